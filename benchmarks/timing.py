"""Times of runs that take turns, so that a machine that gets slower or faster does so for all of them alike."""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from analysis.latency.timing import machine
from gconv.training.device import environment

TURN_SECONDS = 0.02
"""The least seconds of a turn: short calls are repeated, as they are within a network."""


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True) -> dict[str, Any]:
    """Median and quartiles in milliseconds, by name.

    The order is drawn for every turn, because the run before leaves the caches warm or cold; it is the same in every
    process. With ``warm_up`` two turns come first and are not counted. From the second it is known how often a short
    run must be called so that its turn lasts 20 milliseconds; its time is then that of a turn divided by its calls.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls = dict.fromkeys(runs, 1)
    order, draw = list(runs), random.Random(0)
    for turn in range(-2 * warm_up, rounds):
        draw.shuffle(order)
        for name in order:
            began = time.perf_counter()
            for _ in range(calls[name]):
                runs[name]()
            took = time.perf_counter() - began
            if turn >= 0:
                times[name].append(1000 * took / calls[name])
            elif turn == -1:
                calls[name] = max(1, math.ceil(TURN_SECONDS / max(took, 1e-9)))
    return {name: summary(kept) for name, kept in times.items()}


def summary(milliseconds: list[float]) -> dict[str, Any]:
    """The median, the quartiles and the number of these times, as they are recorded."""
    low, _, high = (
        statistics.quantiles(milliseconds, n=4, method="inclusive") if len(milliseconds) > 1 else [milliseconds[0]] * 3
    )
    return {
        "median_ms": round(statistics.median(milliseconds), 4),
        "quartiles_ms": [round(low, 4), round(high, 4)],
        "rounds": len(milliseconds),
    }


def described() -> dict[str, Any]:
    """The machine, and the versions of what runs on it."""
    return {
        **environment(torch.device("cpu")),
        "processor": machine(torch.device("cpu")),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }
