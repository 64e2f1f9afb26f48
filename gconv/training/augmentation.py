"""Augmentation of training images: random rotations, with small random scalings, shears and shifts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DRAWS = 6
"""How many random numbers each image needs."""
_SCALE = _SHEAR = 0.1
_SHIFT = 1 / 14


def augment(images: Tensor, draws: Tensor, kind: str) -> Tensor:
    """Transform each image by its own map, with bilinear interpolation and zeros outside the image.

    Args:
        images: ``[N, C, H, W]``.
        draws: ``[N, 6]``, random numbers in [0, 1) for each image: the angle, as a share of a full rotation,
            counter-clockwise on the screen; the scale; two shears; two shifts. For the last five, 1/2 means no change.
        kind: ``none``, ``rotation`` or ``affine``, as in :class:`gconv.Recipe`.

    Returns:
        ``[N, C, H, W]``.
    """
    if kind == "none":
        return images
    draws = draws.to(images)
    angle = 2 * math.pi * draws[:, 0]
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack((cos, -sin, sin, cos), 1).view(-1, 2, 2)
    shift = torch.zeros_like(draws[:, :2])
    if kind == "affine":
        scale, *shear = (2 * draws[:, 1:4] - 1).unbind(1)
        one = torch.ones_like(scale)
        sheared = torch.stack((one, _SHEAR * shear[0], _SHEAR * shear[1], one), 1).view(-1, 2, 2)
        matrix = matrix @ sheared * (1 + _SCALE * scale)[:, None, None]
        shift = 2 * _SHIFT * (2 * draws[:, 4:] - 1)  # affine_grid takes the image to be two units wide
    height, width = images.shape[2:]  # coordinates go from -1 to 1 along both sides, also of an oblong image
    matrix = matrix * matrix.new_tensor([[1, height / width], [width / height, 1]])
    grid = F.affine_grid(torch.cat((matrix, shift[:, :, None]), 2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
