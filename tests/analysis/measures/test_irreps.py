"""The irreducible representations against published character tables, and against the algebra they must satisfy."""

import numpy as np
import pytest

from analysis.measures.irreps import element_names, irreps, isotypic_projectors
from gconv import GROUPS, group

every_group = pytest.mark.parametrize("of", [group(name) for name in GROUPS], ids=str)

# Characters from the usual tables (C1, C2, C4, Cs, C2v, C4v), the elements in the order of the group axis.
CHARACTERS = {
    "z2": {"A": [1]},
    "p2": {"A": [1, 1], "B": [1, -1]},
    "p4": {"A": [1, 1, 1, 1], "B": [1, -1, 1, -1], "E": [2, 0, -2, 0]},
    "pm": {"A'": [1, 1], "A''": [1, -1]},
    "pmm": {"A1": [1, 1, 1, 1], "A2": [1, 1, -1, -1], "B1": [1, -1, 1, -1], "B2": [1, -1, -1, 1]},
    "p4m": {
        "A1": [1, 1, 1, 1, 1, 1, 1, 1],
        "A2": [1, 1, 1, 1, -1, -1, -1, -1],
        "B1": [1, -1, 1, -1, 1, -1, 1, -1],
        "B2": [1, -1, 1, -1, -1, 1, -1, 1],
        "E": [2, 0, -2, 0, 0, 0, 0, 0],
    },
}
SHARES = {
    "z2": [1],
    "p2": [1 / 2] * 2,
    "p4": [1 / 4, 1 / 4, 1 / 2],
    "pm": [1 / 2] * 2,
    "pmm": [1 / 4] * 4,
    "p4m": [1 / 8, 1 / 8, 1 / 8, 1 / 8, 4 / 8],
}


def left_regular(product):
    """[h, s', s]: element h takes the function that is 1 at s to the one that is 1 at h s."""
    return np.eye(len(product))[product].transpose(0, 2, 1)


def cyclic(n):
    return np.add.outer(np.arange(n), np.arange(n)) % n


def symmetric_3():
    """The permutations of three things: the smallest group that is not abelian, and none of ours."""
    elements = [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1), (2, 1, 0), (1, 0, 2)]
    return np.array([[elements.index(tuple(a[i] for i in b)) for b in elements] for a in elements])


def quaternions():
    """1, i, j, k and their negatives."""
    units = ["1", "i", "j", "k"]
    times = {("i", "j"): ("k", 0), ("j", "k"): ("i", 0), ("k", "i"): ("j", 0)}
    times |= {(b, a): (c, 1) for (a, b), (c, _) in times.items()}
    times |= {(a, a): ("1", 1) for a in "ijk"} | {("1", a): (a, 0) for a in units} | {(a, "1"): (a, 0) for a in units}
    table = np.zeros((8, 8), int)
    for a in range(8):
        for b in range(8):
            unit, sign = times[units[a % 4], units[b % 4]]
            table[a, b] = units.index(unit) + 4 * ((sign + a // 4 + b // 4) % 2)
    return table


@every_group
def test_names_and_characters_are_those_of_the_tables(of):
    # The projector's first column is the character times d / |H|; the complex pair of p4 has d = 1, that of p4m d = 2.
    found = {irrep.name: irrep.projector[:, 0] * of.order for irrep in irreps(of)}
    assert list(found) == list(CHARACTERS[of.name])
    for name, character in CHARACTERS[of.name].items():
        multiplicity = 2 if (of.name, name) == ("p4m", "E") else 1
        np.testing.assert_allclose(found[name], multiplicity * np.array(character), atol=1e-13)


@every_group
def test_share_is_the_dimension_squared_over_the_order(of):
    np.testing.assert_allclose([irrep.share for irrep in irreps(of)], SHARES[of.name], atol=1e-14)


@pytest.mark.parametrize(
    ("product", "dimensions"),
    [(group(name).product, None) for name in GROUPS]
    + [(cyclic(3), [1, 2]), (cyclic(6), [1, 1, 2, 2]), (symmetric_3(), [1, 1, 4]), (quaternions(), [1, 1, 1, 1, 4])],
    ids=[*GROUPS, "C3", "C6", "S3", "Q8"],
)
def test_projectors_split_the_regular_representation(product, dimensions):
    projectors = isotypic_projectors(product)
    regular = left_regular(product)
    for number, p in enumerate(projectors):
        np.testing.assert_allclose(p, p.T, atol=1e-14)
        np.testing.assert_allclose(regular @ p, p @ regular, atol=1e-13)
        for other, q in enumerate(projectors):
            np.testing.assert_allclose(p @ q, p if number == other else np.zeros_like(p), atol=1e-13)
    np.testing.assert_allclose(sum(projectors), np.eye(len(product)), atol=1e-13)
    if dimensions is not None:
        assert sorted(round(np.trace(p)) for p in projectors) == dimensions


@every_group
def test_projectors_are_the_character_sums(of):
    regular = left_regular(of.product)
    for irrep in irreps(of):
        character = irrep.projector[:, 0]  # times d / |H|, all that the formula needs; real, so no conjugate
        np.testing.assert_allclose(irrep.projector, np.einsum("h,hst->st", character, regular), atol=1e-13)


@every_group
def test_the_right_regular_representation_has_the_same_projectors(of):
    right = np.eye(of.order)[of.product[:, of.inverse].T].transpose(0, 2, 1)  # h: s to s h^-1
    for irrep in irreps(of):
        np.testing.assert_allclose(irrep.projector, np.einsum("h,hst->st", irrep.projector[:, 0], right), atol=1e-13)


def test_element_names():
    assert element_names(group("z2")) == ("e",)
    assert element_names(group("pmm")) == ("e", "r2", "m", "mr2")
    assert element_names(group("p4m")) == ("e", "r", "r2", "r3", "m", "mr", "mr2", "mr3")
