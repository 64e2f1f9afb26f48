"""The report: every number in it measured again, from the two networks, in another way or by another caller."""

import json
import math

import pytest
import torch

from analysis import ConversionReport, convert
from analysis.conversion import builder as building
from analysis.latency import timing as execution
from gconv import (
    FORMS,
    InputError,
    Recipe,
    SeparableGConv2d,
    Split,
    cost,
    create_model,
    equivariance_error,
    evaluate,
    load,
    load_dataset,
    save,
)
from gconv.models.memory import forward_memory

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


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Two rounds of every measurement of time."""
    medians = execution.medians
    monkeypatch.setattr(execution, "medians", lambda runs, **how: medians(runs, **{**how, "rounds": 2}))


@pytest.mark.parametrize("form", ["auto", *FORMS])
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
        assert (row.form, row.rank, row.why.split(";")[0].split(",")[0]) == (layer.form.name, layer.rank, "as asked")
        assert (row.execution, row.forced) == (layer.resolved_execution, layer.execution != "auto")
        assert row.fit_error is None
        rows = {"g": 4, "gc": 12, "gc_in": 12, "g_turned": 4, "gc_turned": 12}
        assert {form: len(curve) for form, curve in row.explained_energy.items()} == {
            form: min(rows[form], row.shape[-1] ** 2) for form in FORMS
        }


@pytest.mark.parametrize("form", FORMS)
def test_a_fitted_layer_has_the_error_of_its_output(monkeypatch, train, form):
    """The first one reads what it read before."""
    monkeypatch.setattr(building, "refine", lambda *_, **__: None)  # it is the error of the fit
    model = network()
    after, report = convert(model, form, rank=1, data=train)
    with torch.no_grad():
        x = torch.relu(model.bn1(model.conv1(train.images))).double()
        expected, got = (one.conv2.double()(x).transpose(0, 1).flatten(1) for one in (model, after))
    error = ((got - expected).square().mean(1) / expected.var(1)).mean().sqrt()
    assert report.layers[0].fit_error == pytest.approx(error.item(), rel=1e-4)
    assert 0.02 < error < 1


def test_errors_are_those_of_the_two_networks_on_seeded_images():
    model = network()
    after, report = convert(model, "gc", rank=2, seed=5)
    images = torch.rand(16, *model.input_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, got = model(images[:4]), after(images[:4])
    assert report.output_error == pytest.approx(((got - expected).norm() / expected.norm()).item(), rel=1e-4)
    doubled = [equivariance_error(one.double(), "p4", images[:1].double()).max for one in (model, after)]
    assert report.equivariance_error == pytest.approx(doubled, abs=1e-14)


def test_the_output_error_is_measured_before_batch_norm_is_re_estimated_at_the_end(train):
    model = network()
    weights = convert(model, "gc", rank=1, data=train, minimise="weights")[1]
    assert weights.output_error == convert(model, "gc", rank=1)[1].output_error


def test_fine_tuning_does_not_change_the_output_error(train):
    model = network()
    plain, tuned = (convert(model, "gc", rank=1, data=train, finetune=epochs)[1] for epochs in (0, 1))
    assert plain.output_error == tuned.output_error > 0


def test_an_inexact_architecture_is_reported_as_such():
    model = create_model("p4m-resnet44", group="p4", width=1).eval()
    after, report = convert(model, "g", rank=1)
    image = torch.rand(16, *model.input_shape, generator=torch.Generator().manual_seed(0))[:1].double()
    errors = [equivariance_error(one.double(), "p4", image).max for one in (model, after)]
    assert min(errors) > 1e-6
    assert report.equivariance_error == pytest.approx(errors, rel=1e-9)


def test_latency_says_how_it_was_measured():
    latency = convert(network(), "gc", rank=1)[1].latency
    assert set(latency) == {"milliseconds", "batch", "rounds", "machine", "threads", "process"}
    assert len(latency["milliseconds"]) == 2
    assert all(0 < time < 10_000 for time in latency["milliseconds"])
    assert latency["batch"] == 16
    assert latency["rounds"] == 2
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
    assert (report.finetuning is None) == (not finetune)
    assert "validation" not in report.accuracy
    assert report.notes == ([] if with_test else [NO_TEST]) + ([] if with_data else [NO_TRAINING])
    if with_test:
        assert report.accuracy["test_images"] == 60
        assert report.accuracy["before"] == evaluate(model, test).error
        assert report.accuracy[stages[-1]] == evaluate(after, test).error


def test_stages_are_the_network_at_that_stage(train, test):
    model = network()
    after, report = convert(model, "g", rank=2, data=train, test=test, validation=train, finetune=3, minimise="weights")
    stages = {
        "before": model,
        "converted": convert(model, "g", rank=2)[0],
        "batch_norm": convert(model, "g", rank=2, data=train, minimise="weights")[0],
        "finetuned": after,
    }
    for split, accuracy in ((test, report.accuracy), (train, report.accuracy["validation"])):
        assert {stage: accuracy[stage] for stage in STAGES} == {
            stage: evaluate(one, split).error for stage, one in stages.items()
        }
    assert (report.accuracy["test_images"], report.accuracy["validation"]["images"]) == (60, 40)


def test_fine_tuning_is_reported_with_its_recipe_and_history(train):
    report = convert(network(), "g", rank=2, data=train, finetune=3)[1]
    recipe = Recipe.from_dict({key: report.finetuning[key] for key in Recipe().to_dict()})
    assert (recipe.epochs, recipe.schedule) == (3, "cosine")
    assert set(report.finetuning) == {*Recipe().to_dict(), "distillation", "history"}
    assert [row["epoch"] for row in report.finetuning["history"]] == [1, 2, 3]


def test_validation_is_scored_where_there_is_no_test(train):
    after, report = convert(network(), "g", rank=1, validation=train)
    assert report.accuracy == {
        "validation": {
            "images": 40,
            "before": evaluate(network(), train).error,
            "converted": evaluate(after, train).error,
        }
    }
    assert NO_TEST not in report.notes


def test_to_dict_is_plain_data(train, test):
    _, report = convert(network(), "auto", rank=2, data=train, test=test, finetune=1)
    text = json.dumps(report.to_dict(), allow_nan=False)
    back = json.loads(text)
    assert json.dumps(back) == text
    assert set(back) == {
        "request", "layers", "parameters", "macs_published", "macs_executed", "output_error", "equivariance_error",
        "latency", "memory", "accuracy", "sensitivity", "refinement_steps", "finetuning", "notes", "kernel",
    }  # fmt: skip
    assert back["request"] == {
        "form": "auto", "budget": "rank", "value": 2, "fraction": False,
        "allocation": "auto", "minimise": "outputs", "execution": "auto",
    }  # fmt: skip
    assert back["layers"][0]["name"] == "conv2"
    assert back["parameters"] == list(report.parameters)


@pytest.mark.parametrize("budget", [{"rank": 2, "finetune": 1}, {"params": 0.7}, {"max_drop": 50.0}], ids=str)
def test_a_report_that_was_written_reads_back_as_it_was(train, test, budget):
    _, report = convert(network(), "gc", data=train, validation=test, test=test, **budget)
    written = json.dumps(report.to_dict(), allow_nan=False)
    back = ConversionReport.from_dict(json.loads(written))
    assert json.dumps(back.to_dict(), allow_nan=False) == written
    assert [type(row) for row in back.layers] == [type(row) for row in report.layers]
    assert {key for key in vars(report) if not getattr(back, key)} == {
        key for key in vars(report) if not getattr(report, key)
    }


def test_a_report_says_how_a_budget_was_met(train):
    model = network()
    after, report = convert(model, "gc", params=0.6)
    present = sum(parameter.numel() for parameter in model.parameters())
    assert report.request["limit"] == 0.6 * present >= sum(p.numel() for p in after.parameters())
    assert "dynamic programme" in report.request["allocation_why"]
    assert set(report.sensitivity["layers"]) == {row.name for row in report.layers}
    assert convert(model, "gc", rank=1)[1].sensitivity is None
    _, report = convert(model, "gc", params=0.6, allocation="greedy")
    assert report.request["allocation_why"] == "greedy, as asked"


def test_memory_is_that_of_both_networks():
    model = network()
    after, report = convert(model, "gc", rank=2)
    image = torch.rand(1, 1, 28, 28)
    evaluate(model, Split(image, torch.zeros(1, dtype=torch.long)))  # later passes keep the filters of the first
    assert report.memory == tuple(forward_memory(one, image) for one in (model, after))
    assert min(report.memory) > 0


# --- the report is of the file


def through_a_file(path):
    def saved(network):
        save(network, path)
        return load(path)

    return saved


@pytest.mark.parametrize("form", FORMS)
def test_the_report_and_the_file_agree(tmp_path, train, test, form):
    path = tmp_path / "converted.pt"
    model = network()
    after, report = convert(model, form, rank=1, data=train, test=test, finetune=1, saved=through_a_file(path))
    file = load(path)
    total = cost(file, file.input_shape)
    for key in ("parameters", "macs_published", "macs_executed"):
        assert getattr(report, key)[1] == getattr(total, key)
    assert report.parameters[1] == sum(parameter.numel() for parameter in file.parameters())
    assert report.accuracy["finetuned"] == evaluate(file, test).error
    assert report.memory[1] == forward_memory(file, torch.rand(1, *file.input_shape))
    for row in report.layers:
        layer, before = file.get_submodule(row.name), model.get_submodule(row.name)
        assert (row.form, row.rank, row.execution) == (layer.form.name, layer.rank, layer.resolved_execution)
        error = (layer.weight - before.weight).norm() / before.weight.norm()
        assert row.weight_error == pytest.approx(error.item(), rel=1e-5)
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in file.state_dict().items())


def test_a_file_with_another_network_changes_the_report(test):
    model = network()
    _, report = convert(model, "gc", rank=1, test=test)
    wrong, other = convert(model, "gc_in", rank=2, execution="factorized", test=test)
    with torch.no_grad():
        wrong.fc.bias[0] += 100
    returned, of_file = convert(model, "gc", rank=1, test=test, saved=lambda network: wrong)
    assert returned is wrong
    assert [(row.form, row.rank, row.execution) for row in of_file.layers] == [("gc_in", 2, "factorized")] * 6
    assert of_file.memory == other.memory
    for key in ("parameters", "macs_published", "macs_executed"):
        assert getattr(of_file, key) == getattr(other, key) != getattr(report, key)
    for row, same, not_this in zip(of_file.layers, other.layers, report.layers, strict=True):
        for key in ("weight_error", "parameters", "macs_published", "macs_executed"):
            assert getattr(row, key) == getattr(same, key) != getattr(not_this, key)
    # All images are called a nought.
    assert of_file.accuracy["converted"] == pytest.approx(100 * (test.labels != 0).double().mean().item())
    assert of_file.accuracy["converted"] != report.accuracy["converted"]


def test_a_network_that_lost_its_symmetry_on_the_way_is_noticed():
    def tilted(network):
        network.conv2 = Tilted(network.conv2)
        return network

    class Tilted(SeparableGConv2d):
        """Brighter to the right."""

        def __init__(self, layer):
            super().__init__(3, 3, 3, group="p4", form="gc", rank=1)
            self.load_state_dict(layer.state_dict())

        def forward(self, x):
            return super().forward(x * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype))

    _, report = convert(network(), "gc", rank=1, saved=tilted)
    assert report.equivariance_error[0] < 1e-12
    assert report.equivariance_error[1] > 1e-7


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
    assert any(
        note.startswith("the network as given is not invariant: a stride does not fit its map") for note in report.notes
    )
    assert any(note.startswith("stage2.0.conv1: stride 2 on a 32 x 32 map is inexact") for note in report.notes)
