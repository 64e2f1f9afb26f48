"""What a fused network runs on a CPU: its own ordinary layers, with ReLU inside the convolutions.

A layer of this package checks its input, turns maps and looks after its filters in every pass, which for a single image
takes a good part of the time. A fused network whose layers all run dense is a fixed sequence of ordinary
ones; that is kept beside it, for as long as the network is the one that it was made from.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .conv import SeparableGConv2d, _GroupConv
from .errors import InputError
from .models import Model
from .plain import plain_of


class Frozen:
    """The program of a fused network in eval mode, and what it was made from.

    Attributes:
        run: from images to class scores; None where there is no such program for this network.
    """

    def __init__(self, net: Model) -> None:
        modules = list(net.modules())
        self.run: Callable[[Tensor], Tensor] | None = None
        self._fits = _fits(modules)
        if self._fits:
            try:
                self.run = _relu_inside(plain_of(net).requires_grad_(False))
            except InputError:  # a layer of somebody else's
                self.run = None
        # Kept so that a check touches little memory: it comes before every pass.
        self._net = net
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._norms = [module for module in modules if isinstance(module, _BatchNorm)]
        self._separable = [module for module in modules if isinstance(module, SeparableGConv2d)]
        parts = [part for m in modules for part in (m._modules, m._parameters)] + [m._buffers for m in self._norms]
        self._parts = [(part, list(part.values())) for part in parts if part]
        tensors = [value for _, values in self._parts for value in values if isinstance(value, Tensor)]
        self._tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        # As few comparisons as there are pieces of memory: one, for what fuse made.
        pieces = {tensor.untyped_storage().data_ptr(): tensor for tensor in self._tensors}
        flat = [t.detach().new_empty(0).set_(t.untyped_storage()) for t in pieces.values()]
        self._memory = [(piece, piece.clone()) for piece in flat]

    def is_of(self, net: Model) -> bool:
        """Whether the network is still the same: its modules, how they run, and by value what they hold."""
        if self._net is not net:
            return False
        if not self._fits:
            return not _fits(list(net.modules()))
        if any(self._hooks):
            return False
        for norm in self._norms:
            if norm.training:
                return False
        for layer in self._separable:
            if layer.execution != "dense":
                return False
        for part, values in self._parts:
            if len(part) != len(values) or not all(map(is_, part.values(), values)):
                return False
        return [tensor.data_ptr() for tensor in self._tensors] == self._places and all(
            torch.equal(now, copy) for now, copy in self._memory
        )


def _fits(modules: list[nn.Module]) -> bool:
    """Whether the layers run dense in single precision on a CPU, and nobody trains, watches or computes their parts."""
    return all(map(_runs_plainly, modules)) and all(
        type(parameter) is nn.Parameter
        and parameter.dtype is torch.float32
        and parameter.is_cpu
        and bool(parameter.isfinite().all())
        for module in modules
        for parameter in module.parameters(recurse=False)
    )


def _runs_plainly(module: nn.Module) -> bool:
    return not (
        module.training
        or module._forward_hooks
        or module._forward_pre_hooks
        or (isinstance(module, _GroupConv) and module.execution != "dense")
    )


def _relu_inside(plain: fx.GraphModule) -> fx.GraphModule:
    """The same, with every ReLU that alone reads a convolution done by it, where the backend can."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return plain
    for node in list(plain.graph.nodes):
        if node.op == "call_function" and node.target is F.relu:
            before = node.args[0]
            if before.op == "call_module" and len(before.users) == 1:
                conv = plain.get_submodule(before.target)
                if isinstance(conv, nn.Conv2d):
                    plain.set_submodule(before.target, _ConvReLU(conv))
                    node.replace_all_uses_with(before)
                    plain.graph.erase_node(node)
    plain.recompile()
    return plain


_FEW_IMAGES = 32  # below this the call with ReLU inside, which prepares more, is the slower one


class _ConvReLU(nn.Module):
    """A convolution and the ReLU behind it, in batches by one call of oneDNN."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        padding, stride, dilation = ([int(n) for n in pair] for pair in (conv.padding, conv.stride, conv.dilation))
        self.how = padding, stride, dilation, conv.groups
        self.both = torch.ops.mkldnn._convolution_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < _FEW_IMAGES:
            padding, stride, dilation, groups = self.how
            return F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups).relu_()
        y: Tensor = self.both(x, self.weight, self.bias, *self.how, "relu", [], "")
        return y
