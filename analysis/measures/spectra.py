"""Spectra: how the energy of a filter spreads over the ranks of the matrices that it can be folded into.

Functions take a generator ``[..., O, I, S, k, k]``; leading axes are independent filters, such as the draws of a null,
all computed in one batch. An *energy* is a squared singular value. It is computed as an eigenvalue of the smaller Gram
matrix, which is exact enough for energies: the error is that of float64 relative to the whole energy of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gconv.functional.expansion import Tables
from gconv.functional.forms import Form, form_named
from gconv.groups.point_groups import Group
from gconv.groups.point_groups import group as find_group

# The axis of the generator that indexes the rows; all others index the columns. Both pixel axes count as one.
UNFOLDINGS = {"out": 0, "in": 1, "group": 2, "space": 3}

# A share that is met but for rounding is met.
_ROUNDING = 1e-12


def fold(weight: Tensor, form: str | Form, group: Group) -> Tensor:
    """The blocks of a generator in a form, ``[..., blocks, rows, k k]`` in float64 (:mod:`gconv.functional.forms`).

    A lifting filter has one kernel a channel pair, in the frame of the image: it folds as a planar one does.
    """
    frame = find_group("z2") if weight.shape[-3] == 1 else group
    tables = Tables.build(frame, weight.shape[-1], device=weight.device)
    folded: Callable[[Tensor], Tensor] = partial(form_named(form).fold, pixels=tables.pixels)
    for _ in weight.shape[:-5]:
        folded = torch.vmap(folded)
    return folded(weight.double())


def matrix_energies(matrices: Tensor) -> Tensor:
    """The squared singular values of matrices ``[..., rows, columns]``, falling: ``[..., min(rows, columns)]``."""
    rows, columns = matrices.shape[-2:]
    gram = matrices @ matrices.mT if rows <= columns else matrices.mT @ matrices
    return torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0)


def block_energies(weight: Tensor, form: str | Form, group: Group) -> Tensor:
    """The squared singular values of a generator's blocks in a form, largest first.

    Args:
        weight: generator ``[..., O, I, S, k, k]``.
        form: a separable form, or its name.
        group: the group it is expanded under.

    Returns:
        ``[..., blocks, max_rank]``, float64, at least 0.
    """
    return matrix_energies(fold(weight, form, group))


def block_variances(weight: Tensor, form: str | Form, group: Group) -> Tensor:
    """The squared singular values of the blocks with the mean of their rows taken off: what PCA explains.

    The samples are the rows, so the kernels are seen as points in ``k k`` dimensions; n rows have at most n - 1
    components.

    Args:
        weight: generator ``[..., O, I, S, k, k]``.
        form: a separable form, or its name.
        group: the group it is expanded under.

    Returns:
        ``[..., blocks, min(rows - 1, k k)]``, float64, at least 0; the variances times ``rows - 1``.
    """
    return centred_energies(fold(weight, form, group))


def centred_energies(matrices: Tensor) -> Tensor:
    """:func:`matrix_energies` after the mean of the rows is taken off: ``[..., min(rows - 1, columns)]``."""
    rows, columns = matrices.shape[-2:]
    energies = matrix_energies(matrices - matrices.mean(-2, keepdim=True))[..., : min(rows - 1, columns)]
    # Rows that are all alike have no variance, only the rounding of their mean.
    least = _ROUNDING**2 * matrices.square().sum((-2, -1)).unsqueeze(-1)
    return torch.where(energies > least, energies, 0)


def unfolding_energies(weight: Tensor, along: str) -> Tensor:
    """The squared singular values of one unfolding of a generator, largest first: its multilinear (HOSVD) spectrum.

    De Lathauwer, De Moor & Vandewalle, *A multilinear singular value decomposition* (2000).

    Args:
        weight: generator ``[..., O, I, S, k, k]``, seen as ``[..., O, I, S, k k]``.
        along: which axis makes the rows: ``out``, ``in``, ``group`` or ``space``.

    Returns:
        ``[..., min(rows, columns)]``, float64, at least 0.
    """
    tensor = weight.double().flatten(-2)
    rows_first = tensor.movedim(UNFOLDINGS[along] - 4, -4)
    return matrix_energies(rows_first.flatten(-3))


def energy_shares(energies: Tensor) -> Tensor:
    """The share of all energy at rank 1, 2, …, pooled over the blocks: ``sum_b sigma_bj^2 / sum_b sum_j sigma_bj^2``.

    Without any energy all of it is at rank 1, so that zeros are of rank 1 in every measure.

    Args:
        energies: ``[..., blocks, ranks]``.

    Returns:
        ``[..., ranks]``, falling, with sum 1.
    """
    pooled = energies.sum(-2)
    total = pooled.sum(-1, keepdim=True)
    first = torch.zeros_like(pooled)
    first[..., 0] = 1
    return torch.where(total > 0, pooled / total, first)


def explained_energy(energies: Tensor) -> Tensor:
    """The share of all energy that rank 1, 2, … keeps, pooled over the blocks.

    ``sum_{j <= r} sigma_j^2 / sum_j sigma_j^2``, the sums running over all blocks (uncentred). It equals one minus the
    squared relative Frobenius error of the best filter of that rank. A filter of zeros is fully explained.

    Args:
        energies: ``[..., blocks, max_rank]`` from :func:`block_energies`.

    Returns:
        ``[..., max_rank]``, rising to 1.
    """
    return energy_shares(energies).cumsum(-1)


def effective_rank(shares: Tensor) -> Tensor:
    """``exp(-sum_j p_j log p_j)`` of energy shares ``[..., ranks]``: the number of ranks that equal shares would need.

    Roy & Vetterli, *The effective rank* (2007), with energies in place of singular values. Between 1 and the rank.
    """
    return torch.special.entr(shares).sum(-1).exp()


def stable_rank(shares: Tensor) -> Tensor:
    """``||.||_F^2 / sigma_1^2`` from energy shares ``[..., ranks]``: one over the largest; between 1 and the rank."""
    return 1 / shares[..., 0]


def rank_needed(shares: Tensor, target: float) -> Tensor:
    """The smallest rank that keeps ``target`` of the energy, to rounding, from energy shares ``[..., ranks]``."""
    return 1 + (shares.cumsum(-1)[..., :-1] < target - _ROUNDING).sum(-1)
