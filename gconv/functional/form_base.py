"""What the separable forms share: folding a filter into block matrices and back, its factors, their ranks and costs.

The forms themselves are in :mod:`gconv.functional.forms`, which says what they are.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from gconv.system.errors import InputError

from .expansion import Sampling, Tables
from .mixing import Basis

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
        block_axes: the channel axes that a planar kernel depends on, ``"oi"``, ``"o"`` or ``"i"``: the blocks. The
            other channel axes and the group axis make the rows.
        input_frame: whether every kernel is first turned back by the element that it reads, ``K[o, i, t, t y]``.
        executions: those that the form has.
        default_execution: factorised, but for the forms with a kernel per channel pair: run so they need a map O R
            times the size of their input, so their dense filter is built from the factors instead.
        spatial_first: whether the planar kernels run before the mix, so that the mix sees the output's resolution.
    """

    name: ClassVar[str]
    block_axes: ClassVar[str]
    input_frame: ClassVar[bool] = False
    executions: ClassVar[tuple[Execution, ...]] = ("dense", "factorized")
    default_execution: ClassVar[Execution] = "factorized"
    spatial_first: ClassVar[bool] = False

    # A form has no state: the copy that comes with a copied or unpickled layer is the same form.
    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(self.name)

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
        return 0 if "o" in self.block_axes else 2

    def blocks(self, shape: FilterShape) -> int:
        """The number of matrices that a filter folds into."""
        return math.prod(self._channels(shape)[0])

    def fold(self, weight: Tensor, pixels: Tensor) -> Tensor:
        """The generator ``[O, I, S, k, k]`` as block matrices ``[blocks, rows, k k]``, a permutation of its entries.

        ``pixels`` is the table of that name in :class:`~gconv.functional.expansion.Tables`.
        """
        o, i, s, k, _ = shape = weight.shape
        if self.input_frame:
            weight = weight.reshape(o, i, s * k * k).index_select(2, torch.argsort(_frame(pixels, s))).view(shape)
        return self._blocks_first(weight).reshape(self.blocks(FilterShape(o, i, s, k)), -1, k * k)

    def unfold(self, matrices: Tensor, shape: FilterShape, pixels: Tensor) -> Tensor:
        """The inverse of :meth:`fold`."""
        o, i, s, k = shape
        planar, others = self._channels(shape)
        weight = self._blocks_first(matrices.reshape(*planar, *others, s * k * k))  # an exchange undoes itself
        if self.input_frame:
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
        planar = tuple(sizes.pop(axis) for axis in self.block_axes)
        return planar, tuple(sizes.values())

    def _blocks_first(self, tensor: Tensor) -> Tensor:
        """Exchange the two leading axes, O and I, where the second is the one that the planar kernels depend on."""
        return tensor.transpose(0, 1) if self.block_axes == "i" else tensor


def _frame(pixels: Tensor, order: int) -> Tensor:
    """``[S k k]`` indices that take a kernel in its own frame back: ``K[t, y] = K'[t, t^-1 y]``."""
    k2 = pixels.numel() // order
    return pixels + torch.arange(order, device=pixels.device).repeat_interleave(k2) * k2
