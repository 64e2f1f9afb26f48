"""Null models: what a measure gives on filters that learned nothing. They show whether a trained value is chance.

* ``init``: filters drawn from the layer's initialisation, with independent entries. It answers *how redundant is any
  layer of this shape?* Small matrices are close to low rank by chance: random 4 x 9 blocks keep almost half of their
  energy at rank 1. For a separable layer the factors are drawn and multiplied out, so that the low rank that the form
  imposes does not count as learned. For a generator recovered from an expanded filter (escnn, or an exported network)
  the basis of the original layer is unknown; unconstrained filters are drawn, so what that basis imposes does count as
  learned.
* ``shuffled``: the trained entries of the whole layer in random order. It answers *does the arrangement of the large
  entries matter, or only their number?* Training makes the distribution of the entries heavy-tailed, and that alone
  changes spectra.

A value outside the ``init`` band was changed by training. A value outside both bands comes from the arrangement of the
entries. Neither null says that the redundancy is useful, and neither corrects for the number of values in a table. The
z-score of a whole number, such as the rank that keeps 90 % of the energy, is erratic where nearly all draws agree; read
its interval instead.
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
from gconv.functional.form_base import FilterShape
from gconv.functional.forms import form_named

from .spectra import block_energies, energy_shares, rank_needed

NULLS = ("init", "shuffled")

_COVERED = 0.95

# A null counts as constant if its relative standard deviation is smaller: the rest is rounding.
_ROUNDING = 1e-10

# A separable filter that was multiplied out in single precision has at least this energy share up to its rank.
_SEPARABLE = 1 - 1e-9

# Entries drawn in one batch: enough for vectorised operations, few enough for the processor's cache.
_CHUNK = 2**18


class Band(NamedTuple):
    """Where a value lies relative to its null. Every field is ``[n]``, and NaN where it is not defined.

    Attributes:
        mean: the mean of the draws.
        low: the lower end of the 95 % prediction interval for one more draw, ``mean - t sd sqrt(1 + 1 / draws)``, with
            Student's t of ``draws - 1`` degrees of freedom. It assumes normal draws: there are too few draws for
            empirical percentiles.
        high: the upper end of this interval.
        z: ``(value - mean) / sd``; NaN where the null is constant.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    z: Tensor


def band(value: Tensor, drawn: Tensor) -> Band:
    """The band of a null.

    Args:
        value: ``[n]``, the measure on the trained filter.
        drawn: ``[draws, n]``, the same measure on at least two draws.
    """
    mean, deviation = drawn.mean(0), drawn.std(0)
    varies = deviation > _ROUNDING * mean.abs().clamp(min=1)
    z = torch.where(varies, (value - mean) / deviation, torch.nan)
    draws = len(drawn)
    width = stdtrit(draws - 1, (1 + _COVERED) / 2) * math.sqrt(1 + 1 / draws) * deviation
    return Band(mean, mean - width, mean + width, z)


def null_filters(bank: FilterBank, null: str, draws: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Filters drawn from a null, in batches of bounded memory.

    The filters depend only on the state of ``rng``, not on the batches.

    Args:
        bank: the trained layer.
        null: ``init`` or ``shuffled``.
        draws: the number of filters.
        rng: the random generator.

    Yields:
        ``[d, O, I, S, k, k]``; the batch sizes d sum to ``draws``.
    """
    draw = {"init": _initial, "shuffled": _shuffled}[null]
    size = max(1, _CHUNK // bank.weight.numel())
    for start in range(0, draws, size):
        yield torch.stack([draw(bank, rng) for _ in range(start, min(start + size, draws))])


def _initial(bank: FilterBank, rng: np.random.Generator) -> Tensor:
    """A filter as the layer's ``reset_parameters`` draws it, up to a scale, which no measure depends on."""
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
