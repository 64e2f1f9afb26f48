"""The irreducible representations: character tables, projectors, and the blocks of any multiplication table."""

from itertools import permutations

import numpy as np
import pytest

from gconv import GROUPS, group
from gconv.groups.irreps import blocks_of, irreps, regular_blocks


def table_of(elements, product):
    """The multiplication table of some elements, the first of which is neutral."""
    index = {element: number for number, element in enumerate(elements)}
    return np.array([[index[product(a, b)] for b in elements] for a in elements])


def cyclic(n):
    return table_of(range(n), lambda a, b: (a + b) % n)


def symmetric(n):
    return table_of(list(permutations(range(n))), lambda a, b: tuple(a[i] for i in b))


def quaternions():
    """The eight unit quaternions (sign, i, j or k)."""
    units = {("i", "j"): (1, "k"), ("j", "k"): (1, "i"), ("k", "i"): (1, "j")}
    units |= {(b, a): (-sign, c) for (a, b), (sign, c) in units.items()}
    units |= {(a, a): (-1, "1") for a in "ijk"} | {pair: (1, a) for a in "1ijk" for pair in (("1", a), (a, "1"))}

    def product(a, b):
        sign, unit = units[a[1], b[1]]
        return a[0] * b[0] * sign, unit

    return table_of([(sign, unit) for unit in "1ijk" for sign in (1, -1)], product)


# What there is by hand: (copies, real dimension) of each representation. Complex pairs are one of twice the dimension,
# and the quaternions' own has dimension four.
KNOWN = {
    "z2": (group("z2").product, [(1, 1)]),
    "p2": (group("p2").product, [(1, 1)] * 2),
    "p4": (group("p4").product, [(1, 1)] * 2 + [(1, 2)]),
    "pm": (group("pm").product, [(1, 1)] * 2),
    "pmm": (group("pmm").product, [(1, 1)] * 4),
    "p4m": (group("p4m").product, [(1, 1)] * 4 + [(2, 2)]),
    "C3": (cyclic(3), [(1, 1), (1, 2)]),
    "C7": (cyclic(7), [(1, 1)] + [(1, 2)] * 3),
    "S3": (symmetric(3), [(1, 1)] * 2 + [(2, 2)]),
    "S4": (symmetric(4), [(1, 1)] * 2 + [(2, 2)] + [(3, 3)] * 2),
    "Q8": (quaternions(), [(1, 1)] * 4 + [(1, 4)]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_every_mix_is_block_diagonal_and_copies_look_alike(name):
    product, known = KNOWN[name]
    order = len(product)
    found = blocks_of(product)
    assert sorted((block.copies, block.size) for block in found.blocks) == sorted(known)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(order), atol=1e-13)
    weights = np.random.default_rng(1).normal(size=order)
    mix = np.zeros((order, order))
    for s in range(order):
        for u in range(order):
            mix[s, product[s, u]] = weights[u]  # s' = s u
    expected, at = np.zeros((order, order)), 0
    for block in found.blocks:
        for _ in range(block.copies):
            here = slice(at, at + block.size)
            expected[here, here] = np.einsum("u,uab->ab", weights, block.matrices)
            at += block.size
    assert at == order
    np.testing.assert_allclose(found.basis.T @ mix @ found.basis, expected, atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_the_blocks_of_a_group_are_kept(name):
    assert regular_blocks(group(name)) is regular_blocks(group(name))


@pytest.mark.parametrize("name", KNOWN)
def test_the_matrices_are_an_orthogonal_representation(name):
    product, _ = KNOWN[name]
    for block in blocks_of(product).blocks:
        r = block.matrices
        np.testing.assert_allclose(r[product], np.einsum("uab,vbc->uvac", r, r), atol=1e-12)
        np.testing.assert_allclose(r @ r.transpose(0, 2, 1), np.tile(np.eye(block.size), (len(r), 1, 1)), atol=1e-12)


every_group = pytest.mark.parametrize("name", GROUPS)

# Characters from the usual tables (C1, C2, C4, Cs, C2v, C4v); the elements are in the order of the group axis.
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
    """[h, s', s]: element h maps the indicator function of s to that of h s."""
    return np.eye(len(product))[product].transpose(0, 2, 1)


@every_group
def test_names_and_characters_are_those_of_the_tables(name):
    of = group(name)
    # The projector's first column is the character times d / |H|; the complex pair of p4 has d = 1, that of p4m d = 2.
    found = {irrep.name: irrep.projector[:, 0] * of.order for irrep in irreps(of)}
    assert list(found) == list(CHARACTERS[name])
    for symbol, character in CHARACTERS[name].items():
        multiplicity = 2 if (name, symbol) == ("p4m", "E") else 1
        np.testing.assert_allclose(found[symbol], multiplicity * np.array(character), atol=1e-13)


@every_group
def test_share_is_the_dimension_squared_over_the_order(name):
    np.testing.assert_allclose([irrep.share for irrep in irreps(group(name))], SHARES[name], atol=1e-14)


@pytest.mark.parametrize("name", KNOWN)
def test_projectors_split_the_regular_representation(name):
    product, known = KNOWN[name]
    blocks = blocks_of(product).blocks
    regular = left_regular(product)
    for number, p in enumerate(block.projector for block in blocks):
        np.testing.assert_allclose(p, p.T, atol=1e-14)
        np.testing.assert_allclose(regular @ p, p @ regular, atol=1e-13)
        for other, q in enumerate(block.projector for block in blocks):
            np.testing.assert_allclose(p @ q, p if number == other else np.zeros_like(p), atol=1e-13)
    np.testing.assert_allclose(sum(block.projector for block in blocks), np.eye(len(product)), atol=1e-13)
    dimensions = [round(np.trace(block.projector)) for block in blocks]
    assert sorted(dimensions) == sorted(copies * size for copies, size in known)


@every_group
def test_projectors_are_the_character_sums(name):
    """Of the left and of the right regular representation, which have the same isotypic subspaces."""
    of = group(name)
    left = left_regular(of.product)
    right = np.eye(of.order)[of.product[:, of.inverse].T].transpose(0, 2, 1)  # h: s to s h^-1
    for irrep in irreps(of):
        character = irrep.projector[:, 0]  # times d / |H|, all that the formula needs; real, so no conjugate
        for regular in (left, right):
            np.testing.assert_allclose(irrep.projector, np.einsum("h,hst->st", character, regular), atol=1e-13)
