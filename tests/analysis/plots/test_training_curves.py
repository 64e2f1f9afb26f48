"""The figures of training runs show what the records say."""

import matplotlib.pyplot as plt
import pytest

from analysis.plots import training_curves as curves
from gconv.experiments.runs import Run
from gconv.experiments.tables import PUBLISHED


@pytest.fixture(autouse=True)
def off_screen():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def record(run, error, *, images=12000, history=((2.0, 30.0), (1.0, 0.5))):
    """A record with an error and the training loss and error of each epoch."""
    rows = [{"epoch": n, "train_loss": loss, "train_error": e} for n, (loss, e) in enumerate(history, 1)]
    key = "validation_error" if run.held_out else "test_error"
    return {"run": run, "seed": run.seed, key: error, "train_images": images, "history": rows}


@pytest.fixture
def records():
    return [
        *(record(Run("p4cnn", seed), 2.0 + seed) for seed in range(2)),
        record(Run("z2cnn", 0), 5.0, history=((3.0, 40.0), (2.0, 0.0))),
        *(record(Run("p4cnn", seed, images=120), 30.0 + seed, images=120) for seed in range(2)),
        record(Run("gc-p4cnn", 0, images=120), 40.0, images=120),
        *(record(Run("p4cnn", seed, recipe="cosine", epochs=30, held_out=True), 1.5 + seed) for seed in range(2)),
        record(Run("p4cnn", 0, recipe="published", epochs=30, held_out=True), 2.5),
    ]


def points(axis, marker):
    """The points drawn with a marker, as pairs."""
    return sorted(
        tuple(map(float, xy)) for line in axis.get_lines() if line.get_marker() == marker for xy in line.get_xydata()
    )


def test_the_table_has_our_points_beside_every_published_mean(records):
    (axis,) = curves.plot_table(records).axes
    rows = list(PUBLISHED)
    assert [(x, rows[round(y + 0.14)]) for x, y in points(axis, "o")] == [(2, "p4cnn"), (3, "p4cnn"), (5, "z2cnn")]
    published = {(x, rows[round(y - 0.14)]) for x, y in points(axis, "|")}  # with the ends of the bars
    assert {(row.error, model) for model, row in PUBLISHED.items()} <= published
    assert [label.get_text().split()[0] for label in axis.get_yticklabels()] == rows


def test_training_is_that_of_the_first_seed_on_all_images(records):
    loss, error = curves.plot_training(records).axes
    assert {line.get_label(): list(line.get_ydata()) for line in loss.get_lines()} == {
        "z2cnn": [3.0, 2.0],
        "p4cnn": [2.0, 1.0],
    }
    assert {line.get_label(): list(line.get_ydata()) for line in error.get_lines()} == {
        "z2cnn": [40.0, 0.0],
        "p4cnn": [30.0, 0.5],
    }
    assert (loss.get_yscale(), error.get_yscale()) == ("log", "symlog")  # only one of them reaches zero


def test_one_quantity_has_one_panel():
    (axis,) = curves.plot_histories({"a": [{"epoch": 1, "x": 2.0}, {"epoch": 2, "x": 1.0}]}, {"x": "the x"}).axes
    assert axis.get_ylabel() == "the x"
    assert [list(line.get_xdata()) for line in axis.get_lines()] == [[1, 2]]


def test_efficiency_has_a_line_of_means_the_seeds_and_what_was_published(records):
    (axis,) = curves.plot_efficiency(records).axes
    lines = {line.get_label(): dict(line.get_xydata()) for line in axis.get_lines() if line.get_marker() not in ".x"}
    assert lines == {"p4cnn (2 seeds)": {120: 30.5, 12000: 2.5}, "gc-p4cnn (1 seed)": {120: 40.0}}
    assert points(axis, ".") == [(120, 30), (120, 31), (120, 40), (12000, 2), (12000, 3)]
    assert points(axis, "x") == [(12000, 1.74), (12000, 2.23)]


def test_efficiency_on_fewer_images_has_nothing_published_beside_it(records):
    (axis,) = curves.plot_efficiency([record for record in records if record["train_images"] == 120]).axes
    assert points(axis, "o") == [(120, 30.5)]
    assert points(axis, "x") == []


def test_recipes_are_in_the_order_of_their_making_with_their_seeds(records):
    (axis,) = curves.plot_recipes(records).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["published (1 seed)", "cosine (2 seeds)"]
    assert points(axis, "o") == [(1.5, 1), (2.5, 0), (2.5, 1)]
    assert points(axis, "|") == [(2.0, 1), (2.5, 0)]


def test_no_recipes_are_said_to_be_none(records):
    (axis,) = curves.plot_recipes(records[:3]).axes
    assert [text.get_text() for text in axis.texts] == ["no records yet"]


def test_lines_are_told_apart_by_more_than_colour():
    styles = [tuple(sorted(style.items())) for style in curves.line_styles(24)]
    assert len(set(styles)) == 24
    without_colour = [{key: value for key, value in style if key != "color"} for style in styles]
    assert len({tuple(sorted(style.items())) for style in without_colour}) == 24
    rows = [{"epoch": epoch, "x": 1.0 / epoch} for epoch in range(1, 51)]
    (axis,) = curves.plot_histories({str(n): rows for n in range(7)}, {"x": "the x"}).axes
    markers = [(line.get_marker(), line.get_markevery()) for line in axis.get_lines()]
    assert len({marker for marker, _ in markers}) == 7
    starts = {start for _, (start, _) in markers}
    assert len(starts) == 5  # five epochs from marker to marker, so at most two lines share theirs
    legend = axis.figure.legends[0]
    assert {handle.get_marker() for handle in legend.get_lines()} == {marker for marker, _ in markers}
