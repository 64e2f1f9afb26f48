"""Batch normalisation on group feature maps."""

from __future__ import annotations

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import InputError


class GroupBatchNorm2d(_BatchNorm):
    """Batch norm with one mean, variance and affine pair per channel, shared over the group axis and the plane.

    Sharing over the group axis is what keeps it equivariant. Input and output ``[N, C, S, H, W]`` or planar
    ``[N, C, H, W]``. Arguments, parameters and state dict as ``nn.BatchNorm2d``.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (4, 5):
            raise InputError(f"GroupBatchNorm2d got an input of shape {list(input.shape)}; accepted: [N, C, S, H, W]")
