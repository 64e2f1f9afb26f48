"""Times of runs that take turns, so that a machine that gets slower or faster does so for all of them."""

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
from gconv.training.loop import environment

_TURN = 0.02
"""Seconds a turn lasts at least: what is over in a fraction of one is called several times, as within a network."""


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True) -> dict[str, Any]:
    """Median and quartiles in milliseconds, by name, without a first turn that loads what is loaded on first use.

    The order is drawn anew in every turn, the same in every process: what ran before leaves the caches warm or cold.
    With a first turn, runs of less than twenty milliseconds are then called so often that a turn lasts as long, and a
    time is that of a turn, shared among its calls.
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
                calls[name] = max(1, math.ceil(_TURN / max(took, 1e-9)))
    return {name: summary(kept) for name, kept in times.items()}


def summary(milliseconds: list[float]) -> dict[str, Any]:
    """What is recorded of these times."""
    low, _, high = (
        statistics.quantiles(milliseconds, n=4, method="inclusive") if len(milliseconds) > 1 else [milliseconds[0]] * 3
    )
    return {
        "median_ms": round(statistics.median(milliseconds), 4),
        "quartiles_ms": [round(low, 4), round(high, 4)],
        "rounds": len(milliseconds),
    }


def described() -> dict[str, Any]:
    """The machine."""
    return {
        **environment(torch.device("cpu")),
        "processor": machine(torch.device("cpu")),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }
