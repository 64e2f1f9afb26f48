"""Figures of the measures.

:func:`plot_spectra` and :func:`plot_sensitivity` draw a conversion report. The other functions draw the redundancy
table. Their argument is the result of :func:`analysis.redundancy`, its frame, or some rows of the frame. They draw into
``ax`` or into a new figure, in matplotlib's current style, and return the Axes. From a table over epochs they show the
last epoch, except :func:`plot_against_epoch`. With ``legend=False`` they draw no legend, for panels that share one. The
filters themselves are drawn in :mod:`analysis.plots.filters`.

A solid line with markers shows the trained network. A dashed line of the same colour shows the mean of its null
``init``, filters drawn from the layer's initialisation. The grey shading covers the 95 % intervals of all nulls in the
panel. Without nulls both are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator, PercentFormatter

from analysis.measures.table import NETWORK, Redundancy
from gconv.functional.forms import FORMS
from gconv.groups.irreps import irreps
from gconv.groups.point_groups import group
from gconv.system.errors import InputError

from .spectra import draw_spectra

Table: TypeAlias = Redundancy | pd.DataFrame

# The columns of the heatmap by default: measure and part. A spectrum is shown by its value at rank 1.
MEASURES = (
    ("explained_energy", "g"),
    ("explained_energy", "gc"),
    ("explained_energy", "gc_in"),
    ("effective_rank", "space"),
    ("effective_rank", "group"),
    ("effective_rank", "in"),
    ("effective_rank", "out"),
    ("cosine", "mean"),
    ("invariance", "average"),
    ("invariance_turned", "average"),
)

_MARKERS = "osD^vP*X"
_NAMED = 12  # a legend names at most this many layers: of more it names every second, third, …


def plot_spectra(layers: Sequence[dict[str, Any]]) -> Figure:
    """Explained energy against rank, one panel per separable form and one line per layer.

    A ring marks the form and rank to which a layer was converted.

    Args:
        layers: rows as in ``report.json``: ``name``, ``explained_energy`` (form to list), ``form`` and ``rank``.
    """
    figure = plt.figure()
    draw_spectra(figure, layers)
    return figure


def plot_sensitivity(table: dict[str, Any], *, columns: int = 3) -> Figure:
    """The error if one layer alone is replaced, against its remaining parameters: a panel per layer, a line per form.

    Args:
        table: ``report.sensitivity`` of a conversion with data.
        columns: the number of panels in a row.
    """
    layers: dict[str, list[dict[str, Any]]] = table["layers"]
    rows = -(-len(layers) // columns)
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            rows, columns, figsize=(4 * columns, 2.8 * rows), sharey=True, layout="constrained", squeeze=False
        )
    styles = dict(zip(FORMS, zip(sns.color_palette("colorblind"), _MARKERS, strict=False), strict=False))
    used = {option["form"] for own in layers.values() for option in own}
    for axis, (name, (whole, *options)) in zip(axes.flat, layers.items(), strict=False):
        for form in (form for form in styles if form in used):
            own, (color, marker) = [option for option in options if option["form"] == form], styles[form]
            share = [option["parameters"] / whole["parameters"] for option in own]
            axis.plot(share, [option["error"] for option in own], marker=marker, ms=4, lw=1, color=color, label=form)
        # No tick at 0: its label would touch the "100%" of the panel on the left.
        axis.set(title=name, yscale="log", xlim=(0, 1.02), xticks=(0.25, 0.5, 0.75, 1))
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axis in axes.flat[len(layers) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("error of the scores")
    figure.supxlabel("remaining parameters of the layer", fontsize="medium")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def plot_explained_energy(
    table: Table, part: str = "g", *, measure: str = "explained_energy", legend: bool = True, ax: Axes | None = None
) -> Axes:
    """The share of the energy up to each rank, one line per layer.

    Args:
        table: the redundancy table.
        part: a separable form; or an unfolding, if the measure is ``hosvd_energy``.
        measure: ``explained_energy``, ``pca_explained_variance`` or ``hosvd_energy``.
        legend: whether to draw a legend.
        ax: where to draw; None for a new figure.
    """
    rows = _rows(_last(table), measure, part)
    ax = canvas(ax, 6, 3.6)
    for _, of_layer, style in _by_layer(rows):
        _line(ax, of_layer["rank"], of_layer, **style)
    ax.set(xlabel="rank", ylabel=measure.replace("_", " "), title=part, ylim=(0, 1.03))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(ax, rows, legend)


def plot_against_depth(
    table: Table,
    measure: str = "explained_energy",
    parts: Sequence[str] | None = None,
    *,
    rank: int = 1,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """A measure from the first layer to the last, one line per part.

    Args:
        table: the redundancy table.
        measure: the name of the measure.
        parts: its parts to draw; None for all.
        rank: the rank, if the measure is a spectrum.
        legend: whether to draw a legend.
        ax: where to draw; None for a new figure.
    """
    rows = _rows(_last(table), measure, rank=rank)
    rows = rows[rows["layer"] != NETWORK]
    rows = rows if parts is None else rows[rows["part"].isin(parts)]
    layers = list(rows.sort_values("depth", kind="stable")["layer"].unique())
    ax = canvas(ax, float(np.clip(3 + 0.3 * len(layers), 6, 14)), 3.6)
    colors = sns.color_palette("colorblind")
    for number, part in enumerate(parts or rows["part"].unique()):
        of_part = rows[rows["part"] == part]
        marker = _MARKERS[number % len(_MARKERS)]
        _line(ax, of_part["layer"].map(layers.index), of_part, colors[number % len(colors)], marker, part)
    ax.set(xlabel="layer, from the first to the last", ylabel=_words(measure, rows))
    ax.set_xticks(range(len(layers)), layers, rotation=90 if len(layers) > 8 else 0)
    return _finished(ax, rows, legend)


def plot_against_epoch(
    table: Table,
    measure: str = "explained_energy",
    part: str = "g",
    *,
    rank: int = 1,
    legend: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """A measure in the course of training, one line per layer and a thick line for the network.

    Args:
        table: the result of :func:`analysis.redundancy_over_epochs`.
        measure: the name of the measure.
        part: its part.
        rank: the rank, if the measure is a spectrum.
        legend: whether to draw a legend.
        ax: where to draw; None for a new figure.

    Raises:
        InputError: the table has no epochs.
    """
    frame = _frame(table)
    if "epoch" not in frame:
        raise InputError("the table has no epochs; give the result of redundancy_over_epochs")
    rows = _rows(frame, measure, part, rank)
    ax = canvas(ax, 6, 3.6)
    for _, of_layer, style in _by_layer(rows):
        _line(ax, of_layer["epoch"], of_layer, **style)
    whole = rows[rows["layer"] == NETWORK]
    ax.plot(whole["epoch"], whole["value"], color=_ink(), lw=3, label="network", zorder=3)
    epochs = sorted(rows["epoch"].unique())
    ax.set_xscale("symlog", linthresh=1, linscale=0.5)
    ax.xaxis.set_major_locator(FixedLocator(epochs))
    ax.xaxis.set_major_formatter(FixedFormatter([str(epoch) for epoch in epochs]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlabel="epoch", ylabel=_words(measure, rows), title=part)
    return _finished(ax, rows, legend)


def plot_irreps(table: Table, *, turned: bool = False, legend: bool = True, ax: Axes | None = None) -> Axes:
    """The energy in each irreducible representation of the group: a bar per layer, from the first to the last.

    The line across a bar is the expected share of a random filter, ``d^2 / |H|``. The box around it is the 95 %
    interval of the null.

    Args:
        table: the redundancy table.
        turned: whether the kernels are first transformed back by their element.
        legend: whether to draw a legend.
        ax: where to draw; None for a new figure.
    """
    rows = _rows(_last(table), "irrep_energy_turned" if turned else "irrep_energy")
    names = sorted(rows["part"].unique())
    layers = rows["layer"][rows["layer"] != NETWORK].nunique()
    width = 0.84 / max(layers, 1)
    ax = canvas(ax, float(np.clip(3 + 0.12 * layers * len(names), 6, 14)), 3.6)
    for number, of_layer, style in _by_layer(rows):
        middle = of_layer["part"].map(names.index) + width * (number - (layers - 1) / 2)
        expected = {irrep.name: irrep.share for irrep in irreps(group(of_layer["group"].iloc[0]))}
        ax.bar(middle, of_layer["value"], 0.85 * width, color=style["color"], label=style["label"])
        height = of_layer["init_high"] - of_layer["init_low"]
        ax.bar(middle, height, width, of_layer["init_low"], zorder=2.5, **_null_box(ax))
        y, label = of_layer["part"].map(expected), "" if number else "expected, $d^2/|H|$"
        ax.hlines(y, middle - width / 2, middle + width / 2, _ink(), lw=1.5, zorder=3, label=label)
    ax.set_xticks(range(len(names)), names)
    frame = "kernels transformed back" if turned else "kernels as stored"
    ax.set(xlabel="irreducible representation of the group", ylabel="share of the energy", title=frame)
    return _finished(ax, rows, legend, null=Patch(**_null_box(ax)))


def plot_measures(table: Table, measures: Sequence[tuple[str, str]] = MEASURES, *, ax: Axes | None = None) -> Axes:
    """A heatmap with a row for each layer and a last one for the network, and a column for each measure.

    A spectrum is shown by its value at rank 1. The numbers are the values; a value inside the interval of its null is
    in brackets. The colour makes the measures comparable: ``(value - null) / (1 - null)`` is 0 for chance, and 1 for
    the largest possible redundancy, where all shares, cosines and ranks are 1. Without nulls there are only numbers.

    Args:
        table: the redundancy table.
        measures: pairs of measure and part.
        ax: where to draw; None for a new figure.
    """
    rows = _last(table)
    wanted = rows.set_index(["measure", "part"]).index.isin(measures)
    rows = rows[wanted & (rows["rank"].isna() | rows["rank"].eq(1))]
    found = {(row.layer, row.measure, row.part): row for row in rows.itertuples()}
    layers = list(rows["layer"].unique())
    columns = [key for key in measures if any((layer, *key) in found for layer in layers)]
    ax = canvas(ax, 1.5 + 0.85 * len(columns), 1.6 + 0.3 * len(layers))
    learned = np.full((len(layers), len(columns)), np.nan)
    cividis = plt.get_cmap("cividis")
    for (y, layer), (x, key) in product(enumerate(layers), enumerate(columns)):
        if (row := found.get((layer, *key))) and not np.isnan(row.value):
            learned[y, x] = (row.value - row.init_mean) / (1 - row.init_mean)
            ink = _ink() if np.isnan(learned[y, x]) else "black" if _light(cividis(learned[y, x])) else "white"
            text = f"{round(row.value, 2) + 0:.2f}"  # no -0.00
            text = f"({text})" if row.init_low <= row.value <= row.init_high else text
            ax.text(x + 0.5, y + 0.5, text, color=ink, ha="center", va="center", size=9)
    if np.isfinite(learned).any():
        picture = ax.pcolormesh(learned, cmap=cividis, vmin=0, vmax=1, edgecolors=ax.get_facecolor(), lw=1.5)
        bar = ax.figure.colorbar(picture, ax=ax, extend="min", pad=0.01, aspect=3 * len(layers))
        bar.set_label("learned redundancy (0: chance)")
    names = [f"{measure}_{part}".replace("_", "\n").replace("gc\nin", "gc_in") for measure, part in columns]
    ax.set_xticks([x + 0.5 for x in range(len(columns))], names, size=9)
    ax.set_yticks([y + 0.5 for y in range(len(layers))], layers, size=9)
    ax.set(xlim=(0, len(columns) or 1), ylim=(len(layers) or 1, 0))
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.grid(visible=False)
    return _finished(ax, rows, legend=False)


def canvas(ax: Axes | None, width: float, height: float) -> Axes:
    """``ax``, or the Axes of a new figure of this size in inches if ``ax`` is None."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def _frame(table: Table) -> pd.DataFrame:
    return table.to_frame() if isinstance(table, Redundancy) else table


def _last(table: Table) -> pd.DataFrame:
    frame = _frame(table)
    return frame[frame["epoch"] == frame["epoch"].max()] if "epoch" in frame else frame


def _rows(frame: pd.DataFrame, measure: str, part: str | None = None, rank: int | None = None) -> pd.DataFrame:
    rows = frame[frame["measure"] == measure]
    rows = rows if part is None else rows[rows["part"] == part]
    return rows if rank is None else rows[rows["rank"].isna() | rows["rank"].eq(rank)]


def _by_layer(rows: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame, dict[str, Any]]]:
    """For each layer, without the network: its number, its rows and the style of its line."""
    layers = list(rows["layer"][rows["layer"] != NETWORK].unique())
    step = -(-len(layers) // _NAMED)
    # Without the end of the colour map that is too close to the background.
    first, last = (0.3, 1.0) if _light(_ink()) else (0.0, 0.82)
    for number, layer in enumerate(layers):
        style = {
            "color": plt.get_cmap("viridis")(first + (last - first) * number / max(len(layers) - 1, 1)),
            "marker": _MARKERS[number % len(_MARKERS)],
            "label": layer if number % step == 0 else "",
        }
        yield number, rows[rows["layer"] == layer], style


def _line(ax: Axes, x: pd.Series, rows: pd.DataFrame, color: Any, marker: str, label: str) -> None:
    x = x.to_numpy(float)
    ax.plot(x, rows["value"], color=color, marker=marker, label=label)
    ax.plot(x, rows["init_mean"], color=color, ls="--", lw=1)
    # One opaque colour for all bands: translucent ones would add up to a dark area where they overlap.
    ax.fill_between(x, rows["init_low"], rows["init_high"], color=_shade(ax), lw=0, zorder=0.5)


def _finished(ax: Axes, rows: pd.DataFrame, legend: bool, null: Patch | None = None) -> Axes:
    if rows.empty:
        ax.text(0.5, 0.5, "no layer has this measure", transform=ax.transAxes, ha="center", va="center")
    elif legend:
        handles, labels = ax.get_legend_handles_labels()
        if rows["init_mean"].notna().any():
            handles, labels = [*handles, null or Patch(color=_shade(ax), lw=0)], [*labels, "null, 95 %"]
        ax.legend(handles, labels, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return ax


def _words(measure: str, rows: pd.DataFrame) -> str:
    ranks = rows["rank"].dropna()
    return measure.replace("_", " ") + ("" if ranks.empty else f" at rank {int(ranks.iloc[0])}")


def _ink() -> Any:
    """The text colour of the current style."""
    return plt.rcParams["text.color"]


def _shade(ax: Axes) -> tuple[float, float, float]:
    """The background, shaded by some of the text colour."""
    red, green, blue = 0.82 * np.array(to_rgb(ax.get_facecolor())) + 0.18 * np.array(to_rgb(_ink()))
    return float(red), float(green), float(blue)


def _null_box(ax: Axes) -> dict[str, Any]:
    """The style of a null's interval across a bar: visible on the darkest bar and on the background."""
    return {"facecolor": (*to_rgb(ax.get_facecolor()), 0.6), "edgecolor": _ink(), "lw": 0.8}


def _light(color: Any) -> bool:
    """Whether black is easier to read on this colour than white."""
    return bool(np.dot(to_rgb(color), (0.2126, 0.7152, 0.0722)) > 0.5)
