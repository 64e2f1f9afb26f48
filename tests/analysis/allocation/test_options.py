"""The choice of form and rank against a twin that tries everything, and the budgets that are refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.allocation.budget import Budget
from analysis.allocation.options import choose, energy_curves, executed_macs, forms_named, present, smaller_options
from gconv import FORMS, GROUPS, GConv2d, InputError, SeparableGConv2d

every_form = pytest.mark.parametrize("form", FORMS)
POSITIONS = (36, 16)  # a 6 x 6 input map and a 4 x 4 output map
few = settings(max_examples=40)  # each tries every rank of every form


@st.composite
def layers(draw):
    """Layers with filters near to a random rank of a random form, full or separable, so that all choices occur."""
    o, i, k = (draw(st.integers(1, high)) for high in (4, 4, 4))
    name, form = draw(st.sampled_from(GROUPS[1:])), draw(st.sampled_from(list(FORMS)))
    full = GConv2d(i, o, k, group=name)
    rank = draw(st.integers(1, FORMS[form].max_rank(full.filter_shape)))
    separable = SeparableGConv2d.like(full, form, rank)
    if draw(st.booleans()):
        return separable
    noise = draw(st.sampled_from([0, 0.1, 1]))
    with torch.no_grad():
        full.weight.mul_(noise).add_(separable.weight)
    return full


def size(layer, form=None, rank=None):
    """The filter's parameters as they are, or as they would be: counted on the layer itself."""
    made = layer if form is None else SeparableGConv2d.like(layer, form, rank)
    return sum(p.numel() for name, p in made.named_parameters() if name != "bias")


def macs(layer, form=None, rank=None):
    """As executed at ``POSITIONS``, counted on the layer itself: as it runs by default or, if that is less, dense."""
    if form is None:
        return at_positions(layer.macs())
    made = SeparableGConv2d.like(layer, form, rank)
    return min(at_positions(made.macs()), at_positions(made.macs("dense")))


def at_positions(by_map):
    return sum(each * positions for each, positions in zip(by_map, POSITIONS, strict=True))


def competing(layer, **budget):
    """The (form, rank) pairs within the budget that make the layer smaller and not costlier to run."""
    if layer.kernel_size[0] == 1:
        return []
    allowed = options(layer, Budget.of(**budget))
    return [o for o in allowed if size(layer, *o) < size(layer) and macs(layer, *o) <= macs(layer)]


def kept(layer, form, rank):
    """The share of energy that is left in the factored filter itself."""
    weight = layer.weight.detach().double()
    exact = SeparableGConv2d.like(layer, form, rank).double()
    mix, spatial = exact.form.factor(weight, rank, layer.tables.pixels)
    error = exact.form.generator(mix, spatial, layer.filter_shape, layer.tables.pixels) - weight
    return 1 - (error.norm() / weight.norm()).item() ** 2


def options(layer, budget):
    """Every (form, rank) that the budget allows."""
    for name, form in FORMS.items():
        largest = form.max_rank(layer.filter_shape)
        if budget.kind == "rank":
            yield name, min(budget.value, largest)
        else:
            yield from ((name, r) for r in range(1, largest + 1) if kept(layer, name, r) >= budget.value - 1e-12)


def chosen(layer, form, **budget):
    return choose(layer, energy_curves(layer), forms_named(form), Budget.of(**budget), POSITIONS)


# --- budgets and forms


@pytest.mark.parametrize("budget", [{"rank": 1}, {"rank": 99}, {"energy": 1}, {"energy": 1e-9}, {"energy": 0.95}])
def test_a_budget_is_a_rank_or_a_share_of_energy(budget):
    made = Budget.of(**budget)
    assert {made.kind: made.value} == budget


def test_a_budget_is_one_thing_and_by_default_95_percent_of_the_energy():
    assert Budget.of() == Budget.of(rank=None, energy=0.95)
    with pytest.raises(
        InputError, match=r"^several budgets are given: rank 1, energy 0\.5. Give one of rank, energy, "
    ):
        Budget.of(rank=1, energy=0.5)


@pytest.mark.parametrize("rank", [0, -1, 1.5, 2.0, "2", True, math.nan])
def test_a_wrong_rank_is_refused(rank):
    with pytest.raises(InputError, match=r"^rank is .*\. Give a whole number of at least 1\.$"):
        Budget.of(rank=rank)


@pytest.mark.parametrize("energy", [0, -0.1, 1.0001, 95, math.nan, math.inf, "0.9"])
def test_a_wrong_energy_is_refused(energy):
    with pytest.raises(InputError, match=r"^energy is .*. Give a share above 0 and up to 1"):
        Budget.of(energy=energy)


def test_forms_by_name():
    assert [form.name for form in forms_named("Auto")] == list(FORMS)
    for name, form in FORMS.items():
        assert forms_named(name.upper()) == (form,)


def test_an_unknown_form_is_refused():
    with pytest.raises(InputError, match=r"^unknown form 'cg'; accepted: auto, g, gc, gc_in, g_turned, gc_turned$"):
        forms_named("cg")


# --- choices


@few
@given(layers())
def test_curves_say_what_the_factored_filter_keeps(layer):
    curves = energy_curves(layer)
    assert list(curves) == list(FORMS)
    for form, curve in curves.items():
        ranks = range(1, FORMS[form].max_rank(layer.filter_shape) + 1)
        assert curve == pytest.approx([kept(layer, form, rank) for rank in ranks], abs=1e-6)


@every_form
@few
@given(layer=layers(), energy=st.floats(0.05, 1))
def test_a_form_gets_the_smallest_rank_that_keeps_the_energy(form, layer, energy):
    option = chosen(layer, form, energy=energy).option
    if option is None:
        return
    assert option.form == form
    assert option.energy >= energy - 1e-12
    assert option.rank == 1 or kept(layer, form, option.rank - 1) < energy
    assert option.energy == pytest.approx(kept(layer, form, option.rank), abs=1e-6)
    assert option.error == pytest.approx(max(0, 1 - option.energy))
    assert option.relative_error == pytest.approx(math.sqrt(option.error))
    assert option.parameters == size(layer, form, option.rank)


@every_form
@few
@given(layer=layers(), rank=st.integers(1, 20))
def test_a_form_gets_the_rank_or_its_largest(form, layer, rank):
    option = chosen(layer, form, rank=rank).option
    assert option is None or option.rank == min(rank, FORMS[form].max_rank(layer.filter_shape))


@every_form
@few
@given(layer=layers(), budget=st.one_of(st.builds(dict, rank=st.integers(1, 20)), st.just({"energy": 0.9})))
def test_a_form_that_is_asked_for_is_refused_only_where_there_is_nothing_to_do(form, layer, budget):
    choice = chosen(layer, form, **budget)
    largest = FORMS[form].max_rank(layer.filter_shape)
    wanted = next(rank for name, rank in options(layer, Budget.of(**budget)) if name == form)
    already = isinstance(layer, SeparableGConv2d) and layer.form.name == form and layer.rank <= min(wanted, largest)
    assert (choice.option is None) == (layer.kernel_size == (1, 1) or already)
    if choice.option is not None:
        more = choice.option.parameters - size(layer)
        assert (f"{more:,} parameters more" in choice.why) == (more > 0)


@few
@given(layer=layers(), energy=st.floats(0.3, 1))
def test_auto_within_an_energy_takes_the_fewest_parameters(layer, energy):
    option = chosen(layer, "auto", energy=energy).option
    sizes = [size(layer, *o) for o in competing(layer, energy=energy)]
    assert (None if option is None else option.parameters) == min(sizes, default=None)
    assert option is None or option.macs == macs(layer, option.form, option.rank) <= macs(layer)


@few
@given(layer=layers(), rank=st.integers(1, 10))
def test_auto_at_a_rank_loses_least_energy_per_parameter_saved(layer, rank):
    option = chosen(layer, "auto", rank=rank).option
    smaller = competing(layer, rank=rank)
    assert (option is None) == (not smaller)
    if option is not None:
        price = {o: max(1 - kept(layer, *o), 1e-12) / (size(layer) - size(layer, *o)) for o in smaller}
        assert price[option.form, option.rank] <= min(price.values()) * (1 + 1e-6) + 1e-9


def test_every_outcome_of_auto_has_its_reason():
    full = GConv2d(4, 4, 3, group="p4")
    small = SeparableGConv2d(4, 4, 3, group="p4", form="gc", rank=1)
    pointwise = GConv2d(4, 4, 1, group="p4")
    assert chosen(full, "auto", rank=1).why == "least energy lost per parameter saved"
    assert chosen(full, "auto", energy=0.3).why == "fewest parameters"
    assert chosen(small, "auto", rank=1).why == "no form is smaller"
    assert chosen(small, "gc", rank=1).why == "already gc of rank 1"
    assert chosen(pointwise, "auto", rank=1).why == chosen(pointwise, "gc", rank=1).why == "1x1: nothing to separate"


# --- options for a budget of the whole network


@few
@given(layer=layers(), names=st.sets(st.sampled_from(list(FORMS)), min_size=1))
def test_options_are_the_layer_as_it_is_and_all_that_are_smaller_and_run_no_dearer(layer, names):
    curves = energy_curves(layer)
    first, *others = smaller_options(layer, curves, [FORMS[name] for name in names], POSITIONS)
    assert first == present(layer, POSITIONS)
    assert (first.rank, first.execution, first.energy, first.error, first.relative_error) == (None, None, 1, 0, 0)
    assert (first.parameters, first.macs) == (size(layer), macs(layer))
    pairs = [(name, r) for name in names for r in range(1, FORMS[name].max_rank(layer.filter_shape) + 1)]
    expected = [o for o in pairs if size(layer, *o) < size(layer) and macs(layer, *o) <= macs(layer)]
    assert {(o.form, o.rank) for o in others} == (set(expected) if layer.kernel_size[0] > 1 else set())
    for option in others:
        assert (option.parameters, option.macs) == (
            size(layer, option.form, option.rank),
            macs(layer, option.form, option.rank),
        )
        made = SeparableGConv2d.like(layer, option.form, option.rank)
        assert at_positions(made.macs(option.execution)) == option.macs
        assert option.execution == made.resolved_execution or option.macs < at_positions(made.macs())
        assert option.energy == curves[option.form][option.rank - 1]


@every_form
@few
@given(layer=layers(), data=st.data())
def test_macs_are_those_of_the_layer_that_runs_that_way(form, layer, data):
    rank = data.draw(st.integers(1, FORMS[form].max_rank(layer.filter_shape)))
    made = SeparableGConv2d.like(layer, form, rank)
    for execution in FORMS[form].executions:
        expected = sum(each * positions for each, positions in zip(made.macs(execution), POSITIONS, strict=True))
        assert executed_macs(layer, FORMS[form], rank, execution, POSITIONS) == expected
