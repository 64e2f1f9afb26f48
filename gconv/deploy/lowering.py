"""Lowering: a network that computes the same with layers of ``torch.nn`` alone."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.functional.expansion import expand
from gconv.functional.form_base import Convolution
from gconv.groups.point_groups import group
from gconv.models.networks import Model
from gconv.nn.base import GroupConvBase
from gconv.nn.conv import FullConvBase
from gconv.nn.pooling import GroupMaxPool, SpatialMaxPool2d, SpatialMeanPool2d
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError

from .tracing import is_overridden, trace


def lower(fused: Model) -> fx.GraphModule:
    """A fused network as ordinary layers; see :func:`gconv.to_plain`.

    Raises:
        InputError: a layer has no ordinary counterpart, or has forward hooks, which would be lost.
    """
    plain = _Plain(group(fused.spec.group).order)
    made: dict[fx.Node, fx.Node] = {}
    with torch.no_grad():
        for node in trace(fused).nodes:
            if node.op == "call_module":
                made[node] = plain.add(node.target, fused.get_submodule(node.target), made[node.args[0]])
            else:
                made[node] = copy = plain.graph.node_copy(node, made.__getitem__)
                # What was noted in tracing would take this package's classes, and annotations, into the files.
                copy.type = None
                copy.meta.clear()
                if node.op == "placeholder":  # all maps keep the format, in which convolutions on a CPU are fastest
                    made[node] = plain.graph.call_method("clone", (copy,), {"memory_format": torch.channels_last})
    return fx.GraphModule(plain.modules, plain.graph).eval()


class _Plain:
    """A graph and its modules in the making.

    Attributes:
        order: S, the length of the group axis.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}

    def add(self, name: str, layer: nn.Module, x: fx.Node) -> fx.Node:
        """Add what the layer of that name does to ``x``.

        Raises:
            InputError: the layer has no ordinary counterpart, or it has forward hooks.
        """
        if layer._forward_hooks or layer._forward_pre_hooks:
            raise InputError(f"{name} has forward hooks, which ordinary layers would not call. Remove them first.")
        if is_overridden(layer):
            raise InputError(f"{name} has a forward of its own, which has no ordinary counterpart")
        match layer:
            case GroupConvBase():
                return self._convolutions(name, layer, x)
            case nn.Conv2d() | nn.Linear():  # a copy, as the other layers are new too
                return self._call(name, deepcopy(layer), x)
            case _BatchNorm():
                return self._call(name, _batch_norm(layer, self.order), x)
            case SpatialMaxPool2d():
                return self._call(name, nn.MaxPool2d(layer.kernel_size, layer.stride, layer.padding), x)
            case SpatialMeanPool2d():
                return self._call(name, nn.AdaptiveAvgPool2d(1), x)
            case GroupMaxPool():
                return self._reduce("amax", self.order, x)
            case nn.Identity():
                return x
        raise InputError(f"{name} is a {type(layer).__name__}, which has no ordinary counterpart")

    def _call(self, name: str, module: nn.Module, x: fx.Node) -> fx.Node:
        self.modules[name] = module
        return self.graph.call_module(name, (x,))

    def _reduce(self, method: str, size: int, x: fx.Node) -> fx.Node:
        """Make one map of every ``size`` consecutive ones."""
        return self.graph.call_method(method, (self.graph.call_method("unflatten", (x, 1, (-1, size))), 2))

    def _convolutions(self, name: str, layer: GroupConvBase, x: fx.Node) -> fx.Node:
        terms = _terms(layer)
        total: fx.Node | None = None
        for number, steps in enumerate(terms):
            y = x
            for place, step in enumerate(steps):
                # Of several terms the first has the bias.
                biased = layer.bias is not None and number == 0 and step is steps[-1]
                bias = layer.bias.repeat_interleave(self.order) if biased and layer.bias is not None else None
                parts = [name, *([str(number)] if len(terms) > 1 else []), *([str(place)] if len(steps) > 1 else [])]
                y = self._call(".".join(parts), _conv2d(step, bias), y)
            total = y if total is None else self.graph.call_method("add", (total, y))
        assert total is not None
        return total


def _terms(layer: GroupConvBase) -> tuple[tuple[Convolution, ...], ...]:
    """What the layer does, as a sum of terms, each some convolutions one after the other."""
    if isinstance(layer, SeparableGConv2d) and layer.resolved_execution != "dense":
        terms = layer.form.convolutions(layer.mix, layer.spatial, layer.tables, layer.sampling)
        if terms is not None:
            return tuple(tuple(_channel_major(step, layer.group.order) for step in term) for term in terms)
    assert isinstance(layer, (FullConvBase, SeparableGConv2d))
    return ((Convolution(expand(layer.weight, layer.tables.expansion), 1, layer.sampling),),)


def _channel_major(step: Convolution, order: int) -> Convolution:
    """The same convolution on maps with channel c and element s as channel ``c S + s``; its own are group-major."""
    filter = step.filter.unflatten(0, (order, -1)).transpose(0, 1).flatten(0, 1)
    if step.groups == 1:
        filter = filter.unflatten(1, (order, -1)).transpose(1, 2).flatten(1, 2)
    return step._replace(filter=filter)


def _conv2d(step: Convolution, bias: Tensor | None) -> nn.Conv2d:
    filter, groups, sampling = step
    o, i, k, _ = filter.shape
    # Made without memory and without random numbers; the parameters are clones, as a filter may be a view of more, in
    # the memory format of the maps.
    conv = nn.Conv2d(i * groups, o, k, *sampling, groups=groups, bias=bias is not None, device="meta")
    conv.weight = nn.Parameter(filter.clone(memory_format=torch.channels_last))
    if bias is not None:
        conv.bias = nn.Parameter(bias)
    return conv


def _batch_norm(norm: _BatchNorm, order: int) -> nn.BatchNorm2d:
    """The same batch norm on maps in the planar layout."""
    plain = nn.BatchNorm2d(norm.num_features * order, norm.eps, norm.momentum, norm.affine, device="meta")
    for name, tensor in norm.state_dict().items():
        value = tensor.repeat_interleave(order) if tensor.dim() else tensor.clone()
        setattr(plain, name, nn.Parameter(value) if name in ("weight", "bias") else value)
    return plain
