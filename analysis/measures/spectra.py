"""Spectra: how the energy of a filter is distributed over the ranks of the matrices into which it is folded.

The functions take a generator ``[..., O, I, S, k, k]``; leading axes index independent filters, such as the draws of a
null, computed as one batch. An *energy* is a squared singular value. It is computed as an eigenvalue of the smaller
Gram matrix. The error of an energy is then the rounding error of float64, relative to the whole energy of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gconv.functional.expansion import Tables
from gconv.functional.form_base import Form
from gconv.functional.forms import form_named
from gconv.groups.point_groups import Group
from gconv.groups.point_groups import group as find_group

# For each unfolding the axis of the generator that indexes the rows. All other axes index the columns. The two pixel
# axes count as one.
UNFOLDINGS = {"out": 0, "in": 1, "group": 2, "space": 3}

# A target share counts as reached if only this much, rounding, is missing.
_ROUNDING = 1e-12


def fold(weight: Tensor, form: str | Form, group: Group) -> Tensor:
    """The blocks of a generator in a separable form (:mod:`gconv.functional.forms`).

    A lifting filter has one kernel per channel pair and no group axis; it is folded like a planar filter.

    Args:
        weight: generator ``[..., O, I, S, k, k]``.
        form: a separable form, or its name.
        group: the group under which the generator is expanded.

    Returns:
        ``[..., blocks, rows, k k]``, float64.
    """
    frame = find_group("z2") if weight.shape[-3] == 1 else group
    tables = Tables.build(frame, weight.shape[-1], device=weight.device)
    folded: Callable[[Tensor], Tensor] = partial(form_named(form).fold, pixels=tables.pixels)
    for _ in weight.shape[:-5]:
        folded = torch.vmap(folded)
    return folded(weight.double())


def matrix_energies(matrices: Tensor) -> Tensor:
    """The squared singular values of matrices ``[..., rows, columns]``.

    Returns:
        ``[..., min(rows, columns)]``, in descending order, at least 0.
    """
    rows, columns = matrices.shape[-2:]
    gram = matrices @ matrices.mT if rows <= columns else matrices.mT @ matrices
    return torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0)


def block_energies(weight: Tensor, form: str | Form, group: Group) -> Tensor:
    """The squared singular values of a generator's blocks in a separable form, in descending order.

    Args:
        weight: generator ``[..., O, I, S, k, k]``.
        form: a separable form, or its name.
        group: the group under which the generator is expanded.

    Returns:
        ``[..., blocks, max_rank]``, float64, at least 0.
    """
    return matrix_energies(fold(weight, form, group))


def block_variances(weight: Tensor, form: str | Form, group: Group) -> Tensor:
    """The squared singular values of the blocks after their mean row is subtracted: the variances of a PCA.

    The rows are the samples, so each kernel is a point in ``k k`` dimensions; n rows have at most n - 1 components.

    Args:
        weight: generator ``[..., O, I, S, k, k]``.
        form: a separable form, or its name.
        group: the group under which the generator is expanded.

    Returns:
        ``[..., blocks, min(rows - 1, k k)]``, float64, at least 0: the variances, multiplied by ``rows - 1``.
    """
    return centred_energies(fold(weight, form, group))


def centred_energies(matrices: Tensor) -> Tensor:
    """:func:`matrix_energies` after the mean row is subtracted: ``[..., min(rows - 1, columns)]``."""
    rows, columns = matrices.shape[-2:]
    energies = matrix_energies(matrices - matrices.mean(-2, keepdim=True))[..., : min(rows - 1, columns)]
    # Equal rows have no variance; what is left of them is the rounding error of their mean.
    least = _ROUNDING**2 * matrices.square().sum((-2, -1)).unsqueeze(-1)
    return torch.where(energies > least, energies, 0)


def unfolding_energies(weight: Tensor, along: str) -> Tensor:
    """The squared singular values of one unfolding of a generator: its multilinear (HOSVD) spectrum.

    De Lathauwer, De Moor & Vandewalle, *A multilinear singular value decomposition* (2000).

    Args:
        weight: generator ``[..., O, I, S, k, k]``, seen as ``[..., O, I, S, k k]``.
        along: the axis that indexes the rows: ``out``, ``in``, ``group`` or ``space``.

    Returns:
        ``[..., min(rows, columns)]``, float64, in descending order, at least 0.
    """
    tensor = weight.double().flatten(-2)
    rows_first = tensor.movedim(UNFOLDINGS[along] - 4, -4)
    return matrix_energies(rows_first.flatten(-3))


def energy_shares(energies: Tensor) -> Tensor:
    """The share of the energy at each rank, pooled over the blocks: ``sum_b sigma_bj^2 / sum_b sum_j sigma_bj^2``.

    A filter of zeros has the share 1 at rank 1, so that it has rank 1 in every measure.

    Args:
        energies: ``[..., blocks, ranks]``.

    Returns:
        ``[..., ranks]``, in descending order, with sum 1.
    """
    pooled = energies.sum(-2)
    total = pooled.sum(-1, keepdim=True)
    first = torch.zeros_like(pooled)
    first[..., 0] = 1
    return torch.where(total > 0, pooled / total, first)


def explained_energy(energies: Tensor) -> Tensor:
    """The share of the energy up to each rank, pooled over the blocks (uncentred).

    At rank r it is ``sum_{j <= r} sigma_j^2 / sum_j sigma_j^2``, where the sums include all blocks. It equals one minus
    the squared relative Frobenius error of the best filter of rank r. It is 1 for a filter of zeros.

    Args:
        energies: ``[..., blocks, max_rank]`` from :func:`block_energies`.

    Returns:
        ``[..., max_rank]``, ascending, 1 at the end.
    """
    return energy_shares(energies).cumsum(-1)


def effective_rank(shares: Tensor) -> Tensor:
    """The effective rank ``exp(-sum_j p_j log p_j)`` of energy shares ``[..., ranks]``.

    It is n for n equal shares, and lies between 1 and the rank. Roy & Vetterli, *The effective rank* (2007), define it
    with singular values; here it is computed from energies.
    """
    return torch.special.entr(shares).sum(-1).exp()


def stable_rank(shares: Tensor) -> Tensor:
    """The stable rank ``||.||_F^2 / sigma_1^2`` from energy shares ``[..., ranks]``: between 1 and the rank."""
    return 1 / shares[..., 0]


def rank_needed(shares: Tensor, target: float) -> Tensor:
    """The smallest rank that keeps the share ``target`` of the energy, from energy shares ``[..., ranks]``."""
    return 1 + (shares.cumsum(-1)[..., :-1] < target - _ROUNDING).sum(-1)
