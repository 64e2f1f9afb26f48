"""``python -m gconv.catalog``: what checkpoints hold, as a Markdown table made from their records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gconv.system.cli import Parser, loading, main_args, run

PROG = "python -m gconv.catalog"
_COLUMNS = ("file", "model", "group", "form", "width", "parameters", "trained on", "seed", "epochs", "test error")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Print a Markdown table of what checkpoints hold: the network, what it was trained on, and its test error.",
        "  python -m gconv.catalog checkpoints/*.pt",
    )
    p.add_argument("checkpoints", metavar="CKPT", nargs="+", help="files saved by gconv.save or gconv.train")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: print(table(args.checkpoints)))


def table(paths: Sequence[str]) -> str:
    """The table, one row per file.

    Raises:
        InputError: a file is not a checkpoint.
    """
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *map(_row, paths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(path: str) -> tuple[str, ...]:
    from pathlib import Path

    with loading():
        from gconv.models.checkpoint import layer_choices, read

    checkpoint = read(path)
    spec, record = checkpoint.model.spec, checkpoint.record
    forms = {f"{c['form']} rank {c['rank']}" if c["form"] else "full" for c in layer_choices(checkpoint.model).values()}
    images = f"{record['train_images']:,} images of {record['dataset']}" if "train_images" in record else "–"
    error = f"{record['test_error']:.2f} % of {record['test_images']:,}" if "test_error" in record else "–"
    return (
        Path(path).name,
        str(spec),
        spec.group,
        ", ".join(sorted(forms)) or spec.separable or "full",
        "/".join(map(str, spec.widths)),
        f"{sum(p.numel() for p in checkpoint.model.parameters()):,}",
        images,
        str(record.get("seed", "–")),
        str(len(record.get("history", [])) or "–"),
        error,
    )


if __name__ == "__main__":
    sys.exit(main())
