"""The sensitivity table against twins that replace one layer by hand, and the file that it is kept in."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from analysis.allocation import sensitivity
from analysis.allocation.allocators import Option
from analysis.allocation.sensitivity import OF_OUTPUTS, OF_SCORES, fingerprint, from_table, measure_options, to_table
from analysis.fitting.alternating import fit_factors
from analysis.fitting.moments import channel_weights, collect_moments
from gconv import (
    FORMS,
    GConv2d,
    GroupBatchNorm2d,
    GroupMaxPool,
    InputError,
    LiftingConv2d,
    SeparableGConv2d,
    SpatialMeanPool2d,
    cost,
)
from gconv.training.datasets import Split

STEPS = 12
CHOICES = [("g", 2), ("gc", 1), ("gc", 3), ("gc_in", 2), ("g_turned", 1), ("gc_turned", 2)]


def network(on="p4"):
    made = nn.Sequential(
        LiftingConv2d(1, 2, 3, group=on),
        GroupBatchNorm2d(2),
        nn.ReLU(),
        GConv2d(2, 2, 2, group=on, bias=False),
        GroupBatchNorm2d(2),
        nn.ReLU(),
        GConv2d(2, 3, 2, group=on),
        GroupMaxPool(),
        SpatialMeanPool2d(),
        nn.Linear(3, 4),
    ).double()
    nn.init.uniform_(made[1].running_mean, -0.5, 0.5)
    nn.init.uniform_(made[4].running_var, 0.2, 3)
    return made


def split(count):
    return Split(torch.randn(count, 1, 6, 6), torch.randint(4, (count,)))


def option(layer, form, rank, execution="dense", **changes):
    size = FORMS[form].parameters(layer.filter_shape, rank)
    values = {"energy": 0.5, "parameters": size, "macs": 3 * size, "error": 0.1, "relative_error": 0.2} | changes
    return Option(form, rank, execution, **values)


def as_it_is(layer, **changes):
    return Option(None, None, None, 1.0, layer.weight.numel(), 9 * layer.weight.numel(), 0.0, 0.0, **changes)


def options_of(model):
    return {
        name: (as_it_is(model[int(name)]), *(option(model[int(name)], form, rank) for form, rank in CHOICES))
        for name in ("3", "6")
    }


def scores_with_batch_statistics(model, images):
    """The scores where batch norm normalises by these very images."""
    model = copy.deepcopy(model).eval()
    for part in model.modules():
        if isinstance(part, GroupBatchNorm2d):
            part.train()
    with torch.no_grad():
        return model(images.double())


def divergence_by_hand(model, replaced, images):
    p, q = (scores_with_batch_statistics(one, images).softmax(1) for one in (model, replaced))
    return float((p * (p.log() - q.log())).sum(1).mean())


def points(model, probes):
    right = scores_with_batch_statistics(model, probes.images).argmax(1) == probes.labels
    return 100 * float(right.double().mean())


def replaced_by_hand(model, name, row, images, seed):
    """The network with one layer fitted as the option says, and the fit."""
    layer = model.get_submodule(name)
    moments = collect_moments(model, model, [name], images, seed=seed)[name]
    weights = channel_weights(model, ["3", "6"], images, seed=seed)[name]
    fitted = fit_factors(layer, FORMS[row.form], row.rank, moments, weights=weights, steps=STEPS)
    replaced = copy.deepcopy(model)
    made = SeparableGConv2d.from_factors(layer, row.form, fitted.mix, fitted.spatial, fitted.bias)
    replaced[int(name)] = made
    return replaced, fitted


def in_order_of(images, seed):
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]


def beaten(row, others):
    """Whether another option is nowhere worse and somewhere better."""
    mine = row.parameters, row.macs, row.relative_error
    theirs = [(other.parameters, other.macs, other.relative_error) for other in others]
    return any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in theirs)


def key(row):
    return row.form, row.rank


# --- what is measured


@pytest.mark.parametrize(("on", "seed", "own_probes"), [("p4", 0, True), ("pm", 1, True), ("p2", 2, False)])
def test_every_option_is_measured_as_if_it_alone_were_chosen(on, seed, own_probes):
    model, data = network(on), split(30)
    probes = split(20) if own_probes else None
    options = options_of(model)
    measured = measure_options(model, options, data, probes, seed).options
    assert list(measured) == ["3", "6"]
    images = in_order_of(data.images, seed)
    judged = probes if own_probes else data
    for name, rows in measured.items():
        assert rows[0] == options[name][0]
        kept = {key(row): row for row in rows[1:]}
        made = {key(row): replaced_by_hand(model, name, row, images, seed) for row in options[name][1:]}
        everyone = [options[name][0]]
        for row in options[name][1:]:
            everyone.append(copy.copy(row))
            object.__setattr__(everyone[-1], "relative_error", made[key(row)][1].error)
        assert list(kept) == [key(row) for row in everyone[1:] if not beaten(row, everyone)]
        assert max(row.error for row in rows) > 1e-4
        for row in options[name][1:]:
            if key(row) not in kept:
                continue
            got, (replaced, fitted) = kept[key(row)], made[key(row)]
            assert (got.execution, got.energy, got.parameters, got.macs, got.milliseconds) == (
                *(row.execution, row.energy, row.parameters, row.macs),
                None,
            )
            assert math.isclose(got.relative_error, fitted.error, rel_tol=1e-6, abs_tol=1e-9)
            expected = divergence_by_hand(model, replaced, judged.images)
            assert math.isclose(got.error, expected, rel_tol=1e-6, abs_tol=1e-12)
            if own_probes:
                assert math.isclose(got.drop, points(model, probes) - points(replaced, probes), abs_tol=1e-9)
            else:
                assert got.drop is None


def test_an_option_that_loses_on_every_count_is_left_out():
    model, data = network(), split(20)
    layer = model[3]
    good = option(layer, "gc", 3)
    worse = option(layer, "gc", 1, parameters=good.parameters + 1, macs=good.macs)
    twin = option(layer, "gc", 3, "factorized")  # no better and no worse
    larger = option(layer, "gc", 4, parameters=good.parameters + 1)
    exact = option(layer, "g", FORMS["g"].max_rank(layer.filter_shape), parameters=10**6, macs=10**6)
    measured = measure_options(
        model, {"3": (as_it_is(layer), good, worse, twin, larger, exact)}, data, None, 0
    ).options["3"]
    assert [(row.form, row.rank, row.execution) for row in measured] == [
        (None, None, None),
        ("gc", 3, "dense"),
        ("gc", 3, "factorized"),
        ("gc", 4, "dense"),
    ]


def test_the_layer_as_it_is_stays_an_option_whatever_else_there_is():
    model, data = network(), split(20)
    layer = model[3]
    nn.init.zeros_(layer.weight)  # so that nothing is lost by any other
    options = {"3": (as_it_is(layer), option(layer, "gc", 1), option(layer, "gc", 2))}
    measured = measure_options(model, options, data, None, 0).options["3"]
    assert [row.rank for row in measured] == [None, 1]
    assert measured[0] == options["3"][0]
    assert measured[1].relative_error == 0


def test_an_exact_option_costs_nothing():
    model, data = network(), split(20)
    layer = model[6]
    exact = option(layer, "gc", FORMS["gc"].max_rank(layer.filter_shape))
    row = measure_options(model, {"6": (as_it_is(layer), exact)}, data, split(20), 0).options["6"][1]
    assert row.relative_error < 1e-6
    assert 0 <= row.error < 1e-10
    assert row.drop == 0


def test_work_and_not_time_decides_whether_every_option_classifies(monkeypatch):
    """Else a slow machine, or a busy one, would compare options by another error than a fast one."""
    model, data, probes = network(), split(20), split(10)
    options = options_of(model)
    whole = measure_options(model, options, data, probes, 0)
    count = sum(len(rows) - 1 for rows in whole.options.values())
    work = 10 * count * cost(model, (1, 6, 6)).macs_published
    seconds = iter(range(0, 10**9, 10**4))  # as if nearly three hours passed between any two looks at the clock
    monkeypatch.setattr("time.perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(sensitivity, "SCORE_WORK", work)
    assert measure_options(model, options, data, probes, 0) == whole
    assert whole.compared_by == OF_SCORES
    monkeypatch.setattr(sensitivity, "SCORE_WORK", work - 1)
    measured = measure_options(model, options, data, probes, 0)
    assert measured.compared_by == OF_OUTPUTS
    for row in (row for rows in measured.options.values() for row in rows[1:]):
        assert row.relative_error > 0
        assert row.error == row.relative_error**2
        assert row.drop is None


def test_layers_without_options_are_passed_on(monkeypatch):
    model = network()
    alone = {"3": (as_it_is(model[3]),)}
    assert measure_options(model, alone, split(5), split(5), 0).options == alone
    options = {"3": (as_it_is(model[3]),), "6": options_of(model)["6"]}
    measured = measure_options(model, options, split(9), None, 0).options
    assert list(measured) == ["3", "6"]
    assert measured["3"] == options["3"]
    assert len(measured["6"]) > 1


def test_only_so_many_images_are_looked_at(monkeypatch):
    seen = []
    model = network()
    model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    monkeypatch.setattr(sensitivity, "IMAGES", 11)
    monkeypatch.setattr(sensitivity, "PROBES", 7)
    measure_options(model, options_of(model), split(40), split(30), 0)
    # Gradients of the probes, moments of the images (of both networks), classes of the probes; and a single image, by
    # which the size of the maps is found.
    assert set(seen) == {1, 7, 11}


def test_the_choice_is_of_the_seed_and_the_network_is_left_as_it_was():
    model, data, probes = network().train(), split(20), split(20)
    model[4].eval()
    modes = [part.training for part in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    one, same = (measure_options(model, options_of(model), data, probes, 5) for _ in range(2))
    assert one == same
    assert torch.get_rng_state().equal(random)
    assert [part.training for part in model.modules()] == modes
    assert all(state[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert type(model[3]) is type(model[6]) is GConv2d
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# --- the table

numbers = st.floats(allow_nan=False, allow_infinity=False)
rows = st.builds(
    Option,
    form=st.sampled_from([None, *FORMS]),
    rank=st.none() | st.integers(1, 9),
    execution=st.sampled_from([None, "dense", "factorized"]),
    energy=numbers,
    parameters=st.integers(0, 10**12),
    macs=st.integers(0, 10**12),
    error=numbers,
    relative_error=numbers,
    drop=st.none() | numbers,
    milliseconds=st.none() | numbers,
)
MODEL = nn.Linear(1, 1)


@settings(max_examples=30, deadline=None)
@given(options=st.dictionaries(st.text(), st.lists(rows, max_size=3).map(tuple), max_size=3))
def test_a_table_survives_a_file(options):
    kept = json.loads(json.dumps(to_table(MODEL, options)))
    assert from_table(MODEL, kept) == options
    assert list(from_table(MODEL, kept)) == list(options)


def test_a_measured_table_survives_a_file():
    model = network()
    measured = measure_options(model, options_of(model), split(10), split(10), 0).options
    kept = json.loads(json.dumps(to_table(model, measured), allow_nan=False))
    assert from_table(model, kept) == measured
    assert from_table(copy.deepcopy(model).train(), kept) == measured


def test_the_table_of_another_network_is_refused():
    model, other = network(), network()
    table = to_table(model, options_of(model))
    assert from_table(model, table) == options_of(model)
    with pytest.raises(InputError) as error:
        from_table(other, table)
    message = "sensitivity was measured on another network. Give that of a report on this one."
    assert str(error.value) == message


GOOD = to_table(MODEL, {"a": (Option("g", 1, "dense", 0.5, 1, 1, 0.1, 0.1),)})
ROW = GOOD["layers"]["a"][0]


@pytest.mark.parametrize(
    "table",
    [
        None,
        3,
        "table",
        [],
        ["network", "layers"],
        {},
        {"network": GOOD["network"]},
        {"layers": GOOD["layers"]},
        GOOD | {"layers": None},
        GOOD | {"layers": [ROW]},
        GOOD | {"layers": {"a": None}},
        GOOD | {"layers": {"a": 3}},
        GOOD | {"layers": {"a": [None]}},
        GOOD | {"layers": {"a": ["row"]}},
        GOOD | {"layers": {"a": [[1, 2]]}},
        GOOD | {"layers": {"a": [{}]}},
        GOOD | {"layers": {"a": [ROW | {"colour": 1}]}},
        GOOD | {"layers": {"a": [{name: value for name, value in ROW.items() if name != "macs"}]}},
    ],
    ids=range(18),
)
def test_what_is_no_table_is_refused(table):
    with pytest.raises(InputError) as error:
        from_table(MODEL, table)
    assert str(error.value) == "sensitivity is not a table of this package. Give that of an earlier report."


# --- the fingerprint


def test_the_fingerprint_is_of_the_weights():
    model = network()
    before = fingerprint(model)
    assert before == fingerprint(model) == fingerprint(copy.deepcopy(model)) == fingerprint(model.train())
    assert before == fingerprint(model.requires_grad_(False))
    fresh = network()
    assert fingerprint(fresh) != before
    fresh.load_state_dict(model.state_dict())
    assert fingerprint(fresh) == before


def test_any_change_of_any_tensor_changes_the_fingerprint():
    model = network()
    seen = {fingerprint(model)}
    for name, tensor in model.state_dict().items():
        flat = tensor.view(-1)
        for entry in {0, len(flat) - 1}:
            before = flat[entry].clone()
            # The least change that there is.
            flat[entry] = before + 1 if "tracked" in name else before.nextafter(torch.tensor(9.0).double())
            seen.add(fingerprint(model))
            flat[entry] = before
    sizes = [min(2, tensor.numel()) for tensor in model.state_dict().values()]
    assert len(seen) == 1 + sum(sizes)


def test_a_name_changes_the_fingerprint():
    weight = torch.ones(2)
    one, other = nn.Module(), nn.Module()
    one.register_buffer("a", weight)
    other.register_buffer("b", weight)
    assert fingerprint(one) != fingerprint(other)


def test_the_layout_in_memory_does_not_change_the_fingerprint():
    one, other = nn.Module(), nn.Module()
    weight = torch.randn(3, 4)
    one.register_buffer("a", weight)
    other.register_buffer("a", weight.mT.contiguous().mT)
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.bool, torch.int8])
def test_any_type_has_a_fingerprint(dtype):
    one, other = nn.Module(), nn.Module()
    one.register_buffer("a", torch.ones(2, 2).to(dtype))
    other.register_buffer("a", torch.zeros(2, 2).to(dtype))
    assert fingerprint(one) != fingerprint(other)
