"""The 1x1 group mix of the forms ``gc`` and ``gc_in``, run directly or in the irreducible representations of the group.

Maps are planar and group-major, ``[N, S C, H, W]`` with channel ``s C + c``: then everything that belongs to one group
element, or after the change of basis to one basis function, is a block of neighbouring channels, which a matrix product
takes as it lies in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gconv.groups.irreps import regular_blocks
from gconv.groups.point_groups import Group

_OVERHEAD = 94
"""What a change of basis by PyTorch costs for each value of the maps that it reads and writes, in multiply-accumulates.

It moves memory, mostly. Fitted to times of p4 and p4m layers of 28 to 128 channels on two cores, when direct mixes were
matrix products at every size; ``benchmarks/speed_layers.py`` measures what the rule gives.
"""


class Basis(NamedTuple):
    """The regular representation of a group in blocks (:mod:`gconv.groups.irreps`), as float64 tensors on the CPU.

    Attributes:
        basis: ``[S, S]``.
        copies: of each representation.
        matrices: of each representation, ``[S, d, d]``.
    """

    basis: Tensor
    copies: tuple[int, ...]
    matrices: tuple[Tensor, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a mix for each pair of channels, without the changes of basis."""
        return sum(n * m.shape[1] ** 2 for n, m in zip(self.copies, self.matrices, strict=True))

    def pays(self, out_channels: int, in_channels: int) -> bool:
        """Whether a mix by PyTorch's operations is faster in this basis than direct."""
        order, pairs = len(self.basis), out_channels * in_channels
        return self.macs * pairs + _OVERHEAD * order * (out_channels + in_channels) < order**2 * pairs


@cache
def basis_of(group: Group) -> Basis:
    """The basis for a group; the tensors are shared and are not to be changed."""
    found = regular_blocks(group)
    matrices = tuple(torch.from_numpy(block.matrices.copy()) for block in found.blocks)
    return Basis(torch.from_numpy(found.basis.copy()), tuple(block.copies for block in found.blocks), matrices)


@cache
def regular(group: Group) -> Basis:
    """Direct mixing in the same terms: the regular representation as it is, one block of size S."""
    elements = np.arange(group.order).reshape(-1, 1, 1)
    seen = (group.relative_table() == elements).astype(np.float64)
    # From NumPy, as PyTorch may be set to make tensors on another device.
    return Basis(torch.from_numpy(np.eye(group.order)), (1,), (torch.from_numpy(seen),))


@cache
def basis_on(group: Group, device: torch.device, dtype: torch.dtype) -> Basis:
    """The same on a device and in a type. Kept: to copy it there in every pass would hold up the queue of a GPU."""
    basis, copies, matrices = basis_of(group)
    with torch.inference_mode(False):  # also passes with gradients are to use it
        return Basis(basis.to(device, dtype), copies, tuple(m.to(device, dtype) for m in matrices))


class Mixing(Protocol):
    """R mixes ``[N, S I, H, W]`` to ``[N, S O, H, W]``, each with its own weights."""

    def each(self, x: Tensor) -> Iterator[Tensor]:
        """Every mix of one map, one after the other."""

    def total(self, maps: Iterable[Tensor], bias: Tensor | None) -> Tensor:
        """The sum of the mixes, each of its own map, plus a bias ``[S O]`` that repeats itself S times."""


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
    """Mixing as one small matrix product for each copy of a representation, between two changes of basis.

    Attributes:
        basis: ``[S, S]``, in the type and on the device of the maps.
        copies: of each representation.
        weights: of each representation, ``[R, d O, d I]``.
    """

    basis: Tensor
    copies: tuple[int, ...]
    weights: tuple[Tensor, ...]

    def each(self, x: Tensor) -> Iterator[Tensor]:
        turned = _in_basis(_rows(x), self.basis.mT)
        for number in range(len(self.weights[0])):
            yield _maps(_in_basis(self._products(turned, number, None), self.basis), x)

    def total(self, maps: Iterable[Tensor], bias: Tensor | None) -> Tensor:
        if bias is not None:  # the same for all elements, so in the basis only the trivial representation has one
            bias = torch.outer(self.basis.sum(0), bias.chunk(len(self.basis))[0]).flatten()
        total: Tensor | None = None
        for number, x in enumerate(maps):
            products = self._products(_in_basis(_rows(x), self.basis.mT), number, bias if total is None else None)
            total = products if total is None else total.add_(products)
        assert total is not None
        return _maps(_in_basis(total, self.basis), x)

    def _products(self, rows: Tensor, number: int, bias: Tensor | None) -> Tensor:
        """Mix number ``number`` of ``[P, S I]`` to ``[P, S O]``, in the basis."""
        weights = [w[number] for w, n in zip(self.weights, self.copies, strict=True) for _ in range(n)]
        parts = rows.split([w.shape[1] for w in weights], 1)
        biases = [None] * len(weights) if bias is None else bias.split([w.shape[0] for w in weights])
        return torch.cat([F.linear(*part) for part in zip(parts, weights, biases, strict=True)], 1)


_SMALL = 1 << 26
"""Multiply-accumulates up to which the mix is a matrix product: a convolution prepares more."""


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution; a small one, where the channels lie together, as the matrix product that it is."""
    if x.stride(1) == 1 and x.numel() * len(weight) <= _SMALL:
        return _maps(F.linear(_rows(x), weight, bias), x)
    return F.conv2d(x, weight[:, :, None, None], bias)


def _in_basis(rows: Tensor, change: Tensor) -> Tensor:
    """``[P, S C]`` after a change ``[S, S]`` of the basis of the group axis."""
    return torch.matmul(change, rows.unflatten(1, (len(change), rows.shape[1] // len(change)))).flatten(1)


def _rows(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as ``[N H W, C]``."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    """``[N H W, C]`` as maps of the size of ``like``."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, rows.shape[1]).permute(0, 3, 1, 2)
