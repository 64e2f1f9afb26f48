"""The shipped checkpoints: trained as they say, on what they say, with the result that they say."""

import math
import re
from pathlib import Path

import pytest
import torch

from gconv import RECIPES, Recipe, equivariance_error, evaluate, load_dataset, read
from gconv.experiments.tables import PUBLISHED as PUBLISHED_TABLE

FOLDER = Path(__file__).parents[2] / "checkpoints"
PATHS = sorted(FOLDER.glob("*.pt"))
SNAPSHOTS = sorted(FOLDER.glob("*/epoch-*.pt"))
ON_DIGITS = [path for path in PATHS if path.stem.endswith("-rotdigits")]
every_checkpoint = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
PUBLISHED = {
    "optimizer": "adam",
    "learning_rate": 1e-2,
    "weight_decay": 1e-5,
    "batch_size": 256,
    "epochs": 50,
    "decay_epoch": 40,
    "schedule": "step",
}
SHORTER = {"p4cnn-w30-rotmnist-regen": {"epochs": 20, "decay_epoch": 16}}
NAME = re.compile(r"(?P<network>.+)-(?P<data>rotdigits|rotmnist-regen)(?:-heldout)?(?:-modern)?(?:-seed(?P<seed>\d))?")
NETWORKS = {
    "z2cnn": ("z2cnn", "z2", (20,), None),
    "c-z2cnn": ("c-z2cnn", "z2", (57,), "c"),
    "p4cnn": ("p4cnn", "p4", (10,), None),
    "g-p4cnn-small": ("g-p4cnn-small", "p4", (10,), "g"),
    "g-p4cnn": ("g-p4cnn", "p4", (17,), "g"),
    "p4cnn-w30": ("p4cnn", "p4", (30,), None),
    "p4m-cnn": ("p4cnn", "p4m", (7,), None),
    "gc-p4cnn": ("gc-p4cnn", "p4", (30,), "gc"),
    "gc-p4cnn-small": ("gc-p4cnn-small", "p4", (10,), "gc"),
}
TABLE = {f"{model}-rotmnist-regen" for model in PUBLISHED_TABLE}
MODERN = {"gc-p4cnn-rotmnist-regen-modern"}
ON_EVERYTHING = {"p4cnn-rotdigits", "p4m-cnn-rotdigits"} | TABLE | MODERN


def recipe(path):
    if path.stem in MODERN:
        return RECIPES["modern"]
    return Recipe.from_dict({**PUBLISHED, **SHORTER.get(path.stem, {})})


@pytest.fixture(scope="module")
def digits():
    return load_dataset("rotdigits")


def test_what_is_promised_is_there():
    held_out = {f"p4cnn-rotmnist-regen-heldout-seed{seed}" for seed in range(3)}
    assert ON_EVERYTHING | held_out | SHORTER.keys() <= {path.stem for path in PATHS}
    assert {path.parent.name for path in SNAPSHOTS} >= {"p4cnn-rotmnist-regen", "p4m-cnn-rotdigits"}


@every_checkpoint
def test_architecture(path):
    spec = read(path).model.spec
    name = NAME.fullmatch(path.stem)
    assert NETWORKS[name["network"]] == (spec.name, spec.group, spec.widths, spec.separable)
    assert read(path).record["dataset"] == name["data"]


@every_checkpoint
def test_the_recipe_is_the_published_one(path):
    checkpoint = read(path)
    record = checkpoint.record
    assert Recipe().to_dict() == PUBLISHED
    assert record["recipe"]["optimizer"] == "adam"
    assert Recipe.from_dict(record["recipe"]) == recipe(path)
    assert record["seed"] == int(NAME.fullmatch(path.stem)["seed"] or 0)
    assert record["trained_on"] == ("train and validation" if path.stem in ON_EVERYTHING else "train")
    assert re.fullmatch("[0-9a-f]{64}", record["dataset_sha256"])
    assert checkpoint.resume is None


@every_checkpoint
def test_the_history_is_whole(path):
    history = read(path).record["history"]
    epochs = range(recipe(path).epochs)
    assert [row["epoch"] for row in history] == [epoch + 1 for epoch in epochs]
    assert [row["learning_rate"] for row in history] == pytest.approx([recipe(path).rate(epoch) for epoch in epochs])
    assert all(("validation_error" in row) == (path.stem not in ON_EVERYTHING) for row in history)
    assert all(math.isfinite(row["train_loss"]) and 0 <= row["train_error"] <= 100 for row in history)
    assert history[-1]["train_loss"] < history[0]["train_loss"] / 50


@every_checkpoint
def test_the_class_scores_are_invariant(path):
    model = read(path).model
    report = equivariance_error(model.double(), model.spec.group, torch.rand(2, *model.input_shape).double())
    assert len(report.errors) == {"z2": 1, "p4": 4, "p4m": 8}[model.spec.group]
    assert report.max <= 1e-12
    assert report.inexact == ()


@pytest.mark.parametrize("path", ON_DIGITS, ids=lambda path: path.stem)
def test_the_recorded_test_error_is_what_the_network_has(path, digits):
    model, record = read(path).model, read(path).record
    assert record["dataset_sha256"] == digits.sha256
    assert record["train_images"] == len(digits.train_and_validation.labels)
    assert record["test_images"] == len(digits.test.labels)
    score = evaluate(model, digits.test)
    assert score.error == pytest.approx(record["test_error"], abs=1.001 * 100 / score.images)  # one image
    assert score.loss == pytest.approx(record["test_loss"], rel=1e-3)
    assert record["test_error"] < 6


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ON_DIGITS], ids=lambda path: path.stem)
def test_the_large_ones_were_tested_on_all_images(path):
    record = read(path).record
    images = 12_000 if path.stem in ON_EVERYTHING else 10_000
    assert (record["train_images"], record["test_images"]) == (images, 50_000)
    wrong = record["test_error"] / 100 * 50_000
    assert wrong == pytest.approx(round(wrong))
    assert record["test_error"] < (6 if "z2" in path.stem else 4 if "gc" in path.stem else 3)


@pytest.mark.parametrize("folder", sorted({path.parent for path in SNAPSHOTS}), ids=lambda folder: folder.name)
def test_snapshots_are_those_of_the_record(folder):
    final = read(folder.with_suffix(".pt"))
    paths = sorted(folder.iterdir())
    assert paths == [folder / f"epoch-{epoch:03d}.pt" for epoch in final.record["snapshots"]]
    for path, epoch in zip(paths, final.record["snapshots"], strict=True):
        snapshot = read(path)
        assert snapshot.record["epoch"] == epoch
        assert snapshot.record["history"] == final.record["history"][:epoch]
        assert repr(snapshot.model) == repr(final.model)
        same = [torch.equal(a, b.half().float()) for a, b in _weights(snapshot.model, final.model)]
        assert all(same) == (epoch == 50)


def _weights(*models):
    return zip(*(model.parameters() for model in models), strict=True)
