"""What a fused network runs for inference in place of its layers: a program of ordinary layers.

In every pass, a layer of this package checks its input, changes the layout of maps and compares its parameters with
those that its filters were made from. For a single image, or on a GPU, that takes a good part of the time. A fused
network is a fixed sequence of ordinary layers. This sequence is made once and kept for as long as the network stays the
same (:mod:`gconv.deploy.fingerprint`). On a CPU the convolutions do the ReLU behind them, and all layers must run
dense, as ordinary factorised layers are no faster there. On a GPU the layers may run in any way.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gconv.functional.expansion import has_channels_last_strides, on_tensor_cores
from gconv.kernels.library import is_supported
from gconv.kernels.small_conv import is_small, packed_filter, small_conv2d
from gconv.models.networks import Model
from gconv.system.errors import InputError

from .fingerprint import Fingerprint, can_be_lowered
from .lowering import lower


class InferenceExecutor:
    """Computes the scores of a fused network by its program, in eval mode and without gradients.

    The program is made in the first pass, and again after the network has changed. A copy or a pickle of the network
    makes its own.

    Attributes:
        program: the one that was made last; None if there was none to make.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None

    @property
    def program(self) -> Program | None:
        return None if self._made is None else self._made.program

    def __call__(self, net: Model, x: Tensor) -> Tensor | None:
        """The scores of images ``x``, or None where the layers are to compute them."""
        if not _is_for_programs(net, x):
            return None
        made = self._made  # read once: another thread may replace it
        if made is None or not made.is_current(net):
            made = self._made = _Made.of(net)
        return None if made.program is None else made.program(x)

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": None}


def _is_for_programs(net: Model, x: Tensor) -> bool:
    """Whether this pass is one that a program may do: not in training, under a compiler or in double precision."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    if type(x) is not Tensor or net.training or torch.is_grad_enabled():
        return False
    if x.dim() != 4 or x.shape[1] != net.spec.in_channels:
        return False
    if x.device.type == "cpu":
        return x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return on_tensor_cores(x)


class _Made(NamedTuple):
    """A program, and the network that it was made from.

    Attributes:
        program: None if the network has a layer without an ordinary counterpart, or cannot be lowered as it is.
        fingerprint: None if it cannot be lowered as it is.
    """

    program: Program | None
    fingerprint: Fingerprint | None

    @classmethod
    def of(cls, net: Model) -> _Made:
        if not can_be_lowered(net):
            return cls(None, None)
        on_cpu = next(net.parameters()).is_cpu
        try:
            program = Program(net, relu_inside=on_cpu)
        except InputError:  # a layer of another package
            program = None
        return cls(program, Fingerprint(net, by_value=on_cpu))

    def is_current(self, net: Model) -> bool:
        return not can_be_lowered(net) if self.fingerprint is None else self.fingerprint.matches(net)


class Program:
    """The ordinary layers of a fused network, from images to class scores.

    Args:
        net: a fused network in eval mode.
        relu_inside: make :attr:`batched` too, which is for a CPU.

    Attributes:
        plain: the layers one after the other.
        batched: the same with ReLU inside the convolutions, for batches on a CPU; None elsewhere.
        compiled: whether the compiled kernel runs all convolutions of ``batched``. Then it is used for single images
            too, and for images that are not finite.

    Raises:
        InputError: a layer has no ordinary counterpart.
    """

    def __init__(self, net: Model, *, relu_inside: bool = True) -> None:
        self.plain = lower(net).requires_grad_(False)
        self.batched = _with_relu_inside(self.plain) if relu_inside else None
        self.compiled = self.batched is not None and not any(
            isinstance(module, (nn.Conv2d, _ConvReLU)) for module in self.batched.modules()
        )

    def __call__(self, images: Tensor) -> Tensor:
        """The class scores."""
        use_batched = self.batched is not None
        if use_batched and not self.compiled:
            # oneDNN's ReLU makes zero of NaN, which must stay NaN. A sum that overflows is treated as if it were NaN.
            use_batched = len(images) >= _BATCH and math.isfinite(images.sum().item())
        layers = self.batched if use_batched else self.plain
        assert layers is not None
        scores: Tensor = layers(images)
        return scores


_BATCH = 32
"""With at least this many images, ReLU inside the convolutions is faster, although each call has more to prepare."""


def _with_relu_inside(plain: fx.GraphModule) -> fx.GraphModule | None:
    """The same layers, where a convolution also does the ReLU behind it, if nothing else reads what it gives.

    The compiled kernel runs the convolutions of few channels, also those without ReLU. None if PyTorch was built
    without oneDNN, which runs the others.
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
