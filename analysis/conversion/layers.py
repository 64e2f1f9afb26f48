"""The layers of a network that a conversion may replace, and how one is replaced without breaking what is shared.

A network may use one layer in several places, under one or several names, and two layers may share a parameter. What is
shared is counted once. A layer that is used in several places is replaced in all of them. A layer that shares a
parameter with another layer is left as it is: separable layers of their own would end the sharing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from gconv.nn.capture import Call, watch_calls
from gconv.nn.conv import GConv2d
from gconv.nn.modes import evaluating
from gconv.nn.replace import replace_module
from gconv.nn.separable_conv import SeparableGConv2d

Layer = GConv2d | SeparableGConv2d


class Runs(NamedTuple):
    """How a layer runs in one pass.

    Attributes:
        calls: how often.
        positions: H W of its input map and of its output map, each summed over the calls.
    """

    calls: int
    positions: tuple[int, int]


def group_layers(model: nn.Module) -> dict[str, Layer]:
    """The layers from group to group by name; one that has several names has the first."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (GConv2d, SeparableGConv2d))}


def choose_execution(layer: SeparableGConv2d, execution: str) -> None:
    """Let a layer run so on this machine. If ``auto`` gives the same here, the layer is left to ``auto``.

    Then a file of the network does not carry this machine's choice to others.

    Raises:
        InputError: the layer has no such execution.
    """
    layer.execution = execution
    chosen = layer.resolved_execution
    layer.execution = "auto"
    if layer.resolved_execution != chosen:
        layer.execution = execution


def sharing(model: nn.Module) -> dict[str, str]:
    """For each group-to-group layer that shares a parameter with another module, how: a line for the report."""
    owners: dict[nn.Parameter, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[parameter].append(f"{name}.{key}" if name else key)
    found = {}
    for name, layer in group_layers(model).items():
        for parameter in layer.parameters():
            own, *others = sorted(owners[parameter], key=lambda full: not full.startswith(f"{name}."))
            if others:
                found[name] = f"{own} and {', '.join(others)} are one parameter, which stays shared"
                break
    return found


def runs_of(model: nn.Module, layers: dict[str, Layer], input_shape: Sequence[int]) -> dict[str, Runs]:
    """How these layers run for one image, in the order of their first calls; those that do not run are left out.

    Args:
        model: the network.
        layers: some of its layers, by name.
        input_shape: of one image, ``(C, H, W)``.
    """
    names = {layer: name for name, layer in layers.items()}
    found: dict[str, Runs] = {}

    def count(call: Call) -> None:
        assert call.input is not None
        into, out = (maps.shape[-2:].numel() for maps in (call.input, call.output))
        calls, (before, after) = found.get(names[call.layer], Runs(0, (0, 0)))  # type: ignore[index]
        found[names[call.layer]] = Runs(calls + 1, (before + into, after + out))  # type: ignore[index]

    like = next(model.parameters())
    with watch_calls(layers.values(), after=count), evaluating(model), torch.no_grad():
        model(torch.zeros(1, *input_shape).to(like))
    return found


def replace_layer(model: nn.Module, name: str, new: Layer) -> None:
    """Put ``new`` in the place of the layer called ``name``, under all names that it has, and as frozen as it was."""
    old = model.get_submodule(name)
    assert isinstance(old, (GConv2d, SeparableGConv2d))
    keep_frozen(old, new)
    replace_module(model, old, new)


def keep_frozen(old: Layer, new: Layer) -> None:
    """Make the bias of ``new`` trainable if that of ``old`` is, and the rest if the filter of ``old`` is."""
    trainable = any(parameter.requires_grad for key, parameter in old.named_parameters() if key != "bias")
    for key, parameter in new.named_parameters():
        parameter.requires_grad_(old.bias.requires_grad if key == "bias" and old.bias is not None else trainable)
