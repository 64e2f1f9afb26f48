"""Pooling over the group axis and over the plane, on maps ``[N, C, S, H, W]``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn

from gconv.functional.expansion import from_group_major, to_group_major
from gconv.system.errors import InputError


class GroupMaxPool(nn.Module):
    """Maximum over the group axis: ``[N, C, S, H, W]`` to planar ``[N, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return _group_max(x)


class GroupMeanPool(nn.Module):
    """Mean over the group axis: ``[N, C, S, H, W]`` to planar ``[N, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        return _group_mean(x)


class SpatialMaxPool2d(nn.Module):
    """``nn.MaxPool2d`` on maps ``[N, C, S, H, W]`` or ``[N, C, H, W]``. It pools each element's maps by themselves.

    Args:
        kernel_size: side of the square window, in pixels.
        stride: step of the window, by default its side. Exact equivariance needs
            ``(n + 2 padding - kernel_size) % stride == 0`` on maps of size n.
        padding: margin on each side. The maximum ignores it.
    """

    def __init__(self, kernel_size: int, stride: int | None = None, padding: int = 0) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return _spatial_max(x, self.kernel_size, self.stride, self.padding)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class SpatialMeanPool2d(nn.Module):
    """Mean over the whole plane: ``[..., H, W]`` to ``[...]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))


# torch.fx records a call of these functions and does not look into them. It could not follow a choice by the shape.


@fx.wrap
def _group_max(x: Tensor) -> Tensor:
    _check_group_axis("GroupMaxPool", x)
    return x.amax(2)


@fx.wrap
def _group_mean(x: Tensor) -> Tensor:
    _check_group_axis("GroupMeanPool", x)
    return x.mean(2)


@fx.wrap
def _spatial_max(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    y = F.max_pool2d(to_group_major(x), kernel_size, stride, padding)
    return from_group_major(y, x.shape[2]) if x.dim() == 5 else y


def _check_group_axis(pool: str, x: Tensor) -> None:
    if x.dim() != 5:
        raise InputError(f"{pool} got an input of shape {list(x.shape)}; accepted: [N, C, S, H, W]")
