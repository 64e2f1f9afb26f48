"""The real irreducible representations of a finite group, computed from its multiplication table.

The regular representation moves functions on the group, ``(L(h) f)(s) = f(h^-1 s)``. It splits into one *isotypic*
subspace for each irreducible representation rho, onto which ``P = (d / |H|) sum_h chi(h)* L(h)`` projects, with d the
dimension and chi the character of rho (Serre, *Linear Representations of Finite Groups*, section 2.6). A pair of
complex conjugate representations is one real one: its projectors are added. Names are Mulliken's, as in chemistry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from gconv.groups.point_groups import Group, IntArray

FloatArray = npt.NDArray[np.float64]

# Eigenvalues below this distance are one: those of class sums with coefficients of order 1 are exact to about 1e-15.
_SAME = 1e-9


@dataclass(frozen=True, eq=False)
class Irrep:
    """A real irreducible representation, seen in the regular representation.

    Attributes:
        name: Mulliken symbol: ``A`` or ``B`` if one-dimensional and unchanged or negated by the smallest turn; ``1`` or
            ``2``, or without turns ``'`` or ``''``, if unchanged or negated by the reversal of rows; ``E`` if more.
        projector: ``[S, S]``, symmetric, onto its isotypic subspace of the functions on the group.
    """

    name: str
    projector: FloatArray

    @property
    def share(self) -> float:
        """The part of all dimensions that it takes, and of the energy of a random filter: ``d^2 / |H|``.

        For the complex pair of p4 both are counted, ``(1 + 1) / 4``.
        """
        return float(np.trace(self.projector)) / len(self.projector)


@cache
def irreps(group: Group) -> tuple[Irrep, ...]:
    """The real irreducible representations of a group; the trivial one first, then in the order of their names."""
    named = [Irrep(_name(group, projector), projector) for projector in isotypic_projectors(group.product)]
    return tuple(sorted(named, key=lambda irrep: irrep.name))


@cache
def element_names(group: Group) -> tuple[str, ...]:
    """The elements in the order of the group axis: ``e r r2 r3 m mr mr2 mr3`` for p4m, r a quarter turn, m the flip."""
    turns = ("", "r", "r2", "r3")
    return tuple(("m" if element >= 4 else "") + turns[element % 4] or "e" for element in group.elements)


def isotypic_projectors(product: IntArray) -> list[FloatArray]:
    """The projectors onto the real isotypic subspaces of the regular representation of any finite group.

    The sums of ``L(h)`` over the classes, each joined with its inverse class, commute and are symmetric; the subspaces
    are their joint eigenspaces, so they are the eigenspaces of one combination with generic coefficients.

    Args:
        product: ``[S, S]`` multiplication table, ``product[a, b]`` the index of ``a b``.

    Returns:
        One ``[S, S]`` matrix for each representation; they are symmetric and sum to the identity.
    """
    order = len(product)
    identity = int(np.flatnonzero((product == np.arange(order)).all(1))[0])
    inverse = np.argmax(product == identity, axis=1)
    conjugates = product[product, inverse[:, None]]  # [g, h]: g h g^-1
    classes = np.minimum(conjugates, inverse[conjugates]).min(0)
    coefficients = np.random.default_rng(0).uniform(1, 2, order)[classes]
    combination = np.zeros((order, order))
    for h, coefficient in enumerate(coefficients):
        combination[product[h], np.arange(order)] += coefficient
    values, vectors = np.linalg.eigh(combination)
    spaces = np.split(vectors, np.flatnonzero(np.diff(values) > _SAME * order) + 1, axis=1)
    return [space @ space.T for space in spaces]


def _name(group: Group, projector: FloatArray) -> str:
    # L(h) takes the identity's column to that of h, so the first column holds the character times d / |H|.
    character = projector[:, 0]
    turn = min((element for element in group.elements if 0 < element < 4), default=None)
    if np.trace(projector) > 1.5:
        return "E"
    letter = "B" if turn is not None and character[group.elements.index(turn)] < 0 else "A"
    if 4 not in group.elements:
        return letter
    even = character[group.elements.index(4)] > 0
    if turn is None:
        return letter + ("'" if even else "''")
    return letter + ("1" if even else "2")
