"""The allocators against twins that try everything, in exact arithmetic: all numbers are small fractions of two."""

import itertools
import math
import random
import re
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.allocation import allocators
from analysis.allocation.allocators import ALLOCATORS, COSTS, Option, Problem, allocate, reachable
from gconv.system.errors import InputError

every_allocator = pytest.mark.parametrize("name", ALLOCATORS)
many = settings(max_examples=200, deadline=None)
eighths = st.integers(0, 8).map(lambda n: n / 8)


def an_option(**changes):
    option = Option("gc", 1, "factorized", 0.5, 5, 5, 1.0, 0.5, 1.0, 5.0)
    return replace(option, **changes)


def as_it_is(cost=10, **changes):
    return Option(None, None, None, 1.0, cost, cost, 0.0, 0.0, None, float(cost), **changes)


@st.composite
def options(draw, drops, forms):
    return Option(
        form=draw(st.sampled_from(forms)),
        rank=draw(st.integers(1, 4)),
        execution=draw(st.sampled_from(["dense", "factorized"])),
        energy=draw(eighths),
        parameters=draw(st.integers(1, 12)),
        macs=draw(st.integers(1, 12)),
        error=draw(eighths),
        relative_error=draw(eighths),
        drop=draw(drops),
        milliseconds=draw(st.integers(1, 12)) / 4,
    )


@st.composite
def problems(draw, *, least=0, most=4, drops=None, forms=("g", "gc", "gc_in"), out_of_reach=False):
    """Problems with many ties, options dearer than the layer and, unless asked for, a limit within reach."""
    if drops is None:
        drops = draw(st.sampled_from([st.none(), st.integers(-2, 8).map(lambda n: n / 4)]))
    layers = []
    for _ in range(draw(st.integers(least, most))):
        asis = as_it_is(draw(st.integers(4, 10)))
        asis = replace(asis, milliseconds=asis.parameters / 4)
        layers.append((asis, *draw(st.lists(options(drops, forms), max_size=4))))
    problem = Problem(tuple(layers), draw(st.sampled_from(COSTS)), 0)
    low, high = int(4 * reachable(problem)), int(4 * total(problem, [0] * len(layers)))
    quarters = st.integers(-2, low - 1) if out_of_reach else st.integers(low, high + 2)
    return replace(problem, limit=draw(quarters) / 4)


def cost_of(problem, option):
    return Fraction(getattr(option, problem.cost))


def total(problem, choice, name=None):
    return sum(
        Fraction(getattr(layer[n], name or problem.cost)) for layer, n in zip(problem.layers, choice, strict=True)
    )


def largest(problem, choice, name="relative_error"):
    return max((getattr(layer[n], name) for layer, n in zip(problem.layers, choice, strict=True)), default=0)


def within(problem):
    """Every allocation within the limit."""
    choices = itertools.product(*(range(len(layer)) for layer in problem.layers))
    return [choice for choice in choices if total(problem, choice) <= problem.limit]


def fits_as_it_is(problem):
    return total(problem, [0] * len(problem.layers)) <= problem.limit


def first(problem, layer, allowed):
    """The cheapest of these; of equals that of least error, then of fewest MACs, then the first."""
    return min(allowed, key=lambda n: (cost_of(problem, layer[n]), layer[n].error, layer[n].macs, n))


# --- what holds for all


@many
@given(problem=problems())
def test_every_allocator_keeps_to_the_limit_and_none_beats_the_exact_one(problem):
    least = total(problem, ALLOCATORS["dynamic"](problem), "error")
    for name, allocator in ALLOCATORS.items():
        choice = allocator(problem)
        assert all(type(n) is int and 0 <= n < len(layer) for n, layer in zip(choice, problem.layers, strict=True))
        assert total(problem, choice) <= problem.limit
        assert total(problem, choice, "error") >= least
        assert allocate(problem, name)[0] == choice


@many
@given(problem=problems())
def test_what_fits_is_left_as_it_is(problem):
    # Also where an option is cheaper and has no error either.
    choice = [0] * len(problem.layers)
    for limit in (total(problem, choice), 2 * total(problem, choice) + 1):
        roomy = replace(problem, limit=float(limit))
        for name, allocator in ALLOCATORS.items():
            assert allocator(roomy) == choice
            assert allocate(roomy, name) == (choice, "within the limit as it is")


@every_allocator
@given(thirds=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_the_sum_of_times_may_round_either_way(name, thirds):
    layers = tuple((as_it_is(100), an_option(milliseconds=n / 3)) for n in thirds)
    exact = float(sum(Fraction(n / 3) for n in thirds))
    for limit in (exact, math.nextafter(exact, 0), reachable(Problem(layers, "milliseconds", exact))):
        assert ALLOCATORS[name](Problem(layers, "milliseconds", limit)) == [1] * len(layers)
    with pytest.raises(InputError):
        ALLOCATORS[name](Problem(layers, "milliseconds", exact * (1 - 1e-6)))


@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_whole_numbers_are_exact(cost):
    layers = ((as_it_is(10**13), an_option(**{cost: 10**12 + 1})),)
    assert allocate(Problem(layers, cost, 10**13))[0] == [0]
    assert allocate(Problem(layers, cost, 10**13 - 1))[0] == allocate(Problem(layers, cost, 10**12 + 1))[0] == [1]
    with pytest.raises(InputError, match=r"Give at least 1,000,000,000,001\.$"):
        allocate(Problem(layers, cost, 10**12))


# --- each against its definition


@many
@given(problem=problems())
def test_dynamic_is_the_best_of_all(problem):
    choice = ALLOCATORS["dynamic"](problem)
    least = min(total(problem, other, "error") for other in within(problem))
    assert total(problem, choice, "error") == least


@settings(max_examples=50, deadline=None)
@given(problem=problems(least=6, most=8))
def test_dynamic_is_the_best_of_longer_ones(problem):
    # The same recursion without bounds: for every cost of the layers so far the least error.
    least = {Fraction(0): Fraction(0)}
    for layer in problem.layers:
        merged = {}
        for (cost, error), option in itertools.product(least.items(), layer):
            key = cost + cost_of(problem, option)
            merged[key] = min(error + Fraction(option.error), merged.get(key, Fraction(10**9)))
        least = merged
    best = min(error for cost, error in least.items() if cost <= problem.limit)
    assert total(problem, ALLOCATORS["dynamic"](problem), "error") == best


@many
@given(problem=problems())
def test_minmax_minimises_the_largest_and_then_spends(problem):
    choice = ALLOCATORS["minmax"](problem)
    least = min(largest(problem, other) for other in within(problem))
    assert largest(problem, choice) == least
    if fits_as_it_is(problem):
        return
    cheapest = [
        first(problem, layer, [n for n, o in enumerate(layer) if n == 0 or o.relative_error <= least])
        for layer in problem.layers
    ]
    assert choice == spent(problem, cheapest, "relative_error")


@many
@given(problem=problems())
def test_energy_takes_the_cheapest_above_the_largest_share_that_fits(problem):
    def at(share):
        return [
            first(problem, layer, [n for n, option in enumerate(layer) if n == 0 or option.energy >= share])
            for layer in problem.layers
        ]

    if not fits_as_it_is(problem):
        shares = sorted({option.energy for layer in problem.layers for option in layer}, reverse=True)
        expected = next(at(share) for share in shares if total(problem, at(share)) <= problem.limit)
        assert ALLOCATORS["energy"](problem) == expected


@many
@given(problem=st.one_of(problems(least=1), problems(least=1, forms=["gc"])))
def test_uniform_takes_the_largest_rank_that_fits(problem):
    def at(rank, layer):
        allowed = []
        for form in {option.form for option in layer[1:]}:
            ranks = [option.rank for option in layer[1:] if option.form == form and option.rank <= rank]
            for n, option in enumerate(layer):
                if option.form == form and ranks and option.rank == max(ranks):
                    allowed.append(n)
        allowed = [n for n in allowed if cost_of(problem, layer[n]) < cost_of(problem, layer[0])]
        least = min((layer[n].error for n in allowed), default=None)
        return first(problem, layer, [n for n in allowed if layer[n].error == least]) if allowed else 0

    if fits_as_it_is(problem):
        return
    expected = [first(problem, layer, range(len(layer))) for layer in problem.layers]
    for rank in range(1, 5):
        choice = [at(rank, layer) for layer in problem.layers]
        if total(problem, choice) <= problem.limit:
            expected = choice
    assert ALLOCATORS["uniform"](problem) == expected


def test_uniform_clips_the_rank_and_leaves_alone_what_it_would_not_shrink():
    first_layer = (as_it_is(20), *(an_option(rank=r, parameters=5 * r, error=1 / r) for r in (1, 2, 3, 4)))
    clipped = (as_it_is(9), an_option(rank=1, parameters=3), an_option(rank=2, parameters=6, error=0.5))
    dearer = (as_it_is(4), an_option(rank=1, parameters=4))
    problem = Problem((first_layer, clipped, dearer), "parameters", 25)
    assert ALLOCATORS["uniform"](problem) == [3, 2, 0]


@many
@given(problem=problems())
def test_greedy_takes_the_step_that_loses_least_per_cost_saved(problem):
    measured = all(option.drop is not None for layer in problem.layers for option in layer[1:])
    names = ["drop", "error"] if measured else ["error"]
    assert ALLOCATORS["greedy"](problem) == descended(problem, names)


@pytest.mark.parametrize(("drop", "expected"), [(0.0, [0, 1]), (None, [1, 0])])
def test_greedy_goes_by_error_where_a_drop_was_not_measured(drop, expected):
    costly = (as_it_is(), an_option(error=0.1, drop=3.0))
    free = (as_it_is(), an_option(error=0.2, drop=drop))
    assert ALLOCATORS["greedy"](Problem((costly, free), "macs", 15)) == expected


@many
@given(problem=problems())
def test_lagrangian_is_no_worse_than_the_relaxation_at_the_smallest_price_that_fits(problem):
    choice = ALLOCATORS["lagrangian"](problem)
    relaxed = (best_at(problem, price) for price in prices(problem))
    relaxed = next(other for other in relaxed if total(problem, other) <= problem.limit)
    assert total(problem, choice, "error") <= total(problem, relaxed, "error")
    if not fits_as_it_is(problem):
        assert choice == spent(problem, descended(problem, ["error"]), "error")


@many
@given(problem=problems(most=3))
def test_lagrangian_is_exact_on_the_convex_hull(problem):
    breaks = prices(problem)
    for low, high in itertools.pairwise([*breaks, breaks[-1] + 1]):
        relaxed = best_at(problem, (low + high) / 2)
        tight = replace(problem, limit=float(total(problem, relaxed)))
        error = total(problem, ALLOCATORS["lagrangian"](tight), "error")
        assert error == total(problem, relaxed, "error") == min(total(problem, c, "error") for c in within(tight))


def prices(problem):
    """Every slope between two options of a layer: all prices at which the best option of a layer may change."""
    slopes = {
        Fraction(a.error - b.error) / (cost_of(problem, b) - cost_of(problem, a))
        for layer in problem.layers
        for a, b in itertools.permutations(layer, 2)
        if a.error > b.error and cost_of(problem, a) < cost_of(problem, b)
    }
    return sorted(slopes | {Fraction(0)})


def best_at(problem, price):
    """The minimum of error + price * cost in every layer; of equals the cheapest."""

    def value(option):
        return Fraction(option.error) + price * cost_of(problem, option), cost_of(problem, option)

    return [min(range(len(layer)), key=lambda n: value(layer[n])) for layer in problem.layers]


def descended(problem, names):
    """From all as it is the step of least loss per cost saved, in the first of these, until it fits."""
    choice = [0] * len(problem.layers)
    while total(problem, choice) > problem.limit:
        steps = []
        for at, layer in enumerate(problem.layers):
            now = layer[choice[at]]
            for n, option in enumerate(layer):
                saved = cost_of(problem, now) - cost_of(problem, option)
                if saved > 0:
                    lost = [Fraction((getattr(option, name) or 0) - (getattr(now, name) or 0)) for name in names]
                    steps.append((*(each / saved for each in lost), -saved, at, option.error, option.macs, n))
        *_, at, _, _, n = min(steps)
        choice[at] = n
    return choice


def spent(problem, choice, name):
    """From there the step that fits and gains most per cost, as long as there is one."""
    choice = list(choice)
    while True:
        steps = []
        for at, layer in enumerate(problem.layers):
            now = layer[choice[at]]
            for n, option in enumerate(layer):
                extra = cost_of(problem, option) - cost_of(problem, now)
                gain = Fraction(getattr(now, name) - getattr(option, name))
                if gain > 0 and total(problem, choice) + extra <= problem.limit:
                    price = gain / extra if extra > 0 else math.inf
                    steps.append((-price, at, cost_of(problem, option), option.error, option.macs, n))
        if not steps:
            return choice
        _, at, *_, n = min(steps)
        choice[at] = n


# --- auto: exact, within reason


@many
@given(problem=problems(least=1))
def test_auto_is_exact_and_says_so(problem):
    choice, why = allocate(problem)
    assert choice == ALLOCATORS["dynamic"](problem)
    if not fits_as_it_is(problem):
        assert why.startswith(f"exact dynamic programme: {len(problem.layers)} layers, at most ")


def a_network(layers, error_of):
    """Layers of 39 ranks and random sizes."""
    generator = random.Random(0)
    made = []
    for _ in range(layers):
        size = generator.randint(1_000, 10_000)
        ranks = [
            an_option(rank=r, parameters=r * size, error=error_of(generator, r, size), relative_error=1 / r)
            for r in range(1, 40)
        ]
        made.append((as_it_is(40 * size), *ranks))
    return Problem(tuple(made), "parameters", 20 * sum(layer[1].parameters for layer in made))


def test_auto_is_exact_for_a_deep_network():
    problem = a_network(43, lambda generator, rank, size: generator.random() / rank)
    choice, why = allocate(problem)
    entries = re.fullmatch(r"exact dynamic programme: 43 layers, at most ([\d,]+) combinations on the front", why)
    # Bounds keep the front short. Without them it would have about one entry for every number of parameters.
    assert 1 < int(entries[1].replace(",", "")) < 10_000
    assert total(problem, choice, "error") <= total(problem, ALLOCATORS["lagrangian"](problem), "error")


def test_auto_falls_back_where_the_front_is_too_large(monkeypatch):
    # Error for cost at one rate: nothing beats anything, and no bound can tell.
    problem = a_network(3, lambda generator, rank, size: (40 - rank) * size)
    problem = replace(problem, limit=problem.limit + 0.5)
    _, why = allocate(problem)
    front = int(why.split("at most ")[1].split()[0].replace(",", ""))
    monkeypatch.setattr(allocators, "MAX_FRONT", front)
    assert allocate(problem)[1] == why
    monkeypatch.setattr(allocators, "MAX_FRONT", front - 1)
    expected = f"lagrangian: the exact front would have more than {front - 1:,} entries"
    assert allocate(problem) == (ALLOCATORS["lagrangian"](problem), expected)
    with pytest.raises(InputError, match=rf"more than {front - 1:,} entries; accepted: auto or lagrangian$"):
        allocate(problem, "dynamic")


# --- what is refused


@every_allocator
@given(problem=problems(least=1, out_of_reach=True))
def test_a_limit_out_of_reach_names_the_nearest(name, problem):
    nearest = sum(min(cost_of(problem, option) for option in layer) for layer in problem.layers)
    assert reachable(problem) == nearest
    for attempt in (ALLOCATORS[name], lambda p: allocate(p, name), allocate):
        with pytest.raises(InputError) as refused:
            attempt(problem)
        message = re.fullmatch(r"a limit of (\S+) (\w+) is out of reach\. Give at least (\S+)\.", str(refused.value))
        given, cost, accepted = message.groups()
        assert (float(given), cost, float(accepted)) == (problem.limit, problem.cost, nearest)
        attempt(replace(problem, limit=float(accepted)))


def test_the_nearest_time_is_named_such_that_it_is_accepted():
    problem = Problem(
        ((as_it_is(), an_option(milliseconds=1 / 3)), (as_it_is(), an_option(milliseconds=1))), "milliseconds", 1.0
    )
    with pytest.raises(InputError, match=r"Give at least 1\.3334\.$"):
        allocate(problem)
    assert allocate(replace(problem, limit=1.3334))[0] == [1, 1]


def test_a_limit_that_is_not_a_number_is_refused():
    with pytest.raises(InputError, match="a limit of nan macs is out of reach"):
        allocate(Problem(((as_it_is(),),), "macs", math.nan))


def test_an_unknown_allocator_is_refused():
    accepted = "auto, uniform, energy, minmax, lagrangian, greedy, dynamic"
    with pytest.raises(InputError, match=f"^unknown allocator 'best'; accepted: {accepted}$"):
        allocate(Problem((), "macs", 0), "best")


def test_an_unknown_cost_is_refused():
    with pytest.raises(InputError, match=r"^unknown cost 'joules'; accepted: parameters, macs, milliseconds$"):
        Problem((), "joules", 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("name", ["energy", "error", "relative_error", "milliseconds"])
def test_an_option_without_a_finite_number_is_refused(name, value):
    layers = ((as_it_is(), an_option(**{name: value})),)
    with pytest.raises(InputError, match=rf"^the {name} of an option is {value}\. Give a finite number\.$"):
        Problem(layers, "milliseconds", 1)


def test_times_are_needed_only_where_they_are_the_cost():
    layers = ((as_it_is(), an_option(milliseconds=None)),)
    assert allocate(Problem(layers, "macs", 5))[0] == [1]


def test_an_allocator_that_overspends_is_an_error(monkeypatch):
    monkeypatch.setitem(ALLOCATORS, "wasteful", lambda problem: [0])
    with pytest.raises(RuntimeError, match=r"^allocator wasteful spends 10 macs of 5$"):
        allocate(Problem(((as_it_is(), an_option()),), "macs", 5), "wasteful")
