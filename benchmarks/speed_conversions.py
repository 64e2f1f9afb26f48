"""Converted networks beside their originals: random conversions of the shipped checkpoints with full filters.

No converted network may be slower than its original.
"""

from __future__ import annotations

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

import analysis
import gconv
from analysis.latency.timing import BATCH

from .timing import interleaved

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
COUNT = 20


def draw(count: int, seed: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """Random pairs of a checkpoint and a request to :func:`analysis.convert`, whose budget can always be met."""
    rng = random.Random(seed)
    names = sorted(path.name for path in CHECKPOINTS.glob("*.pt") if path.name.startswith("p4"))
    drawn = []
    for _ in range(count):
        budget = rng.choice(["rank", "energy", "params"])
        value = {"rank": rng.randint(1, 3), "energy": rng.uniform(0.5, 0.95), "params": rng.uniform(0.5, 0.95)}[budget]
        drawn.append((rng.choice(names), {budget: value, "form": rng.choice(["auto", "g", "gc", "gc_in"])}))
    return drawn


def measure(full: bool) -> list[dict[str, Any]]:
    """Rows of original and converted networks in eval mode, at the batch size at which conversion measures layers.

    A copy of the original takes turns with them. The difference between its time and the original's shows how small a
    difference can be measured.
    """
    rows = []
    for number, (name, request) in enumerate(draw(COUNT)):
        before = gconv.load(CHECKPOINTS / name)
        after, _ = analysis.convert(before, **request)
        images = torch.rand(BATCH, *before.input_shape)
        networks = {"original": before.eval(), "converted": after.eval(), "copy": copy.deepcopy(before).eval()}
        with torch.inference_mode():
            found = interleaved(
                {variant: partial(net, images) for variant, net in networks.items()}, 101 if full else 41
            )
        rows += [
            {"subject": f"{number}: {name}", "request": request, "variant": variant, "direction": "inference"}
            | {"batch": BATCH, "macs": gconv.cost(networks[variant], before.input_shape).macs_executed, **times}
            for variant, times in found.items()
        ]
    return rows
