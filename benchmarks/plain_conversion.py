"""What a plain SVD costs in accuracy: a trained P4CNN, truncated, before and after batch norm is re-estimated.

From the root of the repository: ``python -m benchmarks.plain_conversion run`` converts the checkpoint below to each of
``RUNS`` that has no report yet, and keeps the report. ``python -m benchmarks.plain_conversion table`` prints the table
that the documentation shows. A run needs the data set rotmnist-regen and takes a few minutes.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from analysis.decompose import main as decompose
from gconv.system.cli import Parser

PROG = "python -m benchmarks.plain_conversion"
CHECKPOINT = "checkpoints/p4cnn-rotmnist-regen.pt"
RECORDS = Path(__file__).parent / "records" / "plain-conversion"
RUNS = (("g", 3), ("g", 1), ("gc", 1))


def record(form: str, rank: int) -> None:
    """Convert once and keep the report."""
    with tempfile.TemporaryDirectory() as out:
        options = ["--form", form, "--rank", str(rank), "--minimise", "weights", "--data", "rotmnist-regen"]
        if decompose([CHECKPOINT, *options, "--out", out, "--force"]):
            sys.exit(1)
        RECORDS.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(out, "report.json"), RECORDS / f"{form}-{rank}.json")


def table() -> str:
    """The reports as a Markdown table, in the order of ``RUNS``."""
    lines = ["| form, rank | parameters | MACs, published | test error: before | converted | batch norm re-estimated |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for form, rank in RUNS:
        path = RECORDS / f"{form}-{rank}.json"
        if path.exists():
            report = json.loads(path.read_text(encoding="utf-8"))
            errors = [f"{report['accuracy'][stage]:.2f} %" for stage in ("before", "converted", "batch_norm")]
            sizes = [f"{before:,} → {after:,}" for before, after in (report["parameters"], report["macs_published"])]
            lines.append(f"| {form}, {rank} | {' | '.join(sizes + errors)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    p = Parser(
        PROG, "Do the conversions that have no report yet, or print the table of those that have.", f"  {PROG} table"
    )
    p.add_argument("action", choices=["run", "table"])
    if p.parse_args(argv).action == "run":
        for form, rank in RUNS:
            if not (RECORDS / f"{form}-{rank}.json").exists():
                record(form, rank)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
