"""What is drawn of the redundancy table is what is in it, in any style and for any network."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from analysis import FilterBank, block_redundancy, redundancy
from analysis.plots.filters import ORDERS, plot_filters
from analysis.plots.redundancy import (
    MEASURES,
    plot_against_depth,
    plot_against_epoch,
    plot_explained_energy,
    plot_irreps,
    plot_measures,
)
from gconv.groups.irreps import irreps
from gconv.groups.point_groups import group
from gconv.system.errors import InputError

OF_TABLES = [plot_explained_energy, plot_against_depth, plot_irreps, plot_measures]
STYLES = ["default", "dark_background", "seaborn-v0_8-whitegrid"]


@pytest.fixture(autouse=True)
def _off_screen():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def bank(name, *shape, under="p4"):
    generator = torch.Generator().manual_seed(len(name) + sum(shape))
    return FilterBank(name, torch.randn(*shape, generator=generator, dtype=torch.float64), group(under))


def network(under="p4", full=3):
    """A lifting layer and full ones."""
    s = group(under).order
    return [
        bank("lift", 4, 1, 1, 3, 3, under=under),
        *(bank(f"conv{i}", 4, 4, s, 3, 3, under=under) for i in range(full)),
    ]


def over_epochs(epochs=(0, 1, 5)):
    frames = [redundancy(network(), draws=3, seed=epoch).to_frame().assign(epoch=epoch) for epoch in epochs]
    for epoch, frame in zip(epochs, frames, strict=True):
        frame["value"] += 0.01 * epoch
    return pd.concat(frames, ignore_index=True).astype({"epoch": "Int64"})


def select(frame, measure, part, rank=None):
    rows = frame[(frame["measure"] == measure) & (frame["part"] == part)]
    return rows if rank is None else rows[rows["rank"] == rank]


def solid(ax):
    return [line for line in ax.lines if line.get_linestyle() == "-"]


def check_null(ax, number, rows):
    """The dashed line is the null's mean, and the shading reaches from its lower to its upper end."""
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"][number]
    np.testing.assert_array_equal(dashed.get_ydata(), rows["init_mean"])
    assert dashed.get_color() == solid(ax)[number].get_color()
    corners = ax.collections[number].get_paths()[0].vertices[:, 1]
    assert set(rows["init_low"]) | set(rows["init_high"]) == set(corners)


@pytest.mark.parametrize(
    ("part", "measure"), [("g", "explained_energy"), ("gc_in", "pca_explained_variance"), ("group", "hosvd_energy")]
)
def test_energy_of_each_layer_against_the_rank(part, measure):
    table = redundancy(network(), draws=3)
    ax = plot_explained_energy(table, part, measure=measure)
    rows = select(table.to_frame(), measure, part)
    names = ["conv0", "conv1", "conv2"]
    assert [line.get_label() for line in solid(ax)] == names
    for number, name in enumerate(names):
        of_layer = rows[rows["layer"] == name]
        line = solid(ax)[number]
        np.testing.assert_array_equal(line.get_xdata(), of_layer["rank"].to_numpy(float))
        np.testing.assert_array_equal(line.get_ydata(), of_layer["value"])
        check_null(ax, number, of_layer)
    assert len(solid(ax)) == 3
    assert len({line.get_marker() for line in solid(ax)}) == 3


def test_a_measure_against_depth():
    table = redundancy(network(), draws=3)
    ax = plot_against_depth(table, rank=2)
    assert [line.get_label() for line in solid(ax)] == ["g", "gc", "gc_in"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["conv0", "conv1", "conv2"]
    assert ax.get_ylabel() == "explained energy at rank 2"
    for number, form in enumerate(["g", "gc", "gc_in"]):
        rows = select(table.to_frame(), "explained_energy", form, 2)[:-1]  # without the network
        np.testing.assert_array_equal(solid(ax)[number].get_xdata(), [0, 1, 2])
        np.testing.assert_array_equal(solid(ax)[number].get_ydata(), rows["value"])
        check_null(ax, number, rows)


def test_only_the_parts_asked_for_in_their_order_and_each_layer_at_its_depth():
    table = redundancy(network(), draws=3)
    ax = plot_against_depth(table, "effective_rank", ["in", "out"])
    assert ax.get_ylabel() == "effective rank"
    assert [line.get_label() for line in solid(ax)] == ["in", "out"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["lift", "conv0", "conv1", "conv2"]
    assert [list(line.get_xdata()) for line in solid(ax)] == [[1, 2, 3], [0, 1, 2, 3]]


def test_a_measure_against_the_epoch():
    frame = over_epochs()
    ax = plot_against_epoch(frame, "invariance", "average")
    assert [line.get_label() for line in solid(ax)] == ["conv0", "conv1", "conv2", "network"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "5"]
    for number, name in enumerate(["conv0", "conv1", "conv2", "(network)"]):
        rows = select(frame, "invariance", "average")
        rows = rows[rows["layer"] == name]
        np.testing.assert_array_equal(solid(ax)[number].get_xdata().astype(float), [0, 1, 5])
        np.testing.assert_array_equal(solid(ax)[number].get_ydata(), rows["value"])
        if name != "(network)":
            check_null(ax, number, rows)


def test_a_table_without_epochs_is_not_drawn_against_them():
    with pytest.raises(InputError, match="no epochs; give the result"):
        plot_against_epoch(redundancy(network(), draws=0))


def test_of_several_epochs_the_last_is_drawn():
    frame = over_epochs()
    last = frame[frame["epoch"] == 5]
    for plot in OF_TABLES:
        both = [plot(rows) for rows in (frame, last)]
        assert [[list(line.get_ydata()) for line in ax.lines] for ax in both[:1]] == [
            [list(line.get_ydata()) for line in both[1].lines]
        ]
        assert [text.get_text() for text in both[0].texts] == [text.get_text() for text in both[1].texts]


@pytest.mark.parametrize("under", ["p2", "p4", "pmm", "p4m"])
@pytest.mark.parametrize("turned", [False, True])
def test_irreps_beside_their_expectation(under, turned):
    table = redundancy(network(under, full=2), draws=3)
    ax = plot_irreps(table, turned=turned)
    frame = table.to_frame()
    names = [irrep.name for irrep in irreps(group(under))]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == names
    bars, nulls = ax.containers[0::2], ax.containers[1::2]
    for number, (bar, null, expected) in enumerate(zip(bars, nulls, ax.collections, strict=True)):
        for irrep, drawn, band, segment in zip(irreps(group(under)), bar, null, expected.get_segments(), strict=True):
            row = select(frame, "irrep_energy" + "_turned" * turned, irrep.name).set_index("layer").loc[f"conv{number}"]
            assert drawn.get_height() == row["value"]
            assert band.get_y() == row["init_low"]
            assert band.get_y() + band.get_height() == pytest.approx(row["init_high"], abs=1e-12)
            assert segment[:, 1] == pytest.approx([irrep.share] * 2)
            assert segment[0, 0] < drawn.get_x() < drawn.get_x() + drawn.get_width() < segment[1, 0]
            assert round((segment[0, 0] + segment[1, 0]) / 2) == names.index(irrep.name)


def test_the_heatmap_has_every_value_and_brackets_what_chance_gives():
    table = redundancy(network(), draws=5)
    ax = plot_measures(table)
    rows = table.to_frame()
    rows = rows[rows["rank"].isna() | rows["rank"].eq(1)].set_index(["layer", "measure", "part"])
    layers = ["lift", "conv0", "conv1", "conv2", "(network)"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == layers
    low, high = ax.get_ylim()
    assert low > high  # the first layer is on top
    written = {text.get_position(): text.get_text() for text in ax.texts}
    colors = ax.collections[0].get_array()
    for y, layer in enumerate(layers):
        for x, key in enumerate(MEASURES):
            text = written.pop((x + 0.5, y + 0.5), None)
            if (layer, *key) not in rows.index:
                assert text is None
                assert colors[y, x] is np.ma.masked
                continue
            row = rows.loc[(layer, *key)]
            number = f"{row['value']:.2f}".replace("-0.00", "0.00")
            inside = row["init_low"] <= row["value"] <= row["init_high"]
            assert text == (f"({number})" if inside else number)
            assert colors[y, x] == (row["value"] - row["init_mean"]) / (1 - row["init_mean"])
    assert not written


def test_the_heatmap_shows_the_measures_asked_for():
    ax = plot_measures(redundancy(network(), draws=3), [("rank_95", "gc_in"), ("cosine", "mean")])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["rank\n95\ngc_in", "cosine\nmean"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["conv0", "conv1", "conv2", "(network)"]


def turn_back(kernel, element):
    """By its definition: elements rotate by quarter turns and then reverse the rows."""
    return np.rot90(kernel[::-1] if element >= 4 else kernel, -(element % 4))


@pytest.mark.parametrize("under", ["p2", "p4", "pm", "p4m"])
@pytest.mark.parametrize("by", list(ORDERS))
def test_the_gallery_shows_the_extreme_pairs(under, by):
    filters = bank("conv", 3, 5, group(under).order, 3, 3, under=under)
    ax = plot_filters(filters, by=by, pairs=2)
    measured = block_redundancy(filters)
    measured = {
        measure: rows[rows["rank"].isna() | rows["rank"].eq(1)].set_index("block")["value"]
        for measure, part in ORDERS.items()
        for rows in [select(measured, measure, part)]
    }
    ranked = list(measured[by].sort_values(ascending=False).index)
    shown = ranked[:2] + ranked[-2:]
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"out {pair // 5}, in {pair % 5}" for pair in shown]
    images = iter(ax.images)
    for pair in shown:
        kernels = filters.weight[pair // 5, pair % 5].numpy()
        scale = np.abs(kernels).max()
        for turned in (False, True):
            for kernel, element in zip(kernels, filters.group.elements, strict=True):
                image = next(images)
                np.testing.assert_array_equal(image.get_array(), turn_back(kernel, element) if turned else kernel)
                assert image.get_clim() == (-scale, scale)
    assert next(images, None) is None
    numbers = [text.get_text() for text in ax.texts][:12]
    assert numbers == [f"{measured[measure][pair]:.2f}" for pair in shown for measure in ORDERS]


def test_a_layer_with_few_channel_pairs_shows_each_once():
    ax = plot_filters(bank("conv", 1, 2, 4, 3, 3), pairs=3)
    assert len(ax.images) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("filters", "arguments", "message"),
    [
        (bank("lift", 4, 1, 1, 3, 3), {}, "the filters of lift have no invariance along a group axis"),
        (bank("flat", 4, 2, 1, 3, 3, under="z2"), {}, "the filters of flat have no invariance"),
        (bank("one", 4, 2, 4, 1, 1), {"by": "explained_energy"}, "the filters of one have no explained_energy"),
        (bank("conv", 4, 2, 4, 3, 3), {"by": "size"}, "unknown order of filters 'size'; accepted: invariance, "),
        (bank("conv", 4, 2, 4, 3, 3), {"pairs": 0}, "pairs is 0; give at least 1"),
    ],
)
def test_what_a_gallery_cannot_show(filters, arguments, message):
    with pytest.raises(InputError, match=message):
        plot_filters(filters, **arguments)


def all_plots(table, frame):
    return [*(plot(table) for plot in OF_TABLES), plot_against_epoch(frame), plot_filters(network("p4m")[1])]


def test_every_function_draws_into_the_axes_given_and_returns_them():
    table, frame = redundancy(network(), draws=3), over_epochs()
    calls = [*((plot, table) for plot in OF_TABLES), (plot_against_epoch, frame), (plot_filters, network()[1])]
    for plot, source in calls:
        ax = Figure().subplots()
        assert plot(source, ax=ax) is ax
        assert ax.has_data()
    assert not plt.get_fignums()


def test_a_frame_is_drawn_as_its_table():
    table = redundancy(network(), draws=3)
    for plot in OF_TABLES:
        first, second = plot(table), plot(table.to_frame())
        assert [list(line.get_ydata()) for line in first.lines] == [list(line.get_ydata()) for line in second.lines]
        assert [patch.get_bbox().bounds for patch in first.patches] == [p.get_bbox().bounds for p in second.patches]
        assert [text.get_text() for text in first.texts] == [text.get_text() for text in second.texts]


def contrast(first, second):
    """As the Web Content Accessibility Guidelines define it, between 1 and 21."""
    linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in map(np.array, (first, second))]
    dark, light = sorted(float(color @ (0.2126, 0.7152, 0.0722)) for color in linear)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("style", STYLES)
def test_everything_can_be_seen_and_read_in_any_style(style):
    table, frame = redundancy(network(full=6), draws=3), over_epochs()
    with plt.style.context(style):
        before = dict(plt.rcParams)
        drawn = all_plots(table, frame)
        assert dict(plt.rcParams) == before
        for ax in drawn:
            ax.figure.canvas.draw()
            background = to_rgb(ax.get_facecolor())
            for line in ax.lines:
                assert contrast(to_rgb(line.get_color()), background) > 1.6
            drawn_on = ax.figure.get_tightbbox()  # in inches; nothing is cut off
            width, height = ax.figure.get_size_inches()
            assert -0.01 <= drawn_on.x0 <= drawn_on.x1 <= width + 0.01
            assert -0.01 <= drawn_on.y0 <= drawn_on.y1 <= height + 0.01
            in_cells = ax.texts if ax.get_yticklabels()[-1].get_text() == "(network)" else []
            for text in ax.figure.findobj(Text):
                assert text.get_fontsize() >= 8
                if text.get_text() and text not in in_cells:
                    assert contrast(to_rgb(text.get_color()), background) > 4.5


def test_numbers_in_the_heatmap_can_be_read_on_their_cells():
    rows = redundancy([bank("conv", 2, 2, 4, 3, 3)], draws=3).to_frame()
    rows = rows[rows["measure"] == "explained_energy"]
    for redundant in np.linspace(0, 1, 11):
        ax = plot_measures(rows.assign(value=redundant, init_mean=0.0))
        ax.figure.canvas.draw()
        (ink,), (color,) = (
            {tuple(c) for c in colors}
            for colors in ([to_rgb(text.get_color()) for text in ax.texts], ax.collections[0].get_facecolors())
        )
        assert contrast(ink, color[:3]) > 3.5
        plt.close(ax.figure)


def test_two_layers_with_one_color_differ_in_their_marker():
    ax = plot_explained_energy(redundancy(network(full=40), draws=0))
    lines = solid(ax)[:40]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 40
    assert all(before.get_marker() != after.get_marker() for before, after in pairwise(lines))
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == [f"conv{i}" for i in range(0, 40, 4)]


@pytest.mark.parametrize("style", STYLES)
def test_bands_that_overlap_do_not_grow_dark(style):
    """One opaque shade, close to the background; lines and bars are to be seen on it, and boxes on the bars."""
    with plt.style.context(style):
        table = redundancy(network(full=6), draws=3)
        for ax in (plot_explained_energy(table), plot_against_depth(table), plot_against_epoch(over_epochs())):
            shades = {tuple(color) for band in ax.collections for color in band.get_facecolor()}
            ((*shade, alpha),) = shades
            assert alpha == 1
            assert 1.1 < contrast(shade, to_rgb(ax.get_facecolor())) < 1.8
            assert all(band.get_zorder() < min(line.get_zorder() for line in ax.lines) for band in ax.collections)
            legend = ax.get_legend().get_patches()[-1]
            assert legend.get_facecolor() == (*shade, 1)
        ax = plot_irreps(table)
        for box in ax.containers[1]:
            *inside, alpha = box.get_facecolor()
            assert inside == list(to_rgb(ax.get_facecolor()))
            assert 0.5 <= alpha < 1
            assert contrast(box.get_edgecolor()[:3], to_rgb(ax.get_facecolor())) > 4.5


def test_without_nulls_there_is_no_band():
    table = redundancy(network(), draws=0)
    for plot in OF_TABLES:
        ax = plot(table)
        ax.figure.canvas.draw()
        if ax.get_legend():
            assert "null" not in "".join(text.get_text() for text in ax.get_legend().get_texts())
        assert not any("(" in text.get_text() for text in ax.texts)


def test_a_legend_can_be_left_out():
    table = redundancy(network(), draws=3)
    assert not any(plot(table, legend=False).get_legend() for plot in OF_TABLES[:3])
    assert plot_against_epoch(over_epochs(), legend=False).get_legend() is None


@pytest.mark.parametrize("draws", [0, 3])
@pytest.mark.parametrize(
    "banks",
    [
        [],
        [bank("lift", 4, 1, 1, 3, 3)],
        [bank("one", 2, 3, 4, 3, 3)],
        [bank("single", 1, 1, 4, 3, 3)],
        [bank("dot", 2, 3, 4, 1, 1)],
        [bank("flat", 4, 2, 1, 3, 3, under="z2"), bank("flatter", 4, 4, 1, 3, 3, under="z2")],
        [FilterBank("zeros", torch.zeros(2, 2, 4, 3, 3, dtype=torch.float64), group("p4"))],
        [bank("four", 2, 2, 4, 3, 3), bank("eight", 2, 2, 8, 3, 3, under="p4m")],
    ],
    ids=lambda banks: "-".join(bank.name for bank in banks) or "none",
)
def test_networks_with_little_to_show(banks, draws):
    table = redundancy(banks, draws=draws)
    for plot in [*OF_TABLES, lambda rows: plot_against_epoch(rows.to_frame().assign(epoch=3))]:
        ax = plot(table)
        ax.figure.canvas.draw()
        assert ax.has_data() or ax.texts  # a note that there is nothing


def test_a_filter_of_zeros_is_shown_as_zeros():
    ax = plot_filters(FilterBank("zeros", torch.zeros(1, 1, 4, 3, 3, dtype=torch.float64), group("p4")))
    ax.figure.canvas.draw()
    assert len(ax.images) == 8
