"""What the separable forms share: how a filter folds into block matrices and back, its factors, ranks and costs.

:mod:`gconv.functional.forms` has the forms and explains them.
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
ExecutionChoice = Literal["auto", "dense", "factorized", "irrep"]
"""What a layer can be told: one execution, or ``auto``, which the machine resolves (:mod:`gconv.nn.execution`)."""


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
    """A way to separate a filter into group 1x1 mixing and spatial kernels. Instances are stateless; see ``FORMS``.

    Attributes:
        name: what users write.
        block_axes: the channel axes that number the blocks, ``"oi"``, ``"o"`` or ``"i"``. There is one spatial kernel
            for each block and rank. The rows of a block are the other channel axes and the group axis.
        input_frame: whether kernels are taken in the frame of the input element that they read, ``K[o, i, t, t y]``.
        executions: the executions that the form has.
        default_execution: ``"factorized"``, but ``"dense"`` for the forms with a spatial kernel for each channel pair.
            Factorised, these make maps with O R times the values of their input.
        spatial_first: whether the spatial kernels run before the mixing, which then runs at the output's resolution.
    """

    name: ClassVar[str]
    block_axes: ClassVar[str]
    input_frame: ClassVar[bool] = False
    executions: ClassVar[tuple[Execution, ...]] = ("dense", "factorized")
    default_execution: ClassVar[Execution] = "factorized"
    spatial_first: ClassVar[bool] = False

    # A form has no state, so a copied or unpickled one is equal to the original.
    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(self.name)

    @abstractmethod
    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        """The number of inputs that each output of (the mixing, the spatial kernels) sums over when run factorised."""

    @abstractmethod
    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        """Multiply-accumulates per position of (the mixing, the spatial kernels) when run factorised."""

    @abstractmethod
    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        """The two filters that :meth:`run` needs, for the mixing and for the plane. A ``basis`` is to mix in."""

    @abstractmethod
    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        """Run factorised, from ``[N, S I, H, W]`` to ``[N, S O, H', W']``, both group-major.

        Args:
            x: the input.
            w: the first of the two :meth:`filters`.
            d: the second.
            bias: ``[S O]``.
            shape: of the generator.
            rank: R.
            sampling: stride, padding and dilation.
        """

    def convolutions(
        self, mix: Tensor, spatial: Tensor, tables: Tables, sampling: Sampling
    ) -> tuple[tuple[Convolution, ...], ...] | None:
        """:meth:`run` as a sum of terms, each a chain of ordinary convolutions; None if the form needs more."""
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
            into_frame = torch.argsort(_from_input_frame(pixels, s))
            weight = weight.reshape(o, i, s * k * k).index_select(2, into_frame).view(shape)
        return self._blocks_first(weight).reshape(self.blocks(FilterShape(o, i, s, k)), -1, k * k)

    def unfold(self, matrices: Tensor, shape: FilterShape, pixels: Tensor) -> Tensor:
        """The inverse of :meth:`fold`."""
        o, i, s, k = shape
        blocks, others = self._channels(shape)
        weight = self._blocks_first(matrices.reshape(*blocks, *others, s * k * k))  # an exchange undoes itself
        if self.input_frame:
            weight = weight.index_select(2, _from_input_frame(pixels, s))
        return weight.reshape(o, i, s, k, k)

    def factor_shapes(self, shape: FilterShape, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of ``mix`` and ``spatial``."""
        blocks, others = self._channels(shape)
        return (*blocks, rank, *others, shape.order), (*blocks, rank, shape.k, shape.k)

    def macs_by_map(self, shape: FilterShape, rank: int, basis: Basis | None = None) -> tuple[int, int]:
        """Multiply-accumulates per position of the (input map, output map) when run factorised.

        The mixing counts for the map that it reads. With a ``basis`` it is mixing in that basis, including the changes
        of basis.
        """
        mix, spatial = self.macs(shape, rank)
        if basis is not None:
            o, i, s, _ = shape
            changed = (i * rank + o) if self.spatial_first else (i + o * rank)  # channels whose basis changes
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
        """The full filter ``[O, I, S, k, k]`` of these factors; differentiable."""
        blocks, k2 = self.blocks(shape), shape.k**2
        rank = spatial.numel() // (blocks * k2)
        matrices = mix.reshape(blocks, rank, -1).mT @ spatial.reshape(blocks, rank, k2)
        return self.unfold(matrices, shape, pixels)

    def factor(self, weight: Tensor, rank: int, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The best factors of that rank in the Frobenius norm: a truncated SVD of every block, in float64.

        Each factor gets the square roots of the singular values, so that both train at the same scale.

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
        """The sizes of the channel axes that number the blocks, and of the others."""
        sizes = {"o": shape.out_channels, "i": shape.in_channels}
        blocks = tuple(sizes.pop(axis) for axis in self.block_axes)
        return blocks, tuple(sizes.values())

    def _blocks_first(self, tensor: Tensor) -> Tensor:
        """Exchange the two leading axes, O and I, where I numbers the blocks."""
        return tensor.transpose(0, 1) if self.block_axes == "i" else tensor


def _from_input_frame(pixels: Tensor, order: int) -> Tensor:
    """``[S k k]`` indices that undo the input frame: ``K[t, y] = K'[t, t^-1 y]``."""
    k2 = pixels.numel() // order
    return pixels + torch.arange(order, device=pixels.device).repeat_interleave(k2) * k2
