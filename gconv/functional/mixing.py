"""The group 1x1 (pointwise) mixing of the forms ``gc`` and ``gc_in``, direct or in irreducible representations.

Maps are planar and group-major, ``[N, S C, H, W]`` with channel ``s C + c``. So the channels of one group element are
neighbours in memory. After the change of basis, so are the channels of one basis function. A matrix product reads such
a block without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv.groups.irreps import regular_blocks
from gconv.groups.point_groups import Group

_OVERHEAD = 94
"""Cost of a change of basis by PyTorch, in multiply-accumulates per value of the maps that it reads and writes.

Most of its time goes into moving memory. The number was fitted to times of p4 and p4m layers of 28 to 128 channels on
two cores, when direct mixing was a matrix product at every size. ``benchmarks/speed_layers.py`` measures the rule.
"""


class Basis(NamedTuple):
    """The regular representation of a group in blocks (:mod:`gconv.groups.irreps`), as tensors.

    Attributes:
        basis: ``[S, S]``, orthogonal.
        copies: for each irreducible representation, how often it occurs.
        matrices: for each irreducible representation ``[S, d, d]``, how the group elements act on it.
    """

    basis: Tensor
    copies: tuple[int, ...]
    matrices: tuple[Tensor, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the mixing for each pair of channels, without the changes of basis."""
        return sum(n * m.shape[1] ** 2 for n, m in zip(self.copies, self.matrices, strict=True))

    def pays(self, out_channels: int, in_channels: int) -> bool:
        """Whether mixing by PyTorch's operations is faster in this basis than direct."""
        order, pairs = len(self.basis), out_channels * in_channels
        return self.macs * pairs + _OVERHEAD * order * (out_channels + in_channels) < order**2 * pairs


@cache
def basis_of(group: Group) -> Basis:
    """The basis of a group in float64 on the CPU. Its tensors are shared: do not change them."""
    found = regular_blocks(group)
    matrices = tuple(torch.from_numpy(block.matrices.copy()) for block in found.blocks)
    return Basis(torch.from_numpy(found.basis.copy()), tuple(block.copies for block in found.blocks), matrices)


@cache
def regular(group: Group) -> Basis:
    """Direct mixing in the same terms: the standard basis, in which the regular representation is one block."""
    elements = np.arange(group.order).reshape(-1, 1, 1)
    matrices = (group.relative_table() == elements).astype(np.float64)
    # From NumPy, because PyTorch may be set to make tensors on another device.
    return Basis(torch.from_numpy(np.eye(group.order)), (1,), (torch.from_numpy(matrices),))


_bases: dict[tuple[Group, torch.device, torch.dtype], Basis] = {}


def basis_like(group: Group, like: Tensor) -> Basis:
    """The basis of a group on the device and in the type of a tensor.

    It is kept, because a copy to a GPU in each pass would stall that. Two kinds of passes get a new one. A
    ``FakeTensorMode`` accepts no tensors but its own. ``torch.jit.trace`` refuses two passes with different operations.
    """
    if type(like) not in (Tensor, nn.Parameter) or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return _new_basis(group, like)
    key = group, like.device, like.dtype
    found = _bases.get(key)
    if found is None:
        with torch.inference_mode(False):  # passes with gradients will use it too
            found = _new_basis(group, like)
        if type(found.basis) is Tensor:
            _bases[key] = found
    return found


def _new_basis(group: Group, like: Tensor) -> Basis:
    blocks = regular_blocks(group)
    matrices = (block.matrices for block in blocks.blocks)
    basis, *others = (torch.tensor(a, dtype=like.dtype, device=like.device) for a in (blocks.basis, *matrices))
    return Basis(basis, tuple(block.copies for block in blocks.blocks), tuple(others))


class Mixing(Protocol):
    """R linear maps from ``[N, S I, H, W]`` to ``[N, S O, H, W]``, the terms of a filter of rank R."""

    def each(self, x: Tensor) -> Iterator[Tensor]:
        """The outputs of all R terms for one input, one after the other."""

    def total(self, maps: Iterable[Tensor], bias: Tensor | None) -> Tensor:
        """The sum over the terms, each with its own input, plus a bias ``[S O]`` that is the same for all elements."""


@dataclass(frozen=True, eq=False)
class DirectMixing:
    """Mixing as 1x1 convolutions.

    Attributes:
        weights: ``[R, S O, S I]``.
    """

    weights: Tensor

    def each(self, x: Tensor) -> Iterator[Tensor]:
        for weight in self.weights.unbind():
            yield _pointwise(x, weight, None)

    def total(self, maps: Iterable[Tensor], bias: Tensor | None) -> Tensor:
        terms = zip(maps, self.weights.unbind(), strict=True)
        x, weight = next(terms)
        total = _pointwise(x, weight, bias)
        for x, weight in terms:
            total += _pointwise(x, weight, None)
        return total


@dataclass(frozen=True, eq=False)
class IrrepMixing:
    """Mixing between two changes of basis, as one small matrix product for each copy of an irreducible representation.

    Attributes:
        basis: ``[S, S]``, in the type and on the device of the maps.
        copies: for each representation, how often it occurs.
        weights: for each representation ``[R, d O, d I]``.
    """

    basis: Tensor
    copies: tuple[int, ...]
    weights: tuple[Tensor, ...]

    def each(self, x: Tensor) -> Iterator[Tensor]:
        changed = _in_basis(_rows(x), self.basis.mT)
        for number in range(len(self.weights[0])):
            yield _maps(_in_basis(self._products(changed, number, None), self.basis), x)

    def total(self, maps: Iterable[Tensor], bias: Tensor | None) -> Tensor:
        if bias is not None:  # the same for all elements: in the basis, only the trivial representation has a bias
            bias = torch.outer(self.basis.sum(0), bias.chunk(len(self.basis))[0]).flatten()
        total: Tensor | None = None
        for number, x in enumerate(maps):
            products = self._products(_in_basis(_rows(x), self.basis.mT), number, bias if total is None else None)
            total = products if total is None else total.add_(products)
        assert total is not None
        return _maps(_in_basis(total, self.basis), x)

    def _products(self, rows: Tensor, number: int, bias: Tensor | None) -> Tensor:
        """Term ``number`` of ``[P, S I]``, giving ``[P, S O]``, both in the basis."""
        weights = [w[number] for w, n in zip(self.weights, self.copies, strict=True) for _ in range(n)]
        parts = rows.split([w.shape[1] for w in weights], 1)
        biases = [None] * len(weights) if bias is None else bias.split([w.shape[0] for w in weights])
        return torch.cat([F.linear(*part) for part in zip(parts, weights, biases, strict=True)], 1)


_SMALL = 1 << 26
"""Up to so many multiply-accumulates the mixing is a matrix product, because a convolution takes longer to prepare."""


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution. A small one of a channels-last map is computed as a matrix product."""
    if x.stride(1) == 1 and x.numel() * len(weight) <= _SMALL:
        return _maps(F.linear(_rows(x), weight, bias), x)
    return F.conv2d(x, weight[:, :, None, None], bias)


def _in_basis(rows: Tensor, change: Tensor) -> Tensor:
    """``[P, S C]`` after the change of basis ``[S, S]`` of its group axis."""
    return torch.matmul(change, rows.unflatten(1, (len(change), rows.shape[1] // len(change)))).flatten(1)


def _rows(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N H W, C]``."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    """``[N H W, C]`` as ``[N, C, H, W]``, with N, H and W of ``like``."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2)
