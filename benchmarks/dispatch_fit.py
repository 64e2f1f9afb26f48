"""``python -m benchmarks.dispatch_fit``: when full layers are faster as mixes in the compiled kernel than expanded.

For each instruction set a new process holds the kernels, oneDNN and ATen to it, and times full p4 and p4m layers in
both ways, on one thread, by processor time, in turns. The record keeps for every shape the ratio of the two times.
``gconv/kernels/dispatch.py`` has the constants that :func:`fitted` finds in it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gconv.system.cli import Parser, loading, main_args, run
from gconv.system.files import atomic_path

PROG = "python -m benchmarks.dispatch_fit"
RECORD = Path(__file__).with_suffix(".json")
INSTRUCTIONS = {"avx512": "avx512_core", "avx2": "avx2"}  # and what oneDNN calls them
GROUPS, CHANNELS, SIZES, MAPS = ("p4", "p4m"), (8, 16, 32, 64), (3, 5, 7), (14, 28, 56)
LARGEST = 1 << 31  # multiply-accumulates of the expanded filter; larger layers take long, and say no more
ROUNDS = 9


def shapes() -> Iterator[tuple[str, int, int, int]]:
    """Group, channels, size of the kernel and size of the map."""
    for group in GROUPS:
        order = {"p4": 4, "p4m": 8}[group]
        for channels in CHANNELS:
            for k in SIZES:
                for size in MAPS:
                    if (channels * order * k * size) ** 2 <= LARGEST:
                        yield group, channels, k, size


def measure() -> list[dict[str, Any]]:
    """One row for each shape, with the instruction set that this process is held to."""
    with loading():
        import torch
    torch.set_num_threads(1)
    rows = []
    for group, channels, k, size in shapes():
        mixes, expanded = (statistics.median(times) for times in _in_turns(_ways(group, channels, k, size)))
        rows.append({"group": group, "channels": channels, "k": k, "map": size, "time": round(mixes / expanded, 4)})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _ways(group: str, channels: int, k: int, size: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A full layer as mixes in the kernel, and as the convolution with the expanded filter; both are prepared."""
    import torch

    from gconv import GConv2d
    from gconv.functional.expansion import channels_last, expand, from_group_major, to_group_major
    from gconv.kernels.separable_conv import full_kernel, full_parameters

    layer = GConv2d(channels, channels, k, padding=k // 2, group=group).eval().requires_grad_(False)
    order = layer.group.order
    x = from_group_major(channels_last(torch.randn(1, channels * order, size, size)), order)
    kernel = full_kernel(layer.group, layer.filter_shape, layer.sampling, False)
    assert kernel is not None
    packed = kernel.pack(*full_parameters(layer.weight, layer.tables.pixels, layer.filter_shape), None)
    dense = expand(layer.weight, layer.tables.expansion, group_major=True, channels_last=True)
    planar = to_group_major(x)
    return lambda: kernel.forward(x, packed), lambda: torch.nn.functional.conv2d(planar, dense, padding=k // 2)


def _in_turns(ways: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Seconds of this thread for each way, called in turns."""
    import torch

    times: list[list[float]] = [[] for _ in ways]
    with torch.inference_mode():
        for turn in range(-1, ROUNDS):  # the first turn does not count
            for way, kept in zip(ways, times, strict=True):
                start = time.thread_time()
                way()
                if turn >= 0:
                    kept.append(time.thread_time() - start)
    return times


def fitted(record: dict[str, Any]) -> dict[str, list[float]]:
    """For each instruction set the constants of :func:`gconv.kernels.dispatch.mixes_over_expanded`.

    They are not negative, and give the least sum of squared relative errors of the ratio. Of every layer the map counts
    on which mixes do worst, because layers decide without knowing their maps.
    """
    import numpy as np
    from scipy.optimize import nnls

    from gconv.functional.form_base import FilterShape
    from gconv.groups.point_groups import group
    from gconv.kernels.dispatch import OVER_PIXELS, shares_of_mixes, variants_with

    found = {}
    for instructions, rows in record["rows"].items():
        worst: dict[tuple[str, int, int], float] = {}
        for row in rows:
            layer = row["group"], row["channels"], row["k"]
            worst[layer] = max(worst.get(layer, 0), row["time"])
        lanes = variants_with(instructions)[OVER_PIXELS + 1]
        shares = [shares_of_mixes(group(g), FilterShape(c, c, group(g).order, k), lanes) for g, c, k in worst]
        times = np.array(list(worst.values()))
        constants, _ = nnls(np.array(shares) / times[:, None], np.ones(len(times)))
        found[instructions] = [round(float(constant), 2) for constant in constants]
    return found


def parser() -> Parser:
    """The command line's options."""
    p = Parser(PROG, "Time full layers as mixes and expanded, and fit the constants of the choice.", f"  {PROG} run")
    p.add_argument("action", choices=("run", "measure", "fit"), help="measure is what run starts for each kernel")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    action = parser().parse_args(main_args(argv)).action
    return run(PROG, {"run": _run, "measure": lambda: print(json.dumps(measure())), "fit": _print_fit}[action])


def _run() -> None:
    with loading():
        from benchmarks.timing import described
    rows = {}
    for instructions, name in INSTRUCTIONS.items():
        held = {"GCONV_KERNEL": instructions, "ONEDNN_MAX_CPU_ISA": name, "GCONV_REQUIRE_KERNEL": "1"}
        env = {**os.environ, **held, "ATEN_CPU_CAPABILITY": instructions, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.dispatch_fit", "measure"]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        rows[instructions] = json.loads(done.stdout)
    with atomic_path(RECORD) as path:
        path.write_text(json.dumps({"environment": described(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    _print_fit()


def _print_fit() -> None:
    print(json.dumps(fitted(json.loads(RECORD.read_text(encoding="utf-8"))), indent=1))


if __name__ == "__main__":
    sys.exit(main())
