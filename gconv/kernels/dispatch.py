"""Which version of the compiled kernel runs a layer (:mod:`gconv.kernels.separable_conv`), and in which basis its mix
is."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from gconv.functional.form_base import FilterShape
from gconv.functional.forms import FORMS
from gconv.functional.mixing import Basis, basis_of, regular
from gconv.groups.point_groups import Group

from .library import library, require_library


@cache
def variants() -> dict[int, int]:
    """The versions that run on this processor, by number; and to a multiple of what each of them rounds channels up.

    That is the number of floats a vector, or 1 of :data:`PLANES`. Of the others the best comes first.
    """
    if library() is None:
        return {}
    found: dict[int, int] = {}
    number = 0
    while (lanes := require_library().gconv_lanes(number)) >= 0:
        if lanes:
            found[number] = lanes
        number += 1
    return found


class Sizes(NamedTuple):
    """Of a layer: S, I, O, R, whether the planar kernels run before the mix, k, stride, padding and dilation."""

    order: int
    in_channels: int
    out_channels: int
    rank: int
    planar_first: bool
    k: int
    stride: int
    padding: int
    dilation: int

    def output(self, height: int, width: int) -> tuple[int, int]:
        """The height and the width of what becomes of a map."""
        reach = 2 * self.padding - self.k
        return (height + reach) // self.stride + 1, (width + reach) // self.stride + 1


def best(group: Group, sizes: Sizes, in_basis: bool) -> tuple[int, int] | None:
    """The version for layers of a size, one of :func:`variants`; None where there is no kernel."""
    works = _works(group, sizes, in_basis)
    return min(variants().items(), key=lambda version: works.get(version[0], math.inf)) if works else None


def in_basis_pays(group: Group, out_channels: int, in_channels: int, stride: int) -> bool | None:
    """Whether the kernel runs layers of a size faster with the mix in the irreducible representations of the group.

    None where there is no kernel.
    """
    sizes = Sizes(group.order, in_channels, out_channels, 1, False, 3, stride, 0, 1)
    direct, turned = (_works(group, sizes, in_basis).values() for in_basis in (False, True))
    return min(turned) < min(direct) if direct else None


def mixes_pay(group: Group, shape: FilterShape) -> bool:
    """Whether the kernel is there, and full filters as mixes of pixels, of a form ``gc_in`` of rank k k, pay in it.

    They do where these have less than half the multiply-accumulates of the expanded filter.
    """
    return bool(variants()) and _half(group, shape)


@cache
def _half(group: Group, shape: FilterShape) -> bool:
    o, i, s, k = shape
    return sum(FORMS["gc_in"].macs_by_map(shape, k * k, basis_of(group))) < o * i * s * s * k * k / 2


def basis_for(group: Group, in_basis: bool) -> Basis:
    """What a mix is done in."""
    return basis_of(group) if in_basis else regular(group)


def _works(group: Group, sizes: Sizes, in_basis: bool) -> dict[int, float]:
    """By the versions that come into question for a layer, how many multiply-accumulates a position they are worth.

    Counted are those of mixes and of changes of basis, with those that vectors do for nothing where they are part
    empty. What else there is, such as turning maps into planes, is put in the same terms by constants, fitted to times
    of p2, pm, pmm, p4 and p4m layers of 2 to 32 channels on two cores, of which there is no record but for the sizes
    that ``benchmarks/speed_layers.py`` measures. What is alike in all versions is left out.
    """
    s, i, o, rank, planar_first, _, stride, *_ = sizes
    basis = basis_for(group, in_basis)
    changed = (rank * i, o) if planar_first else (i, rank * o)
    works = {}
    for variant, lanes in variants().items():
        sizes_of = ((n, matrices.shape[1]) for n, matrices in zip(basis.copies, basis.matrices, strict=True))
        mix = rank * sum(n * d * i * rounded(d * o, lanes) for n, d in sizes_of)
        values = s * in_basis * sum(rounded(channels, lanes) for channels in changed)
        if variant != PLANES:
            works[variant] = mix + (s + _ROWS_CHANGE) * values
            break
        planes = s * (i + o + 2 * rank * (i if planar_first else o))
        if stride == 1 and planes <= _MOST_PLANES:
            works[variant] = _PLANES_MIX * mix + (s + _PLANES_CHANGE) * values + _TURN * s * (i + o)
    return works


PLANES = 0
"""The version for few channels, with a plane of each: its vectors are of neighbouring positions."""

_ROWS_CHANGE, _PLANES_CHANGE, _PLANES_MIX, _TURN = 2.75, 0.75, 1.2, 3.5
"""What :func:`_works` adds: to the products of a change of basis, for each value, by rows and by planes; to those of a
mix by planes, as a factor; and for each value that is turned into a plane or back."""

_MOST_PLANES = 512
"""With more, bands of rows that stay in the cache are too low."""


def rounded(values: int, lanes: int) -> int:
    """Up to a multiple of the lanes."""
    return values + -values % lanes
