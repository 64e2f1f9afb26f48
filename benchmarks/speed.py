"""Speed of layers and networks, beside the dense limit and other libraries: ``python -m benchmarks.speed``.

Each section is measured in one process, in which everything takes turns, and leaves one JSON record. Sections with a
record are not measured again, so the command can be stopped and continued. ``table`` and ``figure`` make the tables and
the figure of the documentation from the records.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gconv.system.cli import Parser
from gconv.system.errors import one_of
from gconv.system.files import atomic_path

from . import speed_conversions, speed_gpu, speed_layers, speed_networks, speed_processes

RESULTS = Path(__file__).parent / "results"

Rows = list[dict[str, Any]]
SECTIONS: dict[str, Callable[[bool], Rows]] = {
    "layers-p4": lambda full: speed_layers.measure("p4", full),
    "layers-p4m": lambda full: speed_layers.measure("p4m", full),
    "p4cnn": speed_networks.p4cnn,
    "cnns": speed_networks.cnns,
    "p4m-resnet44-inference": speed_networks.resnet_inference,
    "p4m-resnet44-training": speed_networks.resnet_training,
    "resnets": speed_networks.resnets,
    "memory": speed_networks.memory,
    "start-up": speed_processes.measure,
    "conversions": speed_conversions.measure,
    "gpu": speed_gpu.measure,
}


def parser() -> Parser:
    """The command line's options."""
    p = Parser("python -m benchmarks.speed", __doc__ or "", "  python -m benchmarks.speed --only p4cnn,layers-p4")
    p.add_argument(
        "do", nargs="?", default="run", choices=["run", "table", "figure"], help="run (default), table, figure"
    )
    p.add_argument("--only", metavar="SECTION,…", help=f"only these sections, of {', '.join(SECTIONS)}; default all")
    p.add_argument(
        "--full",
        action="store_true",
        help="for run, more widths, networks and turns, half an hour; for table, times of every network",
    )
    p.add_argument(
        "--out", metavar="DIR", default=RESULTS, type=Path, help="the folder of the records; default benchmarks/results"
    )
    p.add_argument("--force", action="store_true", help="measure sections that have a record again")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the sections without a record, print the tables, or draw the figure; returns the exit code."""
    args = parser().parse_args(argv)
    if args.do != "run":
        from . import speed_figure, speed_report  # here, so that a process that measures does not load matplotlib

        print(speed_report.table(args.out, every=args.full) if args.do == "table" else speed_figure.draw(args.out))
        return 0
    names = list(SECTIONS) if args.only is None else args.only.split(",")
    for name in names:
        if name not in SECTIONS:
            raise SystemExit(str(one_of("section", name, SECTIONS)))
    from gconv.system.memory import reuse_freed_memory

    from .timing import described

    reuse_freed_memory()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = args.out / f"{name}.json"
        if path.exists() and not args.force:
            continue
        rows = SECTIONS[name](args.full)
        if not rows:
            continue  # this machine lacks what the section measures, such as a GPU
        record = {"section": name, "full": args.full, "machine": described(), "rows": rows}
        with atomic_path(path) as temporary:
            Path(temporary).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        print(f"written: {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
