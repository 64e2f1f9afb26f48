"""``python -m gconv.export``: write a network as one file that runs without this package.

From Python, :func:`gconv.export` does the same (:mod:`gconv.deploy.exporting`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gconv.deploy.export_formats import export_format
from gconv.system.cli import Parser, loading, main_args, run
from gconv.system.errors import InputError

PROG = "python -m gconv.export"


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Write the network in CKPT as one file that runs without this package, for any batch size. Batch norm is\n"
        "folded into the convolutions. The file is written only if its class scores are those of the network.\n\n"
        "  torch   ordinary PyTorch layers; torch.load(FILE, weights_only=False)\n"
        "  pt2     a program of torch.export; torch.export.load(FILE).module()\n"
        "  onnx    for onnxruntime and others; needs pip install 'gconv-separable[export]'",
        "  python -m gconv.export checkpoints/p4cnn-rotdigits.pt\n"
        "  python -m gconv.export checkpoints/p4cnn-rotdigits.pt --format onnx --out digits.onnx\n"
        "  python -m gconv.export small/converted.pt --format pt2 --json",
    )
    p.add_argument("checkpoint", metavar="CKPT", help="a network saved by gconv.save, gconv.train or decompose")
    p.add_argument("--format", default="torch", help="torch (default), pt2 or onnx")
    p.add_argument("--out", metavar="FILE", help="default: the name of CKPT, -exported, and .pt, .pt2 or .onnx")
    p.add_argument("--force", action="store_true", help="replace --out if it exists")
    p.add_argument("--json", action="store_true", help="print what was written as JSON on stdout")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    # What the user typed is checked before anything slow is imported or read.
    format = export_format(args.format)
    from gconv.system.files import check_output

    out = check_output(args.out or f"{Path(args.checkpoint).stem}-exported{format.suffix}", force=args.force)

    with loading():
        from gconv.deploy.exporting import export
        from gconv.models.checkpoint import load

    net = load(args.checkpoint)
    if out.exists() and out.samefile(args.checkpoint):
        raise InputError(f"{out} is the checkpoint itself. Give another --out.")
    difference = export(net, out, format.name)
    size = out.stat().st_size
    if args.json:
        document = {"file": str(out), "format": format.name, "bytes": size, "max_difference": difference}
        json.dump(document, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        print(f"written: {out} ({size:,} bytes); its class scores differ by {difference:.1e} of the largest at most")


if __name__ == "__main__":
    sys.exit(main())
