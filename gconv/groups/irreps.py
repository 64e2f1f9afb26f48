"""The regular representation of a finite group in blocks: an orthogonal basis in which a group mix is cheap.

A 1x1 group mix ``y[s] = sum_s' w[s^-1 s'] x[s']`` is ``sum_u w[u] R(u)``, R(u) being the matrix with a one where
``s^-1 s' = u``: the right regular representation. The functions on the group split into real subspaces that no ``R(u)``
leaves and that do not split further; each irreducible representation occurs in one or several of them, its *copies*
(Serre, *Linear Representations of Finite Groups*, section 2.4). In a basis of these subspaces, chosen so that copies
look alike, every mix is block diagonal, with one and the same block for all copies of a representation.

Nothing here knows a particular group: only the multiplication table is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from .point_groups import Group, IntArray

FloatArray = npt.NDArray[np.float64]

# Eigenvalues nearer than this are one, and a smaller map between two subspaces is none: both are exact to about 1e-15.
_SAME = 1e-7


@dataclass(frozen=True, eq=False)
class Block:
    """One irreducible representation in the regular one.

    Attributes:
        copies: how often it occurs.
        matrices: ``[S, d, d]``, what ``R(u)`` is on each copy; orthogonal, d its real dimension.
    """

    copies: int
    matrices: FloatArray

    @property
    def size(self) -> int:
        """Its real dimension d."""
        return self.matrices.shape[1]


@dataclass(frozen=True, eq=False)
class Blocks:
    """The regular representation of a group in blocks.

    Attributes:
        basis: ``[S, S]``, orthogonal; its columns are the basis, the copies of ``blocks[0]`` first.
        blocks: the representations, the smallest first.
    """

    basis: FloatArray
    blocks: tuple[Block, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a mix for each pair of channels: ``sum copies d^2``, in place of ``S^2``."""
        return sum(block.copies * block.size**2 for block in self.blocks)


@cache
def regular_blocks(group: Group) -> Blocks:
    """The blocks of one of the package's groups."""
    return blocks_of(group.product)


def blocks_of(product: IntArray) -> Blocks:
    """The regular representation of any finite group in blocks.

    A generic symmetric matrix that commutes with all ``R(u)`` has the irreducible subspaces as its eigenspaces, whether
    they are of real, complex or quaternionic type. Such matrices are the sums of left translations. A generic map among
    them takes one copy to the other, and its orthogonal factor aligns their bases (Schur's lemma).

    Args:
        product: ``[S, S]`` multiplication table, ``product[a, b]`` the index of ``a b``.
    """
    order = len(product)
    identity = int(np.flatnonzero((product == np.arange(order)).all(1))[0])
    inverse = np.argmax(product == identity, axis=1)
    elements = np.arange(order)
    right = np.zeros((order, order, order))  # R(u)[s, s']
    right[product[inverse][:, :].ravel(), elements.repeat(order), np.tile(elements, order)] = 1
    left = np.zeros((order, order, order))  # L(h)[h s, s]
    left[elements.repeat(order), product.ravel(), np.tile(elements, order)] = 1
    # Coefficients that nothing but chance could make degenerate; the same ones each time.
    symmetric, generic = (np.einsum("h,hst->st", c, left) for c in np.random.default_rng(0).normal(size=(2, order)))
    values, vectors = np.linalg.eigh(symmetric + symmetric.T)
    spaces = np.split(vectors, np.flatnonzero(np.diff(values) > _SAME * order) + 1, axis=1)
    found: list[list[FloatArray]] = []
    for space in sorted(spaces, key=lambda space: space.shape[1]):
        for copies in found:
            between = space.T @ generic @ copies[0]
            if copies[0].shape == space.shape and np.linalg.norm(between) > _SAME:
                u, _, vh = np.linalg.svd(between)
                copies.append(space @ u @ vh)
                break
        else:
            found.append([space])
    blocks = tuple(Block(len(copies), copies[0].T @ right @ copies[0]) for copies in found)
    return Blocks(np.concatenate([copy for copies in found for copy in copies], axis=1), blocks)
