"""Folding batch norm into convolutions: in eval mode it is one factor and one offset per channel."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.models.networks import Model
from gconv.nn.base import GroupConvBase
from gconv.nn.capture import is_watched
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError

from .lowering import lower
from .program import InferenceExecutor
from .tracing import is_overridden, trace


def fuse(net: Model) -> Model:
    """A copy of a network in eval mode, where convolutions do what the batch norms behind them did.

    A batch norm is folded if it alone reads what a convolution gives, and if neither of the two has a hook. In its
    place stands ``nn.Identity``. The class scores are the same to rounding, and so is their equivariance: factor and
    offset are shared over the group axis, as the weights are.

    The CNNs keep no batch norm. The ResNets keep the first one of every block and the last one of the network: they
    read a sum, not a convolution. The convolution after them cannot take them, because a ReLU stands between.

    Args:
        net: a network of :func:`gconv.create_model`, converted or not; it stays as it is.

    Returns:
        The copy. In eval mode and without gradients, on a CPU or the tensor cores of a GPU, it runs as ordinary layers
        that are made from it once (:mod:`gconv.deploy.program`). On a GPU these do not see a change that is made
        through ``.data``. The copy cannot be saved as a checkpoint, as a checkpoint describes a network with batch
        norm; see :func:`gconv.export`.

    Raises:
        InputError: the network is not of this package, a batch norm has no running statistics, or a convolution
            computes its filter from other parameters (weight norm, for example).
    """
    if not isinstance(net, Model):
        raise InputError(f"only networks of gconv.create_model can be fused, not a {type(net).__name__}")
    fused = deepcopy(net)
    for name, norm in fused.named_modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is None:
            raise InputError(f"{name} has no running statistics to fold. Use batch norm with track_running_stats=True.")
    for conv, norm in list(_pairs(fused)):
        fold(fused.get_submodule(conv), fused.get_submodule(norm))
        fused.set_submodule(norm, nn.Identity())
    _gather(fused)
    fused.executor = InferenceExecutor()
    return fused.eval()


def to_plain(net: Model) -> fx.GraphModule:
    """The network as ``nn.Conv2d``, ``nn.MaxPool2d`` and so on, with batch norms folded as by :func:`gconv.fuse`.

    It needs nothing of this package, also when it is pickled or unpickled. Layers keep their names. Maps are planar:
    channel c and element s become channel ``c S + s``.

    Full and lifting layers become one convolution with the expanded filter, and so do separable layers that run dense.
    Factorised layers of the forms ``gc`` and ``gc_in``, in irreducible representations or not, become a sum of as many
    terms as their rank, each a group 1x1 convolution and a depthwise convolution. Layers of the other forms become one
    convolution, which is mostly faster: factorised, they would permute or sum maps between the two convolutions.

    Args:
        net: a network of :func:`gconv.create_model`, converted or not; it stays as it is.

    Returns:
        A network in eval mode, from images ``[N, in_channels, H, W]`` to class scores ``[N, classes]``, any N, with the
        dtype and on the device of ``net``. Its ``code`` shows what it does. It is made for inference: training it
        further would change the transformed copies of a filter independently, and equivariance would be lost.

    Raises:
        InputError: as :func:`gconv.fuse`; or a layer has no ordinary counterpart, or has forward hooks.
    """
    return lower(fuse(net))


def _gather(net: nn.Module) -> None:
    """Put all parameters into one piece of memory: whether any of them has changed is then a single comparison."""
    parameters = list(net.parameters())
    first = parameters[0]
    if all(parameter.dtype == first.dtype and parameter.device == first.device for parameter in parameters):
        together = torch.cat([parameter.detach().flatten() for parameter in parameters])
        for parameter, part in zip(parameters, together.split([p.numel() for p in parameters]), strict=True):
            parameter.data = part.view_as(parameter)


def fold(conv: nn.Module, norm: nn.Module) -> None:
    """Change a convolution in place so that it also does what the batch norm behind it does in eval mode.

    With ``a = norm.weight / sqrt(norm.running_var + norm.eps)``, the filter becomes ``a filter`` and the bias becomes
    ``a (bias - norm.running_mean) + norm.bias``. A layer without bias gets one. The computation is in float64. Of a
    separable filter only the factor ``mix`` changes: in every form, it has the axis of the output channels.

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
        kind = type(conv).__name__
        raise InputError(f"the {name} of a {kind} is computed from other parameters. Remove the parametrisation first.")
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
    """Each convolution and the batch norm behind it, by name, where nothing else can see what the convolution gives.

    Not where either has a hook, a ``forward`` of its own, or is called more than once.
    """
    nodes = [node for node in trace(net).nodes if node.op == "call_module"]
    calls = [node.target for node in nodes]
    for node in nodes:
        before = node.args[0]
        if not isinstance(net.get_submodule(node.target), _BatchNorm) or before.op != "call_module":
            continue
        pair = [net.get_submodule(name) for name in (before.target, node.target)]
        if (
            isinstance(pair[0], (GroupConvBase, nn.Conv2d))
            and len(before.users) == 1
            and calls.count(before.target) == calls.count(node.target) == 1
            and not any(is_watched(layer) or is_overridden(layer) for layer in pair)
        ):
            yield before.target, node.target
