"""The irreducible representations of a finite group, and an orthogonal basis in which a group mix is block diagonal.

A 1x1 group mix ``y[s] = sum_s' w[s^-1 s'] x[s']`` is ``sum_u w[u] R(u)``. Here R is the right regular representation:
``R(u)`` has a one where ``s^-1 s' = u``. The functions on the group split into real subspaces that every ``R(u)`` maps
into themselves and that do not split further. Each irreducible representation occurs in one or several of them, its
*copies* (Serre, *Linear Representations of Finite Groups*, section 2.4). In a basis made of these subspaces, with the
bases of the copies aligned, every mix is block diagonal, and all copies of a representation have the same block.

The copies of one representation together span its *isotypic* subspace (Serre, section 2.6). The left regular
representation, ``(L(h) f)(s) = f(h^-1 s)``, has the same isotypic subspaces. A pair of complex conjugate
representations counts as one real representation.

The computation reads the multiplication table only; it knows no particular group. The names are Mulliken's symbols, as
used in chemistry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from .point_groups import Group, IntArray

FloatArray = npt.NDArray[np.float64]

# Eigenvalues that differ by less count as equal, and a smaller map between two subspaces counts as zero. Both are exact
# to about 1e-15.
_TOLERANCE = 1e-7


@dataclass(frozen=True, eq=False)
class Block:
    """One irreducible representation as it occurs in the regular representation.

    Attributes:
        basis: ``[S, copies d]``, orthonormal columns that span the isotypic subspace, one copy after the other.
        matrices: ``[S, d, d]``, orthogonal; entry u is how ``R(u)`` acts on each copy. d is the real dimension.
    """

    basis: FloatArray
    matrices: FloatArray

    @property
    def size(self) -> int:
        """The real dimension d."""
        return self.matrices.shape[1]

    @property
    def copies(self) -> int:
        """How often the representation occurs."""
        return self.basis.shape[1] // self.size

    @property
    def projector(self) -> FloatArray:
        """``[S, S]``, the orthogonal projector onto the isotypic subspace."""
        return self.basis @ self.basis.T


@dataclass(frozen=True, eq=False)
class Blocks:
    """The regular representation of a group in blocks.

    Attributes:
        basis: ``[S, S]``, orthogonal; its columns are those of ``blocks[0].basis``, then ``blocks[1].basis``, ….
        blocks: the representations, sorted by dimension.
    """

    basis: FloatArray
    blocks: tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class Irrep:
    """A real irreducible representation of one of the package's groups.

    Attributes:
        name: the Mulliken symbol. ``A`` or ``B``: one-dimensional, and the smallest rotation acts as 1 or as -1. ``E``:
            of more dimensions. A second sign tells how the reversal of rows acts, as 1 or as -1: ``1`` or ``2`` in a
            group with rotations, ``'`` or ``''`` in a group without.
        projector: ``[S, S]``, the orthogonal projector onto its isotypic subspace of the functions on the group.
    """

    name: str
    projector: FloatArray

    @property
    def share(self) -> float:
        """The dimension of the isotypic subspace, divided by S: the expected share of a random filter's energy.

        It is ``d^2 / S`` for a complex dimension d. The complex pair of p4 counts both members, ``(1 + 1) / 4``.
        """
        return float(np.trace(self.projector)) / len(self.projector)


@cache
def irreps(group: Group) -> tuple[Irrep, ...]:
    """The real irreducible representations of a group, sorted by name; the trivial one is the first."""
    projectors = [block.projector for block in regular_blocks(group).blocks]
    return tuple(sorted((Irrep(_name(group, p), p) for p in projectors), key=lambda irrep: irrep.name))


@cache
def regular_blocks(group: Group) -> Blocks:
    """The regular representation of one of the package's groups in blocks."""
    return blocks_of(group.product)


def blocks_of(product: IntArray) -> Blocks:
    """The regular representation of any finite group in blocks.

    A generic symmetric matrix that commutes with all ``R(u)`` has the irreducible subspaces as its eigenspaces, for
    representations of real, complex and quaternionic type. The sums of left translations are the matrices that commute
    with all ``R(u)``. A generic one of them maps one copy to another, and its orthogonal factor aligns their bases
    (Schur's lemma).

    Args:
        product: ``[S, S]`` multiplication table, ``product[a, b]`` the index of ``a b``.
    """
    order = len(product)
    left, right = _translations(product)
    # Random coefficients are generic with probability one; a fixed seed gives the same basis each time.
    symmetric, generic = (np.einsum("h,hst->st", c, left) for c in np.random.default_rng(0).normal(size=(2, order)))
    values, vectors = np.linalg.eigh(symmetric + symmetric.T)
    spaces = np.split(vectors, np.flatnonzero(np.diff(values) > _TOLERANCE * order) + 1, axis=1)
    found: list[list[FloatArray]] = []
    for space in sorted(spaces, key=lambda space: space.shape[1]):
        for copies in found:
            between = space.T @ generic @ copies[0]
            if copies[0].shape == space.shape and np.linalg.norm(between) > _TOLERANCE:
                u, _, vh = np.linalg.svd(between)
                copies.append(space @ u @ vh)
                break
        else:
            found.append([space])
    blocks = tuple(Block(np.concatenate(copies, axis=1), copies[0].T @ right @ copies[0]) for copies in found)
    return Blocks(np.concatenate([block.basis for block in blocks], axis=1), blocks)


def _translations(product: IntArray) -> tuple[FloatArray, FloatArray]:
    """The left and the right regular representation, each ``[S, S, S]``; the first axis is the element."""
    order = len(product)
    elements = np.arange(order)
    identity = int(np.flatnonzero((product == elements).all(1))[0])
    inverse = np.argmax(product == identity, axis=1)
    left = np.zeros((order, order, order))  # L(h)[h s, s]
    left[elements.repeat(order), product.ravel(), np.tile(elements, order)] = 1
    right = np.zeros((order, order, order))  # R(u)[s, s'] where s^-1 s' = u
    right[product[inverse].ravel(), elements.repeat(order), np.tile(elements, order)] = 1
    return left, right


def _name(group: Group, projector: FloatArray) -> str:
    """The Mulliken symbol of the representation with this isotypic projector."""
    # L(h) maps the indicator function of the identity to that of h, so the first column is the character times d / S.
    character = projector[:, 0]
    rotation = min((element for element in group.elements if 0 < element < 4), default=None)
    if np.trace(projector) > 1.5:
        return "E"
    letter = "B" if rotation is not None and character[group.elements.index(rotation)] < 0 else "A"
    if 4 not in group.elements:
        return letter
    even = character[group.elements.index(4)] > 0
    if rotation is None:
        return letter + ("'" if even else "''")
    return letter + ("1" if even else "2")
