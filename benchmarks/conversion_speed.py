"""The time and the memory that a conversion takes, and whether other processes measure the latency of its report.

From the root of the repository, on an otherwise idle machine:

* ``python -m benchmarks.conversion_speed resnet`` converts a p4m-ResNet44 (2.6 million parameters, untrained) by
  energy, without data and with 512 random images, each in its own process;
* ``python -m benchmarks.conversion_speed latency`` converts two P4CNNs of ``checkpoints/`` under a latency budget.
  Other processes then load the saved network and measure it beside the original, while the machine runs at the speed
  that it had for the report;
* ``python -m benchmarks.conversion_speed table`` prints the records that these two write.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import gconv
from analysis import convert
from analysis.conversion.report import random_images
from analysis.latency.timing import BUDGET_ROUNDS, latency
from gconv.experiments import tables
from gconv.system.cli import Parser
from gconv.system.files import atomic_path
from gconv.training.datasets import Split
from gconv.training.device import environment

from .conversion_runs import CHECKPOINTS, WIDE

PROG = "python -m benchmarks.conversion_speed"
RECORDS = Path(__file__).parent / "records" / "conversion-speed"
ENERGY, IMAGES, SHARE, PROCESSES = 0.8, 512, 0.8, 5
NEAR, PATIENCE = 0.02, 30.0
NARROW = "p4cnn-rotmnist-regen"


def resnet(images: int) -> dict[str, Any]:
    """Seconds and peak memory in bytes of one conversion in this process, fitted on this number of images."""
    torch.manual_seed(0)
    model = gconv.create_model("p4m-resnet44").eval()
    data = Split(torch.randn(images, 3, 32, 32), torch.arange(images) % 10) if images else None
    began = time.perf_counter()
    _, report = convert(model, energy=ENERGY, data=data)
    return {
        "images": images,
        "energy": ENERGY,
        "seconds": time.perf_counter() - began,
        "peak_memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "parameters": report.parameters,
        "environment": environment(torch.device("cpu")),
    }


def converted(name: str, folder: str) -> dict[str, Any]:
    """Convert a shipped network under the latency budget, save it, and let other processes measure it."""
    original, file = CHECKPOINTS / f"{name}.pt", Path(folder) / f"{name}.pt"
    model = gconv.load(original).eval()

    def saved(network: gconv.Model) -> gconv.Model:
        gconv.save(network, file)
        return gconv.load(file).eval()

    _, report = convert(model, latency=SHARE, saved=saved)
    known = str(report.latency["milliseconds"][0])
    measured = [_in_process("measure", str(original), str(file), known) for _ in range(PROCESSES)]
    slower = [row.name for row in report.layers if row.milliseconds and row.milliseconds[1] > row.milliseconds[0]]
    return {
        "network": name,
        "share": SHARE,
        "reported": report.latency["milliseconds"],
        "original_while_converting": report.latency["original"],
        "measured": [row["milliseconds"] for row in measured],
        "layers_slower": slower,
        "converted_layers": sum(row.form is not None for row in report.layers),
        "machine": report.latency["machine"],
        "environment": environment(torch.device("cpu")),
    }


def measure(original: str, file: str, known: str) -> dict[str, Any]:
    """The latency of both networks in this process, when the original takes the milliseconds ``known`` or nearly so.

    The machine may run at another speed for many seconds. After half a minute the measurement is taken in which the
    original's time was nearest to ``known``.
    """
    before, after = gconv.load(original).eval(), gconv.load(file).eval()
    images = random_images(before, before.input_shape, 0)
    visits: list[dict[str, Any]] = []

    def distance(visit: dict[str, Any]) -> float:
        return abs(visit["milliseconds"][0] / float(known) - 1)

    began = time.perf_counter()
    while time.perf_counter() - began < PATIENCE:
        visits.append(latency(before, after, images, rounds=BUDGET_ROUNDS))
        if distance(visits[-1]) < NEAR:
            break
        time.sleep(1)
    return min(visits, key=distance)


def _in_process(*arguments: str) -> dict[str, Any]:
    """The document that this module prints for these arguments in a new process."""
    command = [sys.executable, "-m", "benchmarks.conversion_speed", *arguments]
    document: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return document


def table() -> str:
    """Both records as Markdown: the conversion of the ResNet, and reported beside measured latency."""
    times = [
        {
            "images": str(row["images"]),
            "seconds": f"{row['seconds']:.0f}",
            "peak memory": f"{row['peak_memory'] / 2**30:.1f} GiB",
            "threads": str(row["environment"]["threads"]),
        }
        for row in _read("resnet")
    ]
    latencies = [
        {
            "network": row["network"],
            "reported, before → after": " → ".join(f"{value:.2f}" for value in row["reported"]) + " ms",
            "of the original": f"{_share(row['reported']):.3f}",
            "measured by other processes": ", ".join(f"{after:.2f}" for _, after in row["measured"]) + " ms",
            "of the original there": ", ".join(f"{_share(pair):.3f}" for pair in row["measured"]),
            "median against report, time": f"{_deviation(row, lambda pair: pair[1]):+.1%}",
            "share": f"{_deviation(row, _share):+.1%}",
            "layers slower than dense": ", ".join(row["layers_slower"]) or "none",
        }
        for row in _read("latency")
    ]
    return "\n\n".join(tables.as_markdown(rows) for rows in (times, latencies) if rows)


def _share(pair: Sequence[float]) -> float:
    """The time of the converted network relative to that of the original, with which it took turns."""
    before, after = pair
    return after / before


def _deviation(row: dict[str, Any], of: Callable[[Sequence[float]], float]) -> float:
    """The relative deviation from the report of the median over the other processes."""
    return statistics.median(of(pair) for pair in row["measured"]) / of(row["reported"]) - 1


def _read(name: str) -> list[dict[str, Any]]:
    path = RECORDS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return rows


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    RECORDS.mkdir(parents=True, exist_ok=True)
    with atomic_path(RECORDS / f"{name}.json") as path:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    p = Parser(PROG, "Measure conversions, or print the table of the records.", f"  {PROG} resnet\n  {PROG} table")
    p.add_argument("action", choices=["resnet", "latency", "table", *IN_PROCESS], metavar="resnet | latency | table")
    p.add_argument("rest", nargs="*", help=argparse.SUPPRESS)  # of the processes that this one starts
    args = p.parse_args(argv)
    if args.action in IN_PROCESS:
        print(json.dumps(IN_PROCESS[args.action](*args.rest)))
    elif args.action == "resnet":
        _write("resnet", [_in_process("convert", str(images)) for images in (0, IMAGES)])
    elif args.action == "latency":
        with tempfile.TemporaryDirectory() as folder:
            _write("latency", [converted(name, folder) for name in (NARROW, WIDE)])
    else:
        print(table())
    return 0


IN_PROCESS: dict[str, Callable[..., dict[str, Any]]] = {
    "convert": lambda images: resnet(int(images)),
    "measure": measure,
}
"""By the name of an action, what it does in a process that this module starts."""

if __name__ == "__main__":
    sys.exit(main())
