"""Conversion: exact at full rank, as good as the SVD below, equivariant always, within its budget or refused."""

import copy
import functools
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from analysis import Distillation, Finetuning, convert, to_dense
from analysis.allocation import sensitivity
from analysis.allocation.allocators import ALLOCATORS
from analysis.allocation.sensitivity import fingerprint
from analysis.conversion import autotune as timing
from analysis.conversion import builder as building
from analysis.conversion import job, report
from analysis.conversion import planner as planning
from analysis.fitting.bn_recalibration import reestimate_batchnorm
from analysis.latency import isolated as fresh
from analysis.latency import timing as execution
from gconv import (
    FORMS,
    GROUPS,
    GConv2d,
    GroupBatchNorm2d,
    GroupMaxPool,
    InputError,
    LiftingConv2d,
    SeparableGConv2d,
    SpatialMeanPool2d,
    Split,
    cost,
    create_model,
    equivariance_error,
    load,
    load_dataset,
    save,
)
from gconv.training.evaluation import Score

CHECKPOINTS = Path(__file__).parents[3] / "checkpoints"
trained_networks = pytest.mark.parametrize("name", ["p4cnn-rotdigits", "p4m-cnn-rotdigits"])
every_form = pytest.mark.parametrize("form", FORMS)
every_group = pytest.mark.parametrize("under", GROUPS[1:])


@pytest.fixture(autouse=True)
def _no_stopwatch(monkeypatch):
    """Nothing here depends on how fast the networks are."""
    monkeypatch.setattr(execution, "medians", lambda runs, **_: ([1.0] * len(runs), 1))


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


@functools.cache
def tiny(under="p4"):
    """A classifier of 9 x 9 images with three layers to convert, in eval mode. Its head tells the textures apart."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(
            LiftingConv2d(1, 2, 3, group=under),
            nn.ReLU(),
            GConv2d(2, 4, 3, group=under),
            GroupBatchNorm2d(4),
            nn.ReLU(),
            GConv2d(4, 4, 3, group=under),
            GroupBatchNorm2d(4),
            nn.ReLU(),
            GConv2d(4, 3, 3, group=under),
            GroupMaxPool(),
            SpatialMeanPool2d(),
            nn.Linear(3, 4),
        ).eval()
    images = textures()
    reestimate_batchnorm(model, images)
    with torch.no_grad():
        features = torch.cat([model[:-1](images), torch.ones(len(images), 1)], 1).double()
        weight = torch.linalg.lstsq(features, 10 * torch.eye(4).double()[torch.arange(len(images)) % 4]).solution.mT
        model[-1].weight.copy_(weight[:, :3])
        model[-1].bias.copy_(weight[:, 3])
    model.input_shape = (1, 9, 9)
    return model


@functools.cache
def textures():
    """129 images (two steps of fine-tuning) of noise, blurred noise, stripes and squares in turn."""
    noise = torch.rand(129, 1, 9, 9, generator=torch.Generator().manual_seed(4))
    blurred = nn.functional.avg_pool2d(noise, 3, 1, 1)
    rows, columns = torch.meshgrid(torch.arange(9) % 2, torch.arange(9) % 2, indexing="ij")
    kinds = torch.stack([noise, blurred, 0.7 * rows + 0.3 * noise, 0.7 * (rows ^ columns) + 0.3 * noise])
    return kinds[torch.arange(129) % 4, torch.arange(129)]


@functools.cache
def pictures(under="p4"):
    """The textures, labelled by the tiny network itself, so that it makes no error."""
    return Split(textures(), logits(tiny(under), textures()).argmax(1))


def total(model, key, size=(1, 9, 9)):
    return getattr(cost(model, size), key)


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
    assert done.request == {
        "form": "gc", "budget": "energy", "value": 0.95, "fraction": False,
        "allocation": "auto", "minimise": "weights", "execution": "auto",
    }  # fmt: skip
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
    after, _ = convert(model, "g", rank=1, data=few, minimise="weights")
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
    model, two_steps = small(), first(digits.train, 128)
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
    for minimise in ("weights", "outputs"):
        after, done = convert(model, "gc", rank=8, data=few, test=few, finetune=1, minimise=minimise)
        assert {tensor.dtype for tensor in after.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
        if minimise == "weights":  # to fit outputs, batch norm is re-estimated on the way
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
    assert any("separable already" in note for note in done.notes)


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
        (
            {"rank": 1, "energy": 0.9},
            "^several budgets are given: rank 1, energy 0.9. Give one of rank, energy, params, macs, latency",
        ),
        ({"macs": 0.5, "params": 0.5, "max_drop": 1}, "several budgets are given: params 0.5, macs 0.5, max_drop 1. "),
        ({"rank": 0}, "rank is 0. Give a whole number of at least 1"),
        ({"rank": 9}, "rank 9 is above the largest that form g has here; accepted: 1 to 4"),
        ({"energy": 0.0}, "energy is 0.0. Give a share above 0 and up to 1"),
        ({"energy": 1.5}, "energy is 1.5. Give a share above 0 and up to 1"),
        *[
            (
                {kind: value},
                rf"^{kind} is {re.escape(repr(value))}. Give a fraction up to 1 of what the network has, ",
            )
            for kind in ("params", "macs")
            for value in (0, -1, -0.5, 1.5, "a", "", True, math.nan, math.inf, "0k", "nan")
        ],
        *[
            (
                {"latency": value},
                rf"^latency is {re.escape(repr(value))}. Give a fraction up to 1 of what the network ta",
            )
            for value in (0, -1, 1.5, "ms", "-1ms", "0ms", "2s", math.nan, False)
        ],
        *[
            (
                {"max_drop": value},
                rf"^max_drop is {re.escape(repr(value))}. Give points of accuracy above 0 and below 1",
            )
            for value in (0, -1, 100, "a", math.nan)
        ],
        ({"max_drop": 1}, r"^max_drop needs training and validation images\. Give them as data and validation\.$"),
        ({"minimise": "outputs"}, r"^minimise='outputs' needs training images\. Give them as data\.$"),
        ({"minimise": "scores"}, "^unknown minimise 'scores'; accepted: auto, weights, outputs$"),
        ({"execution": "sparse"}, "^unknown execution 'sparse'; accepted: auto, dense, factorized, irrep$"),
        (
            {"allocation": "fair"},
            "^unknown allocation 'fair'; accepted: auto, uniform, energy, minmax, lagrangian, greedy",
        ),
        ({"form": "h"}, "^unknown form 'h'; accepted: auto, g, gc, gc_in, g_turned, gc_turned$"),
        ({"sensitivity": {}}, r"^sensitivity is not a table of this package\. Give that of an earlier report\.$"),
        ({"finetune": 1}, "fine-tuning needs training images. Give them as data"),
        ({"finetune": -1}, "finetune is -1. Give a whole number of epochs"),
        ({"finetune": 0.5}, "finetune is 0.5. Give a whole number of epochs"),
        ({"data": []}, "data has no images. Give a Split, such as Dataset.train, or a loader of batches"),
        ({"data": 5}, "data has no images. Give a Split, such as Dataset.train, or a loader of batches"),
        *[
            ({"data": batches}, "data has batches that are not images of one size with labels. Give a Split, such")
            for batches in (
                [torch.zeros(3, 1, 28, 28)],
                [(torch.zeros(2, 1, 28, 28),)],
                [(torch.zeros(1, 1, size, size), torch.zeros(1, dtype=torch.long)) for size in (28, 24)],
            )
        ],
        (
            {"test": (torch.zeros(2, 1, 28, 28), torch.zeros(2))},
            "^test is a tuple. Give a Split, such as Dataset.test.$",
        ),
        ({"input_shape": (3, 28, 28)}, r"does not take an input of shape \[3, 28, 28\]"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message) as refusal:
        convert(small(), **{"form": "g", **kwargs})
    assert "\n" not in str(refusal.value)


AS_MANY = "Give at least one image, and a label for each."


def whole(*values):
    return torch.tensor(values, dtype=torch.long)


@pytest.mark.parametrize("name", ["data", "validation", "test"])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(0, 1, 9, 9), whole(), f"has 0 images and 0 labels. {AS_MANY}"),
        (torch.zeros(2, 1, 9, 9), whole(0), f"has 2 images and 1 labels. {AS_MANY}"),
        (torch.zeros(2, 3, 9, 9), whole(0, 1), "has images of shape [2, 3, 9, 9]; accepted: [N, 1, 9, 9]"),
        (torch.zeros(2, 1, 5, 5), whole(0, 1), "has images of shape [2, 1, 5, 5]; accepted: [N, 1, 9, 9]"),
        (torch.zeros(2, 9, 9), whole(0, 1), "has images of shape [2, 9, 9]; accepted: [N, 1, 9, 9]"),
        (torch.zeros(2, 1, 9, 9), whole(0, 4), "has labels from 0 to 4; accepted: 0 to 3"),
        (torch.zeros(2, 1, 9, 9), whole(-1, 0), "has labels from -1 to 0; accepted: 0 to 3"),
        (
            torch.zeros(2, 1, 9, 9),
            torch.zeros(2, 4),
            "has labels of shape [2, 4] and type torch.float32. Give whole numbers of shape [N]: "
            "the number of each image's class.",
        ),
        (
            torch.zeros(2, 1, 9, 9),
            torch.zeros(2),
            "has labels of shape [2] and type torch.float32. Give whole numbers of shape [N]: "
            "the number of each image's class.",
        ),
        (torch.full((2, 1, 9, 9), math.nan), whole(0, 1), "has NaN or infinite pixels. Give finite images."),
        (torch.full((2, 1, 9, 9), math.inf), whole(0, 1), "has NaN or infinite pixels. Give finite images."),
    ],
    ids=str,
)
def test_images_that_do_not_fit_the_network_are_refused(name, images, labels, message):
    with pytest.raises(InputError) as refusal:
        convert(tiny(), "gc", rank=1, **{name: Split(images, labels)})
    assert str(refusal.value) == f"{name} {message}"


@pytest.mark.parametrize(
    "model",
    [create_model("z2cnn", width=2), create_model("c-z2cnn", width=2), LiftingConv2d(1, 2, 3, group="p4")],
    ids=lambda model: type(model).__name__,
)
def test_a_network_without_group_layers_is_refused(model):
    with pytest.raises(InputError, match="no group-to-group layer to separate"):
        convert(model)


@pytest.mark.parametrize("name", ["conv3.weight", "conv1.bias", "bn5.running_var", "fc.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(name, value):
    model = small()
    model.state_dict()[name].view(-1)[-1] = value
    with pytest.raises(InputError, match=r"NaN or infinite entries in .*\. Give one with finite weights"):
        convert(model, "g", rank=1)


def test_an_image_size_that_nobody_knows_is_asked_for(few):
    model = layers_only("p4")
    with pytest.raises(InputError, match=r"Give input_shape, such as \(1, 28, 28\), or data"):
        convert(model, "g", rank=1)
    data = Split(few.images, few.labels % 2)
    assert convert(model, "g", rank=1, data=data)[1].macs_executed[0] == cost(model, (1, 28, 28)).macs_executed


# --- the whole network


NEAREST = re.compile(
    r"^(\w+) of at most [\d,.e+]+(?:ms)? is out of reach with form (\w+)\. "
    r"Give at least ([\d.,]+?)(ms)?, or ([\d.]+) of the network\.$"
)
fractions = st.floats(0.02, 1)
any_form = st.sampled_from(["auto", *FORMS])


def met_or_refused(model, budget, value, reached, **kwargs):
    """Convert, and compare with the limit; or check that what the refusal names is accepted, and nothing below it."""
    present = reached(model)
    limit = value * present if isinstance(value, float) else value
    try:
        after, done = convert(model, **{budget: value}, **kwargs)
    except InputError as error:
        kind, form, least, _, share = NEAREST.match(str(error)).groups()
        assert (kind, form) == (budget, kwargs.get("form", "auto"))
        least = int(least.replace(",", ""))
        assert limit < least
        for nearest in (least, float(share)):
            after, _ = convert(model, **{budget: nearest}, **kwargs)
            assert reached(after) == least
        with pytest.raises(InputError, match="is out of reach"):
            convert(model, **{budget: least - 1}, **kwargs)
        return
    assert reached(after) <= limit
    assert done.request["limit"] == pytest.approx(limit)
    assert (reached(after) == present) == all(row.form is None for row in done.layers)


@settings(max_examples=12)
@given(value=fractions, form=any_form, allocation=st.sampled_from(["auto", *ALLOCATORS]))
def test_parameters_are_within_the_fraction_or_the_nearest_is_named(value, form, allocation):
    met_or_refused(tiny(), "params", value, lambda m: total(m, "parameters"), form=form, allocation=allocation)


@settings(max_examples=8)
@given(value=st.integers(2, 1500), form=any_form, under=st.sampled_from(GROUPS[1:]))
def test_parameters_are_within_the_number_or_the_nearest_is_named(value, form, under):
    met_or_refused(tiny(under), "params", value, lambda m: total(m, "parameters"), form=form)


@settings(max_examples=15)
@given(value=fractions, form=any_form, execution=st.sampled_from(["auto", "dense", "factorized"]))
def test_macs_as_executed_are_within_the_fraction_or_the_nearest_is_named(value, form, execution):
    met_or_refused(tiny(), "macs", value, lambda m: total(m, "macs_executed"), form=form, execution=execution)


@settings(max_examples=8)
@given(value=st.integers(2, 60_000), form=any_form, under=st.sampled_from(GROUPS[1:]))
def test_macs_as_executed_are_within_the_number_or_the_nearest_is_named(value, form, under):
    met_or_refused(tiny(under), "macs", value, lambda m: total(m, "macs_executed"), form=form)


@pytest.mark.parametrize(("budget", "key"), [("params", "parameters"), ("macs", "macs_executed")])
def test_a_number_may_have_a_unit(budget, key):
    limit = total(tiny(), key) * 6 // 10
    plain, _ = convert(tiny(), **{budget: limit})
    for spelt in (str(limit), f"{limit / 1e3}k", f"{limit / 1e6:.6f}M"):
        after, done = convert(tiny(), **{budget: spelt})
        assert same(after, plain)
        assert (done.request["value"], done.request["fraction"]) == (limit, False)


@pytest.mark.parametrize("budget", ["params", "macs"])
def test_the_whole_network_is_within_a_budget_of_all_of_it(budget):
    after, done = convert(tiny(), **{budget: 1.0})
    assert same(after, tiny())
    assert any(note.startswith("nothing was converted") for note in done.notes)


def test_fitted_layers_are_within_the_budget_too():
    data = Split(*(tensor[:40] for tensor in pictures()))
    after, done = convert(tiny(), "gc", macs=0.6, data=data)
    assert total(after, "macs_executed") <= 0.6 * total(tiny(), "macs_executed")
    assert all((row.fit_error is None) == (row.form is None) for row in done.layers)
    assert {row.execution for row in done.layers if row.form} <= {"factorized", "irrep"}


def test_every_layer_runs_as_it_is_asked_to():
    for wanted in ("dense", "factorized"):
        after, done = convert(tiny(), rank=1, execution=wanted)
        assert {row.execution for row in done.layers} == {wanted}
        assert {layer.execution for layer in group_layers(after).values()} == {wanted}


def test_what_cannot_be_converted_is_paid_for_first():
    model = layers_only("p4")
    fixed = sum(p.numel() for name, p in model.named_parameters() if name != "2.weight")
    least = min(form.parameters(model[2].filter_shape, 1) for form in FORMS.values())
    with pytest.raises(InputError, match=rf"Give at least {fixed + least}, or"):
        convert(model, params=fixed, input_shape=(1, 9, 9))
    after, _ = convert(model, params=fixed + least, input_shape=(1, 9, 9))
    assert sum(p.numel() for p in after.parameters()) == fixed + least


def test_a_network_whose_layers_cannot_be_separated_has_one_budget():
    model = layers_only("p4", k=1)
    with pytest.raises(InputError, match=r"Give at least \d+, or 1\.0000 of the network\.$"):
        convert(model, params=0.9, input_shape=(1, 9, 9))
    after, done = convert(model, rank=1, input_shape=(1, 9, 9))
    assert same(after, model)
    assert {row.why for row in done.layers} == {"1x1: nothing to separate"}


@pytest.mark.parametrize("there", ["gc", "g_turned"])
def test_a_separable_network_becomes_a_smaller_one(there):
    separable, _ = convert(tiny(), there, rank=2)
    data = Split(*(tensor[:40] for tensor in pictures()))
    for given_data in ({}, {"data": data}):
        after, done = convert(separable, there, params=0.8, **given_data)
        assert total(after, "parameters") <= 0.8 * total(separable, "parameters")
        assert {row.rank for row in done.layers} == {1, None}
    met_or_refused(separable, "params", 0.1, lambda m: total(m, "parameters"), form=there)
    met_or_refused(separable, "macs", 0.5, lambda m: total(m, "macs_executed"))


# --- time, by a clock that counts multiply-accumulates


def milliseconds(model, size):
    return total(model, "macs_executed", size) / 1000


class Clock:
    """Stands in for every measurement: ``layer`` for one layer, ``network`` for a whole one."""

    layer = staticmethod(milliseconds)
    network = staticmethod(milliseconds)

    def layer_times(self, layer, x, others=()):
        return [self.layer(one, x.shape[1:]) for one in (layer, *others)]

    def latency(self, before, after, images, rounds=1):
        times = [self.network(one, images.shape[1:]) for one in (before, after)]
        return {"milliseconds": times, "batch": len(images), "rounds": rounds, "machine": "none", "threads": 1}


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (execution, timing):
        monkeypatch.setattr(module, "layer_times", made.layer_times)
    for module in (fresh, report):
        monkeypatch.setattr(module, "latency", made.latency)
    return made


@pytest.mark.parametrize("value", [0.9, 0.6, 0.45])
@pytest.mark.parametrize("form", ["auto", "gc", "gc_in"])
def test_the_measured_time_is_within_the_fraction(clock, form, value):
    after, done = convert(tiny(), form, latency=value)
    before, now = done.latency["milliseconds"]
    assert now == milliseconds(after, (1, 9, 9)) <= value * before
    assert done.latency["rounds"] == execution.BUDGET_ROUNDS
    assert not any(row.form and row.milliseconds[1] > row.milliseconds[0] for row in done.layers)


@pytest.mark.parametrize("data_aware", [False, True])
def test_the_measured_time_is_within_the_milliseconds(clock, data_aware):
    data = {"data": Split(*(tensor[:40] for tensor in pictures()))} if data_aware else {}
    after, done = convert(tiny(), "gc", latency="30ms", **data)
    assert milliseconds(tiny(), (1, 9, 9)) > 30 >= milliseconds(after, (1, 9, 9))
    assert (done.request["value"], done.request["fraction"], done.request["limit"]) == (30, False, 30)


@pytest.mark.parametrize("form", ["auto", "gc", "g"])
def test_a_time_out_of_reach_is_refused_with_the_nearest(clock, form):
    for value in (0.01, "0.5ms"):
        with pytest.raises(InputError) as refusal:
            convert(tiny(), form, latency=value)
        kind, _, least, unit, share = NEAREST.match(str(refusal.value)).groups()
        assert (kind, unit) == ("latency", "ms")
        for nearest in (f"{least}ms", float(share)):
            after, _ = convert(tiny(), form, latency=nearest)
            assert milliseconds(after, (1, 9, 9)) == pytest.approx(float(least), abs=2e-3)


def test_the_limit_is_tightened_until_the_network_as_a_whole_is_within_it(clock):
    """Layers that are slower in the network than alone."""

    def slower(model, size):
        converted = any(isinstance(layer, SeparableGConv2d) for layer in group_layers(model).values())
        return milliseconds(model, size) * (1.3 if converted else 1)

    clock.network = slower
    _, done = convert(tiny(), latency=0.6)
    before, now = done.latency["milliseconds"]
    assert now <= 0.6 * before


def test_a_time_that_the_network_never_reaches_is_refused_with_the_nearest_measured(clock):
    clock.network = lambda model, size: 50 if any(isinstance(m, SeparableGConv2d) for m in model.modules()) else 60
    with pytest.raises(
        InputError, match=r"^latency of 0\.8 is out of reach here\. The nearest that was measured is 0\.833 "
    ):
        convert(tiny(), latency=0.8)
    assert convert(tiny(), latency=0.834)[1].latency["milliseconds"] == [60, 50]


def test_no_layer_is_slower_than_its_dense_original(clock):
    """Factorised is slower for every other layer; a time within noise of dense counts as slower."""
    shares = {(2, 4): 1.5, (4, 4): 0.5, (4, 3): 0.98}

    def layer(module, size):
        dense = milliseconds(module.to_dense() if isinstance(module, SeparableGConv2d) else module, size)
        factorized = getattr(module, "resolved_execution", "dense") == "factorized"
        return dense * (shares[module.in_channels, module.out_channels] if factorized else 1)

    clock.layer = layer
    for form in ("auto", *FORMS):
        after, done = convert(tiny(), form, rank=1)
        assert [row.execution for row in done.layers] == ["dense", "factorized", "dense"]
        made = group_layers(after).values()
        assert [layer.resolved_execution for layer in made] == ["dense", "factorized", "dense"]
        for row in done.layers:
            assert row.milliseconds[1] <= row.milliseconds[0]
            assert f"; {row.execution}: " in row.why


def test_a_budget_of_macs_does_not_ask_the_clock(clock):
    clock.layer = None
    done = convert(tiny(), macs=0.5)[1]
    assert {row.execution for row in done.layers if row.form} <= {"factorized", "irrep"}
    assert all(row.milliseconds is None for row in done.layers)


# --- accuracy


@pytest.fixture(scope="module")
def measured():
    """The options of the tiny network in form gc, measured once."""
    data = pictures()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "medians", lambda runs, **_: ([1.0] * len(runs), 1))
        return convert(tiny(), "gc", params=0.5, data=data, validation=data)[1].sensitivity


def dropped(after):
    """Points of accuracy lost on validation, counted here."""
    data = pictures()
    return 100 * (logits(after, data.images).argmax(1) != data.labels).double().mean().item()


def test_the_labels_of_the_tiny_network_are_all_its_own():
    assert dropped(tiny()) == 0
    assert pictures().labels.bincount(minlength=4).min() > 5


@pytest.mark.parametrize("allowed", [0.5, 8, 12, 99])
def test_the_drop_is_allowed_and_the_network_the_smallest_that_was_tried(measured, allowed):
    data = pictures()
    after, done = convert(tiny(), "gc", max_drop=allowed, data=data, validation=data, sensitivity=measured)
    assert dropped(after) <= allowed
    assert done.accuracy["validation"]["batch_norm"] - done.accuracy["validation"]["before"] <= allowed
    tried = done.request["tried"]
    smallest = min((t["parameters"] for t in tried if t["drop"] <= allowed), default=total(tiny(), "parameters"))
    assert total(after, "parameters") == smallest
    for one in tried:
        assert one["drop"] > allowed or one["parameters"] >= smallest


def test_where_everything_is_allowed_the_smallest_network_of_all_wins(measured):
    data = pictures()
    after, _ = convert(tiny(), "gc", max_drop=99, data=data, validation=data, sensitivity=measured)
    least = [min(option["parameters"] for option in options) for options in measured["layers"].values()]
    assert [
        sum(p.numel() for p in layer.parameters()) - len(layer.bias) for layer in group_layers(after).values()
    ] == least


def test_where_every_conversion_loses_more_the_network_stays_as_it_is(measured, monkeypatch):
    monkeypatch.setattr(building, "fit_factors", lambda *args, **_: zeros(FORMS, *args))
    data = pictures()
    after, done = convert(tiny(), "gc", max_drop=0.5, data=data, validation=data, sensitivity=measured)
    assert all(row.form is None for row in done.layers)
    assert {row.why for row in done.layers} == {"any conversion that was tried loses more"}
    assert any(note.startswith("nothing was converted") for note in done.notes)
    assert same(after, tiny())
    assert dropped(after) == 0


def zeros(forms, layer, form, rank, moments, **_):
    """A fit that loses everything."""
    from analysis.fitting.alternating import Fit

    mix, spatial = (torch.zeros(shape).double() for shape in form.factor_shapes(layer.filter_shape, rank))
    return Fit(mix, spatial, None if layer.bias is None else torch.zeros_like(layer.bias).double(), 1.0, (1.0,))


@pytest.mark.parametrize("budget", [{"params": 1.0}, {"max_drop": 0.01}])
def test_a_network_that_is_left_as_it_is_keeps_its_batch_norm(measured, budget, monkeypatch):
    def score(network, split, **_):
        """As if any conversion lost everything."""
        converted = any(isinstance(layer, SeparableGConv2d) for layer in network.modules())
        return Score(0.0, 100.0 if converted else 0.0, len(split.labels))

    for module in (planning, job):
        monkeypatch.setattr(module, "evaluate", score)
    model = copy.deepcopy(tiny())
    with torch.no_grad():
        model[3].running_mean += 1
        table = {**measured, "network": fingerprint(model)}
        own = Split(textures(), logits(model, textures()).argmax(1))
    after, done = convert(model, "gc", data=own, validation=own, sensitivity=table, **budget)
    assert all(row.form is None for row in done.layers)
    assert same(after, model)
    assert done.accuracy["validation"]["batch_norm"] == 0


# --- equivariance


@every_form
@every_group
def test_a_fitted_and_fine_tuned_network_is_as_equivariant_as_float32_allows(under, form):
    data = Split(*(tensor[:40] for tensor in pictures(under)))
    after, done = convert(tiny(under), form, rank=2, data=data, finetune=1)
    assert {row.form for row in done.layers} == {form}
    assert done.finetuning["epochs"] == 1
    assert equivariance_error(after, under, textures()[-8:]).max <= 1e-5
    assert max(done.equivariance_error) <= 1e-12


@every_group
def test_a_network_within_a_budget_is_as_equivariant_as_float32_allows(under):
    for budget in ({"params": 0.5}, {"macs": 0.6}, {"energy": 0.8}):
        after, done = convert(tiny(under), **budget)
        assert any(row.form for row in done.layers)
        assert equivariance_error(after, under, textures()[-8:]).max <= 1e-5


# --- back to full layers


@every_form
@every_group
def test_to_dense_gives_back_the_weights_where_nothing_was_truncated(under, form):
    model, images = copy.deepcopy(tiny(under)).double(), textures()[-4:].double()
    converted, _ = convert(model, form, energy=1.0)
    assert all(layer.rank == layer.form.max_rank(layer.filter_shape) for layer in group_layers(converted).values())
    dense = to_dense(converted)
    for name, layer in group_layers(dense).items():
        assert type(layer) is GConv2d
        torch.testing.assert_close(layer.weight, model.get_submodule(name).weight, rtol=1e-12, atol=1e-13)
        assert torch.equal(layer.bias, model.get_submodule(name).bias)
    torch.testing.assert_close(logits(dense, images), logits(model, images), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(logits(dense, images), logits(converted, images), rtol=1e-11, atol=1e-11)


# --- interrupted and continued


def tuned(model=None, **changes):
    """Three epochs on the tiny network; two steps each."""
    data = pictures()
    training = {name: changes.pop(name) for name in ("distillation", "after_epoch", "resume") if name in changes}
    given = {"form": "gc", "rank": 1, "data": data, "test": data, "minimise": "weights", **changes}
    return convert(model or tiny(), **{**given, "finetune": Finetuning(given.pop("finetune", 3), **training)})


@pytest.fixture(scope="module")
def undisturbed():
    """The converted network, its report, and the states after its epochs."""
    states = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "medians", lambda runs, **_: ([1.0] * len(runs), 1))
        return *tuned(after_epoch=states.append), states


def through_a_file(state):
    """As it is after it was written and read again without executing anything."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kept", [lambda state: state, through_a_file], ids=["in memory", "in a file"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_continued_fine_tuning_ends_where_the_undisturbed_one_does(undisturbed, epoch, kept):
    expected, done, states = undisturbed
    for _ in range(2):  # a state may be used again
        rows = []
        after, again = tuned(resume=kept(states[epoch - 1]), after_epoch=rows.append)
        assert [len(state["history"]) for state in rows] == list(range(epoch + 1, 4))
        assert same(after, expected)
        assert again.accuracy == done.accuracy
        assert [row.__dict__ for row in again.layers] == [row.__dict__ for row in done.layers]
        timeless = [
            [{key: value for key, value in row.items() if key != "seconds"} for row in one.finetuning["history"]]
            for one in (again, done)
        ]
        assert timeless[0] == timeless[1]
        assert len(timeless[0]) == 3


def test_an_interruption_in_the_middle_of_an_epoch_loses_that_epoch_alone(undisturbed, monkeypatch):
    states, steps = [], []

    def stop(*args, step=torch.optim.Adam.step, **kwargs):
        steps.append(step(*args, **kwargs))
        if len(steps) == 5:  # two an epoch, as a single image left over joins the last: the third epoch has begun
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        tuned(after_epoch=states.append)
    monkeypatch.undo()
    monkeypatch.setattr(execution, "medians", lambda runs, **_: ([1.0] * len(runs), 1))
    assert states[-1]["fit"]["epochs_done"] == 2
    assert same(tuned(resume=states[-1])[0], undisturbed[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, "was of another network or another budget"),
        ({"rank": None, "params": 0.5}, "was of another network or another budget"),
        ({"form": "g"}, "was of another network or another budget"),
        ({"minimise": "outputs"}, "was of another network or another budget"),
        ({"finetune": 4}, "had other epochs, another seed or another loss"),
        ({"seed": 1}, "had other epochs, another seed or another loss"),
        ({"distillation": Distillation(weight=0)}, "had other epochs, another seed or another loss"),
    ],
    ids=str,
)
def test_the_state_of_another_conversion_is_refused(undisturbed, changes, message):
    with pytest.raises(InputError, match=f"^the interrupted fine-tuning {message}$"):
        tuned(resume=undisturbed[2][0], **changes)


def test_the_state_of_another_network_is_refused(undisturbed):
    other = copy.deepcopy(tiny())
    with torch.no_grad():
        other[-1].bias[0] += 1e-3
    with pytest.raises(InputError, match=r"^the interrupted fine-tuning was of another network or another budget$"):
        tuned(other, resume=undisturbed[2][0])


def test_a_state_without_fine_tuning_is_refused(undisturbed):
    with pytest.raises(
        InputError, match=r"^resume continues fine-tuning\. Give the arguments of the interrupted call as they were"
    ):
        tuned(resume=undisturbed[2][0], finetune=0)


@pytest.mark.parametrize(
    "missing", ["original", "request", "training", "layers", "state_dict", "report", "history", "fit"]
)
def test_a_state_that_lacks_something_is_refused(undisturbed, missing):
    state = {key: value for key, value in undisturbed[2][0].items() if key != missing}
    with pytest.raises(InputError, match=f"^the state of the interrupted fine-tuning is inconsistent: '{missing}'$"):
        tuned(resume=state)


@pytest.mark.parametrize("state", [5, [], {}, "x", {"original": 1}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(InputError, match="the interrupted fine-tuning"):
        tuned(resume=state)


def test_a_state_whose_history_lacks_an_epoch_is_refused(undisturbed):
    with pytest.raises(InputError, match="inconsistent: an epoch is missing"):
        tuned(resume={**undisturbed[2][1], "history": undisturbed[2][1]["history"][:1]})


# --- measurements that are used again


@pytest.fixture
def counted(monkeypatch):
    """The calls of what measures the options of a network."""
    calls = []

    def measure(*args, real=planning.measure_options):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(planning, "measure_options", measure)
    return calls


def test_measurements_are_not_made_again(counted, measured):
    data = pictures()
    first, done = convert(tiny(), "gc", params=0.6, data=data, validation=data)
    assert len(counted) == 1
    table = json.loads(json.dumps(done.sensitivity))
    again, repeated = convert(tiny(), "gc", params=0.6, data=data, validation=data, sensitivity=table)
    assert len(counted) == 1
    assert same(again, first)
    assert json.loads(json.dumps(repeated.sensitivity)) == table == json.loads(json.dumps(measured))


def test_measurements_decide_what_each_layer_gets(measured):
    """Turned upside down they give another network: they are not only carried along."""
    data = pictures()
    expected, _ = convert(tiny(), "gc", params=0.75, data=data, sensitivity=measured)
    table = copy.deepcopy(measured)
    for options in table["layers"].values():
        errors = [option["error"] for option in options[1:]]
        for option, error in zip(options[1:], reversed(errors), strict=True):
            option["error"] = error
    other, _ = convert(tiny(), "gc", params=0.75, data=data, sensitivity=table)
    ranks = [[getattr(m, "rank", None) for m in group_layers(one).values()] for one in (expected, other)]
    assert ranks[0] != ranks[1]


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_layer_whose_output_is_constant_may_still_be_left_as_it_is(what):
    """Any option of it is without error and smaller, and yet none must take the place of the layer itself."""
    model, data = copy.deepcopy(tiny()), pictures()
    with torch.no_grad():
        model[5].weight.zero_()
        if what == "bias":  # nothing reaches the last one either
            model[5].bias.zero_()
            model[6].bias.fill_(-1)
    after, done = convert(model, "gc", params=0.75, data=data)
    assert total(after, "parameters") <= 0.75 * total(model, "parameters")
    for options in done.sensitivity["layers"].values():
        assert (options[0]["form"], options[0]["error"]) == (None, 0)
        assert all(option["form"] == "gc" for option in options[1:])
    assert torch.isfinite(logits(after, data.images)).all()


def test_measurements_of_another_network_are_refused(measured):
    other = copy.deepcopy(tiny())
    with torch.no_grad():
        other[2].weight[0] *= 1.01
    with pytest.raises(
        InputError, match=r"^sensitivity was measured on another network\. Give that of a report on this one"
    ):
        convert(other, "gc", params=0.5, sensitivity=measured)


@pytest.mark.parametrize("form", ["auto", "g"])
def test_measurements_of_another_form_are_refused(measured, form):
    """Or the nearest value that a refusal names would be wrong."""
    with pytest.raises(
        InputError, match=r"^sensitivity was measured for form gc, not for g.*\. Give that of a report with form auto"
    ):
        convert(tiny(), form, params=0.5, sensitivity=measured)


def test_errors_of_filters_are_not_taken_for_those_of_outputs():
    table = convert(tiny(), "gc", params=0.5)[1].sensitivity
    assert convert(tiny(), "gc", params=0.6, sensitivity=table)[1].request["minimise"] == "weights"
    with pytest.raises(
        InputError, match=r"^sensitivity is of the filters alone\. Give that of a report with minimise outputs"
    ):
        convert(tiny(), "gc", params=0.6, sensitivity=table, data=pictures())


@pytest.mark.parametrize("table", [5, "x", [], {"network": "x"}, {"network": "x", "layers": {"2": [{"rank": 1}]}}])
def test_what_is_no_table_of_measurements_is_refused(table):
    with pytest.raises(
        InputError, match=r"^sensitivity is not a table of this package\. Give that of an earlier report\.$"
    ):
        convert(tiny(), params=0.5, sensitivity=table)


def test_an_execution_that_a_form_lacks_is_refused_before_anything_else():
    words = r"form 'g' has no execution 'irrep', which is for gc, gc_in; accepted: auto, dense, factorized"
    with pytest.raises(InputError, match=words):
        convert(create_model("p4cnn", width=2), rank=1, execution="irrep")


def test_a_network_converted_to_irreps_is_the_same_function_and_is_saved_as_such(tmp_path):
    network = create_model("p4cnn", width=3)
    plain, _ = convert(network, "gc_in", rank=2, execution="factorized")
    small, report = convert(network, "gc_in", rank=2, execution="irrep")
    images = torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(small(images), plain(images))
    assert {row.execution for row in report.layers} == {"irrep"}
    save(small, tmp_path / "small.pt")
    kept = load(tmp_path / "small.pt").eval()
    with torch.no_grad():
        torch.testing.assert_close(kept(images), small(images))


# --- arguments that moved, and what the report says about the comparison


@pytest.mark.parametrize(
    ("name", "value"), [("distillation", Distillation()), ("after_epoch", print), ("resume", None)], ids=str
)
def test_an_argument_that_moved_is_answered_by_where_it_is_now(name, value):
    message = rf"^convert has no argument {name}\. Give finetune=analysis\.Finetuning\(epochs, {name}=…\)\.$"
    with pytest.raises(InputError, match=message):
        convert(tiny(), rank=1, **{name: value})


def test_an_argument_that_never_was_is_a_type_error():
    with pytest.raises(TypeError, match=r"^convert\(\) got an unexpected keyword argument 'ranks'$"):
        convert(tiny(), ranks=1)


def test_fine_tuning_is_a_number_of_epochs_or_a_description_of_it():
    data = Split(*(tensor[:40] for tensor in pictures()))
    given = {"form": "gc", "rank": 1, "data": data, "minimise": "weights"}
    plain, described, other = (
        convert(tiny(), **given, finetune=finetune)[0]
        for finetune in (2, Finetuning(2), Finetuning(2, Distillation(weight=0)))
    )
    assert same(plain, described)
    assert not same(plain, other)


def test_the_report_says_by_which_error_options_were_compared(measured, monkeypatch):
    data = pictures()
    assert "compared_by" not in convert(tiny(), rank=1)[1].request
    assert convert(tiny(), "gc", params=0.6)[1].request["compared_by"] == sensitivity.OF_FILTERS
    done = convert(tiny(), "gc", params=0.6, data=data, sensitivity=measured)[1]
    assert done.request["compared_by"] == measured["compared_by"] == sensitivity.OF_SCORES
    older = {key: value for key, value in measured.items() if key != "compared_by"}
    assert convert(tiny(), "gc", params=0.6, sensitivity=older)[1].request["compared_by"] == "not recorded"
    monkeypatch.setattr(sensitivity, "SCORE_WORK", 0)
    done = convert(tiny(), "gc", params=0.6, data=data)[1]
    assert done.request["compared_by"] == done.sensitivity["compared_by"] == sensitivity.OF_OUTPUTS
    assert any("compared by their own layers' outputs" in note for note in done.notes)
    monkeypatch.setattr(sensitivity, "FIT_WORK", 0)
    done = convert(tiny(), "gc", params=0.6, data=data)[1]
    assert done.request["compared_by"] == done.sensitivity["compared_by"] == sensitivity.OF_FILTERS
    assert any("compared by the energy of their filters" in note for note in done.notes)
