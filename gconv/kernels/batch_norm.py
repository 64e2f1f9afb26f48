"""Batch norm of channels-last group-major maps by compiled functions (``csrc/batch_norm.c``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import address, launch, require_library, threads


def norm(x: Tensor, factor: Tensor, offset: Tensor, relu: bool) -> Tensor:
    """``factor x + offset`` of a channels-last map ``[N, C, H, W]``, and ReLU of it if asked.

    Args:
        x: the map.
        factor: ``[C]``.
        offset: ``[C]``.
        relu: whether to apply ReLU to the result; NaN stays NaN.
    """
    y = torch.empty_like(x)
    arguments = (*map(address, (x, factor, offset)), int(relu), address(y))
    launch("norm", require_library().instructions, threads(), x.numel() // x.shape[1], x.shape[1], *arguments)
    return y


def norm_train(
    x: Tensor, weight: Tensor, bias: Tensor, order: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm by the statistics of the batch; the S values of a channel at a position share its statistics.

    Args:
        x: a channels-last map ``[N, S C, H, W]``.
        weight: ``[C]``.
        bias: ``[C]``.
        order: S.
        eps: is added to the variance.
        relu: whether to apply ReLU to the result.

    Returns:
        The map, and the mean ``[C]`` and the variance ``[C]`` (divided by n, not n - 1).
    """
    found = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    arguments = (*map(address, (x, weight, bias)), eps, int(relu))
    launch("norm_train", *_sizes(x, order), *arguments, *map(address, found))
    return found


def norm_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, mean: Tensor, var: Tensor, order: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`norm_train` with respect to the map, the weight and the bias.

    Args:
        grad: the gradient of the output, channels-last.
        x: the input.
        y: the output, if that had ReLU; else None.
        weight: ``[C]``.
        mean: as :func:`norm_train` returned it.
        var: likewise.
        order: S.
        eps: as given to :func:`norm_train`.
    """
    found = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    arguments = (*map(address, (grad, x, y, weight, mean, var)), eps)
    launch("norm_backward", *_sizes(x, order), *arguments, *map(address, found))
    return found


def _sizes(x: Tensor, order: int) -> tuple[int, int, int, int, int]:
    """Instruction set, threads, positions, channels, and values of each channel at a position."""
    return require_library().instructions, threads(), x.numel() // x.shape[1], x.shape[1] // order, order
