"""Folding batch norm into convolutions: in eval mode it is one factor and one offset per channel."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.models.zoo import Model
from gconv.nn.base import GroupConvBase
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError

from .lowering import plain_of
from .program import InferenceProgram
from .tracing import trace


def fuse(net: Model) -> Model:
    """A copy of a network in eval mode, with every batch norm folded that alone reads what a convolution gives.

    The class scores are the same to rounding, and so is their equivariance: the factor and the offset are shared over
    the group axis, as the weights are. In place of a folded batch norm stands ``nn.Identity``.

    The CNNs keep no batch norm. The pre-activation ResNets keep those that open a block, and the last: they read a sum
    that is passed on without them too, and the ReLU behind them bars the way into the next convolution.

    Args:
        net: a network of :func:`gconv.create_model`, converted or not; it stays as it is.

    Returns:
        The copy. In eval mode and without gradients, on a CPU or the tensor cores of a GPU, it runs as ordinary layers
        that are made from it once (:mod:`gconv.deploy.program`); on a GPU these do not see a change made through
        ``.data``. It
        cannot be saved as a checkpoint, whose architecture has batch norm; see :func:`gconv.export`.

    Raises:
        InputError: the network is none of this package's, a batch norm has no running statistics, or a convolution
            computes its filter from parameters that this function does not know (weight norm, for example).
    """
    if not isinstance(net, Model):
        raise InputError(f"only networks of gconv.create_model can be fused, not {type(net)}")
    fused = deepcopy(net)
    for name, norm in fused.named_modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is None:
            raise InputError(f"{name} has no running statistics to fold; accepted: batch norm that tracks them")
    for conv, norm in list(_pairs(fused)):
        fold(fused.get_submodule(conv), fused.get_submodule(norm))
        fused.set_submodule(norm, nn.Identity())
    _gather(fused)
    fused.run_by(InferenceProgram())
    return fused.eval()


def to_plain(net: Model) -> fx.GraphModule:
    """The network as ``nn.Conv2d``, ``nn.MaxPool2d`` and so on, with this package's batch norms folded (``fuse``).

    It needs nothing of this package, also when it is pickled or unpickled. Layers keep their names; maps are planar,
    channel c and element s being channel ``c S + s``. Full and lifting layers become one convolution with the expanded
    filter. Separable layers that run dense become one convolution too; factorised ones of the forms ``gc`` and
    ``gc_in``, in irreducible representations or not, become a sum of as many terms as their rank, each a 1x1 mix and a
    depthwise convolution.
    The other forms move or sum maps in between, for which dense is mostly the faster way; they become one.

    Args:
        net: a network of :func:`gconv.create_model`, converted or not; it stays as it is.

    Returns:
        A network in eval mode, from images ``[N, in_channels, H, W]`` to class scores ``[N, classes]``, any N, with the
        dtype and on the device of ``net``. Its ``code`` shows what it does. It is made for inference: training it
        further would change the turned copies of a filter independently, and equivariance would be lost.

    Raises:
        InputError: as :func:`gconv.fuse`, or the network has a layer of another kind than the published ones.
    """
    return plain_of(fuse(net))


def _gather(net: nn.Module) -> None:
    """Put all parameters into one piece of memory: whether any of them has changed is then a single comparison."""
    parameters = list(net.parameters())
    first = parameters[0]
    if all(parameter.dtype == first.dtype and parameter.device == first.device for parameter in parameters):
        together = torch.cat([parameter.detach().flatten() for parameter in parameters])
        for parameter, part in zip(parameters, together.split([p.numel() for p in parameters]), strict=True):
            parameter.data = part.view_as(parameter)


def fold(conv: nn.Module, norm: nn.Module) -> None:
    """Let a convolution do, in place, what the batch norm behind it does in eval mode.

    With ``a = weight / sqrt(running_var + eps)``, the filter becomes ``a filter`` and the bias, made if there is none,
    ``a (bias - running_mean) + bias of the norm``; computed in float64. Of a separable filter only the mix changes:
    whatever the form, it has the axis of the output channels.

    Args:
        conv: a layer of this package, or an ``nn.Conv2d``.
        norm: a batch norm with running statistics.

    Raises:
        InputError: the filter is not a parameter of the layer, but computed from others.
    """
    assert isinstance(conv, (GroupConvBase, nn.Conv2d)) and isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None and norm.running_var is not None
    name, axis = ("mix", conv.form.output_axis) if isinstance(conv, SeparableGConv2d) else ("weight", 0)
    factor = dict(conv.named_parameters(recurse=False)).get(name)
    if factor is None:
        raise InputError(f"the {name} of a {type(conv).__name__} is computed from others; accepted: a parameter")
    with torch.no_grad():
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        offset = -scale * norm.running_mean.double()
        if conv.bias is not None:
            offset = offset + scale * conv.bias.double()
        if norm.bias is not None:
            offset = offset + norm.bias.double()
        shape = [-1 if dim == axis else 1 for dim in range(factor.dim())]
        # New parameters, as the old ones may be shared with another layer.
        setattr(conv, name, nn.Parameter((factor.double() * scale.view(shape)).to(factor.dtype)))
        conv.bias = nn.Parameter(offset.to(factor.dtype))


def _pairs(net: Model) -> Iterator[tuple[str, str]]:
    """Each convolution and the batch norm behind it, by name, where nothing else reads what the convolution gives."""
    nodes = [node for node in trace(net).nodes if node.op == "call_module"]
    calls = [node.target for node in nodes]
    for node in nodes:
        before = node.args[0]
        if (
            isinstance(net.get_submodule(node.target), _BatchNorm)
            and before.op == "call_module"
            and isinstance(net.get_submodule(before.target), (GroupConvBase, nn.Conv2d))
            and len(before.users) == 1
            and calls.count(before.target) == calls.count(node.target) == 1
        ):
            yield before.target, node.target
