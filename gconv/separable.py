"""The separable forms of a group-convolution filter: one place for each form's fold, factors, execution and cost.

A form folds the generator ``K [O, I, S, k, k]`` into one matrix per block, ``[blocks, rows, k k]``. A filter is
separable of rank R when every block is a product of factors with inner dimension R; both factors are stored with
shapes that say what they act on:

=====  ============  ====================  =====================  =====================  ===================
form   block         row                   ``mix``                ``spatial``            runs as
=====  ============  ====================  =====================  =====================  ===================
g      each (o, i)   s                     ``[O, I, R, S]``       ``[O, I, R, k, k]``    mix, then depthwise
gc     each o        (i, s)                ``[O, R, I, S]``       ``[O, R, k, k]``       mix, then depthwise
gc_in  each i        (o, t), own frame     ``[I, R, O, S]``       ``[I, R, k, k]``       depthwise, then mix
=====  ============  ====================  =====================  =====================  ===================

``g`` and ``gc`` at rank 1 are the layers of Lengyel & van Gemert (ICIP 2021). ``gc_in`` takes the kernel in the frame
of its input element, ``K[o, i, t, t y]``, so that one planar kernel per input channel, turned by the element of the map
that it reads, runs *before* the mix: ``K_s[o, i, s', y] = w[o, i, s^-1 s'] d[i, s'^-1 y]``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, one_of
from .functional import Sampling, Tables

Execution = Literal["dense", "factorized"]
EXECUTIONS: tuple[Execution, ...] = ("dense", "factorized")


class FilterShape(NamedTuple):
    """The size of a generator ``[O, I, S, k, k]``."""

    out_channels: int
    in_channels: int
    order: int
    k: int

    @classmethod
    def of(cls, weight: Tensor) -> FilterShape:
        """The shape of this generator."""
        o, i, s, k, _ = weight.shape
        return cls(o, i, s, k)


class Form(ABC):
    """A way to separate a filter into a group mix and planar kernels. Instances are stateless; see ``FORMS``.

    Attributes:
        name: what users write.
        default_execution: factorised, but for ``g``: run so it needs a map O R times the size of its input, so its
            dense filter is built from the factors instead.
        spatial_first: whether the planar kernels run before the mix, so that the mix sees the output's resolution.
    """

    name: ClassVar[str]
    default_execution: ClassVar[Execution] = "factorized"
    spatial_first: ClassVar[bool] = False

    # There is one object per form, also after a layer is copied or unpickled.
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return form_named, (self.name,)

    @abstractmethod
    def blocks(self, shape: FilterShape) -> int:
        """The number of matrices that a filter folds into."""

    @abstractmethod
    def fold(self, weight: Tensor, pixels: Tensor) -> Tensor:
        """The generator ``[O, I, S, k, k]`` as block matrices ``[blocks, rows, k k]``, a permutation of its entries.

        ``pixels`` is the table of that name in :class:`~gconv.functional.Tables`.
        """

    @abstractmethod
    def unfold(self, matrices: Tensor, shape: FilterShape, pixels: Tensor) -> Tensor:
        """The inverse of :meth:`fold`."""

    @abstractmethod
    def factor_shapes(self, shape: FilterShape, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of ``mix`` and ``spatial``."""

    @abstractmethod
    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        """How many inputs each output of the mix, and of the planar kernels, sums over when run factorised."""

    @abstractmethod
    def convolve(self, x: Tensor, mix: Tensor, spatial: Tensor, tables: Tables, sampling: Sampling) -> Tensor:
        """Run factorised: planar layout in ``[N, I S, H, W]`` and out ``[N, O S, H', W']``, without bias."""

    @abstractmethod
    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        """Multiply-accumulates a position of (the mix, the planar kernels) when run factorised."""

    def macs_by_map(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        """The same per position of the (input map, output map): the mix runs on whichever it reads."""
        mix, spatial = self.macs(shape, rank)
        return (0, mix + spatial) if self.spatial_first else (mix, spatial)

    def max_rank(self, shape: FilterShape) -> int:
        """The rank at which every filter is exactly separable: ``min(rows, k k)``."""
        mix, _ = self.factor_shapes(shape, 1)
        return min(math.prod(mix) // self.blocks(shape), shape.k**2)

    def parameters(self, shape: FilterShape, rank: int) -> int:
        """The number of entries of both factors."""
        return sum(math.prod(factor) for factor in self.factor_shapes(shape, rank))

    def generator(self, mix: Tensor, spatial: Tensor, shape: FilterShape, pixels: Tensor) -> Tensor:
        """The full filter ``[O, I, S, k, k]`` that the factors stand for; differentiable."""
        blocks, k2 = self.blocks(shape), shape.k**2
        rank = spatial.numel() // (blocks * k2)
        matrices = mix.reshape(blocks, rank, -1).mT @ spatial.reshape(blocks, rank, k2)
        return self.unfold(matrices, shape, pixels)

    def factor(self, weight: Tensor, rank: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The best factors of that rank in the Frobenius norm: a truncated SVD of every block, in float64.

        The singular values are shared evenly between the factors, so that both train at the same scale.

        Returns:
            ``mix`` and ``spatial`` in float64.

        Raises:
            InputError: the rank is out of range, or the weight is not finite.
        """
        shape = FilterShape.of(weight)
        self.check_rank(rank, shape)
        if not torch.isfinite(weight).all():
            raise InputError("the filter has NaN or infinite entries and cannot be factored")
        u, s, vh = torch.linalg.svd(self.fold(weight.detach().double(), pixels), full_matrices=False)
        root = s[:, :rank, None].sqrt()
        mix_shape, spatial_shape = self.factor_shapes(shape, rank)
        return (u.mT[:, :rank] * root).reshape(mix_shape), (vh[:, :rank] * root).reshape(spatial_shape)

    def check_rank(self, rank: int, shape: FilterShape) -> None:
        """Raises InputError unless ``1 <= rank <= max_rank``."""
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= self.max_rank(shape):
            of = f"form {self.name!r} of a {[*shape, shape.k]} filter"
            raise InputError(f"rank {rank!r} is out of range for {of}; accepted: 1 to {self.max_rank(shape)}")


class SharedPerPair(Form):
    """``g``: one planar kernel for each (output, input) channel pair, shared along the group axis."""

    name = "g"
    default_execution = "dense"

    def blocks(self, shape: FilterShape) -> int:
        return shape.out_channels * shape.in_channels

    def fold(self, weight: Tensor, pixels: Tensor) -> Tensor:
        return weight.flatten(3).flatten(0, 1)

    def unfold(self, matrices: Tensor, shape: FilterShape, pixels: Tensor) -> Tensor:
        return _as_generator(matrices, shape)

    def factor_shapes(self, shape: FilterShape, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        o, i, s, k = shape
        return (o, i, rank, s), (o, i, rank, k, k)

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.order, shape.in_channels * rank * shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        pairs = shape.out_channels * shape.in_channels * rank
        return pairs * shape.order**2, pairs * shape.order * shape.k**2

    def convolve(self, x: Tensor, mix: Tensor, spatial: Tensor, tables: Tables, sampling: Sampling) -> Tensor:
        o, i, rank, s = mix.shape
        k = spatial.shape[-1]
        # Mix every input channel on its own, for every output channel: I groups with O S R outputs each.
        w = mix.reshape(-1, s).index_select(1, tables.relative).view(o, i, rank, s, s)
        mixed = F.conv2d(x, w.permute(1, 0, 3, 2, 4).reshape(i * o * s * rank, s, 1, 1), groups=i)
        mixed = mixed.unflatten(1, (i, o * s, rank)).transpose(1, 2).flatten(1, 3)
        d = turned(spatial.flatten(1, 2), tables.pixels).reshape(o * s, i * rank, k, k)
        return F.conv2d(mixed, d, None, *sampling, groups=o * s)


class SharedPerOutput(Form):
    """``gc``: one planar kernel for each output channel, shared along the group axis and over input channels."""

    name = "gc"

    def blocks(self, shape: FilterShape) -> int:
        return shape.out_channels

    def fold(self, weight: Tensor, pixels: Tensor) -> Tensor:
        return weight.flatten(3).flatten(1, 2)

    def unfold(self, matrices: Tensor, shape: FilterShape, pixels: Tensor) -> Tensor:
        return _as_generator(matrices, shape)

    def factor_shapes(self, shape: FilterShape, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        o, i, s, k = shape
        return (o, rank, i, s), (o, rank, k, k)

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.in_channels * shape.order, rank * shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        maps = shape.out_channels * shape.order * rank
        return maps * shape.in_channels * shape.order, maps * shape.k**2

    def convolve(self, x: Tensor, mix: Tensor, spatial: Tensor, tables: Tables, sampling: Sampling) -> Tensor:
        o, rank, i, s = mix.shape
        k = spatial.shape[-1]
        w = mix.reshape(-1, s).index_select(1, tables.relative).view(o, rank, i, s, s)
        mixed = F.conv2d(x, w.permute(0, 3, 1, 2, 4).reshape(o * s * rank, i * s, 1, 1))
        d = turned(spatial, tables.pixels).reshape(o * s * rank, 1, k, k)
        y = F.conv2d(mixed, d, None, *sampling, groups=o * s * rank)
        # Depthwise and then a sum. A grouped convolution of R inputs each would sum too, but for R > 1 it is no longer
        # depthwise, the case that backends have a kernel for.
        return y if rank == 1 else y.unflatten(1, (o * s, rank)).sum(2)


class SharedPerInput(Form):
    """``gc_in``: one planar kernel for each input channel, turned by the element of the input map it reads.

    Folding takes the kernel in the frame of its input element, ``K'[o, i, t, y] = K[o, i, t, t y]``. Expanding
    ``K'`` gives ``K_s[o, i, s', y] = K'[o, i, s^-1 s', s'^-1 y]``: the planar part depends on s' alone, so it can run
    first.
    """

    name = "gc_in"
    spatial_first = True

    def blocks(self, shape: FilterShape) -> int:
        return shape.in_channels

    def fold(self, weight: Tensor, pixels: Tensor) -> Tensor:
        o, i, s, k, _ = weight.shape
        own_frame = weight.reshape(o, i, s * k * k).index_select(2, torch.argsort(_frame(pixels, s)))
        return own_frame.view(o, i, s, k * k).transpose(0, 1).flatten(1, 2)

    def unfold(self, matrices: Tensor, shape: FilterShape, pixels: Tensor) -> Tensor:
        o, i, s, k = shape
        own_frame = matrices.view(i, o, s * k * k).transpose(0, 1)
        return own_frame.index_select(2, _frame(pixels, s)).reshape(o, i, s, k, k)

    def factor_shapes(self, shape: FilterShape, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        o, i, s, k = shape
        return (i, rank, o, s), (i, rank, k, k)

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.in_channels * shape.order * rank, shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        maps = shape.in_channels * shape.order * rank
        return maps * shape.out_channels * shape.order, maps * shape.k**2

    def convolve(self, x: Tensor, mix: Tensor, spatial: Tensor, tables: Tables, sampling: Sampling) -> Tensor:
        i, rank, o, s = mix.shape
        k = spatial.shape[-1]
        d = turned(spatial, tables.pixels).reshape(i * s * rank, 1, k, k)
        filtered = F.conv2d(x, d, None, *sampling, groups=i * s)
        w = mix.reshape(-1, s).index_select(1, tables.relative).view(i, rank, o, s, s)
        return F.conv2d(filtered, w.permute(2, 3, 0, 4, 1).reshape(o * s, i * s * rank, 1, 1))


FORMS: dict[str, Form] = {form.name: form for form in (SharedPerPair(), SharedPerOutput(), SharedPerInput())}


def form_named(name: str | Form) -> Form:
    """The form of that name (case-insensitive).

    Raises:
        InputError: there is none.
    """
    if isinstance(name, Form):
        return name
    if not isinstance(name, str) or name.lower() not in FORMS:
        raise one_of("form", name, FORMS)
    return FORMS[name.lower()]


def check_execution(execution: str) -> Execution:
    """``execution`` if it is one of ``EXECUTIONS``.

    Raises:
        InputError: it is not.
    """
    for known in EXECUTIONS:
        if execution == known:
            return known
    raise one_of("execution", execution, EXECUTIONS)


def _as_generator(matrices: Tensor, shape: FilterShape) -> Tensor:
    o, i, s, k = shape
    return matrices.reshape(o, i, s, k, k)


def _frame(pixels: Tensor, order: int) -> Tensor:
    """``[S k k]`` indices that take a kernel in its own frame back: ``K[t, y] = K'[t, t^-1 y]``."""
    k2 = pixels.numel() // order
    return pixels + torch.arange(order, device=pixels.device).repeat_interleave(k2) * k2


def turned(spatial: Tensor, pixels: Tensor) -> Tensor:
    """All turned copies of planar kernels: ``[A, B, k, k]`` to ``[A, S, B, k, k]``, copy s being ``d[s^-1 y]``."""
    k = spatial.shape[-1]
    return spatial.flatten(2).index_select(2, pixels).unflatten(2, (-1, k, k)).transpose(1, 2)
