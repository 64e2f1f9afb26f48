"""Layers of every kind, beside the dense limit: the ordinary convolution of the expanded width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gconv
from gconv.functional.expansion import channels_last, from_group_major

from .timing import interleaved

# Width and side of the maps. Those of MORE are measured with --full only.
CASES = {"p4": [(10, 8), (10, 32), (64, 16)], "p4m": [(28, 8), (28, 32), (64, 16), (128, 8)]}
MORE = {"p4": [(10, 16), (30, 16), (64, 8), (64, 32), (128, 16)], "p4m": [(10, 16), (64, 8), (64, 32), (128, 16)]}
VALUES, IMAGES = 1 << 21, 64
"""The most values that the maps of a batch have, and the most images."""


def layer(kind: str, group: str, width: int) -> nn.Module:
    """A 3x3 layer of that width: lifting, full, or a separable form of rank 1."""
    if kind == "lifting":
        return gconv.LiftingConv2d(3, width, 3, padding=1, group=group)
    if kind == "full":
        return gconv.GConv2d(width, width, 3, padding=1, group=group)
    return gconv.SeparableGConv2d(width, width, 3, padding=1, group=group, form=kind)


def measure(group: str, full: bool) -> list[dict[str, Any]]:
    """Rows of each kind at each size: forward in eval mode, and forward with backward.

    MACs are for one position of the output.
    """
    torch.manual_seed(0)
    rows = []
    order = gconv.group(group).order
    for width, side in CASES[group] + (MORE[group] if full else []):
        batch = max(1, min(IMAGES, VALUES // (width * order * side * side)))
        maps = channels_last(torch.randn(batch, width * order, side, side))
        images = channels_last(torch.randn(batch, 3, side, side))
        grouped = from_group_major(maps, order)  # in the memory format that the layer before returns
        kinds = ("lifting", "full", *gconv.FORMS)
        networks = {kind: layer(kind, group, width) for kind in kinds}
        macs: dict[str, int] = {kind: sum(networks[kind].macs()) for kind in kinds}  # type: ignore[operator]
        plain = {"dense": maps.contiguous(), "dense, channels-last": maps}
        for name, given in plain.items():
            format = torch.channels_last if given is maps else torch.contiguous_format
            networks[name] = nn.Conv2d(width * order, width * order, 3, padding=1)
            networks[name].to(memory_format=format)  # type: ignore[call-overload]  # which Module.to does accept
            macs[name] = (width * order) ** 2 * 9
        inputs = {name: plain.get(name, images if name == "lifting" else grouped) for name in networks}
        turns = (31 if full else 15) * (3 if width * order < 64 else 1)  # times of narrow layers vary most
        for direction in ("forward", "forward and backward"):
            runs = {name: _run(network, inputs[name], direction) for name, network in networks.items()}
            with torch.inference_mode(direction == "forward"):
                found = interleaved(runs, turns)
            rows += [
                {"subject": f"{group}, {width} channels, {side}x{side}", "variant": name, "direction": direction}
                | {"group": group, "width": width, "side": side, "batch": batch, "macs": macs[name], **times}
                for name, times in found.items()
            ]
    return rows


def _run(network: nn.Module, x: Tensor, direction: str) -> Callable[[], object]:
    """A function that does one pass."""
    if direction == "forward":
        network.eval()
        return lambda: network(x)
    network.train()
    # Within a network all layers but the first compute the gradient of their input.
    x = x.detach().clone().requires_grad_(x.shape[1] != 3)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        x.grad = None
        y = network(x)
        y.backward(torch.ones_like(y))

    return step
