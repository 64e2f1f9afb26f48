"""Which version of the compiled kernel runs a layer (:mod:`gconv.kernels.separable_conv`), and in which basis it mixes
the group axis."""

from __future__ import annotations

import math
from functools import cache
from operator import mul
from typing import NamedTuple

from gconv.functional.form_base import FilterShape
from gconv.functional.mixing import Basis, basis_of, regular
from gconv.groups.point_groups import Group
from gconv.system.errors import one_of

from .library import INSTRUCTIONS, MAX_K, MAX_ORDER, library

OVER_PIXELS = 0
"""The version for few channels, vectorised over pixels: a vector holds neighbouring positions of one channel.

All other versions are vectorised over channels.
"""

_BASIS_OVER_CHANNELS, _BASIS_OVER_PIXELS, _MIX_OVER_PIXELS, _TRANSPOSE = 2.75, 0.75, 1.2, 3.5
"""Constants of :func:`_estimated_costs`: the overhead for each value of a change of basis, vectorised over channels and
over pixels; the factor on the products of a mix over pixels; and the cost of transposing one value into the layout of
that version, or back."""

MAX_PLANES = 512
"""The version over pixels is for layers of up to this many planes. With more, only few rows of them fit the cache."""


@cache
def variants() -> dict[int, int]:
    """The versions of the kernel that may run here: their numbers, and to what multiple they pad channels.

    The multiple is the number of floats of a vector, or 1 for :data:`OVER_PIXELS`. Among the versions over channels the
    fastest comes first.
    """
    compiled = library()
    if compiled is None:
        return {}
    found: dict[int, int] = {}
    number = 0
    while (instructions := compiled.functions["version_instructions"](number)) >= 0:
        if instructions <= compiled.instructions:
            found[number] = compiled.functions["version_lanes"](number)
        number += 1
    return found


KERNELS = ("none", *INSTRUCTIONS)
"""The classes of machines, by the instruction set of the kernels; ``none`` has no kernels. As for ``GCONV_KERNEL``."""

_LANES = {"any": 4, "avx2": 8, "avx512": 16}


def variants_with(kernel: str) -> dict[int, int]:
    """As :func:`variants`, on a machine of another class; only the fastest version over channels is listed.

    Args:
        kernel: one of :data:`KERNELS`.

    Raises:
        InputError: it is none of them.
    """
    if kernel not in KERNELS:
        raise one_of("kernel", kernel, KERNELS)
    if kernel == "none":
        return {}
    over_pixels = {OVER_PIXELS: 1} if kernel == "avx512" else {}
    return over_pixels | {OVER_PIXELS + 1: _LANES[kernel]}


class Sizes(NamedTuple):
    """The sizes of a layer.

    Attributes:
        order: S, the number of group elements.
        in_channels: I.
        out_channels: O.
        rank: R.
        spatial_first: whether the spatial kernels run before the mix, as in the form ``gc_in``.
        k: the size of the spatial kernels.
        stride: as of ``nn.Conv2d``, the same along both axes.
        padding: likewise.
        dilation: likewise.
        whole: whether this is a full filter. It runs as one of the form ``gc_in`` of rank ``k k`` whose spatial kernels
            have one pixel each, in the order of the pixels.
    """

    order: int
    in_channels: int
    out_channels: int
    rank: int
    spatial_first: bool
    k: int
    stride: int
    padding: int
    dilation: int
    whole: bool = False

    def output(self, height: int, width: int) -> tuple[int, int]:
        """The height and the width of the output for a map of this height and width."""
        reach = 2 * self.padding - self.k
        return (height + reach) // self.stride + 1, (width + reach) // self.stride + 1


def is_supported_size(sizes: Sizes) -> bool:
    """Whether the kernel, where there is one, can run layers of this size."""
    s, _, _, _, _, k, _, padding, dilation, _ = sizes
    return dilation == 1 and k <= MAX_K and padding < k and s <= MAX_ORDER


def best(group: Group, sizes: Sizes, in_basis: bool) -> tuple[int, int] | None:
    """The fastest version for layers of a size, one item of :func:`variants`; None where there is no kernel."""
    costs = _estimated_costs(group, sizes, in_basis, variants())
    return min(variants().items(), key=lambda version: costs.get(version[0], math.inf)) if costs else None


def in_basis_pays(
    group: Group, out_channels: int, in_channels: int, stride: int, kernel: str | None = None
) -> bool | None:
    """Whether the kernel is faster with the mix in the irreducible representations of the group than without.

    Args:
        group: the layer's group.
        out_channels: O.
        in_channels: I.
        stride: the layer's stride.
        kernel: the class of the machine, one of :data:`KERNELS`; by default this machine's.

    Returns:
        None where there is no kernel.

    Raises:
        InputError: there is no such class.
    """
    sizes = Sizes(group.order, in_channels, out_channels, 1, False, 3, stride, 0, 1)
    candidates = variants() if kernel is None else variants_with(kernel)
    direct, irreps = (_estimated_costs(group, sizes, in_basis, candidates).values() for in_basis in (False, True))
    return min(irreps) < min(direct) if direct else None


def mixes_pay(group: Group, shape: FilterShape) -> bool:
    """Whether the kernel is to run a full filter as one mix for each entry of the filter, a ``gc_in`` of rank ``k k``.

    It does where the kernel is there, and this is clearly faster with its instruction set than the convolution with the
    expanded filter.
    """
    lanes = max(variants().values(), default=0)
    return lanes in MIXES and mixes_over_expanded(group, shape, lanes) < CLEARLY


MIXES = {16: (1.17, 1.53), 8: (0.94, 2.85)}
"""The constants of :func:`mixes_over_expanded` for AVX-512 and AVX2, by the number of floats of a vector.

They are what ``benchmarks/dispatch_fit.py`` finds in its record. With other vectors full layers are always expanded,
because PyTorch may use better instructions than the kernel.
"""

CLEARLY = 0.75
"""Full layers run as mixes where the estimate is below this. It may be too low by a sixth, and no layer is to become
slower than expanded."""


@cache
def mixes_over_expanded(group: Group, shape: FilterShape, lanes: int) -> float:
    """The estimated time of a full layer as mixes in the kernel, over that of the convolution with the expanded filter.

    Args:
        group: the layer's group.
        shape: ``(O, I, S, k)``.
        lanes: the number of floats of a vector.
    """
    return sum(map(mul, MIXES[lanes], shares_of_mixes(group, shape, lanes)))


def shares_of_mixes(group: Group, shape: FilterShape, lanes: int) -> tuple[float, float]:
    """The multiply-accumulates of the mixes of a full layer, and those of the changes of basis.

    Both are given over those of the expanded filter, with the products that vectors compute in vain where they are
    partly empty.
    """
    o, i, s, k = shape
    basis = basis_of(group)
    sizes = ((n, matrices.shape[1]) for n, matrices in zip(basis.copies, basis.matrices, strict=True))
    mixes = sum(n * d * rounded(d * o, lanes) for n, d in sizes)
    return mixes / (s * s * o), rounded(i, lanes) / (i * o) + rounded(o, lanes) / (o * i * k * k)


def basis_for(group: Group, in_basis: bool) -> Basis:
    """The basis in which a mix is done: that of the irreducible representations, or the plain one."""
    return basis_of(group) if in_basis else regular(group)


def _estimated_costs(group: Group, sizes: Sizes, in_basis: bool, candidates: dict[int, int]) -> dict[int, float]:
    """Estimated cost per output pixel of each candidate version, in multiply-accumulates.

    The candidates are in the form of :func:`variants`.

    Mixes and changes of basis are counted, with the products that vectors compute in vain where they are partly empty.
    Other work, such as transposing maps, is expressed in the same unit by constants. These were fitted to times of
    p2, pm, pmm, p4 and p4m layers of 2 to 32 channels on two cores; ``benchmarks/speed_layers.py`` records some of
    these sizes. Work that is the same in all versions is left out.
    """
    s, i, o, rank, spatial_first, _, stride, *_ = sizes
    basis = basis_for(group, in_basis)
    changed = (rank * i, o) if spatial_first else (i, rank * o)
    costs = {}
    for variant, lanes in candidates.items():
        sizes_of = ((n, matrices.shape[1]) for n, matrices in zip(basis.copies, basis.matrices, strict=True))
        mix = rank * sum(n * d * i * rounded(d * o, lanes) for n, d in sizes_of)
        values = s * in_basis * sum(rounded(channels, lanes) for channels in changed)
        if variant != OVER_PIXELS:
            costs[variant] = mix + (s + _BASIS_OVER_CHANNELS) * values
            break
        planes = s * (i + o + 2 * rank * (i if spatial_first else o))
        if stride == 1 and planes <= MAX_PLANES and not sizes.whole:
            costs[variant] = _MIX_OVER_PIXELS * mix + (s + _BASIS_OVER_PIXELS) * values + _TRANSPOSE * s * (i + o)
    return costs


def rounded(values: int, lanes: int) -> int:
    """The next multiple of ``lanes`` that is not smaller."""
    return values + -values % lanes
