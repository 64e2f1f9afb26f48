"""``python -m gconv.experiments``: do the training runs of an experiment, or print its table.

Experiments that need the same run share its record (:mod:`gconv.experiments.runs`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gconv.system import cli
from gconv.system.cli import Parser, main_args, number
from gconv.system.errors import one_of

from .definitions import EXPERIMENTS
from .runs import PROG, load_records
from .workers import execute

FOLDER = Path("checkpoints") / "records"
WORK = Path("out") / "experiments"


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        f"Run an experiment ({', '.join(EXPERIMENTS)}), or print its table.\n\n"
        "An experiment is a list of training runs. Each run leaves one JSON record, and a run that has a record is\n"
        "not done again. The command can be stopped with Ctrl-C at any time: given again, it continues. On a CPU\n"
        "there are as many runs at once as cores, with one thread each.",
        "  python -m gconv.experiments rotmnist --data rotmnist-regen --seeds 5\n"
        "  python -m gconv.experiments rotmnist --models p4cnn,gc-p4cnn --seeds 3 --jobs 1\n"
        "  python -m gconv.experiments rotmnist table > table.md\n"
        "  python -m gconv.experiments data-efficiency table --csv",
    )
    p.add_argument("experiment", metavar="EXPERIMENT", help="one of " + ", ".join(EXPERIMENTS))
    p.add_argument("action", nargs="?", default="run", metavar="run | table", help="default run")
    p.add_argument("--data", default="rotmnist-regen", help="name of the data set, default rotmnist-regen")
    p.add_argument("--seeds", type=number(int, 1, 10**6), default=3, help="how many seeds, from 0 on, default 3")
    p.add_argument("--models", metavar="A,B,…", help="only these models of the experiment")
    p.add_argument("--jobs", type=number(int, 1, 10**4), help="runs at once, default one per core (on a GPU 1)")
    p.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    p.add_argument("--records", metavar="DIR", default=str(FOLDER), help=f"folder of the records, default {FOLDER}")
    p.add_argument("--work", metavar="DIR", default=str(WORK), help=f"folder of the networks, default {WORK}")
    p.add_argument("--csv", action="store_true", help="print the table as CSV instead of Markdown")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return cli.run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    if args.experiment not in EXPERIMENTS:
        raise one_of("experiment", args.experiment, EXPERIMENTS)
    if args.action not in ("run", "table"):
        raise one_of("action", args.action, ("run", "table"))
    if args.action == "table":
        from .tables import as_csv, as_markdown, table

        rows = table(args.experiment, load_records(Path(args.records), args.data))
        print(as_csv(rows) if args.csv else as_markdown(rows))
        return
    runs = EXPERIMENTS[args.experiment](args.data, args.seeds)
    if args.models is not None:
        wanted, known = args.models.lower().split(","), {run.model for run in runs}
        for model in set(wanted) - known:
            raise one_of(f"model of {args.experiment}", model, sorted(known))
        runs = [run for run in runs if run.model in wanted]
    execute(runs, records=Path(args.records), work=Path(args.work), device=args.device, jobs=args.jobs)


if __name__ == "__main__":
    sys.exit(main())
