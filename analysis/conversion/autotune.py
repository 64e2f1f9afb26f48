"""Choices by measured time: what each option of a layer takes, and which execution is the faster one here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from analysis.allocation.allocators import Option
from analysis.allocation.sensitivity import Options
from analysis.latency.timing import faster_execution, layer_inputs, layer_times
from gconv.functional.forms import check_execution
from gconv.nn.conv import GConv2d
from gconv.nn.separable_conv import SeparableGConv2d

from .report import LayerReport


def timed_options(
    layers: dict[str, GConv2d | SeparableGConv2d], options: Options, inputs: dict[str, Tensor], execution: str
) -> Options:
    """The options with the milliseconds of the faster execution; layers of one shape on maps of one size share them."""
    known: dict[Any, Option] = {}
    timed: Options = {}
    for name, own in options.items():
        layer, x = layers[name], inputs[name]
        shape = _kind(layer, x)
        kind = layer.rank if isinstance(layer, SeparableGConv2d) else None
        rows = []
        for option in own:
            key = (shape, option.form, option.rank, kind if option.rank is None else None)
            if key not in known:
                known[key] = _timed(layer, option, x, execution)
            found = known[key]
            rows.append(replace(option, milliseconds=found.milliseconds, execution=found.execution, macs=found.macs))
        first = rows[0].milliseconds
        assert first is not None
        timed[name] = (rows[0], *(row for row in rows[1:] if row.milliseconds is not None and row.milliseconds < first))
    return timed


def _kind(layer: GConv2d | SeparableGConv2d, x: Tensor) -> tuple[Any, ...]:
    """What the time of a layer depends on, beside form and rank."""
    return layer.group.name, layer.filter_shape, layer.sampling, tuple(x.shape)


def _timed(layer: GConv2d | SeparableGConv2d, option: Option, x: Tensor, execution: str) -> Option:
    if option.rank is None:
        return replace(option, milliseconds=layer_times(layer, x)[0])
    assert option.form is not None
    with torch.random.fork_rng(devices=[]):
        separable = SeparableGConv2d.like(layer, option.form, option.rank)
    chosen, times = faster_execution(separable, x)
    chosen = chosen if execution == "auto" else check_execution(execution)
    return replace(option, execution=chosen, milliseconds=times[chosen])


def choose_executions(after: nn.Module, rows: Sequence[LayerReport], size: Sequence[int]) -> None:
    """Run every converted layer the faster way, as measured here; once for layers of a kind.

    Args:
        after: the converted network; its layers change in place.
        rows: of the report; the times and the reason are entered.
        size: of an image.
    """
    converted = {row.name: row for row in rows if row.form is not None}
    inputs = layer_inputs(after, list(converted), size)
    known: dict[Any, Any] = {}
    for name, row in converted.items():
        layer, x = after.get_submodule(name), inputs[name]
        assert isinstance(layer, SeparableGConv2d)
        key = (layer.form.name, layer.rank, _kind(layer, x))
        if key not in known:
            known[key] = faster_execution(layer, x)
        layer.execution, times = known[key]
        execution = layer.execution
        row.milliseconds = times["dense"], times[execution]
        row.why += f"; {execution}: " + ", ".join(f"{ms:.2f} ms {way}" for way, ms in times.items())
