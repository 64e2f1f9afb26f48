"""The separable forms of a group-convolution filter: one place for each form's fold, factors, execution and cost.

A form folds the generator ``K [O, I, S, k, k]`` into one matrix per block, ``[blocks, rows, k k]``. A filter is
separable of rank R when every block is a product of factors with inner dimension R; both factors are stored with
shapes that say what they act on:

=========  ============  ======  =========  ====================  ====================  ===================
form       block         row     own frame  ``mix``               ``spatial``           runs as
=========  ============  ======  =========  ====================  ====================  ===================
g          each (o, i)   s       no         ``[O, I, R, S]``      ``[O, I, R, k, k]``   mix, then depthwise
gc         each o        (i, s)  no         ``[O, R, I, S]``      ``[O, R, k, k]``      mix, then depthwise
gc_in      each i        (o, t)  yes        ``[I, R, O, S]``      ``[I, R, k, k]``      depthwise, then mix
g_turned   each (o, i)   t       yes        ``[O, I, R, S]``      ``[O, I, R, k, k]``   depthwise, then mix
gc_turned  each o        (i, t)  yes        ``[O, R, I, S]``      ``[O, R, k, k]``      mix, then depthwise
=========  ============  ======  =========  ====================  ====================  ===================

``g`` and ``gc`` at rank 1 are the layers of Lengyel & van Gemert (ICIP 2021). The forms in their *own frame* first turn
every kernel back by the element of the input map that it reads, ``K'[o, i, t, y] = K[o, i, t, t y]``. Expanding ``K'``
gives ``K_s[o, i, s', y] = K'[o, i, s^-1 s', s'^-1 y]``: the planar part depends on the input element s' alone, where
that of the others, ``d[s^-1 y]``, depends on the output element s. For ``gc_in``, that lets one planar kernel per input
channel, turned by s', run *before* the mix.

How a layer runs is a choice of its own and changes nothing but rounding: ``dense`` builds the full filter,
``factorized`` is the last column, and ``irrep``, for ``gc`` and ``gc_in``, is that with the mix in the irreducible
representations of the group (:mod:`gconv.functional.mixing`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import reduce
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gconv.system.errors import InputError, one_of

from .expansion import Sampling, Tables, from_group_major, to_group_major
from .mixing import Basis, DirectMixing, IrrepMixing, Mixing

Execution = Literal["dense", "factorized", "irrep"]
EXECUTIONS: tuple[Execution, ...] = ("dense", "factorized", "irrep")


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


class Convolution(NamedTuple):
    """An ordinary convolution: its filter ``[O, I / groups, k, k]``, channel groups, and how it samples the plane."""

    filter: Tensor
    groups: int
    sampling: Sampling


class Form(ABC):
    """A way to separate a filter into a group mix and planar kernels. Instances are stateless; see ``FORMS``.

    Attributes:
        name: what users write.
        planar_axes: the channel axes that a planar kernel depends on, ``"oi"``, ``"o"`` or ``"i"``: the blocks. The
            other channel axes and the group axis make the rows.
        own_frame: whether every kernel is first turned back by the element that it reads, ``K[o, i, t, t y]``.
        executions: those that the form has.
        default_execution: factorised, but for the forms with a kernel per channel pair: run so they need a map O R
            times the size of their input, so their dense filter is built from the factors instead.
        spatial_first: whether the planar kernels run before the mix, so that the mix sees the output's resolution.
    """

    name: ClassVar[str]
    planar_axes: ClassVar[str]
    own_frame: ClassVar[bool] = False
    executions: ClassVar[tuple[Execution, ...]] = ("dense", "factorized")
    default_execution: ClassVar[Execution] = "factorized"
    spatial_first: ClassVar[bool] = False

    # There is one object per form, also after a layer is copied or unpickled.
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return form_named, (self.name,)

    @abstractmethod
    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        """How many inputs each output of the mix, and of the planar kernels, sums over when run factorised."""

    @abstractmethod
    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        """Multiply-accumulates a position of (the mix, the planar kernels) when run factorised."""

    @abstractmethod
    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        """What :meth:`run` mixes with, and its filter for the plane; with a ``basis``, to mix in that."""

    @abstractmethod
    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        """Run factorised, with the two :meth:`filters` and a bias ``[S O]``.

        From ``[N, S I, H, W]`` to ``[N, S O, H', W']``, both group-major.
        """

    def convolutions(
        self, mix: Tensor, spatial: Tensor, tables: Tables, sampling: Sampling
    ) -> tuple[tuple[Convolution, ...], ...] | None:
        """:meth:`run` as a sum of terms, each of ordinary convolutions in a row; None if it is more than that."""
        return None

    @property
    def output_axis(self) -> int:
        """The axis of ``mix`` that counts output channels."""
        return 0 if "o" in self.planar_axes else 2

    def blocks(self, shape: FilterShape) -> int:
        """The number of matrices that a filter folds into."""
        return math.prod(self._channels(shape)[0])

    def fold(self, weight: Tensor, pixels: Tensor) -> Tensor:
        """The generator ``[O, I, S, k, k]`` as block matrices ``[blocks, rows, k k]``, a permutation of its entries.

        ``pixels`` is the table of that name in :class:`~gconv.functional.expansion.Tables`.
        """
        o, i, s, k, _ = shape = weight.shape
        if self.own_frame:
            weight = weight.reshape(o, i, s * k * k).index_select(2, torch.argsort(_frame(pixels, s))).view(shape)
        return self._planar_first(weight).reshape(self.blocks(FilterShape(o, i, s, k)), -1, k * k)

    def unfold(self, matrices: Tensor, shape: FilterShape, pixels: Tensor) -> Tensor:
        """The inverse of :meth:`fold`."""
        o, i, s, k = shape
        planar, others = self._channels(shape)
        weight = self._planar_first(matrices.reshape(*planar, *others, s * k * k))  # an exchange undoes itself
        if self.own_frame:
            weight = weight.index_select(2, _frame(pixels, s))
        return weight.reshape(o, i, s, k, k)

    def factor_shapes(self, shape: FilterShape, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of ``mix`` and ``spatial``."""
        planar, others = self._channels(shape)
        return (*planar, rank, *others, shape.order), (*planar, rank, shape.k, shape.k)

    def macs_by_map(self, shape: FilterShape, rank: int, basis: Basis | None = None) -> tuple[int, int]:
        """The same per position of the (input map, output map): the mix runs on whichever it reads.

        With a ``basis``, of the mix in that, the changes of basis included.
        """
        mix, spatial = self.macs(shape, rank)
        if basis is not None:
            o, i, s, _ = shape
            changed = (i * rank + o) if self.spatial_first else (i + o * rank)  # channels, each changed once
            mix = o * i * rank * basis.macs + changed * s**2
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

    def _channels(self, shape: FilterShape) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The sizes of the channel axes that the planar kernels depend on, and of the others."""
        sizes = {"o": shape.out_channels, "i": shape.in_channels}
        planar = tuple(sizes.pop(axis) for axis in self.planar_axes)
        return planar, tuple(sizes.values())

    def _planar_first(self, tensor: Tensor) -> Tensor:
        """Exchange the two leading axes, O and I, where the second is the one that the planar kernels depend on."""
        return tensor.transpose(0, 1) if self.planar_axes == "i" else tensor


class SharedPerPair(Form):
    """``g``: one planar kernel for each (output, input) channel pair, shared along the group axis."""

    name = "g"
    planar_axes = "oi"
    default_execution = "dense"

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.order, shape.in_channels * rank * shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        pairs = shape.out_channels * shape.in_channels * rank
        return pairs * shape.order**2, pairs * shape.order * shape.k**2

    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        o, i, rank, s = mix.shape
        k = spatial.shape[-1]
        # Mix every input channel on its own, for every output channel: I groups with O S R outputs each.
        w = seen(mix, tables.relative).permute(1, 0, 3, 2, 4).reshape(i * o * s * rank, s, 1, 1)
        return w, turned(spatial.flatten(1, 2), tables.pixels).reshape(o * s, i * rank, k, k)

    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        o, i, s, _ = shape
        x = _channel_major(x, s)
        mixed = F.conv2d(x, w, groups=i).unflatten(1, (i, o * s, rank)).transpose(1, 2).flatten(1, 3)
        return _group_major(F.conv2d(mixed, d, None, *sampling, groups=o * s), s, bias)


class SharedPerOutput(Form):
    """``gc``: one planar kernel for each output channel, shared along the group axis and over input channels."""

    name = "gc"
    planar_axes = "o"
    executions = EXECUTIONS

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.in_channels * shape.order, rank * shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        maps = shape.out_channels * shape.order * rank
        return maps * shape.in_channels * shape.order, maps * shape.k**2

    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        # The axes are (o, r, i) and then what the group axis becomes.
        return _mixing(mix, "oriuv->ruovi", "oriu,uab->raobi", tables, basis), _planes(spatial, tables)

    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        mixing: Mixing = w
        # One term of the sum after the other, each with a depthwise convolution, for which backends have a kernel. All
        # terms at once and then their sum would also leave the memory format.
        return _sum(
            F.conv2d(mixed, plane, bias if number == 0 else None, *sampling, groups=len(plane))
            for number, (mixed, plane) in enumerate(zip(mixing.each(x), d.unbind(), strict=True))
        )

    def convolutions(
        self, mix: Tensor, spatial: Tensor, tables: Tables, sampling: Sampling
    ) -> tuple[tuple[Convolution, ...], ...] | None:
        mixing, planes = self.filters(mix, spatial, tables)
        return tuple(
            (Convolution(one[:, :, None, None], 1, Sampling()), Convolution(plane, len(plane), sampling))
            for one, plane in zip(mixing.weights, planes, strict=True)
        )


class SharedPerInput(Form):
    """``gc_in``: one planar kernel for each input channel, turned by the element of the input map that it reads."""

    name = "gc_in"
    planar_axes = "i"
    own_frame = True
    executions = EXECUTIONS
    spatial_first = True

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.in_channels * shape.order * rank, shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        maps = shape.in_channels * shape.order * rank
        return maps * shape.out_channels * shape.order, maps * shape.k**2

    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        # The axes are (i, r, o) and then what the group axis becomes.
        return _mixing(mix, "irouv->ruovi", "irou,uab->raobi", tables, basis), _planes(spatial, tables)

    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        mixing: Mixing = w
        return mixing.total((F.conv2d(x, plane, None, *sampling, groups=len(plane)) for plane in d.unbind()), bias)

    def convolutions(
        self, mix: Tensor, spatial: Tensor, tables: Tables, sampling: Sampling
    ) -> tuple[tuple[Convolution, ...], ...] | None:
        mixing, planes = self.filters(mix, spatial, tables)
        return tuple(
            (Convolution(plane, len(plane), sampling), Convolution(one[:, :, None, None], 1, Sampling()))
            for one, plane in zip(mixing.weights, planes, strict=True)
        )


class RotatedPerPair(Form):
    """``g_turned``: one planar kernel for each (output, input) channel pair, turned by the element that it reads."""

    name = "g_turned"
    planar_axes = "oi"
    own_frame = True
    default_execution = "dense"
    spatial_first = True

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.in_channels * shape.order * rank, shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        maps = shape.out_channels * shape.in_channels * shape.order * rank
        return maps * shape.order, maps * shape.k**2

    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        o, i, rank, s = mix.shape
        k = spatial.shape[-1]
        w = seen(mix, tables.relative).permute(0, 3, 1, 4, 2).reshape(o * s, i * s * rank, 1, 1)
        # Every input map is filtered for every output channel: I S groups with O R outputs each.
        d = turned(spatial.flatten(0, 1), tables.pixels).unflatten(0, (o, i)).permute(1, 2, 0, 3, 4, 5)
        return w, d.reshape(i * s * o * rank, 1, k, k)

    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        o, i, s, _ = shape
        filtered = F.conv2d(_channel_major(x, s), d, None, *sampling, groups=i * s)
        mixed = F.conv2d(filtered.unflatten(1, (i * s, o, rank)).transpose(1, 2).flatten(1, 3), w, groups=o)
        return _group_major(mixed, s, bias)


class RotatedPerOutput(Form):
    """``gc_turned``: one planar kernel for each output channel, turned by the element of the input map that it reads.

    As the planar part depends on s' and the mix on both s and s', there are maps for all pairs of elements: the planar
    part costs S times that of ``gc``.
    """

    name = "gc_turned"
    planar_axes = "o"
    own_frame = True

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.in_channels, shape.order * rank * shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        maps = shape.out_channels * shape.order**2 * rank
        return maps * shape.in_channels, maps * shape.k**2

    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        o, rank, i, s = mix.shape
        k = spatial.shape[-1]
        # S filters one after the other, one for the maps of each input element, with R S O outputs.
        w = seen(mix, tables.relative).permute(4, 1, 3, 0, 2).reshape(s * rank * s * o, i, 1, 1)
        d = turned(spatial, tables.pixels).permute(1, 2, 0, 3, 4).unsqueeze(2).expand(s, rank, s, o, k, k)
        return w, d.reshape(s * rank * s * o, 1, k, k)

    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        s = shape.order

        def of_element(maps: Tensor, w: Tensor, d: Tensor) -> Tensor:
            y = F.conv2d(F.conv2d(maps, w), d, None, *sampling, groups=len(d))
            return y if rank == 1 else y.unflatten(1, (rank, -1)).sum(1)

        # One input element after the other: all at once would need maps S times the size.
        total = reduce(torch.add, map(of_element, x.chunk(s, 1), w.chunk(s), d.chunk(s)))
        return total if bias is None else total + bias.view(-1, 1, 1)


FORMS: dict[str, Form] = {
    form.name: form
    for form in (SharedPerPair(), SharedPerOutput(), SharedPerInput(), RotatedPerPair(), RotatedPerOutput())
}


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


def check_execution(execution: str, form: Form | None = None) -> Execution:
    """``execution`` if it is one of ``EXECUTIONS``, or one that a form has.

    Raises:
        InputError: it is not.
    """
    if execution not in EXECUTIONS:
        raise one_of("execution", execution, EXECUTIONS)
    for known in EXECUTIONS if form is None else form.executions:
        if execution == known:
            return known
    assert form is not None
    having = ", ".join(name for name, other in FORMS.items() if execution in other.executions)
    raise InputError(
        f"form {form.name!r} has no execution {execution!r}, which is for {having}; accepted: "
        + ", ".join(form.executions)
    )


def _mixing(mix: Tensor, direct: str, in_blocks: str, tables: Tables, basis: Basis | None) -> Mixing:
    """The mixes of a form, group-major; the two strings say, as of ``einsum``, where the axes of ``mix`` go."""
    if basis is None:
        before, after = direct.split("->")
        weights = seen(mix, tables.relative).permute([before.index(axis) for axis in after])
        rank, s, o, _, i = weights.shape
        return DirectMixing(weights.reshape(rank, s * o, s * i))
    weights_of = [torch.einsum(in_blocks, mix, matrices.to(mix)) for matrices in basis.matrices]
    return IrrepMixing(basis.basis.to(mix), basis.copies, tuple(w.flatten(3, 4).flatten(1, 2) for w in weights_of))


def _planes(spatial: Tensor, tables: Tables) -> Tensor:
    """``[C, R, k, k]`` as the filters ``[R, S C, 1, k, k]`` of depthwise convolutions."""
    k = spatial.shape[-1]
    copies = turned(spatial, tables.pixels).permute(2, 1, 0, 3, 4)
    return copies.reshape(spatial.shape[1], -1, 1, k, k)


def _channel_major(x: Tensor, order: int) -> Tensor:
    """Group-major maps with channel c and element s as channel ``c S + s``."""
    return from_group_major(x, order).flatten(1, 2)


def _group_major(x: Tensor, order: int, bias: Tensor | None) -> Tensor:
    """The inverse, and a bias ``[S O]`` added."""
    x = to_group_major(x.unflatten(1, (-1, order)))
    return x if bias is None else x + bias.view(-1, 1, 1)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    """In place, as every term is fresh."""
    total = next(terms)
    for term in terms:
        total += term
    return total


def _frame(pixels: Tensor, order: int) -> Tensor:
    """``[S k k]`` indices that take a kernel in its own frame back: ``K[t, y] = K'[t, t^-1 y]``."""
    k2 = pixels.numel() // order
    return pixels + torch.arange(order, device=pixels.device).repeat_interleave(k2) * k2


def seen(mix: Tensor, relative: Tensor) -> Tensor:
    """A mix as every output element sees it: ``[..., S]`` to ``[..., S, S]``, entry (s, s') being ``w[s^-1 s']``."""
    s = mix.shape[-1]
    return mix.reshape(-1, s).index_select(1, relative).view(*mix.shape, s)


def turned(spatial: Tensor, pixels: Tensor) -> Tensor:
    """All turned copies of planar kernels: ``[A, B, k, k]`` to ``[A, S, B, k, k]``, copy s being ``d[s^-1 y]``."""
    k = spatial.shape[-1]
    return spatial.flatten(2).index_select(2, pixels).unflatten(2, (-1, k, k)).transpose(1, 2)
