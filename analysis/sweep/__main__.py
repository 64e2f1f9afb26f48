"""``python -m analysis.sweep``: error against parameters, multiply-accumulates and latency, over several budgets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gconv.system.cli import Parser, loading, main_args, number, run

from .units import BUDGETS, FILES, UNITS, checked_budgets

if TYPE_CHECKING:
    from .files import Row

PROG = "python -m analysis.sweep"


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Convert a network to several budgets. Show its error against parameters, multiply-accumulates and latency,\n"
        "and which of the converted networks are on the Pareto front. With --data every layer is fitted to the output\n"
        "that it had, and batch norm is re-estimated. Writes sweep.json, sweep.csv and sweep.png. If the sweep is\n"
        "interrupted, the same command continues it.",
        "  python -m analysis.sweep checkpoints/p4cnn-rotdigits.pt --data rotdigits\n"
        "  python -m analysis.sweep net.pt --data rotmnist-regen --params 0.2,0.3,9k --out front\n"
        "  python -m analysis.sweep net.pt --data rotmnist-regen --macs 0.3,0.5 --form gc_in --json > front.json\n"
        "  python -m analysis.sweep net.pt --data rotmnist-regen --latency 0.8,3.5ms --out fast --force",
    )
    p.add_argument("checkpoint", metavar="CKPT", help="a network saved by gconv.save, gconv.train or decompose")
    p.add_argument("--data", metavar="NAME", help="rotdigits, rotmnist-regen or rotmnist")
    budget = p.add_mutually_exclusive_group()
    default = ",".join(map(str, BUDGETS))
    budget.add_argument(
        "--params", metavar="P,…", help=f"parameters: fractions up to 1, or numbers (9k); default {default}"
    )
    budget.add_argument(
        "--macs",
        metavar="M,…",
        help="multiply-accumulates of an image as executed: fractions up to 1, or numbers (3.5M)",
    )
    budget.add_argument("--latency", metavar="L,…", help="time of a batch here: fractions up to 1, or times (3.5ms)")
    p.add_argument(
        "--form",
        default="auto",
        metavar="FORM",
        help="g, gc, gc_in, g_turned or gc_turned for all layers, or auto (default): the best form for each layer",
    )
    p.add_argument("--minimise", default="auto", metavar="M", help="outputs, weights, or auto: outputs with --data")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the choice of images, default 0")
    p.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    p.add_argument("--out", metavar="DIR", help="where the results go (default: CKPT's name with -sweep)")
    p.add_argument("--force", action="store_true", help="start over and replace the results that are in --out")
    p.add_argument("--json", action="store_true", help="print sweep.json on stdout, everything else on stderr")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    # What the user typed is checked before anything slow is imported or read.
    unit = next((unit for unit in UNITS if getattr(args, unit) is not None), "params")
    given = getattr(args, unit)
    budgets: Sequence[float | str] = BUDGETS if given is None else given.split(",")
    checked_budgets(unit, budgets)

    with loading():
        import matplotlib

        matplotlib.use("agg")

        from .table import print_sweep

    out = Path(args.out or f"{Path(args.checkpoint).stem}-sweep")
    rows = _rows(args, budgets, unit, out, lambda text: print(text, file=sys.stderr))
    print_sweep(rows, unit, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        sys.stdout.write(Path(out, "sweep.json").read_text(encoding="utf-8"))
    else:
        print(f"written: {', '.join(str(out / name) for name in FILES)}")


def _rows(
    args: argparse.Namespace, budgets: Sequence[float | str], unit: str, out: Path, say: Callable[[str], None]
) -> list[Row]:
    """The sweep that the command line asks for. Interrupted, it says how it is continued."""
    with loading():
        from analysis.conversion.splits import splits_for
        from gconv.models import checkpoint
        from gconv.training.device import pick_device

        from . import rows as sweeping

    device = pick_device(args.device)
    source = checkpoint.read(args.checkpoint)
    dataset, splits = splits_for(args.data, source)
    about: dict[str, Any] = {"checkpoint": str(args.checkpoint), "dataset": None}
    if dataset is not None:
        about["dataset"] = {key: getattr(dataset, key) for key in ("name", "description", "sha256")}
    try:
        return sweeping.sweep(
            source.model.to(device),
            budgets,
            unit,
            args.form,
            minimise=args.minimise,
            data=splits.train,
            validation=splits.validation,
            test=splits.test,
            seed=args.seed,
            input_shape=None if dataset is None else dataset.train.images.shape[1:],
            out=out,
            force=args.force,
            about=about,
            say=say,
        )
    except KeyboardInterrupt:
        if Path(out, "sweep.json").exists():
            again = "the same command without --force" if args.force else "the same command"
            say(f"\nto continue: {again} (what was done is in {out / 'sweep.json'})")
        raise


if __name__ == "__main__":
    sys.exit(main())
