"""Choices by measured time: what each option of a layer takes, and which execution is the fastest one here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from analysis.allocation.allocators import Option
from analysis.allocation.options import executed_macs
from analysis.allocation.sensitivity import Options
from analysis.latency.timing import fastest_execution, layer_inputs, layer_times
from gconv.functional.form_base import Execution
from gconv.functional.forms import FORMS, check_execution
from gconv.nn.separable_conv import SeparableGConv2d

from .layers import Layer, Runs, choose_execution
from .report import LayerReport


def timed_options(
    layers: Mapping[str, Layer],
    options: Options,
    inputs: Mapping[str, Tensor],
    runs: Mapping[str, Runs],
    execution: str = "auto",
) -> Options:
    """The options with milliseconds, and with the MACs of the execution that was timed.

    Only options that are faster than the layer as it is stay. Layers of one kind, with inputs of one shape, share
    measurements.

    Args:
        layers: the layers, by name.
        options: of each layer; the first one leaves it as it is.
        inputs: for each layer a batch of what it reads.
        runs: how each layer runs in one pass.
        execution: of all options; ``auto``: for each the fastest one.
    """
    known: dict[Any, tuple[Execution | None, float]] = {}
    timed: Options = {}
    for name, own in options.items():
        layer, x = layers[name], inputs[name]
        kind = _kind(layer, x)
        rows = []
        for option in own:
            key = (kind, option.form, option.rank)
            if key not in known:
                known[key] = _timed(layer, option, x, execution)
            way, milliseconds = known[key]
            rows.append(_with_time(layer, option, way, milliseconds, runs[name]))
        first = rows[0].milliseconds
        assert first is not None
        timed[name] = (rows[0], *(row for row in rows[1:] if row.milliseconds is not None and row.milliseconds < first))
    return timed


def _with_time(layer: Layer, option: Option, way: Execution | None, milliseconds: float, runs: Runs) -> Option:
    """The option as it was timed; a layer that runs several times takes its time as often."""
    option = replace(option, milliseconds=runs.calls * milliseconds)
    if option.rank is None or way is None:  # the layer as it is
        return option
    assert option.form is not None
    macs = executed_macs(layer, FORMS[option.form], option.rank, way, runs.positions)
    return replace(option, execution=way, macs=macs)


def _kind(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    """What the time of a layer, and of any option for it, depends on."""
    own = (layer.form.name, layer.rank, layer.execution) if isinstance(layer, SeparableGConv2d) else None
    return layer.group.name, layer.filter_shape, layer.sampling, tuple(x.shape), own


def _timed(layer: Layer, option: Option, x: Tensor, execution: str) -> tuple[Execution | None, float]:
    """The execution, and its milliseconds; no execution for the layer as it is."""
    if option.rank is None:
        return None, layer_times(layer, x)[0]
    assert option.form is not None
    with torch.random.fork_rng(devices=[]):
        separable = SeparableGConv2d.like(layer, option.form, option.rank)
    fastest, times, _ = fastest_execution(separable, x)
    asked = check_execution(execution)
    chosen = fastest if asked == "auto" else asked
    return chosen, times[chosen]


def choose_executions(before: nn.Module, after: nn.Module, rows: Sequence[LayerReport], size: Sequence[int]) -> None:
    """Let every converted layer run the fastest way, as measured here. Layers of one kind share measurements.

    A layer for which ``auto`` gives the fastest way is left to ``auto``. All others are set to it, and their reasons
    say so.

    Args:
        before: the network as given.
        after: the converted network; its layers change in place.
        rows: of the report. The times and the reason are entered.
        size: the shape of one image.
    """
    converted = {row.name: row for row in rows if row.form is not None}
    inputs = layer_inputs(after, list(converted), size)
    known: dict[Any, tuple[Execution, dict[Execution, float], float]] = {}
    for name, row in converted.items():
        original, layer, x = before.get_submodule(name), after.get_submodule(name), inputs[name]
        assert isinstance(layer, SeparableGConv2d)
        key = (layer.form.name, layer.rank, _kind(original, x))  # type: ignore[arg-type]
        if key not in known:
            known[key] = _fastest(original, layer, x)
        layer.execution = "auto"
        auto = layer.resolved_execution
        chosen, times, as_given = known[key]
        choose_execution(layer, chosen)
        row.milliseconds = as_given, times[chosen]
        row.why += f"; {chosen}: " + ", ".join(f"{ms:.2f} ms {way}" for way, ms in times.items())
        if layer.execution != "auto":
            row.why += f"; set to {chosen} as timed on this machine, where auto is {auto}"


def _fastest(
    original: nn.Module, layer: SeparableGConv2d, x: Tensor
) -> tuple[Execution, dict[Execution, float], float]:
    """The fastest execution, the milliseconds of all, and those of the layer as given, in turns with them."""
    chosen, times, (as_given,) = fastest_execution(layer, x, (original,))
    return chosen, times, as_given
