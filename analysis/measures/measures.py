"""What the redundancy table measures on one layer, and how layers are pooled into a network.

The functions take a generator ``[..., O, I, S, k, k]``; leading axes index independent filters, computed as one batch.
The measures of the group axis need only the Gram matrices of the kernels along that axis,
``G[s, s'] = <K[o, i, s], K[o, i, s']>``. There are two frames:

* *stored*, ``K[o, i, s, y]``: the kernels as they are stored.
* *turned*, ``K[o, i, s, s y]``: every kernel in the frame of its input element, that is, transformed back by its
  element. In this frame the left regular representation is the group's action on the whole filter,
  ``(h K)[s, y] = K[h^-1 s, h^-1 y]``. So a filter is invariant in this frame exactly if all maps that it makes along
  the group axis are equal.

A table is made in two steps. :func:`spectra` gives each measure as a share of the energy; shares of draws and of layers
can be averaged. :func:`values` turns shares into the numbers that a reader sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gconv.groups.irreps import irreps
from gconv.groups.point_groups import Group

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

# A measure, and the part of the filter that it describes.
Key = tuple[str, str]

# The separable forms in the table: those that published tables have. g_turned and gc_turned are left out.
MEASURED_FORMS = ("g", "gc", "gc_in")

# The measures with one value per rank: the share of the energy, or of the variance, up to this rank.
RANKED = ("explained_energy", "pca_explained_variance", "hosvd_energy")
_TARGETS = {"rank_90": 0.90, "rank_95": 0.95, "rank_99": 0.99}


def group_gram(weight: Tensor, group: Group, *, turned: bool = False) -> Tensor:
    """The inner products of the spatial kernels of each filter along the group axis.

    Args:
        weight: generator ``[..., O, I, S, k, k]``.
        group: the group of the axis S.
        turned: whether each kernel is first transformed back by its element.

    Returns:
        ``[..., O, I, S, S]``, float64.
    """
    o, i, s = weight.shape[-5:-2]
    if turned:
        return _gram(fold(weight, "gc_in", group).unflatten(-2, (o, s))).transpose(-4, -3)
    return _gram(fold(weight, "g", group).unflatten(-3, (o, i)))


def kernel_cosine(gram: Tensor) -> Tensor:
    """How similar the kernels along the group axis are: the mean cosine over all pairs ``s != s'``.

    All pairs have the same weight, so the measure compares directions and ignores the kernels' norms. The mean weighted
    by energy is no separate measure: it is ``(S share - 1) / (S - 1)`` with the share of the trivial representation.
    Pairs with a kernel of zeros are left out.

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
    """How close a filter is to its transform under each element h: ``<L(h) K, K> / ||K||^2``.

    L is the left regular representation, ``(L(h) K)[s] = K[h^-1 s]``. The measure is 1 exactly if h leaves the filter
    unchanged, because ``||L(h) K - K||^2 = 2 ||K||^2 (1 - <L(h) K, K> / ||K||^2)``. Its mean over all elements is the
    energy share of the group average, which is the share of the trivial representation.

    Args:
        gram: ``[..., S, S]`` from :func:`group_gram`, of single filters or summed over filters.
        group: the group of the axis S.

    Returns:
        ``[..., S]``, at most 1; 1 for the identity. NaN for a filter of zeros.
    """
    source = torch.tensor(group.relative_table(), device=gram.device)  # [h, s]: h^-1 s
    return _per_energy(gram[..., source, torch.arange(group.order, device=gram.device)].sum(-1), gram)


def irrep_energy(gram: Tensor, group: Group) -> Tensor:
    """The share of a filter's energy in each real irreducible representation on the group axis.

    It is ``||P_rho K||^2 / ||K||^2`` with the isotypic projectors of :mod:`gconv.groups.irreps`. The expected share of
    a random filter is ``d_rho^2 / |H|``.

    Args:
        gram: ``[..., S, S]`` from :func:`group_gram`, of single filters or summed over filters.
        group: the group of the axis S.

    Returns:
        ``[..., irreps]`` in the order of :func:`gconv.groups.irreps.irreps`, with sum 1; NaN for a filter of zeros.
    """
    projectors = torch.stack([torch.as_tensor(irrep.projector, device=gram.device) for irrep in irreps(group)])
    return _per_energy(torch.einsum("rst,...st->...r", projectors, gram), gram)


def spectra(weight: Tensor, group: Group, *, shared_inputs: bool = True) -> dict[Key, Tensor]:
    """All measures of one layer, each as shares of the layer's energy.

    A measure that carries no information is left out: a spectrum with a single rank (for example along space for 1x1
    kernels), the measures of the group axis where there is none, and the forms of a lifting layer, which has no group
    axis. A layer of one single kernel keeps one measure, its rank along space.

    Args:
        weight: generator ``[draws, O, I, S, k, k]``.
        group: the group under which the generator is expanded.
        shared_inputs: whether all output channels read the same input channels. This is false for a grouped
            convolution; then the measures over all filters of one input channel are left out (``gc_in`` and the
            unfolding ``in``).

    Returns:
        ``[draws, n]`` for each (measure, part). For ``RANKED`` measures entry r - 1 is the share of rank r alone; for
        the others n is 1.
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
        found |= _of_group_axis(_gram(blocks["g"].unflatten(-3, (o, i))), group, "")
        found |= _of_group_axis(_gram(blocks["gc_in"].unflatten(-2, (o, s))), group, "_turned")
    return found


def _of_group_axis(gram: Tensor, group: Group, frame: str) -> dict[Key, Tensor]:
    """The measures of the group axis; ``frame`` is appended to their names.

    Args:
        gram: ``[draws, O, I, S, S]``, or with O and I exchanged: the measures do not depend on the filters' order.
        group: the group of the axis S.
        frame: empty for kernels as stored, else ``_turned``.
    """
    found = {(f"cosine{frame}", "mean"): kernel_cosine(gram).flatten(1).nanmean(-1, keepdim=True)}
    pooled = gram.sum((-4, -3))
    by_element = invariance(pooled, group)
    found[f"invariance{frame}", "average"] = by_element.mean(-1, keepdim=True)
    for name, value in list(zip(group.element_names, by_element.unbind(-1), strict=True))[1:]:
        found[f"invariance{frame}", name] = value.unsqueeze(-1)
    for irrep, value in zip(irreps(group), irrep_energy(pooled, group).unbind(-1), strict=True):
        found[f"irrep_energy{frame}", irrep.name] = value.unsqueeze(-1)
    return found


def pool(layers: Sequence[dict[Key, Tensor]], weights: Sequence[float]) -> dict[Key, Tensor]:
    """The weighted mean of :func:`spectra` over layers. Each measure is averaged over the layers that have it.

    Args:
        layers: what :func:`spectra` gave for each layer, with the same number of draws.
        weights: one positive weight per layer. If it is the number of entries of the generator, the mean equals pooling
            the energies of layers scaled to the same mean square. Pooling unscaled energies would be arbitrary, because
            batch norm undoes the scale of a layer.

    Returns:
        As :func:`spectra`; shorter spectra are padded with zeros.
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
    """The measures as a reader sees them, from the shares of :func:`spectra` or :func:`pool`.

    The shares of ``RANKED`` measures become cumulative. Every uncentred spectrum also gives its effective rank, its
    stable rank and the ranks that keep 90, 95 and 99 % of the energy. All come from the spectrum pooled over the
    blocks.

    Returns:
        ``[draws, n]`` for each (measure, part). Entry r - 1 of a ``RANKED`` measure is its value at rank r; for the
        others n is 1.
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
