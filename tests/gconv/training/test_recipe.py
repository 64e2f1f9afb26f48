"""Recipes: plain data and back, rates, and that what they say reaches the training."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gconv.functional.forms import FORMS
from gconv.models.checkpoint import read, save
from gconv.models.zoo import Model, create_model
from gconv.system.errors import InputError
from gconv.training.augmentation import DRAWS, augment
from gconv.training.datasets import Split
from gconv.training.evaluation import evaluate
from gconv.training.loop import fit
from gconv.training.recipe import AUGMENTATIONS, RECIPES, SCHEDULES, Recipe
from gconv.training.regularization import rank1_residual

RECORDS = Path(__file__).resolve().parents[3] / "benchmarks" / "records" / "retraining"
positive = st.floats(0, 1e3)
shares = st.floats(0, 1, exclude_max=True)
recipes = st.builds(
    Recipe,
    epochs=st.integers(0, 1000),
    batch_size=st.integers(1, 1000),
    learning_rate=positive,
    weight_decay=positive,
    decay_epoch=st.integers(0, 1000),
    schedule=st.sampled_from(SCHEDULES),
    augmentation=st.sampled_from(AUGMENTATIONS),
    label_smoothing=shares,
    averaging=shares,
    low_rank_penalty=positive,
    low_rank_form=st.sampled_from(tuple(FORMS)),
)


def pictures(count: int, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    return Split(torch.rand(count, 1, 28, 28, generator=generator) * (labels.view(-1, 1, 1, 1) + 1) / 10, labels)


TRAIN, VALIDATION = pictures(14), pictures(7, seed=1)
SHORT = Recipe(epochs=3, batch_size=5, decay_epoch=2)


def network() -> Model:
    torch.manual_seed(0)
    return create_model("p4cnn", width=2)


def trained(recipe: Recipe, seed: int = 3, **options: Any) -> tuple[Model, list[dict[str, Any]]]:
    model = network()
    history = fit(model, TRAIN, recipe, seed=seed, label=None, **options)
    return model, [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- plain data


@given(recipe=recipes)
def test_a_recipe_is_plain_data_and_back(recipe):
    described = recipe.to_dict()
    assert Recipe.from_dict(json.loads(json.dumps(described))) == recipe
    always = {"optimizer", "epochs", "batch_size", "learning_rate", "weight_decay", "decay_epoch", "schedule"}
    others = {key for key in described if key not in always}
    assert all(described[key] != getattr(Recipe(), key) for key in others)
    assert always <= described.keys()


@given(recipe=recipes)
def test_another_recipe_is_described_otherwise(recipe):
    assert (recipe == Recipe()) == (recipe.to_dict() == Recipe().to_dict())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"momentum": 0.9, "epochs": 3}, "a recipe has no momentum; accepted: augmentation, averaging, batch_size,"),
        ({"b": 1, "a": 2}, "a recipe has no a, b; accepted: "),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'; accepted: adam"),
        ({"schedule": "linear"}, "unknown schedule 'linear'; accepted: step, cosine"),
        ({"augmentation": "flip"}, "unknown augmentation 'flip'; accepted: none, rotation, affine"),
        ({"averaging": 1}, "averaging is 1; give a number of at least 0 and below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1; give"),
        ({"averaging": math.nan}, "averaging is nan; give"),
        ({"epochs": -1}, "epochs is -1; give a whole number of at least 0"),
        ({"epochs": 2.5}, "epochs is 2.5; give"),
        ({"batch_size": 0}, "batch_size is 0; give a whole number of at least 1"),
        ({"batch_size": True}, "batch_size is True; give"),
        ({"learning_rate": math.inf}, "learning_rate is inf; give a number of at least 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; give"),
        ({"low_rank_penalty": math.nan}, "low_rank_penalty is nan; give"),
    ],
    ids=str,
)
def test_what_is_no_recipe_is_one_line(data, said):
    with pytest.raises(InputError) as caught:
        Recipe.from_dict(data)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_recipe_under_the_field_names_of_older_versions_is_read():
    older = {**Recipe().to_dict(), "separability": 2.0, "separability_form": "gc_in"}
    assert Recipe.from_dict(older) == Recipe(low_rank_penalty=2.0, low_rank_form="gc_in")
    with pytest.raises(InputError, match=r"^low_rank_penalty is -1; give"):
        Recipe.from_dict({"separability": -1})


@pytest.mark.parametrize("path", sorted(RECORDS.rglob("*.json")), ids=lambda path: path.stem)
def test_every_recipe_that_was_recorded_is_read(path):
    document = json.loads(path.read_text())
    recipe = Recipe.from_dict(document["recipe"])
    assert recipe.low_rank_penalty == document["run"].get("separability", 0)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_the_named_recipes_are_plain_data_and_back(name):
    assert Recipe.from_dict(RECIPES[name].to_dict()) == RECIPES[name]


# --- rates


@given(recipe=recipes, epoch=st.integers(0, 1000), progress=shares)
def test_the_rate_steps_down_once_to_a_tenth(recipe, epoch, progress):
    recipe = replace(recipe, schedule="step")
    expected = recipe.learning_rate * (1 if epoch < recipe.decay_epoch else 0.1)
    assert recipe.rate(epoch, progress) == pytest.approx(expected, rel=1e-12)


@given(epochs=st.integers(1, 200))
def test_the_cosine_rises_for_a_tenth_and_falls_to_nothing(epochs):
    recipe = Recipe(epochs=epochs, learning_rate=0.02, schedule="cosine")
    at = [recipe.rate(*divmod(step / 50 * epochs, 1)) for step in range(50)]
    assert at[0] == 0
    assert at[:6] == pytest.approx([0.02 * step / 5 for step in range(6)], abs=1e-9)
    for step in range(5, 50):
        assert at[step] == pytest.approx(0.01 * (1 + math.cos(math.pi * (step - 5) / 45)), abs=1e-9)
    assert recipe.rate(epochs) == pytest.approx(0, abs=1e-12)


def test_the_rate_of_a_step_reaches_the_optimizer(monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    recipe = replace(SHORT, schedule="cosine")
    _, history = trained(recipe)
    assert rates == [recipe.rate(epoch, step / 3) for epoch in range(3) for step in range(3)]
    assert [row["learning_rate"] for row in history] == [recipe.rate(epoch) for epoch in range(3)]


# --- what is learned from


@pytest.mark.parametrize("kind", ["rotation", "affine"])
def test_the_network_sees_every_image_under_a_map_of_its_own_and_new_in_every_epoch(kind):
    seen: list[Tensor] = []
    recipe = replace(SHORT, augmentation=kind)

    def noting(images: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return F.cross_entropy(scores, labels)

    trained(recipe, seed=4, loss=noting)
    expected = []
    for epoch in range(3):
        generator = torch.Generator().manual_seed(4 * 1_000_003 + epoch)
        order = torch.randperm(14, generator=generator)
        draws = torch.rand(14, DRAWS, generator=generator)
        expected += [augment(TRAIN.images[order], draws[order], kind)]
    assert torch.equal(torch.cat(seen), torch.cat(expected))
    assert len({tuple(image.flatten().tolist()) for image in torch.cat(seen)}) == 42


@pytest.mark.parametrize("kind", ["rotation", "affine"])
def test_augmentation_is_drawn_by_the_seed_alone(kind):
    recipe = replace(SHORT, augmentation=kind)
    first, history = trained(recipe)
    torch.rand(5)
    again, history_again = trained(recipe)
    assert equal(first.state_dict(), again.state_dict())
    assert history == history_again
    assert not equal(first.state_dict(), trained(recipe, seed=4)[0].state_dict())
    assert not equal(first.state_dict(), trained(SHORT)[0].state_dict())


# --- what is minimised


def first_loss(recipe: Recipe) -> tuple[float, Tensor, Tensor]:
    """Of one step of all images, with the logarithms of the probabilities that it was of, and the labels."""
    kept: list[Tensor] = []
    model = network()
    hook = model.register_forward_hook(lambda net, inputs, scores: kept.append(scores.detach().clone()))
    (row,) = fit(model, TRAIN, replace(recipe, epochs=1, batch_size=14), seed=0, label=None)
    hook.remove()
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    return row["train_loss"], kept[-1].double().log_softmax(1), TRAIN.labels[order]


def test_label_smoothing_is_in_the_loss():
    loss, logs, labels = first_loss(replace(SHORT, label_smoothing=0.3))
    target = torch.full((14, 10), 0.03, dtype=torch.float64)
    target[torch.arange(14), labels] += 0.7
    assert loss == pytest.approx(float(-(target * logs).sum(1).mean()), rel=1e-5)
    assert loss != pytest.approx(first_loss(SHORT)[0], rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_the_penalty_is_in_the_loss(form):
    loss, _, _ = first_loss(replace(SHORT, low_rank_penalty=2.0, low_rank_form=form))
    expected = first_loss(SHORT)[0] + 2 * float(rank1_residual(network(), form).detach())
    assert loss == pytest.approx(expected, rel=1e-5)


# --- averaging


def test_averaging_is_the_moving_average_of_all_weights_and_statistics(monkeypatch):
    """Against a twin that is written out: the weights after every step, averaged with a decay that grows."""
    after: list[dict[str, Tensor]] = []
    plain, step = network(), torch.optim.Adam.step
    kept = {name: value.clone() for name, value in plain.state_dict().items()}

    def noting(self: torch.optim.Adam) -> None:
        step(self)
        after.append({name: value.clone() for name, value in plain.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", noting)
        fit(plain, TRAIN, SHORT, seed=3, label=None)
    assert len(after) == 9
    for number, weights in enumerate(after):
        decay = min(0.6, (1 + number) / (10 + number))
        for name, value in weights.items():
            kept[name] = decay * kept[name] + (1 - decay) * value if value.is_floating_point() else value
    averaged, _ = trained(replace(SHORT, averaging=0.6))
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(value, kept[name], rtol=1e-5, atol=1e-6)
    assert not equal(averaged.state_dict(), plain.state_dict())


def test_the_averaged_network_is_what_is_scored_and_given_after_an_epoch():
    model, scores, weights = network(), [], []

    def after(row: dict[str, Any], state: dict[str, Any]) -> None:
        scores.append((evaluate(model, VALIDATION).error, row["validation_error"]))
        weights.append(copy.deepcopy(model.state_dict()))

    fit(model, TRAIN, replace(SHORT, averaging=0.6), seed=3, validation=VALIDATION, after_epoch=after, label=None)
    assert all(a == b for a, b in scores)
    assert equal(model.state_dict(), weights[-1])


def test_averaging_does_not_change_what_is_trained():
    """What a continuation gets are the weights as they are without it."""
    kept: list[dict[str, Any]] = []
    trained(replace(SHORT, averaging=0.6), after_epoch=lambda row, state: kept.append(copy.deepcopy(state)))
    plain, _ = trained(SHORT)
    weights = [value for value in plain.state_dict().values() if value.is_floating_point()]
    assert all(torch.equal(a, b) for a, b in zip(kept[-1]["weights"], weights, strict=True))


@pytest.mark.parametrize("step", [1, 2, 5, 7])
@pytest.mark.parametrize("averaging", [0.0, 0.6])
def test_a_run_stopped_in_the_middle_of_an_epoch_continues_to_the_bit(tmp_path, monkeypatch, step, averaging):
    """By a signal after this step; continued from the file in another network."""
    recipe = replace(SHORT, averaging=averaging, schedule="cosine", augmentation="affine")
    whole, history = trained(recipe, validation=VALIDATION)
    rows: list[dict[str, Any]] = []
    model, taken, adam = network(), [], torch.optim.Adam.step

    def signalling(self: torch.optim.Adam) -> None:
        adam(self)
        taken.append(1)
        if len(taken) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(torch.optim.Adam, "step", signalling)
    with pytest.raises(KeyboardInterrupt):
        fit(
            model, TRAIN, recipe, seed=3, validation=VALIDATION, label=None,
            after_epoch=lambda row, state: rows.append(row),
            on_stop=lambda state: save(model, tmp_path / "stopped.pt", resume=state),
        )  # fmt: skip
    assert len(taken) == step
    stopped = read(tmp_path / "stopped.pt")
    assert (stopped.resume["epochs_done"], stopped.resume["partial_epoch"]["step"]) == divmod(step, 3)
    assert ("weights" in stopped.resume) == bool(averaging)
    rows += fit(stopped.model, TRAIN, recipe, seed=3, validation=VALIDATION, resume=stopped.resume, label=None)
    assert equal(stopped.model.state_dict(), whole.state_dict())
    assert [{key: value for key, value in row.items() if key != "seconds"} for row in rows] == history


def test_a_signal_in_the_last_step_ends_the_run_with_all_epochs_kept(monkeypatch):
    kept: list[dict[str, Any]] = []
    step = torch.optim.Adam.step
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: step(self) or os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        trained(
            replace(SHORT, epochs=1, batch_size=14),
            after_epoch=lambda row, state: kept.append(state),
            on_stop=lambda state: pytest.fail("the epoch is over"),
        )
    assert [state["epochs_done"] for state in kept] == [1]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_the_run_at_once(monkeypatch):
    def twice(self: torch.optim.Adam) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(torch.optim.Adam, "step", twice)
    with pytest.raises(KeyboardInterrupt):
        trained(SHORT, on_stop=lambda state: pytest.fail("it does not wait for the step"))
