"""The report: every number in it measured again, from the two networks, in another way or by another caller."""

import json
import math

import pytest
import torch

from analysis import convert
from gconv import InputError, Recipe, Split, cost, create_model, equivariance_error, evaluate, load_dataset

STAGES = ["before", "converted", "batch_norm", "finetuned"]
NO_TEST = "accuracy was not measured: no test images were given (--data)"
NO_TRAINING = "batch norm was not re-estimated: no training images were given (--data)"


@pytest.fixture(scope="module")
def digits():
    return load_dataset("rotdigits")


@pytest.fixture(scope="module")
def train(digits):
    return Split(digits.train.images[:40], digits.train.labels[:40])


@pytest.fixture(scope="module")
def test(digits):
    return Split(digits.test.images[:60], digits.test.labels[:60])


def network(**kwargs):
    torch.manual_seed(1)
    model = create_model("p4cnn", width=3, **kwargs)
    with torch.no_grad():
        model.train()(torch.rand(8, *model.input_shape))
    return model.eval()


@pytest.mark.parametrize("form", ["auto", "g", "gc", "gc_in"])
def test_costs_are_those_of_the_two_networks(form):
    model = network(group="p4m")
    after, report = convert(model, form, rank=2)
    first, second = cost(model, model.input_shape), cost(after, model.input_shape)
    rows = {a.name: (a, b) for a, b in zip(first.layers, second.layers, strict=True)}
    for key in ("parameters", "macs_published", "macs_executed"):
        assert getattr(report, key) == (getattr(first, key), getattr(second, key))
        assert [getattr(row, key) for row in report.layers] == [
            tuple(getattr(side, key) for side in rows[row.name]) for row in report.layers
        ]
    assert first.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert second.parameters == sum(parameter.numel() for parameter in after.parameters()) < first.parameters


def test_rows_describe_the_layers():
    model = network(group="pmm")
    after, report = convert(model, "gc_in", rank=2)
    for row in report.layers:
        layer = after.get_submodule(row.name)
        assert (row.group, row.shape) == ("pmm", tuple(model.get_submodule(row.name).weight.shape))
        assert (row.form, row.rank, row.why.split(",")[0]) == (layer.form.name, layer.rank, "as asked")
        assert {form: len(curve) for form, curve in row.explained_energy.items()} == {
            form: min(rows, row.shape[-1] ** 2) for form, rows in {"g": 4, "gc": 12, "gc_in": 12}.items()
        }


def test_errors_are_those_of_the_two_networks_on_seeded_images():
    model = network()
    after, report = convert(model, "gc", rank=2, seed=5)
    images = torch.rand(16, *model.input_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, got = model(images), after(images)
    assert report.output_error == pytest.approx(((got - expected).norm() / expected.norm()).item(), rel=1e-4)
    doubled = [equivariance_error(one.double(), "p4", images[:1].double()).max for one in (model, after)]
    assert report.equivariance_error == pytest.approx(doubled, abs=1e-14)


def test_the_output_error_is_measured_before_batch_norm_is_re_estimated(train):
    model = network()
    assert convert(model, "gc", rank=1)[1].output_error == convert(model, "gc", rank=1, data=train)[1].output_error


def test_an_inexact_architecture_is_reported_as_such():
    model = create_model("p4m-resnet44", group="p4", width=1).eval()
    after, report = convert(model, "g", rank=1)
    image = torch.rand(16, *model.input_shape, generator=torch.Generator().manual_seed(0))[:1].double()
    errors = [equivariance_error(one.double(), "p4", image).max for one in (model, after)]
    assert min(errors) > 1e-6
    assert report.equivariance_error == pytest.approx(errors, rel=1e-9)


def test_latency_says_how_it_was_measured():
    latency = convert(network(), "gc", rank=1)[1].latency
    assert set(latency) == {"milliseconds", "batch", "rounds", "machine", "threads"}
    assert len(latency["milliseconds"]) == 2
    assert all(0 < time < 10_000 for time in latency["milliseconds"])
    assert latency["batch"] == 16
    assert 1 <= latency["rounds"] <= 15
    assert latency["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("finetune", [0, 2])
@pytest.mark.parametrize("with_test", [False, True])
@pytest.mark.parametrize("with_data", [False, True])
def test_accuracy_has_the_stages_that_there_is_data_for(train, test, finetune, with_test, with_data):
    model = network()
    given = {"data": train if with_data else None, "test": test if with_test else None, "finetune": finetune}
    if finetune and not with_data:
        with pytest.raises(InputError, match="fine-tuning needs training images"):
            convert(model, "gc", rank=1, **given)
        return
    after, report = convert(model, "gc", rank=1, **given)
    stages = STAGES[: 2 + with_data + bool(finetune)] if with_test else []
    assert [key for key in report.accuracy if key in STAGES] == stages
    assert ("finetune_recipe" in report.accuracy) == bool(finetune)
    assert report.notes == ([] if with_test else [NO_TEST]) + ([] if with_data else [NO_TRAINING])
    if with_test:
        assert report.accuracy["test_images"] == 60
        assert report.accuracy["before"] == evaluate(model, test).error
        assert report.accuracy[stages[-1]] == evaluate(after, test).error


def test_stages_are_the_network_at_that_stage(train, test):
    model = network()
    accuracy = convert(model, "g", rank=2, data=train, test=test, finetune=3)[1].accuracy
    assert accuracy["converted"] == evaluate(convert(model, "g", rank=2)[0], test).error
    assert accuracy["batch_norm"] == evaluate(convert(model, "g", rank=2, data=train)[0], test).error
    recipe = Recipe.from_dict(accuracy["finetune_recipe"])
    assert (recipe.epochs, recipe.learning_rate, recipe.rate(2)) == (3, 1e-3, 1e-3)


def test_to_dict_is_plain_data(train, test):
    _, report = convert(network(), "auto", rank=2, data=train, test=test, finetune=1)
    text = json.dumps(report.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert json.dumps(back) == text
    assert set(back) == {
        "request", "layers", "parameters", "macs_published", "macs_executed", "output_error", "equivariance_error",
        "latency", "accuracy", "notes",
    }  # fmt: skip
    assert back["request"] == {"form": "auto", "rank": 2, "energy": None}
    assert back["layers"][0]["name"] == "conv2"
    assert back["parameters"] == list(report.parameters)


def test_a_network_of_zeros_has_finite_errors():
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _, report = convert(model)
    assert (report.output_error, *report.equivariance_error) == (0, 0, 0)
    assert all(row.weight_error == 0 and row.rank == 1 for row in report.layers)
    assert not any(math.isnan(kept) for row in report.layers for kept in row.explained_energy["g"])


def test_scores_that_are_not_finite_are_refused():
    model = create_model("p4cnn", width=2)
    model.bn3.running_var.fill_(-1)
    with pytest.raises(InputError, match="class scores of the network as given are NaN or infinite"):
        convert(model, "g", rank=1)


def test_a_network_that_is_not_invariant_says_why():
    _, report = convert(create_model("p4m-resnet44", width=1), "gc", rank=1)
    assert report.equivariance_error[0] > 1e-8
    assert "the network as given is not invariant: a stride that does not fit its map, or its head" in report.notes
    assert any(note.startswith("stage2.0.conv1: stride 2 on a 32 x 32 map is inexact") for note in report.notes)
