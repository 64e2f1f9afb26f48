"""Training is repeatable to the bit, also across an interruption, and does what its recipe says."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gconv.models.checkpoint import read, save
from gconv.models.zoo import Model, create_model
from gconv.system.errors import InputError
from gconv.training.datasets import Split
from gconv.training.evaluation import evaluate
from gconv.training.loop import fit
from gconv.training.recipe import Recipe
from gconv.training.steps import steps_of_epoch

SHORT = Recipe(epochs=4, batch_size=10, decay_epoch=3)


class Stopped(Exception):
    pass


def pictures(count: int, seed: int = 0) -> Split:
    """Noise, brighter for the higher of ten labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    return Split(torch.rand(count, 1, 28, 28, generator=generator) * (labels.view(-1, 1, 1, 1) + 1) / 10, labels)


TRAIN, VALIDATION = pictures(24), pictures(7, seed=1)


def network() -> Model:
    torch.manual_seed(0)
    return create_model("p4cnn", width=2)


def state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def trained(seed: int, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    model = network()
    history = fit(model, TRAIN, SHORT, seed=seed, **options)
    return state(model), timeless(history)


# --- repeatable


def test_the_same_seed_gives_the_same_weights_whatever_else_was_drawn():
    weights, history = trained(3)
    torch.rand(17)
    again, history_again = trained(3)
    assert equal(weights, again)
    assert history == history_again


def test_another_seed_gives_other_weights():
    assert not equal(trained(3)[0], trained(4)[0])


def test_scoring_a_validation_set_changes_nothing():
    assert equal(trained(3)[0], trained(3, validation=VALIDATION)[0])


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_interrupted_run_continues_to_the_bit(tmp_path, epoch):
    """Stopped after any epoch, before or after the rate falls, and continued from the file in another network."""
    rows = []

    def stop(row: dict[str, Any], resume: dict[str, Any]) -> None:
        rows.append(row)
        if row["epoch"] == epoch:
            save(model, tmp_path / "stopped.pt", resume=resume)
            raise Stopped

    model = network()
    with pytest.raises(Stopped):
        fit(model, TRAIN, SHORT, seed=3, validation=VALIDATION, after_epoch=stop)
    torch.manual_seed(99)
    stopped = read(tmp_path / "stopped.pt")
    assert not equal(state(stopped.model), trained(3)[0])
    rows += fit(stopped.model, TRAIN, SHORT, seed=3, validation=VALIDATION, resume=stopped.resume)
    weights, history = trained(3, validation=VALIDATION)
    assert equal(state(stopped.model), weights)
    assert timeless(rows) == history


def test_nothing_is_left_to_do_after_the_last_epoch():
    states = []
    model = network()
    fit(model, TRAIN, SHORT, seed=3, after_epoch=lambda row, resume: states.append(copy.deepcopy(resume)))
    weights = state(model)
    assert fit(model, TRAIN, SHORT, seed=3, resume=states[-1]) == []
    assert equal(state(model), weights)


# --- as the recipe says


def test_the_default_recipe_is_the_published_one():
    recipe = Recipe()
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (50, 256, 1e-5)
    assert [recipe.rate(epoch) for epoch in (0, 39)] == [1e-2, 1e-2]
    assert [recipe.rate(epoch) for epoch in (40, 49)] == pytest.approx([1e-3, 1e-3], rel=1e-12)


def test_a_recipe_is_plain_data_and_back():
    recipe = Recipe(3, 7, 0.5, 0.25, 2, "cosine")
    described = recipe.to_dict()
    assert described == {
        "optimizer": "adam",
        "epochs": 3,
        "batch_size": 7,
        "learning_rate": 0.5,
        "weight_decay": 0.25,
        "decay_epoch": 2,
        "schedule": "cosine",
    }
    assert Recipe.from_dict(described) == recipe
    older = {key: value for key, value in described.items() if key != "schedule"}  # records from before there was one
    assert Recipe.from_dict(older) == dataclasses.replace(recipe, schedule="step")


def test_fit_is_adam_with_one_step_down_on_every_image_once_an_epoch():
    """Against a loop written out with PyTorch's own scheduler, and images counted as the network sees them."""
    seen: list[Tensor] = []
    model = network()
    hook = model.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]) if net.training else None)
    recipe = Recipe(epochs=3, batch_size=10, learning_rate=3e-3, weight_decay=0.1, decay_epoch=2)
    history = fit(model, TRAIN, recipe, seed=5)
    hook.remove()
    assert [len(batch) for batch in seen] == [10, 10, 4] * 3
    orders = [find(batch) for batch in seen]
    assert all(sorted(torch.cat(orders[i : i + 3]).tolist()) == list(range(24)) for i in (0, 3, 6))
    assert not torch.equal(orders[0], orders[3])

    twin = network().train()
    adam = torch.optim.Adam(twin.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, [2])
    for epoch, row in enumerate(history):
        loss_sum, wrong = 0.0, 0
        for which in orders[3 * epoch : 3 * epoch + 3]:
            scores = twin(TRAIN.images[which])
            loss = F.cross_entropy(scores, TRAIN.labels[which])
            adam.zero_grad()
            loss.backward()
            adam.step()
            loss_sum += loss.item() * len(which)
            wrong += (scores.argmax(1) != TRAIN.labels[which]).sum().item()
        assert row["train_loss"] == pytest.approx(loss_sum / 24, rel=1e-5)
        assert row["train_error"] == 100 * wrong / 24
        schedule.step()
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)
    assert [row["learning_rate"] for row in history] == pytest.approx([3e-3, 3e-3, 3e-4])


def find(batch: Tensor) -> Tensor:
    """Which of the training images these are."""
    return (batch.flatten(1)[:, None] == TRAIN.images.flatten(1)[None]).all(2).int().argmax(1)


def test_the_history_says_what_was_measured(capsys):
    measured = []

    def note(row: dict[str, Any], resume: dict[str, Any]) -> None:
        measured.append((evaluate(model, VALIDATION).error, resume["epochs_done"]))

    model = network()
    history = fit(model, TRAIN, SHORT, seed=0, validation=VALIDATION, after_epoch=note, label="the run")
    assert [(row["validation_error"], row["epoch"]) for row in history] == measured
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(",")[0] for line in err.splitlines()] == [f"the run: epoch {i}/4" for i in (1, 2, 3, 4)]


def test_divergence_is_told_at_once():
    with pytest.raises(InputError, match=r"^cnn diverged in epoch 1: the loss is (nan|inf); try a smaller") as caught:
        fit(network(), TRAIN, Recipe(epochs=9, batch_size=6, learning_rate=1e30), seed=0, label="cnn")
    assert "\n" not in str(caught.value)


def test_no_images_are_refused():
    empty = Split(torch.empty(0, 1, 28, 28), torch.empty(0, dtype=torch.int64))
    with pytest.raises(InputError, match=r"the data set has no images$"):
        fit(network(), empty, SHORT, seed=0)
    with pytest.raises(InputError, match="no images to evaluate on"):
        evaluate(network(), empty)


# --- evaluation


@pytest.mark.parametrize("batch_size", [1, 5, 24, 500])
@pytest.mark.parametrize("training", [True, False])
def test_evaluate_equals_one_image_after_another(batch_size, training):
    model = network()
    fit(model, TRAIN, SHORT, seed=0)
    before = state(model.train(training))
    score = evaluate(model, TRAIN, batch_size=batch_size)
    assert all(module.training == training for module in model.modules())
    assert equal(state(model), before)
    model.eval()
    loss, wrong = 0.0, 0
    with torch.no_grad():
        for image, label in zip(*TRAIN, strict=True):
            scores = model(image[None])[0].double()
            loss -= scores.log_softmax(0)[label].item()
            wrong += int(scores.argmax()) != int(label)
    assert score.loss == pytest.approx(loss / 24, rel=1e-5)
    assert (score.error, score.images) == (100 * wrong / 24, 24)
    assert 0 < wrong < 24


def test_one_image_left_over_joins_the_batch_before_it() -> None:
    model = create_model("z2cnn", width=2)
    split = Split(torch.rand(5, 1, 28, 28), torch.arange(5))
    (row,) = fit(model, split, Recipe(epochs=1, batch_size=2, decay_epoch=1), seed=0)
    assert math.isfinite(row["train_loss"])


def test_evaluation_gives_every_part_its_mode_back_also_after_an_error() -> None:
    model = create_model("p4cnn", width=2).train()
    model.bn1.eval()
    evaluate(model, Split(torch.rand(4, 1, 28, 28), torch.arange(4)))
    with pytest.raises(RuntimeError):
        evaluate(model, Split(torch.rand(4, 1, 2, 2), torch.arange(4)))
    assert (model.training, model.bn1.training, model.bn2.training) == (True, False, True)


# --- what cannot be learned from


def without(**changes: Any) -> Split:
    """The training images with a change: of all images, of all labels, or of one of either."""
    images, labels = (part.clone() for part in TRAIN)
    if "pixel" in changes:
        images[5, 0, 3, 4] = changes["pixel"]
    if "label" in changes:
        labels[7] = changes["label"]
    return Split(changes.get("images", images), changes.get("labels", labels))


BAD = {
    "a label above the classes": (without(label=10), "labels go from 0 to 10; give labels from 0 to 9"),
    "a label below zero": (without(label=-1), "labels go from -1 to 9; give labels from 0 to 9"),
    "labels that are no whole numbers": (
        without(labels=TRAIN.labels.float()),
        "24 images and labels [24] of torch.float32; give one whole number for each image",
    ),
    "labels that are flags": (without(labels=TRAIN.labels > 4), "24 images and labels [24] of torch.bool; give"),
    "a label too few": (without(labels=TRAIN.labels[1:]), "24 images and labels [23] of torch.int64; give"),
    "labels one-hot": (without(labels=F.one_hot(TRAIN.labels)), "24 images and labels [24, 10] of torch.int64"),
    "NaN": (without(pixel=math.nan), "image number 5 has NaN or infinite pixels; give finite numbers"),
    "infinity": (without(pixel=-math.inf), "image number 5 has NaN or infinite pixels"),
    "smaller images": (
        without(images=torch.rand(24, 1, 27, 27)),
        "the network cannot take images [1, 27, 27]; it takes [1, 28, 28]",
    ),
    "larger images": (without(images=torch.rand(24, 1, 32, 32)), "the network cannot take images [1, 32, 32]"),
    "tiny images": (without(images=torch.rand(24, 1, 8, 8)), "the network cannot take images [1, 8, 8]"),
    "images in colour": (without(images=torch.rand(24, 3, 28, 28)), "the network cannot take images [3, 28, 28]"),
    "images without a channel": (without(images=torch.rand(24, 28, 28)), "the network cannot take images [28, 28]"),
    "images in a row": (without(images=torch.rand(24, 784)), "the network cannot take images [784]"),
    "no images": (Split(TRAIN.images[:0], TRAIN.labels[:0]), "the data set has no images"),
}


@pytest.mark.parametrize("name", ["p4cnn", "z2cnn"])
@pytest.mark.parametrize(("split", "said"), BAD.values(), ids=BAD)
def test_bad_images_and_labels_are_one_line_and_change_nothing(name, split, said):
    for part in ({"train": split}, {"train": TRAIN, "validation": split}):
        torch.manual_seed(0)
        model = create_model(name, width=2).train()
        before = state(model)
        with pytest.raises(InputError) as caught:
            fit(model, recipe=SHORT, seed=0, **part)
        assert str(caught.value).startswith(said)
        assert "\n" not in str(caught.value)
        assert equal(state(model), before)
        assert all(module.training for module in model.modules())


def test_a_network_of_ones_own_is_told_why():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(100, 10))
    with pytest.raises(InputError, match=r"^the network cannot take images \[1, 28, 28\]: .*784"):
        fit(model, TRAIN, SHORT, seed=0)


def test_one_class_cannot_be_learned_but_can_be_scored():
    one = Split(TRAIN.images, torch.full_like(TRAIN.labels, 3))
    with pytest.raises(InputError, match=r"^all training images have the label 3; give images of two classes or more$"):
        fit(network(), one, SHORT, seed=0)
    fit(network(), TRAIN, dataclasses.replace(SHORT, epochs=1), seed=0, validation=one)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(InputError, match=r"^a batch of 25 is larger than the training set of 24 images$"):
        fit(network(), TRAIN, dataclasses.replace(SHORT, batch_size=25), seed=0)
    fit(network(), TRAIN, dataclasses.replace(SHORT, batch_size=24, epochs=1), seed=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int8], ids=str)
def test_labels_may_be_of_any_type_of_whole_numbers(dtype):
    narrow = Split(TRAIN.images, TRAIN.labels.to(dtype))
    model = network()
    history = fit(model, narrow, SHORT, seed=3, validation=narrow)
    weights, expected = trained(3, validation=TRAIN)
    assert equal(state(model), weights)
    assert timeless(history) == expected


@pytest.mark.parametrize("seed", [10**23, -(10**23), 2**44])
def test_a_seed_that_fits_no_generator_is_told(seed):
    with pytest.raises(InputError, match=rf"^seed is {seed}; give a whole number of at most 2\*\*43$"):
        fit(network(), TRAIN, SHORT, seed=seed)
    fit(network(), TRAIN, dataclasses.replace(SHORT, epochs=1), seed=2**43)


def test_an_unknown_precision_is_told():
    with pytest.raises(InputError, match="unknown precision 'float16'; accepted: float32, bfloat16"):
        fit(network(), TRAIN, SHORT, seed=0, precision="float16")


# --- a state that does not fit


def kept_state(model: Model, recipe: Recipe = SHORT) -> dict[str, Any]:
    """After two epochs."""
    states: list[dict[str, Any]] = []
    fit(model, TRAIN, recipe, seed=3, after_epoch=lambda row, resume: states.append(copy.deepcopy(resume)))
    return states[1]


def test_the_state_of_another_network_or_recipe_is_refused():
    own = kept_state(network())
    averaged = dataclasses.replace(SHORT, averaging=0.5)
    cases = [
        (create_model("p4cnn", width=3), SHORT, own),
        (create_model("z2cnn", width=2), SHORT, own),
        (create_model("gc-p4cnn", width=2), SHORT, own),
        (network(), averaged, own),
        (network(), dataclasses.replace(SHORT, epochs=1), own),
        (network(), SHORT, {**own, "partial_epoch": {"step": 3, "loss_sum": 0.0, "wrong": 0, "seconds": 0.0}}),
        (network(), SHORT, {**own, "partial_epoch": 3}),
        (network(), SHORT, {**own, "optimizer": None}),
        (network(), SHORT, {"optimizer": own["optimizer"]}),
        (create_model("p4cnn", width=3), averaged, kept_state(network(), averaged)),
    ]
    for model, recipe, resume in cases:
        with pytest.raises(InputError, match=r"^the state of the run does not fit the network and its recipe: "):
            fit(model, TRAIN, recipe, seed=3, resume=copy.deepcopy(resume))


# --- other passes


def test_half_precision_passes_train_single_precision_weights():
    model = network()
    scores: list[torch.dtype] = []
    hook = model.register_forward_hook(lambda net, inputs, output: scores.append(output.dtype))
    history = fit(model, TRAIN, SHORT, seed=3, validation=VALIDATION, precision="bfloat16")
    hook.remove()
    assert scores.count(torch.bfloat16) == 12
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    single, expected = trained(3, validation=VALIDATION)
    assert not equal(state(model), single)
    assert [row["train_loss"] for row in history] == pytest.approx([row["train_loss"] for row in expected], rel=0.1)


def test_compiled_passes_train_the_same_network(monkeypatch):
    """Through what PyTorch makes of the network, but without its compiler, which takes a minute."""
    original, compiled = torch.compile, []

    def compile(function: Any) -> Any:
        compiled.append(function)
        return original(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile)
    model = network()
    history = fit(model, TRAIN, SHORT, seed=3, compiled=True)
    assert compiled == [torch.neg, model]
    expected = trained(3)[1]
    assert [row["train_loss"] for row in history] == pytest.approx([row["train_loss"] for row in expected], rel=1e-3)


def test_without_a_compiler_that_is_one_line_before_anything_is_trained(monkeypatch):
    def missing(function: Any) -> Any:
        def call(*_: Any) -> None:
            raise RuntimeError("No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

        return call

    monkeypatch.setattr(torch, "compile", missing)
    model = network()
    before = state(model)
    with pytest.raises(InputError) as caught:
        fit(model, TRAIN, SHORT, seed=3, compiled=True)
    said = "torch.compile does not work here (No working C++ compiler found); it needs a C++ compiler"
    assert str(caught.value) == said
    assert equal(state(model), before)


@pytest.mark.parametrize(("images", "size", "steps"), [(24, 10, 3), (21, 10, 2), (20, 10, 2), (1, 10, 1), (11, 5, 2)])
def test_steps_of_an_epoch(images, size, steps):
    assert steps_of_epoch(images, size) == steps
