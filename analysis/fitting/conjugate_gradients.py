"""Many small least-squares problems at once, improved by preconditioned conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_RIDGE = 1e-5  # relative to a block's largest diagonal entry


def block_solver(blocks: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiplies vectors ``[..., n]`` by the inverses of blocks ``[..., n, n]``, but not of those that are rounding."""
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
    """Lower ``x A x / 2 - b x`` in so many steps from x, where its gradient ``A x - b`` is given.

    Hestenes and Stiefel (1952), preconditioned; one problem along ``axes`` for each index of the others.
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
