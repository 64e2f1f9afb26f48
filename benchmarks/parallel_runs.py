"""Training runs at the same time, one thread each, compared with the same runs one after the other on all cores.

From the root of the repository: ``python -m benchmarks.parallel_runs [--json OUT]``. A run trains P4CNN on rotdigits as
:mod:`gconv.experiments` does; there is one for each core, each with its own seed. The two ways take turns. Compared are
the seconds of training: the longest of the runs at the same time, and the sum of those one after the other.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from gconv.experiments.runs import Run, load_records
from gconv.experiments.workers import execute
from gconv.system.cli import Parser, number
from gconv.system.files import atomic_path, check_output
from gconv.training.device import environment


def seconds(runs: Sequence[Run], jobs: int) -> list[float]:
    """The seconds that each run spends in training when ``jobs`` of them run at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        execute(runs, records=Path(folder, "records"), work=Path(folder, "work"), device="cpu", jobs=jobs)
        return [record["seconds"]["training"] for record in load_records(Path(folder, "records"), runs[0].data)]


def main(argv: Sequence[str] | None = None) -> None:
    p = Parser(
        "python -m benchmarks.parallel_runs",
        "Compare training runs at the same time, one thread each, with the same runs one after the other on all cores.",
        "  python -m benchmarks.parallel_runs --epochs 10",
    )
    p.add_argument("--epochs", type=number(int, 1), default=5, help="of every run, default 5")
    p.add_argument(
        "--rounds", type=number(int, 1), default=3, help="how often each of the two ways is measured, default 3"
    )
    p.add_argument("--json", metavar="OUT", help="also write the record here")
    args = p.parse_args(argv)
    if args.json:
        check_output(args.json, force=True)
    cores = torch.get_num_threads()
    runs = [Run("p4cnn", seed, "rotdigits", epochs=args.epochs) for seed in range(cores)]
    at_once, in_turn = [], []
    for _ in range(args.rounds):
        at_once.append(max(seconds(runs, cores)))
        in_turn.append(sum(seconds(runs, 1)))
    ratio = statistics.median(at_once) / statistics.median(in_turn)
    record = {
        "runs": cores,
        "epochs": args.epochs,
        "environment": environment(torch.device("cpu")),
        "seconds": {"at once, one thread each": at_once, "in turn, all threads": in_turn},
        "ratio": ratio,
    }
    print(f"{cores} runs at once take {ratio:.2f} of the time that they take one after the other on all cores")
    if args.json:
        with atomic_path(args.json) as temporary:
            Path(temporary).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
