"""Ordinary convolutions of few channels by a compiled kernel (``csrc/small_conv.c``)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gconv.functional.expansion import has_channels_last_strides

from .library import INSTRUCTIONS, address, is_supported, launch, library, threads

_MAX_CHANNELS = 64
"""The kernel runs convolutions of up to this many output channels; benchmarks/speed_networks.py measures P4CNN, which
has 40."""


def runs_small_conv() -> bool:
    """Whether :func:`small_conv2d` is there, and may use the instructions that it needs."""
    found = library()
    return found is not None and found.instructions >= INSTRUCTIONS.index("avx512")


def is_small(weight: Tensor, stride: int, padding: int, dilation: int) -> bool:
    """Whether :func:`small_conv2d` is the faster way for a convolution with this filter ``[O, I, k, k]``."""
    few = len(weight) <= _MAX_CHANNELS and len(weight) % 8 == 0
    return few and (stride, padding, dilation) == (1, 0, 1) and runs_small_conv()


def packed_filter(weight: Tensor) -> Tensor:
    """A filter ``[O, I, k, k]`` in the layout that :func:`small_conv2d` takes."""
    return weight.detach().permute(2, 3, 1, 0).contiguous()


def small_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """The convolution of a channels-last map without padding, with stride 1.

    Args:
        x: ``[N, I, H, W]``.
        weight: ``[k, k, I, O]``, O a multiple of eight; see :func:`packed_filter`.
        bias: ``[O]``, or None.
        relu: whether to apply ReLU to the result; NaN stays NaN.

    Returns:
        ``[N, O, H - k + 1, W - k + 1]``, channels-last.
    """
    n, channels, height, width = x.shape
    k, out_channels = len(weight), weight.shape[3]
    y = x.new_empty((n, height - k + 1, width - k + 1, out_channels)).permute(0, 3, 1, 2)
    sizes = threads(), n, channels, out_channels, k, height, width
    if n:
        launch("small_conv", *sizes, *map(address, (x, weight, bias)), int(relu), address(y))
    return y


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int) -> Tensor:
    """``torch.nn.functional.conv2d``; few channels run in :func:`small_conv2d`, with PyTorch's gradients."""
    # This comes first, because a compiler must not look into what follows.
    plain = not torch.compiler.is_compiling() and not torch.jit.is_tracing() and type(x) is Tensor  # type: ignore[attr-defined]
    fits = plain and is_small(weight, stride, padding, dilation) and is_supported(x, weight, bias)
    fits = fits and has_channels_last_strides(x)
    if not (fits and x.shape[1] == weight.shape[1] and min(x.shape[2:]) >= weight.shape[2]):
        return F.conv2d(x, weight, bias, stride, padding, dilation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y: Tensor = _SmallConv.apply(x, weight, bias)
        return y
    return small_conv2d(x, packed_filter(weight), bias, relu=False)


class _SmallConv(torch.autograd.Function):
    """:func:`small_conv2d` of an unpacked filter, with gradients by PyTorch's operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_shape = None if bias is None else list(bias.shape)
        return small_conv2d(x, packed_filter(weight), bias, relu=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = list(ctx.needs_input_grad)
        found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
            *gradients, x, weight, ctx.bias_shape, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, needed
        )
        return found
