"""What the redundancy table measures on one layer, and how layers are pooled into a network.

Functions take a generator ``[..., O, I, S, k, k]`` (leading axes: independent filters, one batch), or the Gram matrices
of its kernels along the group axis, ``G[s, s'] = <K[o, i, s], K[o, i, s']>``, from which every measure of the group
axis follows. They come in two frames:

* *stored*, ``K[o, i, s, y]``: copies along the group axis share one spatial kernel as it stands;
* *turned*, ``K[o, i, s, s y]``: every kernel is turned back by its element first. The left regular representation
  acting on these is the group's own action on the filter, ``(h K)[s, y] = K[h^-1 s, h^-1 y]``, so that a filter is
  invariant in this frame exactly if the maps that it makes are the same along the group axis.

A table is made in two steps. :func:`spectra` gives each measure in a form that is linear in the energy, so that draws
and layers can be averaged; :func:`values` turns those into what a reader sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gconv.groups.point_groups import Group

from .irreps import element_names, irreps
from .spectra import (
    UNFOLDINGS,
    centred_energies,
    effective_rank,
    energy_shares,
    fold,
    matrix_energies,
    rank_needed,
    stable_rank,
    unfolding_energies,
)

# A measure and the part of the filter that it is taken of.
Key = tuple[str, str]

# The separable forms that are measured. The turned ones of gconv.functional.forms are not: published tables have these
# three.
MEASURED_FORMS = ("g", "gc", "gc_in")

# Measures with one value for each rank: the share of the energy (or variance) that the ranks up to it keep.
RANKED = ("explained_energy", "pca_explained_variance", "hosvd_energy")
_TARGETS = {"rank_90": 0.90, "rank_95": 0.95, "rank_99": 0.99}


def group_gram(weight: Tensor, group: Group, *, turned: bool = False) -> Tensor:
    """The inner products of the spatial kernels of each filter along the group axis: ``[..., O, I, S, S]``."""
    o, i, s = weight.shape[-5:-2]
    if turned:
        return _gram(fold(weight, "gc_in", group).unflatten(-2, (o, s))).transpose(-4, -3)
    return _gram(fold(weight, "g", group).unflatten(-3, (o, i)))


def kernel_cosine(gram: Tensor) -> Tensor:
    """How alike the kernels along the group axis are: the mean cosine over all pairs ``s != s'``.

    A plain mean, so that it compares directions whatever the kernels' norms; the energy-weighted mean is already
    in the trivial irrep's share (``(S share - 1) / (S - 1)``). Pairs with a kernel of zeros are left out.

    Args:
        gram: ``[..., S, S]`` from :func:`group_gram`.

    Returns:
        ``[...]``, from -1 / (S - 1) to 1; NaN where no pair is left.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0)
    count = (norms > 0).sum(-1)
    cosines = torch.einsum("...st,...s,...t->...", gram, inverse, inverse)  # each kernel with itself makes one
    return torch.where(count > 1, (cosines - count) / (count * (count - 1)), torch.nan)


def invariance(gram: Tensor, group: Group) -> Tensor:
    """How close a filter is to its copy moved along the group axis: ``<L(h) K, K> / ||K||^2`` for every element h.

    L is the left regular representation, ``(L(h) K)[s] = K[h^-1 s]``. It is 1 exactly if h leaves the filter as it is,
    as ``||L(h) K - K||^2 = 2 ||K||^2 (1 - <L(h) K, K> / ||K||^2)``. Its mean over all elements is the group average's
    share of the energy, which is that of the trivial irrep.

    Args:
        gram: ``[..., S, S]`` from :func:`group_gram`, of one filter each or summed over filters.
        group: the group of that axis.

    Returns:
        ``[..., S]``, at most 1, and 1 for the identity; NaN for a filter of zeros.
    """
    moved = torch.tensor(group.product[group.inverse], device=gram.device)  # [h, s]: h^-1 s
    return _per_energy(gram[..., moved, torch.arange(group.order, device=gram.device)].sum(-1), gram)


def irrep_energy(gram: Tensor, group: Group) -> Tensor:
    """The share of a filter's energy in each real irrep of the regular representation on the group axis.

    ``||P_rho K||^2 / ||K||^2`` with the isotypic projectors of :mod:`analysis.measures.irreps`, which are the same for
    the left
    and the right regular representation. A random filter's is expected to be ``d_rho^2 / |H|``.

    Args:
        gram: ``[..., S, S]`` from :func:`group_gram`, of one filter each or summed over filters.
        group: the group of that axis.

    Returns:
        ``[..., irreps]`` in the order of :func:`analysis.measures.irreps.irreps`, with sum 1; NaN for a filter of
        zeros.
    """
    projectors = torch.stack([torch.as_tensor(irrep.projector, device=gram.device) for irrep in irreps(group)])
    return _per_energy(torch.einsum("rst,...st->...r", projectors, gram), gram)


def spectra(weight: Tensor, group: Group, *, shared_inputs: bool = True) -> dict[Key, Tensor]:
    """All measures of one layer, each as shares of the layer's energy.

    Measures that cannot tell anything are left out: a spectrum with one rank only (of 1x1 kernels along space, say),
    the group axis where there is none, and the forms of a lifting layer, which has none. A layer of a single kernel,
    of which nothing would be left, is told to have one rank along space.

    Args:
        weight: generator ``[draws, O, I, S, k, k]``.
        group: the group it is expanded under.
        shared_inputs: whether all output channels read the same input channels. A grouped convolution's do not, so
            nothing is measured over the filters of one input channel (``gc_in`` and the unfolding ``in``).

    Returns:
        For each (measure, part) ``[draws, n]``; for the ``RANKED`` ones the share of each rank, else n is 1.
    """
    o, i, s = weight.shape[-5:-2]
    found: dict[Key, Tensor] = {}
    blocks = {form: fold(weight, form, group) for form in MEASURED_FORMS}
    lifting = s < group.order
    for form, matrices in blocks.items():
        if lifting or (form == "gc_in" and not shared_inputs):
            continue
        rows, columns = matrices.shape[-2:]
        if min(rows, columns) > 1:
            found["explained_energy", form] = energy_shares(matrix_energies(matrices))
        if min(rows - 1, columns) > 1:
            found["pca_explained_variance", form] = energy_shares(centred_energies(matrices))
    for along in UNFOLDINGS:
        if along == "in" and not shared_inputs:
            continue
        energies = unfolding_energies(weight, along)
        if energies.shape[-1] > 1 or (along == "space" and o * i * s == 1):
            found["hosvd_energy", along] = energy_shares(energies.unsqueeze(-2))
    if s > 1:
        stored = _gram(blocks["g"].unflatten(-3, (o, i)))
        turned = _gram(blocks["gc_in"].unflatten(-2, (o, s)))
        for frame, gram in (("", stored), ("_turned", turned)):
            found[f"cosine{frame}", "mean"] = kernel_cosine(gram).flatten(1).nanmean(-1, keepdim=True)
            pooled = gram.sum((-4, -3))  # over all filters, whose order does not matter
            kept = invariance(pooled, group)
            names = ("average", *element_names(group)[1:])
            for name, value in zip(names, (kept.mean(-1), *kept.unbind(-1)[1:]), strict=True):
                found[f"invariance{frame}", name] = value.unsqueeze(-1)
            for irrep, value in zip(irreps(group), irrep_energy(pooled, group).unbind(-1), strict=True):
                found[f"irrep_energy{frame}", irrep.name] = value.unsqueeze(-1)
    return found


def pool(layers: Sequence[dict[Key, Tensor]], weights: Sequence[float]) -> dict[Key, Tensor]:
    """The weighted mean of :func:`spectra` over layers, each measure over the layers that have it.

    Args:
        layers: what :func:`spectra` gave for each layer, with the same number of draws.
        weights: one for each layer, above 0. With the number of entries of the generators, the result is what pooling
            the energy gives once every layer is scaled to the same mean square. Batch norm undoes a layer's scale, so
            pooling the energy as it is would weigh layers by chance.

    Returns:
        As :func:`spectra`; spectra of different lengths are continued by zeros.
    """
    pooled: dict[Key, Tensor] = {}
    for key in dict.fromkeys(key for layer in layers for key in layer):
        having = [(layer[key], weight) for layer, weight in zip(layers, weights, strict=True) if key in layer]
        longest = max(value.shape[-1] for value, _ in having)
        total = sum(weight for _, weight in having)
        pooled[key] = sum(
            (F.pad(value, (0, longest - value.shape[-1])) * (weight / total) for value, weight in having),
            start=torch.zeros(1, dtype=torch.float64),
        )
    return pooled


def values(found: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """The measures as a reader sees them, from :func:`spectra` or :func:`pool`.

    Shares become cumulative, and every uncentred spectrum gives its effective rank, its stable rank and the ranks that
    keep 90, 95 and 99 % of the energy; all from the one spectrum pooled over the blocks.

    Returns:
        For each (measure, part) ``[draws, n]``; entry r - 1 of a ``RANKED`` measure is that at rank r, else n is 1.
    """
    shown = {key: value.cumsum(-1) if key[0] in RANKED else value for key, value in found.items()}
    for (measure, part), shares in found.items():
        if measure in ("explained_energy", "hosvd_energy"):
            shown["effective_rank", part] = effective_rank(shares).unsqueeze(-1)
            shown["stable_rank", part] = stable_rank(shares).unsqueeze(-1)
            for name, target in _TARGETS.items():
                shown[name, part] = rank_needed(shares, target).double().unsqueeze(-1)
    return shown


def _gram(kernels: Tensor) -> Tensor:
    return kernels @ kernels.mT


def _per_energy(parts: Tensor, gram: Tensor) -> Tensor:
    return parts / gram.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
