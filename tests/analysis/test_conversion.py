"""Conversion: exact at full rank, as good as the SVD below, equivariant at every rank, and decided by weights alone."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from analysis import convert, report, to_dense
from gconv import (
    FORMS,
    GROUPS,
    GConv2d,
    GroupBatchNorm2d,
    InputError,
    LiftingConv2d,
    SeparableGConv2d,
    Split,
    create_model,
    equivariance_error,
    load,
    load_dataset,
)

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
trained_networks = pytest.mark.parametrize("name", ["p4cnn-rotdigits", "p4m-cnn-rotdigits"])
every_form = pytest.mark.parametrize("form", FORMS)
every_group = pytest.mark.parametrize("under", GROUPS[1:])


@pytest.fixture(autouse=True)
def _no_stopwatch(monkeypatch):
    """Nothing here depends on how fast the networks are."""
    monkeypatch.setattr(report, "_latency", lambda *_: {})


@pytest.fixture(scope="module")
def digits():
    return load_dataset("rotdigits")


@pytest.fixture
def few(digits):
    """A training set of a few images."""
    return first(digits.train, 40)


def first(split, count):
    return Split(split.images[:count], split.labels[:count])


def trained(name):
    return load(CHECKPOINTS / f"{name}.pt")


def small(under="p4", name="p4cnn", **kwargs):
    """A network with batch-norm statistics of its own, in eval mode."""
    model = create_model(name, group=under, width=2, **kwargs)
    with torch.no_grad():
        model.train()(torch.rand(8, *model.input_shape))
    return model.eval()


def layers_only(under, k=3):
    """From an image to group maps: lifting, a k x k and a 1x1 layer; not a model of this package; in float64."""
    return nn.Sequential(
        LiftingConv2d(1, 2, 3, group=under),
        nn.ReLU(),
        GConv2d(2, 3, k, group=under, padding=1),
        GroupBatchNorm2d(3),
        nn.ReLU(),
        GConv2d(3, 2, 1, group=under),
    ).double()


def group_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (GConv2d, SeparableGConv2d))}


def largest_rank(model, form):
    return max(FORMS[form].max_rank(layer.filter_shape) for layer in group_layers(model).values())


def relative(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def logits(model, images):
    with torch.no_grad():
        return model(images)


def same(a, b):
    """Whether two networks have the same layers and, to the bit, the same weights."""
    tensors = a.state_dict(), b.state_dict()
    return repr(a) == repr(b) and all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())


# --- what is kept


@every_form
@trained_networks
def test_full_rank_reproduces_the_class_scores_of_a_trained_network(name, form, digits):
    model, images = trained(name), digits.test.images[:50]
    after, _ = convert(model, form, rank=largest_rank(model, form))
    assert all(layer.form.name == form for layer in group_layers(after).values())
    assert relative(logits(after, images), logits(model, images)) < 1e-5


@every_form
@every_group
def test_full_rank_reproduces_the_class_scores_on_every_group(under, form):
    model = small(under)
    images = torch.rand(4, *model.input_shape)
    after, _ = convert(model, form, rank=largest_rank(model, form))
    assert all(layer.form.name == form for layer in group_layers(after).values())
    assert relative(logits(after, images), logits(model, images)) < 1e-5


@every_form
def test_all_energy_is_full_rank(form):
    model = small()
    after, _ = convert(model, form, energy=1.0)
    assert all(layer.rank == layer.form.max_rank(layer.filter_shape) for layer in group_layers(after).values())


@every_form
@every_group
def test_equivariance_survives_every_rank(under, form):
    model, image = layers_only(under), torch.rand(1, 1, 9, 9, dtype=torch.float64)
    for rank in range(1, largest_rank(model, form) + 1):
        after, done = convert(model, form, rank=rank, input_shape=(1, 9, 9))
        assert after[2].rank == rank
        assert equivariance_error(after, under, image).max < 1e-12
        assert max(done.equivariance_error) < 1e-12


@every_form
@trained_networks
def test_the_class_scores_of_a_trained_network_stay_invariant(name, form):
    model = trained(name)
    after, done = convert(model, form, rank=1)
    image = torch.rand(1, *model.input_shape, dtype=torch.float64)
    assert equivariance_error(after.double(), after.spec.group, image).max < 1e-12
    assert max(done.equivariance_error) < 1e-12


@every_form
@trained_networks
@pytest.mark.parametrize("rank", [1, 2, 3, 99])
def test_the_weight_error_is_the_root_of_the_energy_lost(name, form, rank):
    model = trained(name)
    after, done = convert(model, form, rank=min(rank, largest_rank(model, form)))
    assert [row.name for row in done.layers] == [f"conv{i}" for i in range(2, 8)]
    for row in done.layers:
        before = model.get_submodule(row.name).weight.detach().double()
        error = relative(after.get_submodule(row.name).weight.detach().double(), before)
        lost = max(0, 1 - row.explained_energy[form][row.rank - 1])
        assert row.weight_error == pytest.approx(error, abs=1e-7)
        assert row.weight_error == pytest.approx(math.sqrt(lost), abs=1e-6)


def test_training_makes_filters_more_separable_by_what_was_measured_beforehand():
    """p4cnn on rotmnist-regen, mean of layers 2 to 7 at rank 1, trained and at initialisation."""
    for name, expected in {
        "p4cnn-rotmnist-regen": {"g": 0.60, "gc": 0.40},
        "p4cnn-rotmnist-regen/epoch-000": {"g": 0.47, "gc": 0.20},
    }.items():
        rows = convert(trained(name), "g", rank=1)[1].layers
        for form, energy in expected.items():
            assert sum(row.explained_energy[form][0] for row in rows) / 6 == pytest.approx(energy, abs=0.06)


# --- what is chosen


def test_by_default_every_layer_keeps_95_percent():
    model = small()
    default, done = convert(model, "gc")
    assert done.request == {"form": "gc", "rank": None, "energy": 0.95}
    assert same(default, convert(model, "gc", energy=0.95)[0])
    for row in done.layers:
        kept = row.explained_energy["gc"]
        assert kept[row.rank - 1] >= 0.95
        assert kept[row.rank - 2] < 0.95


def test_a_rank_above_a_layers_largest_becomes_its_largest():
    model = small("p4m")
    _, done = convert(model, "gc", rank=16)
    assert [row.rank for row in done.layers] == [9, 9, 9, 9, 9, 16]


def test_lifting_and_1x1_layers_are_left_alone():
    model = layers_only("p4m")
    for form in ("auto", *FORMS):
        after, done = convert(model, form, rank=1, input_shape=(1, 9, 9))
        assert [type(layer) for layer in after] == [
            LiftingConv2d, nn.ReLU, SeparableGConv2d, GroupBatchNorm2d, nn.ReLU, GConv2d,
        ]  # fmt: skip
        assert [(row.name, row.form, row.weight_error > 0) for row in done.layers][1] == ("5", None, False)
        for untouched in (0, 5):
            assert same(after[untouched], model[untouched])


def test_a_resnet_keeps_its_shortcuts_and_strides():
    model = small("p4", "p4m-resnet44")
    after, done = convert(model, "gc_in", rank=largest_rank(model, "gc_in"))
    unchanged = [row.name for row in done.layers if row.form is None]
    assert unchanged == ["stage2.0.shortcut", "stage3.0.shortcut"]
    assert len(done.layers) == 42 + 2
    images = torch.rand(2, *model.input_shape)
    assert relative(logits(after, images), logits(model, images)) < 1e-5


@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_auto_never_adds_parameters_and_an_explicit_form_always_converts(form):
    _, done = convert(small(), form, energy=0.95)
    more = [row.parameters[1] > row.parameters[0] for row in done.layers]
    if form == "auto":
        assert not any(more)
        assert all((row.form is None) == (row.parameters[1] == row.parameters[0]) for row in done.layers)
    else:
        assert any(more)
        assert all(row.form == form for row in done.layers)


# --- what may not matter


def test_the_given_network_is_not_changed(few):
    model = small().train()
    before = copy.deepcopy(model)
    after, _ = convert(model, "gc", rank=2, data=few, test=few, finetune=1)
    assert same(model, before)
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in after.modules())
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.zero_()
    assert same(model, before)


def test_without_data_only_the_filters_change():
    model = small()
    after, _ = convert(model, "g", rank=1)
    state = after.state_dict()
    kept = {name for name, tensor in model.state_dict().items() if name in state and torch.equal(tensor, state[name])}
    assert kept == {name for name in model.state_dict() if name not in {f"conv{i}.weight" for i in range(2, 8)}}


def test_with_data_batch_norm_statistics_change_too(few):
    model = small()
    plain, _ = convert(model, "g", rank=1)
    after, _ = convert(model, "g", rank=1, data=few)
    state = after.state_dict()
    changed = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == {f"bn{i}.running_{what}" for i in range(1, 8) for what in ("mean", "var")}


@pytest.mark.parametrize("finetune", [0, 2])
def test_neither_the_test_set_nor_the_global_seed_has_a_say(digits, few, finetune):
    model = small()
    converted = []
    for seed, test in enumerate((None, first(digits.test, 30), Split(torch.rand(9, 1, 28, 28), torch.arange(9)))):
        torch.manual_seed(seed)
        converted.append(convert(model, "gc", rank=2, data=few, test=test, finetune=finetune)[0])
    assert same(converted[0], converted[1])
    assert same(converted[0], converted[2])


def test_fine_tuning_depends_on_its_seed(digits):
    model, two_steps = small(), first(digits.train, 300)
    once, again, other = (convert(model, "gc", rank=1, data=two_steps, finetune=1, seed=seed)[0] for seed in (3, 3, 4))
    assert same(once, again)
    assert relative(other.fc.weight, once.fc.weight) > 1e-5
    assert not same(once, convert(model, "gc", rank=1, data=two_steps, seed=3)[0])


def test_data_may_be_a_loader_of_batches(few):
    model = small()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*few), batch_size=7)
    assert same(
        convert(model, "gc", rank=1, data=loader, finetune=1)[0], convert(model, "gc", rank=1, data=few, finetune=1)[0]
    )


def test_a_network_in_float64_stays_in_float64(few):
    model = small().double()
    after, done = convert(model, "gc", rank=8, data=few, test=few, finetune=1)
    assert {tensor.dtype for tensor in after.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    assert done.output_error < 1e-12


# --- again


@every_form
def test_a_converted_network_converts_to_a_lower_rank_as_the_original_does(form):
    model = small()
    images = torch.rand(4, *model.input_shape)
    twice, done = convert(convert(model, form, rank=3)[0], form, rank=1)
    once, _ = convert(model, form, rank=1)
    assert {row.rank for row in done.layers} == {1}
    for name, layer in group_layers(once).items():
        assert relative(twice.get_submodule(name).weight, layer.weight) < 1e-5
    assert relative(logits(twice, images), logits(once, images)) < 1e-5


@every_form
@pytest.mark.parametrize("budget", [{"rank": 2}, {"rank": 4}, {"energy": 1.0}], ids=str)
def test_what_already_fits_the_budget_is_left_alone(form, budget):
    converted, _ = convert(small(), form, rank=2)
    again, done = convert(converted, form, **budget)
    assert same(again, converted)
    assert [(row.form, row.why) for row in done.layers] == [(None, f"already {form} of rank 2")] * 6


@pytest.mark.parametrize("there", FORMS)
@pytest.mark.parametrize("back", FORMS)
def test_a_converted_network_converts_to_another_form(there, back):
    converted, _ = convert(small(), there, rank=2)
    again, _ = convert(converted, back, rank=largest_rank(converted, back))
    images = torch.rand(4, *converted.input_shape)
    assert {layer.form.name for layer in group_layers(again).values()} == {back}
    assert relative(logits(again, images), logits(converted, images)) < 1e-5


@every_form
@every_group
def test_to_dense_is_the_same_function(under, form):
    converted, _ = convert(small(under), form, rank=2)
    before = copy.deepcopy(converted)
    images = torch.rand(4, *converted.input_shape)
    dense = to_dense(converted)
    assert {type(layer) for layer in group_layers(dense).values()} == {GConv2d}
    assert relative(logits(dense, images), logits(converted, images)) < 1e-5
    assert same(converted, before)
    converted, images = converted.double(), images.double()
    assert relative(logits(to_dense(converted), images), logits(converted, images)) < 1e-12


# --- refused


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 1, "energy": 0.9}, "accepted: either rank or energy"),
        ({"rank": 0}, "rank is 0; accepted: a whole number of at least 1"),
        ({"rank": 9}, "rank 9 is above the largest of form g here; accepted: 1 to 4"),
        ({"energy": 0.0}, "energy is 0.0; accepted: a share above 0 and up to 1"),
        ({"energy": 1.5}, "energy is 1.5; accepted: a share above 0 and up to 1"),
        ({"form": "h"}, "unknown form 'h'; accepted: auto, g, gc, gc_in"),
        ({"finetune": 1}, "fine-tuning needs training images; accepted: data"),
        ({"finetune": -1}, "finetune is -1; accepted: a whole number of epochs"),
        ({"finetune": 0.5}, "finetune is 0.5; accepted: a whole number of epochs"),
        ({"data": []}, "data has no images; accepted: a Split, such as Dataset.train, or a loader of batches"),
        ({"data": Split(torch.zeros(0, 1, 28, 28), torch.zeros(0))}, "cannot be re-estimated without images"),
        ({"test": Split(torch.zeros(0, 1, 28, 28), torch.zeros(0))}, "no images to evaluate on"),
        ({"input_shape": (3, 28, 28)}, r"does not take an input of shape \[3, 28, 28\]"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        convert(small(), **{"form": "g", **kwargs})


@pytest.mark.parametrize(
    "model",
    [create_model("z2cnn", width=2), create_model("c-z2cnn", width=2), LiftingConv2d(1, 2, 3, group="p4")],
    ids=lambda model: type(model).__name__,
)
def test_a_network_without_group_layers_is_refused(model):
    with pytest.raises(InputError, match="no group-to-group layer to separate; accepted: a p2 to p4m network"):
        convert(model)


@pytest.mark.parametrize("name", ["conv3.weight", "conv1.bias", "bn5.running_var", "fc.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(name, value):
    model = small()
    model.state_dict()[name].view(-1)[-1] = value
    with pytest.raises(InputError, match="NaN or infinite weights; accepted: finite weights"):
        convert(model, "g", rank=1)


def test_an_image_size_that_nobody_knows_is_asked_for(few):
    model = layers_only("p4")
    with pytest.raises(InputError, match=r"give input_shape, such as \(1, 28, 28\), or data"):
        convert(model, "g", rank=1)
    assert convert(model, "g", rank=1, data=few)[1].macs_executed[0] > 0
