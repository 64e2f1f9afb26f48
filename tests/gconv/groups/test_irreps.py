"""The regular representation in blocks, for groups of every type that are given as multiplication tables alone."""

from itertools import permutations

import numpy as np
import pytest

from gconv import GROUPS, group
from gconv.groups.irreps import blocks_of, regular_blocks


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
    assert found.macs == sum(copies * size**2 for copies, size in known)
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
