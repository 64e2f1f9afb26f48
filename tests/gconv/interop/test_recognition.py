"""Exported group networks are recognised and taken back to their generators; ordinary networks are not mistaken."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gconv import GROUPS, InputError, group
from gconv.functional.expansion import Tables, expand
from gconv.interop.recognition import Layout, collapse, layout_of, recognise

TURNING = [group(name) for name in GROUPS if name != "z2"]
# The elements of escnn's groups by our names for them (4 m + r), in escnn's order; its own flip reverses columns.
ESCNN = {"p2": (0, 2), "p4": (0, 1, 2, 3), "pmm": (0, 2, 6, 4), "p4m": (0, 1, 2, 3, 6, 5, 4, 7)}

every_group = pytest.mark.parametrize("on", TURNING, ids=str)
widths = st.integers(1, 3)


def generator(o, i, s_in, k):
    return torch.randn(o, i, s_in, k, k, dtype=torch.float64)


def expanded(on, weight, *, lifting=None):
    lifting = weight.shape[2] == 1 if lifting is None else lifting
    return expand(weight, Tables.build(on, weight.shape[-1], lifting=lifting).expansion)


def exported(on, weight, *, order=None, group_major=False):
    """The plain filter as another library would lay it out, by loops over its channels."""
    elements = on.elements if order is None else order
    ours = expanded(on, weight)
    s = on.order

    def source(position, channels):
        c, p = (position % (channels // s), position // (channels // s)) if group_major else divmod(position, s)
        return c * s + on.elements.index(elements[p])

    rows, columns = ours.shape[:2]
    ours = ours[[source(row, rows) for row in range(rows)]]
    return ours if weight.shape[2] == 1 else ours[:, [source(column, columns) for column in range(columns)]]


@every_group
@given(lifting=st.booleans(), o=widths, i=widths, k=st.integers(1, 5))
def test_collapse_undoes_expand(on, lifting, o, i, k):
    weight = generator(o, i, 1 if lifting else on.order, k)
    found, residual = collapse(expanded(on, weight, lifting=lifting), on, lifting=lifting)
    torch.testing.assert_close(found, weight, rtol=1e-12, atol=1e-12)
    assert residual < 1e-14


@every_group
def test_collapse_is_the_least_squares_inverse(on):
    """The generator by lstsq over the matrix of ``expand`` for one pair of channels, and its residual."""
    plain = torch.randn(on.order, on.order, 3, 3, dtype=torch.float64)
    units = torch.eye(9 * on.order, dtype=torch.float64).view(-1, 1, 1, on.order, 3, 3)
    matrix = torch.stack([expanded(on, unit).flatten() for unit in units], dim=1)
    expected = torch.linalg.lstsq(matrix, plain.flatten()[:, None]).solution
    found, residual = collapse(plain, on, lifting=False)
    torch.testing.assert_close(found.flatten(), expected.flatten(), rtol=1e-12, atol=1e-12)
    assert residual == pytest.approx(float((matrix @ expected - plain.view(-1, 1)).norm() / plain.norm()), rel=1e-12)


# The same order for p2 and p4; the one flip of pm reverses columns there: test_a_flip_of_columns_is_seen_turned.
ORDERS = [(on, None) for on in TURNING] + [(group(name), ESCNN[name]) for name in ("pmm", "p4m")]


@pytest.mark.parametrize(("on", "order"), ORDERS)
@pytest.mark.parametrize("group_major", [False, True], ids=["channel-major", "group-major"])
@settings(max_examples=10)
@given(o=st.integers(2, 3), i=widths, k=st.integers(2, 4))
def test_an_exported_network_gives_its_generators_back(on, order, group_major, o, i, k):
    layout = {"order": order, "group_major": group_major}
    generators = {
        "first": generator(i, 1, 1, k),
        "middle": generator(o, i, on.order, k),
        "1x1": generator(2, o, on.order, 1),
    }
    plain = {name: exported(on, weight, **layout) for name, weight in generators.items()}
    found = recognise(plain)
    assert (found.layout.group, found.layout.group_major) == (on, group_major)
    assert found.fits.keys() == generators.keys()
    for name, weight in generators.items():
        torch.testing.assert_close(found.fits[name].generator, weight, rtol=1e-12, atol=1e-12)
        assert found.fits[name].residual < 1e-14


def test_a_flip_of_columns_is_seen_turned():
    on = group("pm")
    upright = generator(3, 2, 2, 3)
    turned = exported(on, upright).rot90(-1, (-2, -1))
    found = recognise({"conv": turned})
    assert (found.layout.group, found.layout.rotated) == (on, True)
    torch.testing.assert_close(found.fits["conv"].generator, upright, rtol=1e-12, atol=1e-12)
    assert str(found.layout) == "pm, channel-major, columns flipped"


@every_group
def test_noise_is_reported_as_the_residual(on):
    weight = generator(4, 4, on.order, 3)
    plain = exported(on, weight)
    noisy = plain + 1e-5 * torch.randn_like(plain)
    found = recognise({"conv": noisy})
    assert found.layout.group == on
    # Of the noise a share of 1/S lies in the space of expanded filters.
    expected = 1e-5 * math.sqrt(1 - 1 / on.order) * math.sqrt(plain.numel()) / plain.norm().item()
    assert found.fits["conv"].residual == pytest.approx(expected, rel=0.2)


@given(st.lists(st.tuples(st.integers(1, 17), st.integers(1, 17), st.integers(1, 4)), min_size=1, max_size=3))
@settings(max_examples=60)
def test_random_filters_are_never_recognised(shapes):
    assert recognise({str(n): torch.randn(o, i, k, k).double() for n, (o, i, k) in enumerate(shapes)}) is None


@pytest.mark.parametrize(
    "plain",
    [
        torch.zeros(8, 8, 3, 3),
        torch.ones(8, 8, 3, 3),
        torch.ones(8, 8, 1, 1),
        torch.nn.init.dirac_(torch.empty(8, 8, 3, 3)),
    ],
    ids=["zeros", "constant", "constant 1x1", "identity"],
)
def test_filters_that_fit_every_group_decide_nothing(plain):
    assert recognise({"conv": plain.double()}) is None
    random = torch.randn(24, 8, 3, 3).double()
    assert recognise({"conv": plain.double(), "random": random}) is None
    # With others that do, they take part.
    p4 = group("p4")
    fits = recognise({"conv": plain.double(), "grouped": exported(p4, generator(3, 2, 4, 3))})
    assert fits.layout.group == p4
    assert fits.fits.keys() == {"conv", "grouped"}


def test_one_oriented_bank_does_not_make_a_network_equivariant():
    sobel = torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]])
    bank = torch.stack([sobel.rot90(turn) for turn in range(4)])[:, None].double()
    assert recognise({"bank": bank, "learned": torch.randn(8, 4, 3, 3).double()}) is None
    assert recognise({"bank": bank}).layout.group == group("p4")


def test_planar_layers_after_group_pooling_stay_planar():
    on = group("p4m")
    plain = {"group": exported(on, generator(4, 4, 8, 3)), "head": torch.randn(8, 4, 1, 1).double()}
    assert recognise(plain).fits.keys() == {"group"}
    assert recognise(plain, on).fits.keys() == {"group"}


def test_groups_that_fit_alike_are_asked_for():
    """On kernels with symmetric columns, turning by 180 degrees, as p2 does, is reversing the rows, as pm does."""
    kernel = torch.tensor([[1.0, 2, 1], [0, 0, 0], [-3, -4, -3]]).double()
    weight = torch.randn(4, 3, 2, 1, 1).double() * kernel
    plain = exported(group("p2"), weight)
    with pytest.raises(
        InputError, match=r"fit p2 and pm equally well: give the group, with --group .* accepted: p2, pm$"
    ):
        recognise({"conv": plain})
    for name in ("p2", "pm"):
        found = recognise({"conv": plain}, group(name))
        torch.testing.assert_close(found.fits["conv"].generator, weight, rtol=1e-12, atol=1e-12)


@every_group
def test_a_forced_group_that_is_not_there_is_an_error_with_the_residual(on):
    plain = {"small": torch.randn(8, 8, 1, 1).double(), "large": torch.randn(16, 16, 3, 3).double()}
    said = (
        rf"do not have the structure of {on.name}: the rows of large .* residual of 0\.\d+, and at most 0.1 is accepted"
    )
    with pytest.raises(InputError, match=said):
        recognise(plain, on)
    with pytest.raises(InputError, match=f"no layer has a multiple of {on.order} outputs"):
        recognise({"conv": torch.randn(9, 8, 3, 3).double()}, on)


def test_a_forced_group_may_be_broken_a_little_or_be_of_kernels_that_tell_nothing():
    on = group("p4")
    plain = exported(on, generator(4, 4, 4, 3))
    broken = {"conv": plain + 0.02 * torch.randn_like(plain)}
    assert recognise(broken) is None
    assert recognise(broken, on).fits["conv"].residual == pytest.approx(0.017, abs=0.002)
    points = generator(3, 2, 4, 1)
    found = recognise({"1x1": exported(on, points)}, on)
    torch.testing.assert_close(found.fits["1x1"].generator, points, rtol=1e-12, atol=1e-12)
    # A subgroup of the network's group is as true, in the layout that fits it.
    assert recognise({"conv": exported(group("p4m"), generator(2, 2, 8, 3), order=ESCNN["p4m"])}, on).layout.group == on


def test_layout_of_reads_groups_from_their_matrices():
    for name in GROUPS:
        on = group(name)
        assert layout_of(list(on.matrices.astype(float))) == Layout(on, tuple(range(on.order)))
    p4m = group("p4m").matrices.astype(float)
    assert layout_of([p4m[s] for s in ESCNN["p4m"]]) == Layout(group("p4m"), ESCNN["p4m"])
    assert layout_of([p4m[0], p4m[6]]) == Layout(group("pm"), (0, 1), rotated=True)
    assert layout_of([p4m[0], p4m[5]]) is None  # a flip about a diagonal
    third = math.cos(math.tau / 3), math.sin(math.tau / 3)
    turn = torch.tensor([[third[0], -third[1]], [third[1], third[0]]]).numpy()
    assert layout_of([p4m[0], turn, turn @ turn]) is None
