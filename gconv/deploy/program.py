"""What a fused network runs for inference: its own ordinary layers, on a CPU with ReLU inside the convolutions.

A layer of this package checks its input, turns maps and looks after its filters in every pass, which for a single
image, or on a GPU, takes a good part of the time. A fused network is a fixed sequence of ordinary layers; that is kept
beside it, for as long as the network is the one that it was made from. On a CPU the layers must all run dense, as
ordinary factorised ones are no faster there; on a GPU they may run in any way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import is_
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.functional.expansion import has_channels_last_strides, on_tensor_cores
from gconv.kernels.library import is_supported
from gconv.kernels.small_conv import is_small, packed_filter, small_conv2d
from gconv.models.zoo import Model
from gconv.nn.base import GroupConvBase
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError

from .lowering import plain_of


class InferenceProgram:
    """What runs in place of a fused network's layers, without gradients; made in the first pass, and again on changes.

    Neither a copy nor a pickle has what was made.
    """

    _program: Program | None = None

    def program(self, net: Model, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What gives the scores of ``x``; None where the layers are to run."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return None
        if type(x) is not Tensor or net.training or torch.is_grad_enabled():
            return None
        if x.dim() != 4 or x.shape[1] != net.spec.in_channels:
            return None
        if x.device.type == "cpu":
            if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
                return None
        elif not on_tensor_cores(x):
            return None
        frozen = self._program  # read once: another thread may replace it
        if frozen is None or not frozen.is_of(net):
            self._program = frozen = Program(net)
        return None if frozen.plain is None else frozen.run

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Program:
    """The program of a fused network in eval mode, and what it was made from.

    Attributes:
        plain: from images to class scores; None where there is no such program for this network.
        batched: the same with ReLU inside the convolutions, for batches on a CPU; None elsewhere.
        compiled: whether the compiled kernel does all of these, so that it is for a single image too, and for any.
    """

    def __init__(self, net: Model) -> None:
        modules = list(net.modules())
        self.plain: fx.GraphModule | None = None
        self.batched: fx.GraphModule | None = None
        self.compiled = False
        self._fits = _fits(modules)
        self._by_value = next(net.parameters()).is_cpu
        if self._fits:
            try:
                self.plain = plain_of(net).requires_grad_(False)
                self.batched = _relu_inside(self.plain) if self._by_value else None
                self.compiled = self.batched is not None and not any(
                    isinstance(module, (nn.Conv2d, _ConvReLU)) for module in self.batched.modules()
                )
            except InputError:  # a layer of somebody else's
                self.plain = None
        # Kept so that a check touches little memory: it comes before every pass.
        self._net = net
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._norms = [module for module in modules if isinstance(module, _BatchNorm)]
        self._executions = [(m, m.execution) for m in modules if isinstance(m, SeparableGConv2d)]
        parts = [part for m in modules for part in (m._modules, m._parameters)] + [m._buffers for m in self._norms]
        self._parts = [(part, list(part.values())) for part in parts if part]
        tensors = [value for _, values in self._parts for value in values if isinstance(value, Tensor)]
        self._tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        # As few comparisons as there are pieces of memory: one, for what fuse made.
        pieces = {tensor.untyped_storage().data_ptr(): tensor for tensor in self._tensors} if self._by_value else {}
        flat = [t.detach().new_empty(0).set_(t.untyped_storage()) for t in pieces.values()]
        self._memory = [(piece, piece.clone()) for piece in flat]
        self._versions = self._counted() if self._fits and not self._by_value else []

    def run(self, images: Tensor) -> Tensor:
        """The class scores; only where there is a program."""
        inside = self.batched is not None
        if inside and not self.compiled:
            # What is not a number is to stay so, and oneDNN's ReLU makes it zero; a sum that overflows is let go too.
            inside = len(images) >= _BATCH and math.isfinite(images.sum().item())
        program = self.batched if inside else self.plain
        assert program is not None
        scores: Tensor = program(images)
        return scores

    def is_of(self, net: Model) -> bool:
        """Whether the network is still the same: its modules, how they run, and what they hold.

        On a CPU that is compared by value. A GPU would have to be waited for, so there the counters of in-place changes
        are compared, which do not see those made through ``.data``.
        """
        if self._net is not net:
            return False
        if not self._fits:
            return not _fits(list(net.modules()))
        if any(self._hooks):
            return False
        for norm in self._norms:
            if norm.training:
                return False
        for layer, execution in self._executions:
            if layer.execution != execution:
                return False
        for part, values in self._parts:
            if len(part) != len(values) or not all(map(is_, part.values(), values)):
                return False
        if [tensor.data_ptr() for tensor in self._tensors] != self._places:
            return False
        if self._by_value:
            return all(torch.equal(now, copy) for now, copy in self._memory)
        return self._counted() == self._versions

    def _counted(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]


def _fits(modules: list[nn.Module]) -> bool:
    """Whether the program would be the network's: nobody trains, watches or computes its parts.

    On a CPU also whether the layers run dense, on finite weights in single precision.
    """
    return all(map(_runs_plainly, modules)) and all(
        type(parameter) is nn.Parameter and (_counts(module) if parameter.is_cuda else _is_usual(parameter))
        for module in modules
        for parameter in module.parameters(recurse=False)
    )


def _is_usual(parameter: nn.Parameter) -> bool:
    return parameter.is_cpu and parameter.dtype is torch.float32 and bool(parameter.isfinite().all())


def _counts(module: nn.Module) -> bool:
    """Whether in-place changes of its tensors are counted, as they are not for those made in inference mode."""
    return not any(t.is_inference() for ts in (module.parameters(False), module.buffers(False)) for t in ts)


def _runs_plainly(module: nn.Module) -> bool:
    if module.training or module._forward_hooks or module._forward_pre_hooks:
        return False
    if not isinstance(module, GroupConvBase) or next(module.parameters()).is_cuda:
        return True
    runs_in_irreps = module.runs_in_irreps and module.kernel_size != (1, 1)  # of which there are few
    return module.execution == "dense" and not runs_in_irreps


_BATCH = 32
"""Images from which on the call with ReLU inside, which prepares more, is the faster one."""


def _relu_inside(plain: fx.GraphModule) -> fx.GraphModule | None:
    """A program of the same layers, with every ReLU that alone reads a convolution done by it, if the backend can.

    Convolutions of few channels are the compiled kernel's, also those without ReLU.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return None
    graph = fx.Graph()
    graph.output(graph.graph_copy(plain.graph, {}))
    batched = fx.GraphModule(plain, graph)
    for node in list(graph.nodes):
        conv = batched.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d):
            continue
        (reader, *others) = node.users
        relu = not others and reader.op == "call_function" and reader.target is F.relu
        if relu:
            reader.replace_all_uses_with(node)
            graph.erase_node(reader)
        if _is_small(conv):
            batched.set_submodule(node.target, _SmallConv(conv, relu))
        elif relu:
            batched.set_submodule(node.target, _ConvReLU(conv))
    batched.recompile()
    return batched.eval()


def _is_small(conv: nn.Conv2d) -> bool:
    pairs = conv.stride, conv.padding, conv.dilation
    square = conv.groups == 1 and all(isinstance(pair, tuple) and len(set(pair)) == 1 for pair in pairs)
    return square and is_small(conv.weight, *(int(pair[0]) for pair in pairs))


class _SmallConv(nn.Module):
    """A convolution of few channels by the compiled kernel, with ReLU behind it or without."""

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.relu = conv.weight, conv.bias, relu
        self.packed = packed_filter(conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        fits = x.shape[1] == self.weight.shape[1] and min(x.shape[2:]) >= self.weight.shape[2]
        if fits and is_supported(x, self.weight, self.bias) and has_channels_last_strides(x):
            return small_conv2d(x, self.packed, self.bias, self.relu)
        y = F.conv2d(x, self.weight, self.bias)
        return F.relu(y) if self.relu else y


class _ConvReLU(nn.Module):
    """A convolution and the ReLU behind it, by one call of oneDNN."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        padding, stride, dilation = ([int(n) for n in pair] for pair in (conv.padding, conv.stride, conv.dilation))
        self.how = padding, stride, dilation, conv.groups
        self.both = torch.ops.mkldnn._convolution_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.both(x, self.weight, self.bias, *self.how, "relu", [], "")
        return y
