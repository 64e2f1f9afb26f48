"""The groups that act exactly on the square pixel grid, and the index tables that expand filters under them.

A group here is a point group H of rotations by 90 degrees and flips. Together with the translations it makes one of
the plane groups p1 (written z2), p2, p4, pm, pmm and p4m. Element ``s = 4 m + r`` of p4m means: rotate by ``r`` x 90
degrees counter-clockwise, then, if ``m`` is 1, reverse the rows. The other groups are subgroups with their elements in
the same order.

Everything is computed from the 2x2 integer matrices of the elements, so a new group is one new line in ``_ELEMENTS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from gconv.system.errors import one_of

IntArray = npt.NDArray[np.int64]

# Matrices act on centred (row, column) coordinates. A quarter turn counter-clockwise, as displayed with rows going
# down, takes the offset (i, j) to (-j, i); the flip reverses the rows.
_QUARTER_TURN = np.array([[0, -1], [1, 0]], dtype=np.int64)
_FLIP = np.array([[-1, 0], [0, 1]], dtype=np.int64)

_ELEMENTS: dict[str, tuple[int, ...]] = {
    "z2": (0,),
    "p2": (0, 2),
    "p4": (0, 1, 2, 3),
    "pm": (0, 4),
    "pmm": (0, 2, 4, 6),
    "p4m": (0, 1, 2, 3, 4, 5, 6, 7),
}
GROUPS = tuple(_ELEMENTS)


def _matrix(element: int) -> IntArray:
    """The 2x2 matrix of element ``4 m + r`` of p4m."""
    flips, turns = divmod(element, 4)
    rotation = np.linalg.matrix_power(_QUARTER_TURN, turns)
    return _FLIP @ rotation if flips else rotation


@dataclass(frozen=True, eq=False, repr=False)
class Group:
    """A point group H that acts on the pixel grid. Get one with :func:`group`.

    Attributes:
        name: one of ``GROUPS``.
        elements: the elements' numbers in p4m (``4 m + r``), in the order of the group axis of feature maps.
        matrices: ``[S, 2, 2]`` integer matrices on centred (row, column) coordinates.
        product: ``[S, S]`` table, ``product[a, b]`` is the index of ``a b`` (first b, then a).
        inverse: ``[S]`` table of inverses.
    """

    name: str
    elements: tuple[int, ...]
    matrices: IntArray
    product: IntArray
    inverse: IntArray

    @property
    def order(self) -> int:
        """The number of elements S = |H|: the length of the group axis of a feature map."""
        return len(self.elements)

    @property
    def element_names(self) -> tuple[str, ...]:
        """The elements' names in the order of the group axis: ``e r r2 r3 m mr mr2 mr3`` for p4m.

        e is the identity, r the rotation by 90 degrees and m the reversal of rows.
        """
        rotations = ("", "r", "r2", "r3")
        return tuple(("m" if element >= 4 else "") + rotations[element % 4] or "e" for element in self.elements)

    def __repr__(self) -> str:
        return f"group({self.name!r})"

    # A copied or unpickled group is the object that group() returns for the name.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return group, (self.name,)

    def reversed_axes(self) -> tuple[bool, bool]:
        """Which of the (row, column) axes some element reverses. Only these must be sampled symmetrically."""
        rows, columns = (bool((self.matrices[:, axis] < 0).any()) for axis in (0, 1))
        return rows, columns

    def pixel_table(self, k: int) -> IntArray:
        """``[S, k k]`` table, the index of pixel ``s^-1 y`` of a k x k kernel: ``(s K)[y] = K[table[s, y]]``."""
        return _pixel_table(self.name, k)

    def relative_table(self) -> IntArray:
        """``[S, S]`` table, entry ``[s, s']`` is the index of ``s^-1 s'``: the position of s' relative to s."""
        return self.product[self.inverse]

    def expansion_table(self, k: int, *, lifting: bool = False) -> IntArray:
        """The index in the generator of each entry of the expanded filter ``K_s[s', y] = K[s^-1 s', s^-1 y]``.

        Returns:
            ``[S, S_in, k k]`` indices into the flattened generator ``[S_in k k]``. S_in is 1 for a lifting filter,
            which reads planar maps, and S for other filters.
        """
        pixels = self.pixel_table(k)
        if lifting:
            return pixels[:, None, :]
        return self.relative_table()[:, :, None] * (k * k) + pixels[:, None, :]


@cache
def _pixel_table(name: str, k: int) -> IntArray:
    owner = group(name)
    # Twice the centred coordinates, which are whole numbers also for kernels of even size.
    axis = 2 * np.arange(k) - (k - 1)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    sources = np.einsum("sab,yb->sya", owner.matrices[owner.inverse], points)
    rows, columns = np.moveaxis((sources + (k - 1)) // 2, -1, 0)
    table: IntArray = rows * k + columns
    table.setflags(write=False)
    return table


@cache
def _build(name: str) -> Group:
    elements = _ELEMENTS[name]
    matrices = np.stack([_matrix(element) for element in elements])
    index = {matrix.tobytes(): i for i, matrix in enumerate(matrices)}
    product = np.array([[index[(a @ b).tobytes()] for b in matrices] for a in matrices], dtype=np.int64)
    inverse = np.argmax(product == 0, axis=1)
    for table in (matrices, product, inverse):
        table.setflags(write=False)
    return Group(name, elements, matrices, product, inverse)


def group(name: str | Group) -> Group:
    """The group of that name (case-insensitive). A group is returned unchanged.

    Raises:
        InputError: the name is not one of ``GROUPS``.
    """
    if isinstance(name, Group):
        return name
    if not isinstance(name, str) or name.lower() not in _ELEMENTS:
        raise one_of("group", name, GROUPS)
    return _build(name.lower())
