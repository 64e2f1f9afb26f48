"""Budgets: what is accepted, what it means, and what is said about the rest."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.allocation.budget import BUDGETS, DEFAULT_ENERGY, Budget
from gconv.system.errors import InputError

NAN, INF = float("nan"), float("inf")
COUNT = "a fraction up to 1 of what the network has, or a whole number above 1"
TIME = "a fraction up to 1 of what the network takes, or a time such as 3.5ms"
SHARE = "a share above 0 and up to 1, such as 0.95"
WHOLE = "a whole number of at least 1"
POINTS = "points of accuracy above 0 and below 100, such as 0.5"
ACCEPTED = {"rank": WHOLE, "energy": SHARE, "params": COUNT, "macs": COUNT, "latency": TIME, "max_drop": POINTS}
# Refused by every kind.
NEVER = [0, 0.0, -1, -0.5, NAN, INF, -INF, True, False, "nan", "inf", "", " ", "abc", "-1", "1,5", "5%"]
NEVER += [[], [1], {}, 1j, b"1", np.bool_(True), "0x10", "ms", "k", "1kk", "1e999"]

every_kind = pytest.mark.parametrize("kind", BUDGETS)
counted = pytest.mark.parametrize("kind", ["params", "macs"])
fractions = st.floats(0, 1, exclude_min=True)


def refused(kind, value):
    with pytest.raises(InputError) as error:
        Budget.of(**{kind: value})
    assert str(error.value) == f"{kind} is {value!r}. Give {ACCEPTED[kind]}."
    assert len(str(error.value).splitlines()) == 1


def test_every_kind_is_known():
    assert set(ACCEPTED) == set(BUDGETS)


# --- what is given


def test_by_default_most_of_the_energy_is_kept():
    assert DEFAULT_ENERGY == 0.95
    assert Budget.of() == Budget.of(**dict.fromkeys(BUDGETS)) == Budget("energy", 0.95)


@every_kind
def test_one_budget_among_others_not_given_is_taken(kind):
    assert Budget.of(**(dict.fromkeys(BUDGETS) | {kind: 1})).kind == kind


def test_several_budgets_are_refused():
    with pytest.raises(InputError) as error:
        Budget.of(rank=2, energy=None, params="9k", latency=0.5)
    assert str(error.value) == (
        "several budgets are given: rank 2, params 9k, latency 0.5. "
        "Give one of rank, energy, params, macs, latency, max_drop."
    )
    # Also where one of them would not be accepted, or is zero.
    for pair in ({"rank": 0, "energy": 0}, {"params": 0.0, "max_drop": 1}):
        with pytest.raises(InputError, match="several budgets are given"):
            Budget.of(**pair)


@every_kind
@pytest.mark.parametrize("value", NEVER, ids=lambda value: repr(value)[:12])
def test_what_no_kind_accepts(kind, value):
    refused(kind, value)


@every_kind
@given(value=st.text() | st.floats(max_value=0) | st.integers(max_value=0) | st.booleans())
def test_an_error_is_one_line_that_names_what_is_accepted(kind, value):
    try:
        assert 0 < Budget.of(**{kind: value}).value < INF
        assert isinstance(value, str)
    except InputError:
        refused(kind, value)


@pytest.mark.parametrize("kind", [kind for kind in BUDGETS if kind != "rank"])
def test_a_number_too_large_for_a_float_is_refused(kind):
    refused(kind, 10**400)


# --- rank, energy and drop


@given(rank=st.integers(1, 10**6))
def test_a_rank_is_a_whole_number(rank):
    for value in (rank, np.int64(rank)):
        budget = Budget.of(rank=value)
        assert budget == Budget("rank", rank, False)
        assert type(budget.value) is int


@pytest.mark.parametrize("value", [1.0, 1.5, "1", "2k", np.float64(2), Fraction(1, 2)], ids=repr)
def test_a_rank_is_nothing_else(value):
    refused("rank", value)


@given(share=fractions)
def test_energy_is_a_share(share):
    assert Budget.of(energy=share) == Budget("energy", share, False)
    assert Budget.of(energy=np.float64(share)).value == share


def test_all_of_the_energy_is_a_share():
    budget = Budget.of(energy=1)
    assert budget == Budget("energy", 1.0)
    assert type(budget.value) is float


@pytest.mark.parametrize("value", [math.nextafter(1, 2), 1.5, 2, 95, "0.95", "95"], ids=repr)
def test_energy_is_nothing_else(value):
    refused("energy", value)


@given(points=st.floats(0, 100, exclude_min=True, exclude_max=True))
def test_a_drop_is_in_points(points):
    for value in (points, repr(points), np.float64(points)):
        assert Budget.of(max_drop=value) == Budget("max_drop", points, False)


@pytest.mark.parametrize("value", [100, 100.0, 250, "100", "0.5k", "1ms"], ids=repr)
def test_a_drop_is_nothing_else(value):
    refused("max_drop", value)


# --- parameters and multiply-accumulates


@counted
@given(share=fractions)
def test_up_to_one_is_a_fraction(kind, share):
    for value in (share, repr(share), f" {share!r} "):
        budget = Budget.of(**{kind: value})
        assert budget == Budget(kind, share, True)
        assert budget.limit(1000) == share * 1000


@counted
@pytest.mark.parametrize("value", [1, 1.0, "1", "1.0", np.int64(1)], ids=repr)
def test_one_is_the_whole_network(kind, value):
    assert Budget.of(**{kind: value}) == Budget(kind, 1.0, True)
    assert Budget.of(**{kind: value}).limit(12345) == 12345


@counted
@given(number=st.integers(2, 10**15))
def test_above_one_is_a_number(kind, number):
    for value in (number, float(number), str(number), np.int64(number)):
        budget = Budget.of(**{kind: value})
        assert budget == Budget(kind, number, False)
        assert type(budget.value) is int
        assert budget.limit(7) == number


@counted
@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9k", 9_000),
        ("9K", 9_000),
        ("8.9k", 8_900),
        ("0.5k", 500),
        ("3.5M", 3_500_000),
        ("3.5m", 3_500_000),
        (" 2g ", 2_000_000_000),
        ("1.1G", 1_100_000_000),
        ("1.001k", 1_001),
        ("4.35m", 4_350_000),
        ("2 k", 2_000),
        ("1e3", 1_000),
        ("1.5e3k", 1_500_000),
    ],
)
def test_units(kind, text, number):
    budget = Budget.of(**{kind: text})
    assert budget == Budget(kind, number, False)
    assert type(budget.value) is int


@counted
@given(thousandths=st.integers(2, 10**6), unit=st.sampled_from(["k", "m", "g"]))
def test_decimals_with_a_unit_are_exact(kind, thousandths, unit):
    whole, rest = divmod(thousandths, 1000)
    value = Budget.of(**{kind: f"{whole}.{rest:03}{unit}"}).value
    assert value == thousandths * {"k": 1, "m": 1000, "g": 10**6}[unit]


@counted
@pytest.mark.parametrize("value", [1.5, 2.000001, "1.5", "1.0001k", "-9k", "0k", "nank", "infM", "9t", "3ms"], ids=repr)
def test_a_count_is_nothing_else(kind, value):
    refused(kind, value)


@counted
@pytest.mark.parametrize("value", ["0.001k", "0.0005k", "0.000001m"])
def test_a_number_with_a_unit_is_no_fraction(kind, value):
    refused(kind, value)


# --- latency


@given(share=fractions)
def test_up_to_one_is_a_fraction_of_the_time(share):
    for value in (share, repr(share)):
        budget = Budget.of(latency=value)
        assert budget == Budget("latency", share, True)
        assert budget.limit(4.0) == 4 * share


@given(time=st.floats(0, 10**6, exclude_min=True))
def test_a_time_is_in_milliseconds(time):
    for value in (f"{time!r}ms", f" {time!r} MS "):
        budget = Budget.of(latency=value)
        assert budget == Budget("latency", time, False)
        assert budget.limit(4.0) == time


@pytest.mark.parametrize(
    "value", [1.5, 2, "1.5", "3.5s", "3.5", "0ms", "-1ms", "nanms", "infms", "1kms", "1msms", "ms1", "5us"], ids=repr
)
def test_a_latency_is_nothing_else(value):
    refused("latency", value)


# --- for a report


@pytest.mark.parametrize(
    ("given_", "plain"),
    [
        ({"rank": np.int64(3)}, {"budget": "rank", "value": 3, "fraction": False}),
        ({"energy": 1}, {"budget": "energy", "value": 1.0, "fraction": False}),
        ({"params": "8.9k"}, {"budget": "params", "value": 8900, "fraction": False}),
        ({"macs": 0.5}, {"budget": "macs", "value": 0.5, "fraction": True}),
        ({"macs": "1"}, {"budget": "macs", "value": 1.0, "fraction": True}),
        ({"latency": "3.5ms"}, {"budget": "latency", "value": 3.5, "fraction": False}),
        ({"max_drop": "0.5"}, {"budget": "max_drop", "value": 0.5, "fraction": False}),
    ],
)
def test_plain_data(given_, plain):
    assert json.loads(json.dumps(Budget.of(**given_).to_dict())) == plain


@counted
@pytest.mark.parametrize("value", ["1\n2", "a\x85b", "\u2028"], ids=repr)
def test_the_error_is_one_line_also_for_odd_text(kind, value):
    refused(kind, value)
