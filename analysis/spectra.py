"""Explained energy: how much of a filter the best separable filter of each rank keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from gconv.functional import Tables
from gconv.groups import Group
from gconv.separable import Form, form_named


def block_energies(weight: Tensor, form: str | Form, group: Group) -> Tensor:
    """The squared singular values of a generator's blocks in a form, largest first.

    They are the eigenvalues of the smaller Gram matrix of each block, which is exact enough for energies: the error
    is that of float64 relative to the block's whole energy.

    Args:
        weight: generator ``[O, I, S, k, k]``.
        form: ``g``, ``gc`` or ``gc_in``.
        group: the group it is expanded under.

    Returns:
        ``[blocks, max_rank]``, float64, at least 0.
    """
    tables = Tables.build(group, weight.shape[-1], device=weight.device)
    blocks = form_named(form).fold(weight.double(), tables.pixels)
    rows, columns = blocks.shape[1:]
    gram = blocks @ blocks.mT if rows <= columns else blocks.mT @ blocks
    return torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0)


def explained_energy(energies: Tensor) -> Tensor:
    """The share of all energy that rank 1, 2, … keeps, pooled over the blocks.

    ``sum_{j <= r} sigma_j^2 / sum_j sigma_j^2``, the sums running over all blocks (uncentred). It equals one minus the
    squared relative Frobenius error of the best filter of that rank. A filter of zeros is fully explained.

    Args:
        energies: ``[blocks, max_rank]`` from :func:`block_energies`.

    Returns:
        ``[max_rank]``, rising to 1.
    """
    kept = energies.sum(0).cumsum(0)
    total = kept[-1]
    return kept / total if total > 0 else torch.ones_like(kept)
