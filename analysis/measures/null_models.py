"""Nulls: what a measure gives on filters that learned nothing, so that a trained value can be told from chance.

* ``init``: filters drawn as the layer itself draws them before training, with independent entries. It answers *how
  redundant is a layer of this shape anyway?* Small matrices are close to low rank by chance: random 4 x 9 blocks
  keep almost half of their energy at rank 1. For a separable layer the factors are drawn and multiplied out, so that
  what its form forces on it does not pass for learned. For filters taken back from escnn's or from an exported network
  it draws free filters, because the basis is not known: what that imposes does pass for learned.
* ``shuffled``: the trained filter's own entries in random order, over the whole layer. It answers *is it where the
  large entries are, or only that there are few of them?* Training makes the entries' distribution heavy-tailed, and
  that alone changes spectra.

A value outside the ``init`` band is not what the layer began with; outside both, it is in the arrangement of the
entries. Neither says that the redundancy is useful, and neither corrects for how many values a table holds. The z-score
of a whole number, such as the rank that keeps 90 %, is wild where nearly all draws agree; look at its interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import stdtrit  # of Student's t: scipy.stats, which calls it, takes long to load
from torch import Tensor

from analysis.filters.banks import FilterBank
from gconv.functional.expansion import Tables
from gconv.functional.forms import FilterShape, form_named

from .spectra import block_energies, energy_shares, rank_needed

NULLS = ("init", "shuffled")

_COVERED = 0.95

# A null that varies less than rounding does not vary.
_ROUNDING = 1e-10

# A filter multiplied out in single precision keeps this much of its energy at the rank of its factors.
_SEPARABLE = 1 - 1e-9

# Entries drawn at a time: enough to fill vectors, few enough to stay in the cache.
_CHUNK = 2**18


class Band(NamedTuple):
    """Where a value lies in its null; every field ``[n]``, NaN where it is not defined.

    Attributes:
        mean: of the draws.
        low: lower end of the interval that holds 95 % of further draws, ``mean - t sd sqrt(1 + 1 / draws)`` with
            Student's t of ``draws - 1`` degrees of freedom, as mean and sd are estimated too. It takes the draws for
            normal; they are too few for their own percentiles.
        high: its upper end.
        z: ``(value - mean) / sd``; NaN where the null does not vary.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    z: Tensor


def band(value: Tensor, drawn: Tensor) -> Band:
    """The band of a null.

    Args:
        value: ``[n]``, of the trained filter.
        drawn: ``[draws, n]``, the same measure on at least two draws.
    """
    mean, deviation = drawn.mean(0), drawn.std(0)
    varies = deviation > _ROUNDING * mean.abs().clamp(min=1)
    z = torch.where(varies, (value - mean) / deviation, torch.nan)
    draws = len(drawn)
    width = stdtrit(draws - 1, (1 + _COVERED) / 2) * math.sqrt(1 + 1 / draws) * deviation
    return Band(mean, mean - width, mean + width, z)


def null_filters(bank: FilterBank, null: str, draws: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Filters of a null, in batches of bounded memory ``[d, O, I, S, k, k]`` that make ``draws`` together.

    The filters depend on the state of ``rng`` alone, not on how they are batched.

    Args:
        bank: the trained layer.
        null: ``init`` or ``shuffled``.
        draws: how many filters.
        rng: source of randomness.
    """
    draw = {"init": _initial, "shuffled": _shuffled}[null]
    size = max(1, _CHUNK // bank.weight.numel())
    for start in range(0, draws, size):
        yield torch.stack([draw(bank, rng) for _ in range(start, min(start + size, draws))])


def _initial(bank: FilterBank, rng: np.random.Generator) -> Tensor:
    """As ``reset_parameters`` of the layer draws, but for a scale of the whole filter, which no measure sees."""
    if bank.form is None:
        return _uniform(tuple(bank.weight.shape), rng)
    form, shape = form_named(bank.form), FilterShape.of(bank.weight)
    shares = energy_shares(block_energies(bank.weight, form, bank.group))
    mix, spatial = (_uniform(size, rng) for size in form.factor_shapes(shape, int(rank_needed(shares, _SEPARABLE))))
    return form.generator(mix, spatial, shape, Tables.build(bank.group, shape.k).pixels)


def _shuffled(bank: FilterBank, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.permutation(bank.weight.numpy().ravel())).view(bank.weight.shape)


def _uniform(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.uniform(-1, 1, shape))
