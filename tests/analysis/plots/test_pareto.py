"""The figure of a sweep: every network in every panel, the front through its points, names that can be read."""

import itertools
import random

import matplotlib.pyplot as plt
import pytest
from matplotlib.text import Text

from analysis.plots.pareto import plot_pareto
from analysis.sweep.rows import mark_pareto
from analysis.sweep.units import COSTS

CLOUD = [(0.2, 2e3, 9e5, 0.4, 9.0), (0.3, 3e3, 2e6, 0.7, 4.0), ("9k", 9e3, 3e6, 0.9, 3.5), (0.6, 2e4, 3e6, 1.1, 3.6)]
HEAP = [(budget, 1e4, 4e6, 1.0, 3.0) for budget in (0.2, 0.3, "12345678", 0.5)]
SPREAD = [(0.01, 10, 1e3, 0.05, 90.0), (1.0, 2.5e4, 4e6, 1.0, 3.0)]


def rows(*points, error="test_error"):
    """Rows of (budget, parameters, MACs, latency, error), after that of an original with an error of 3."""
    found = [
        {"requested": budget, "out_of_reach": None, **dict(zip(COSTS, costs, strict=True)), error: loss}
        for budget, *costs, loss in ((None, 2.5e4, 4e6, 1.0, 3.0), *points)
    ]
    for row in found:
        row.update({name: None for name in ("validation_error", "test_error", "output_error") if name != error})
    mark_pareto(found)
    return found


def at_random():
    draw = random.Random(0)
    return [
        (round(draw.random(), 2), draw.uniform(1e3, 2e4), draw.uniform(1e5, 4e6), draw.random(), draw.uniform(2, 9))
        for _ in range(8)
    ]


@pytest.fixture(params=[[], CLOUD, HEAP, SPREAD, at_random()], ids=["original", "cloud", "heap", "spread", "random"])
def drawn(request):
    found = rows(*request.param)
    figure = plot_pareto(found, "test_error")
    figure.draw_without_rendering()
    yield found, figure
    plt.close(figure)


def lines(axis):
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axis.lines[1:]}


def test_there_is_a_panel_for_each_cost_with_every_network(drawn):
    found, figure = drawn
    assert len(figure.axes) == 3
    for axis, cost in zip(figure.axes, COSTS, strict=True):
        shown = lines(axis)
        expected = sorted((row[cost], row["test_error"]) for row in found)
        points = [shown[label] for label in ("converted, on the front", "converted", "original")]
        assert sorted(itertools.chain(*points)) == expected
        assert shown["original"] == [(found[0][cost], 3.0)]
        assert [text.get_text() for text in axis.texts] == [
            str(row["requested"]) for row in sorted(found[1:], key=lambda row: row["test_error"])
        ]


def test_the_front_goes_through_what_is_marked_from_left_to_right(drawn):
    found, figure = drawn
    for axis, cost in zip(figure.axes, COSTS, strict=True):
        marked = {(row[cost], row["test_error"]) for row in found if row["pareto"][cost]}
        front = lines(axis)["Pareto front"]
        assert set(front) == marked
        assert front == sorted(front, key=lambda point: (point[0], -point[1]))


def test_points_names_and_labels_are_inside_and_no_two_names_overlap(drawn):
    _, figure = drawn
    for axis in figure.axes:
        frame = axis.get_window_extent()
        for x, y in axis.transData.transform(list(itertools.chain(*lines(axis).values()))):
            assert frame.contains(x, y)
        names = [Text.get_window_extent(text) for text in axis.texts]  # without the line to its point
        for n, box in enumerate(names):
            assert frame.contains(box.x0, box.y0)
            assert frame.contains(box.x1, box.y1)
            assert not any(box.overlaps(other) for other in names[:n])
            markers = itertools.chain(
                *(lines(axis)[label] for label in ("converted, on the front", "converted", "original"))
            )
            assert not any(box.contains(*axis.transData.transform(point)) for point in markers)
        whole = axis.get_tightbbox()
        assert figure.bbox.contains(whole.x0, whole.y0)
        assert figure.bbox.contains(whole.x1, whole.y1)
        ticks = [
            label.get_window_extent()
            for tick, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
            if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]
        ]
        assert len(ticks) > 2
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(ticks))


def test_what_is_out_of_reach_is_left_out():
    missing = {**dict.fromkeys(rows()[0]), "requested": 0.1, "out_of_reach": "too small"}
    figure = plot_pareto([*rows(*CLOUD), {**missing, "pareto": dict.fromkeys(COSTS, False)}], "test_error")
    assert [len(axis.texts) for axis in figure.axes] == [4, 4, 4]
    plt.close(figure)


@pytest.mark.parametrize(
    ("error", "label"),
    [
        ("validation_error", "validation error (%)"),
        ("test_error", "test error (%)"),
        ("output_error", "relative error of the class scores"),
    ],
)
def test_the_axis_says_which_error_it_is(error, label):
    figure = plot_pareto(rows(*CLOUD, error=error), error)
    assert figure.axes[0].get_ylabel() == label
    plt.close(figure)
