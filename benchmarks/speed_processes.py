"""Start-up: the process of a whole conversion, beside a process that only imports PyTorch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .timing import interleaved

ROOT = Path(__file__).parents[1]
CHECKPOINT = "checkpoints/p4cnn-rotdigits.pt"


def measure(full: bool) -> list[dict[str, Any]]:
    """Rows of the two processes, which take turns."""
    with tempfile.TemporaryDirectory() as folder:
        decompose = ["-m", "analysis.decompose", CHECKPOINT, "--rank", "2", "--out", folder, "--force"]

        def run(*arguments: str) -> None:
            subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT, capture_output=True)

        runs = {"import torch": lambda: run("-c", "import torch"), "decompose": lambda: run(*decompose)}
        found = interleaved(runs, 15 if full else 5)
    return [{"subject": "start-up", "variant": name, "direction": "process", **times} for name, times in found.items()]
