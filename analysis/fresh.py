"""Latency as a process has it that only loads two saved networks and runs them in turn, as their users will.

A process that has just converted one has memory and caches with a history. So where a budget of time is to be kept,
``python -m analysis.fresh`` measures, on the same device with the same threads and the same environment.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gconv import checkpoint
from gconv.models import Model

from .execution import BUDGET_ROUNDS, latency


def fresh_latency(before: nn.Module, after: nn.Module, images: Tensor, note: Callable[[str], None]) -> dict[str, Any]:
    """:func:`analysis.execution.latency` of two networks in eval mode, many rounds of it, measured in a new process.

    Where that cannot be it is measured in this one: a network has no checkpoint, or the process fails.

    Args:
        before: a network.
        after: another one.
        images: a batch ``[N, C, H, W]``; the networks are run on its device and with its type.
        note: is told in one line if it was this process, and why.

    Returns:
        The latency, and as ``process`` which one measured it: ``new`` or ``converting``.
    """
    try:
        return {**_in_new_process(before, after, images), "process": "new"}
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())
        note(f"latency was measured in the converting process, which may take longer than a new one: {why}")
        return {**latency(before, after, images, rounds=BUDGET_ROUNDS), "process": "converting"}


def _in_new_process(before: nn.Module, after: nn.Module, images: Tensor) -> dict[str, Any]:
    """The latency that this module prints when it is run.

    Raises:
        ValueError: a network has no checkpoint, or what was printed is no latency.
        OSError: no files can be written, or the process does not start or fails.
    """
    with tempfile.TemporaryDirectory(prefix="gconv-") as folder:
        for name, network in (("before.pt", before), ("after.pt", after)):
            checkpoint.save(cast(Model, network), Path(folder, name))  # which refuses what is none
        batch = io.BytesIO()
        torch.save(images, batch)
        Path(folder, "images.pt").write_bytes(batch.getbuffer())
        command = [sys.executable, "-P", "-m", "analysis.fresh", "before.pt", "after.pt", "images.pt"]
        done = subprocess.run(  # which kills it on Ctrl-C
            [*command, str(torch.get_num_threads())],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": _import_path()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    if done.returncode:
        said = _last_line(done.stderr) or "no message"
        raise ChildProcessError(f"the new one ended with exit code {done.returncode} ({said})")
    found: dict[str, Any] = json.loads(_last_line(done.stdout))
    return found


def _import_path() -> str:
    """Where this process finds its modules, in the same order, and this package wherever it was found."""
    path = [os.path.abspath(entry) for entry in sys.path]
    root = str(Path(__file__).parents[1])  # no longer there if the path has it as the working directory at that time
    return os.pathsep.join(path if root in path else [root, *path])


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _measure(before: str, after: str, images: str, threads: str) -> dict[str, Any]:
    """The latency of the networks in two files on the images in a third."""
    if int(threads) != torch.get_num_threads():  # as setting a number changes more than the number
        torch.set_num_threads(int(threads))
    batch = torch.load(images, weights_only=True)
    first, second = (checkpoint.load(path).to(batch) for path in (before, after))
    return latency(first, second, batch, rounds=BUDGET_ROUNDS)


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
