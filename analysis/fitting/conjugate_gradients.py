"""Many small least-squares problems at once, improved by preconditioned conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_RIDGE = 1e-5  # relative to a block's largest diagonal entry


def block_solver(blocks: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that multiplies vectors ``[..., n]`` by the inverses of blocks ``[..., n, n]``.

    A block that cannot be factorised, because it holds nothing but rounding, is taken for the identity.
    """
    identity = torch.eye(blocks.shape[-1]).to(blocks)
    ridge = _RIDGE * blocks.diagonal(dim1=-2, dim2=-1).amax(-1)
    factor, failed = torch.linalg.cholesky_ex(blocks + ridge[..., None, None] * identity)
    factor = torch.where((failed > 0)[..., None, None], identity, factor)
    return lambda vectors: torch.cholesky_solve(vectors[..., None], factor)[..., 0]


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    x: Tensor,
    gradient: Tensor,
    axes: tuple[int, ...],
    steps: int,
) -> Tensor:
    """Lower ``x A x / 2 - b x`` by preconditioned conjugate gradients (Hestenes and Stiefel, 1952).

    Args:
        apply: multiplies by A.
        precondition: multiplies by the preconditioner.
        x: where to start.
        gradient: ``A x - b`` there.
        axes: the axes of one problem; there is one problem for each index of the other axes.
        steps: how many.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(axes, keepdim=True)

    residual = -gradient
    direction = ready = precondition(residual)
    slope = dot(residual, ready)
    for _ in range(steps):
        image = apply(direction)
        curvature = dot(direction, image)
        step = torch.where(curvature > 0, slope / curvature, 0)  # zero where a problem is solved already
        x, residual = x + step * direction, residual - step * image
        ready = precondition(residual)
        new = dot(residual, ready)
        direction, slope = ready + torch.where(slope > 0, new / slope, 0) * direction, new
    return x
