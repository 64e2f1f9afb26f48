"""The report of a conversion: what was done to each layer, and what it costs and loses, as measured."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gconv.cost import cost
from gconv.equivariance import equivariance_error
from gconv.errors import InputError
from gconv.groups import Group

LATENCY_BATCH = 16
_ROUNDING = 1e-8  # far above what float64 loses in a deep network, far below what a broken symmetry costs
_LATENCY_SECONDS = 3.0
_LATENCY_ROUNDS = 15


@dataclass
class LayerReport:
    """What happened to one group-to-group layer.

    Attributes:
        name: its name in the network.
        group: its group.
        shape: ``[O, I, S, k, k]`` of the full filter.
        explained_energy: for each form the share of energy kept at rank 1, 2, ….
        form: the form it was given, None if it was left as it was.
        rank: its rank in that form.
        why: the reason for that choice, in words.
        weight_error: relative Frobenius error of the filter.
        parameters: of the layer, before and after; likewise the MACs of one image (:func:`gconv.cost`).
        macs_published: in the published convention.
        macs_executed: as executed.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    explained_energy: dict[str, list[float]]
    form: str | None
    rank: int | None
    why: str
    weight_error: float
    parameters: tuple[int, int] = (0, 0)
    macs_published: tuple[int, int] = (0, 0)
    macs_executed: tuple[int, int] = (0, 0)


@dataclass
class ConversionReport:
    """What a conversion did. Pairs are (before, after); everything is plain data after :meth:`to_dict`.

    Attributes:
        request: the form and budget that were asked for.
        layers: one row per group-to-group layer.
        parameters: of the whole network; likewise the MACs of one image (:func:`gconv.cost`).
        macs_published: in the published convention.
        macs_executed: as executed.
        output_error: relative error of the class scores on seeded random images, as converted, before batch norm is
            re-estimated.
        equivariance_error: for one seeded random image the largest relative change of the class scores over the group,
            in float64: at rounding level where the network is invariant.
        latency: median milliseconds a batch, and with what it was measured.
        accuracy: error in per cent on the test images at each stage, as far as data was given.
        notes: what was not measured, and why.
    """

    request: dict[str, Any]
    layers: list[LayerReport]
    parameters: tuple[int, int] = (0, 0)
    macs_published: tuple[int, int] = (0, 0)
    macs_executed: tuple[int, int] = (0, 0)
    output_error: float = 0.0
    equivariance_error: tuple[float, float] = (0.0, 0.0)
    latency: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in ``report.json``."""
        return asdict(self)

    def measure(
        self, before: nn.Module, after: nn.Module, input_shape: Sequence[int], group: Group, seed: int
    ) -> None:
        """Fill in costs, output and equivariance errors, and latency, from the two networks in eval mode."""
        costs = [cost(network, input_shape) for network in (before, after)]
        rows = [{row.name: row for row in total.layers} for total in costs]
        for key in ("parameters", "macs_published", "macs_executed"):
            setattr(self, key, tuple(getattr(total, key) for total in costs))
            for layer in self.layers:
                setattr(layer, key, tuple(getattr(row[layer.name], key) for row in rows))
        images = torch.rand(LATENCY_BATCH, *input_shape, generator=torch.Generator().manual_seed(seed))
        images = images.to(next(before.parameters()))  # its device and type
        with torch.no_grad():
            expected, got = before(images).double(), after(images).double()
        norm, difference = expected.norm().item(), (got - expected).norm().item()
        for network, scores in (("network as given", expected), ("converted network", got)):
            if not torch.isfinite(scores).all():
                raise InputError(f"the class scores of the {network} are NaN or infinite on random images in [0, 1)")
        self.output_error = difference / norm if norm else difference
        one = images[:1].double()
        doubled = (copy.deepcopy(network).double() for network in (before, after))
        first, second = (equivariance_error(network, group, one) for network in doubled)
        self.equivariance_error = (first.max, second.max)
        if first.max > _ROUNDING:
            self.notes.append("the network as given is not invariant: a stride that does not fit its map, or its head")
            self.notes.extend(str(layer) for layer in first.inexact)
        self.latency = _latency(before, after, images)


def _latency(before: nn.Module, after: nn.Module, images: Tensor) -> dict[str, Any]:
    """Median forward times, the two networks taking turns so that a drift of the machine's speed hits both."""
    times: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    with torch.inference_mode():
        for turn in range(_LATENCY_ROUNDS + 1):
            for network, kept in zip((before, after), times, strict=True):
                start = time.perf_counter()
                network(images)
                if images.is_cuda:
                    torch.cuda.synchronize()
                if turn:  # the first turn warms up
                    kept.append(1000 * (time.perf_counter() - start))
            if turn and time.perf_counter() - began > _LATENCY_SECONDS:
                break
    machine = torch.cuda.get_device_name(images.device) if images.is_cuda else platform.machine()
    return {
        "milliseconds": [round(statistics.median(kept), 3) for kept in times],
        "batch": len(images),
        "rounds": len(times[0]),
        "machine": machine,
        "threads": torch.get_num_threads(),
    }
