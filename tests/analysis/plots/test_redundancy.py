"""What is drawn is what was measured."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from analysis.plots.redundancy import plot_sensitivity, plot_spectra

FORMS = {"g": 4, "gc": 9, "gc_in": 9, "g_turned": 4, "gc_turned": 9}  # and their largest rank


@pytest.fixture(autouse=True)
def _off_screen():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def rows(count):
    """Rows of report.json: forms in turn and then None, ranks from 1."""
    rng = np.random.default_rng(0)
    return [
        {
            "name": f"conv{i + 2}",
            "explained_energy": {form: np.sort(rng.uniform(size=ranks)).tolist() for form, ranks in FORMS.items()},
            "form": [*FORMS, None][i % 6],
            "rank": None if i % 6 == 5 else 1 + i % 3,
        }
        for i in range(count)
    ]


def panels(figure):
    """For each form the curves and the rings."""
    for axis in figure.axes:
        lines = axis.get_lines()
        curves = [line for line in lines if line.get_marker() == "."]
        yield axis, curves, [line for line in lines if line.get_marker() == "o"]


@pytest.mark.parametrize("count", [1, 6, 43])
def test_every_curve_is_the_explained_energy_against_the_rank(count):
    layers = rows(count)
    figure = plot_spectra(layers)
    assert [axis.get_title() for axis in figure.axes] == [f"form {form}" for form in FORMS]
    for form, (axis, curves, _) in zip(FORMS, panels(figure), strict=True):
        assert axis.get_xlabel() == "rank"
        assert [curve.get_label() for curve in curves] == [layer["name"] for layer in layers]
        for curve, layer in zip(curves, layers, strict=True):
            assert curve.get_xdata().tolist() == list(range(1, FORMS[form] + 1))
            assert list(curve.get_ydata()) == layer["explained_energy"][form]
    assert figure.axes[0].get_ylabel() == "explained energy"
    assert all(low == 0 and high >= 1 for low, high in (axis.get_ylim() for axis in figure.axes))


def test_a_ring_marks_each_choice_and_nothing_else():
    layers = rows(6)
    for form, (_, curves, rings) in zip(FORMS, panels(plot_spectra(layers)), strict=True):
        chosen = [(layer, curve) for layer, curve in zip(layers, curves, strict=True) if layer["form"] == form]
        assert [(*ring.get_xdata(), *ring.get_ydata()) for ring in rings] == [
            (layer["rank"], layer["explained_energy"][form][layer["rank"] - 1]) for layer, _ in chosen
        ]
        colors = [to_hex(ring.get_markeredgecolor()) for ring in rings]
        assert colors == [to_hex(curve.get_color()) for _, curve in chosen]


@pytest.mark.parametrize("count", [1, 6, 43])
def test_the_legend_names_every_layer_once_and_stays_inside_the_figure(count):
    layers = rows(count)
    figure = plot_spectra(layers)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [layer["name"] for layer in layers]
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert max(axis.get_window_extent().x1 for axis in figure.axes) <= box.x0


@pytest.mark.parametrize("style", [{}, {"font.size": 20}, {"figure.constrained_layout.use": True, "figure.dpi": 60}])
@pytest.mark.parametrize("forms", [1, 3, 5])
def test_panels_are_of_one_size_and_what_is_written_has_room(forms, style):
    layers = [{**row, "explained_energy": dict(list(row["explained_energy"].items())[:forms])} for row in rows(6)]
    with plt.rc_context(style):
        figure = plot_spectra(layers)
        figure.canvas.draw()
    inches = [axis.bbox.transformed(figure.dpi_scale_trans.inverted()) for axis in figure.axes]
    assert np.ptp([box.size for box in inches], axis=0) == pytest.approx([0, 0])
    assert (inches[0].width, inches[0].height) == pytest.approx((3.4, 2.9))
    boxes = [axis.get_tightbbox() for axis in figure.axes]
    assert all(figure.bbox.x0 <= box.x0 and figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_layers_are_told_apart_and_other_figures_keep_their_style():
    before = dict(plt.rcParams)
    _, curves, _ = next(panels(plot_spectra(rows(6))))
    assert len({to_hex(curve.get_color()) for curve in curves}) == 6
    assert dict(plt.rcParams) == before


def test_five_forms_stand_in_two_rows_and_nothing_is_left_empty():
    forms = ("g", "gc", "gc_in", "g_turned", "gc_turned")
    layers = [{"name": "conv2", "explained_energy": {form: [0.5, 1.0] for form in forms}, "form": "g", "rank": 1}]
    figure = plot_spectra(layers)
    assert [axis.get_title() for axis in figure.axes] == [f"form {form}" for form in forms]
    assert [axis.get_ylabel() for axis in figure.axes] == ["explained energy", "", "", "explained energy", ""]


def test_sensitivity_is_drawn_as_it_was_measured():
    whole = {"form": None, "parameters": 100, "error": 0.0}
    curves = {"gc_in": [(20, 1e-2), (40, 1e-3)], "g": [(30, 2e-2)]}
    options = [{"form": form, "parameters": p, "error": e} for form, curve in curves.items() for p, e in curve]
    table = {"layers": {"conv2": [whole, *options], "conv3": [whole], "conv4": [whole], "conv5": [whole, options[0]]}}
    figure = plot_sensitivity(table)
    shown = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in shown] == ["conv2", "conv3", "conv4", "conv5"]
    drawn = [{line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()} for axis in shown]
    assert drawn[0] == {"g": [[0.3, 2e-2]], "gc_in": [[0.2, 1e-2], [0.4, 1e-3]]}
    assert drawn[3] == {"g": [], "gc_in": [[0.2, 1e-2]]}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["g", "gc_in"]
    colours = [{line.get_label(): line.get_color() for line in axis.get_lines()} for axis in shown]
    assert all(colour == colours[0] for colour in colours)


@pytest.mark.parametrize("layers", [1, 3, 7])
def test_labels_of_sensitivity_do_not_touch(layers):
    own = [{"form": None, "parameters": 100, "error": 0.0}, {"form": "g", "parameters": 30, "error": 1e-2}]
    figure = plot_sensitivity({"layers": {f"conv{n}": own for n in range(layers)}})
    figure.draw_without_rendering()
    boxes = [
        label.get_window_extent()
        for axis in figure.axes
        if axis.axison
        for label in (*axis.get_xticklabels(), axis.title)
        if label.get_text()
    ]
    assert len(boxes) == 5 * layers
    assert not any(one.padded(2).overlaps(other) for one, other in combinations(boxes, 2))
