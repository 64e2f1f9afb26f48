"""The tables of the groups against pictures: what an element does is seen by turning an image."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gconv import GROUPS, InputError, group

ORDERS = {"z2": 1, "p2": 2, "p4": 4, "pm": 2, "pmm": 4, "p4m": 8}
PICTURE = np.arange(9).reshape(3, 3)

every_group = pytest.mark.parametrize("of", [group(name) for name in GROUPS], ids=str)


def turned(of, s, image):
    """Element s applied to an image, from its definition: quarter turns counter-clockwise, then the rows reversed."""
    flips, turns = divmod(of.elements[s], 4)
    image = np.rot90(image, turns, (-2, -1))
    return np.flip(image, -2) if flips else image


def test_all_six_groups_are_there_with_their_orders():
    assert {name: group(name).order for name in GROUPS} == ORDERS


@every_group
def test_no_two_elements_do_the_same_and_the_first_does_nothing(of):
    pictures = [turned(of, s, PICTURE).tobytes() for s in range(of.order)]
    assert len(set(pictures)) == of.order
    assert pictures[0] == PICTURE.tobytes()


@every_group
def test_product_is_composition_and_inverse_undoes(of):
    for a in range(of.order):
        np.testing.assert_array_equal(turned(of, of.inverse[a], turned(of, a, PICTURE)), PICTURE)
        for b in range(of.order):
            both = turned(of, a, turned(of, b, PICTURE))
            np.testing.assert_array_equal(turned(of, of.product[a, b], PICTURE), both)


@every_group
def test_group_axioms(of):
    product, everyone = of.product, np.arange(of.order)
    np.testing.assert_array_equal(product[product], product[:, product])  # (a b) c = a (b c)
    np.testing.assert_array_equal(product[0], everyone)
    np.testing.assert_array_equal(product[:, 0], everyone)
    np.testing.assert_array_equal(product[everyone, of.inverse], 0)
    np.testing.assert_array_equal(product[of.inverse, everyone], 0)
    np.testing.assert_array_equal(np.sort(product, axis=1), np.tile(everyone, (of.order, 1)))


@every_group
def test_subgroups_multiply_as_p4m_does(of):
    elements = np.array(of.elements)
    np.testing.assert_array_equal(elements[of.product], group("p4m").product[np.ix_(elements, elements)])


@every_group
def test_matrices_say_where_each_pixel_goes(of):
    for s, matrix in enumerate(of.matrices):
        moved = turned(of, s, PICTURE)
        for row, column in np.ndindex(3, 3):
            new_row, new_column = matrix @ (row - 1, column - 1) + 1
            assert moved[new_row, new_column] == PICTURE[row, column]


@every_group
def test_only_pm_leaves_an_axis_unreversed(of):
    assert of.reversed_axes() == {"z2": (False, False), "pm": (True, False)}.get(of.name, (True, True))


@every_group
@given(k=st.integers(1, 7))
def test_pixel_table_turns_a_kernel(of, k):
    kernel = np.arange(k * k).reshape(k, k)
    for s, sources in enumerate(of.pixel_table(k)):
        np.testing.assert_array_equal(kernel.ravel()[sources].reshape(k, k), turned(of, s, kernel))


@every_group
def test_relative_table_solves_s_u_equals_t(of):
    for s, t in np.ndindex(of.order, of.order):
        assert of.product[s, of.relative_table()[s, t]] == t


@every_group
@given(k=st.integers(1, 5), lifting=st.booleans())
def test_expansion_only_permutes_the_generator(of, k, lifting):
    s_in = 1 if lifting else of.order
    table = of.expansion_table(k, lifting=lifting)
    assert table.shape == (of.order, s_in, k * k)
    np.testing.assert_array_equal(
        np.sort(table.reshape(of.order, -1), axis=1), np.tile(np.arange(s_in * k * k), (of.order, 1))
    )
    np.testing.assert_array_equal(table[0].ravel(), np.arange(s_in * k * k))


@every_group
def test_there_is_one_object_per_group(of):
    for same in (group(of.name.upper()), group(of), copy.deepcopy(of), pickle.loads(pickle.dumps(of))):
        assert same is of
    assert len({group(name) for name in GROUPS}) == len(GROUPS)
    assert repr(of) == f"group('{of.name}')"
    assert of != of.name


@every_group
def test_shared_tables_cannot_be_written(of):
    for table in (of.matrices, of.product, of.inverse, of.pixel_table(3)):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0


@pytest.mark.parametrize("name", ["p3", "", None, 4])
def test_unknown_group_is_one_line_that_names_the_known_ones(name):
    with pytest.raises(InputError) as error:
        group(name)
    assert str(error.value) == f"unknown group '{name}'; accepted: z2, p2, p4, pm, pmm, p4m"


def test_elements_have_names():
    assert group("z2").element_names == ("e",)
    assert group("pmm").element_names == ("e", "r2", "m", "mr2")
    assert group("p4m").element_names == ("e", "r", "r2", "r3", "m", "mr", "mr2", "mr3")
