"""Figures of training runs, from the records of :mod:`gconv.experiments`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, FuncFormatter, LogLocator, NullLocator

from gconv.experiments.tables import PUBLISHED, by_recipe, efficiency, is_published, seeds

Record = dict[str, Any]
OFFICIAL_IMAGES = 12_000
"""The number of training images of the published networks."""
_MARKERS = "osD^vPX*"


def plot_table(records: Sequence[Record]) -> Figure:
    """Test error of each model, one point per seed, beside the published mean and deviation.

    Args:
        records: the records of one data set (:func:`gconv.experiments.runs.load_records`). Those of other recipes than
            the published one are left out.
    """
    with sns.axes_style("whitegrid"):
        figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    colour = sns.color_palette("colorblind")[0]
    for row, (model, published) in enumerate(PUBLISHED.items()):
        axis.errorbar(
            published.error, row + 0.14, xerr=3 * published.deviation, fmt="|", color="0.45", ms=11, capsize=3,
            label="published: mean, 3 deviations" if row == 0 else None,
        )  # fmt: skip
        errors = [record["test_error"] for record in records if is_published(record, model)]
        axis.plot(
            errors, [row - 0.14] * len(errors), "o", color=colour, alpha=0.8,
            label="ours, one point per seed" if row == 0 else None,
        )  # fmt: skip
    names = [f"{model}\n{published.parameters:,}" for model, published in PUBLISHED.items()]
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="test error (%)", ylim=(len(names) - 0.5, -0.5))
    axis.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_training(records: Sequence[Record]) -> Figure:
    """Training loss and error by epoch, a line for each model: the first seed of the published recipe on all images.

    Args:
        records: the records of one data set.
    """
    histories = {
        model: record["history"]
        for model in PUBLISHED
        for record in records
        if is_published(record, model) and record["seed"] == 0
    }
    return plot_histories(histories, {"train_loss": "training loss", "train_error": "training error (%)"})


def plot_histories(histories: Mapping[str, Sequence[dict[str, Any]]], quantities: Mapping[str, str]) -> Figure:
    """Quantities by epoch: a line for each history and a panel for each quantity.

    Args:
        histories: the rows of :func:`gconv.fit`, by the label of the line.
        quantities: the labels of the axes, by their keys in the rows.
    """
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, len(quantities), figsize=(5.5 * len(quantities), 4), layout="constrained")
    styles = line_styles(len(histories))
    for axis, (key, label) in zip(np.atleast_1d(axes), quantities.items(), strict=True):
        for number, ((name, history), style) in enumerate(zip(histories.items(), styles, strict=True)):
            # Some ten markers a line, each line at epochs of its own, so that they do not cover one another.
            step = max(1, len(history) // 10)
            every = (number * step // len(histories), step)
            epochs = [row["epoch"] for row in history]
            axis.plot(epochs, [row[key] for row in history], lw=1.2, ms=4.5, markevery=every, label=name, **style)
        axis.set(yscale="log", xlabel="epoch", ylabel=label)
        if any(row[key] == 0 for history in histories.values() for row in history):
            axis.set_yscale("symlog", linthresh=0.01)
            axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def line_styles(count: int) -> list[dict[str, Any]]:
    """Line styles that differ in colour and marker, and from eight on in the dashes too.

    Args:
        count: the number of lines.
    """
    colours = sns.color_palette("dark", len(_MARKERS))
    size = len(_MARKERS)
    dashes = ("-", "--", ":", "-.")
    return [
        {"color": colours[n % size], "marker": _MARKERS[n % size], "ls": dashes[n // size % len(dashes)]}
        for n in range(count)
    ]


def plot_recipes(records: Sequence[Record]) -> Figure:
    """Validation error of P4CNN by recipe, the published one first: a point for each seed, and the means as bars.

    Args:
        records: the records of one data set.
    """
    found = by_recipe(records)
    with sns.axes_style("whitegrid"):
        figure, axis = plt.subplots(figsize=(7.5, 3.5), layout="constrained")
    colour = sns.color_palette("colorblind")[0]
    if not found:
        axis.text(0.5, 0.5, "no records yet", ha="center", va="center", transform=axis.transAxes)
        return figure
    for row, own in enumerate(found.values()):
        errors = [record["validation_error"] for record in own]
        axis.plot(errors, [row] * len(errors), "o", color=colour, alpha=0.8)
        axis.plot(statistics.mean(errors), row, "|", color="0.2", ms=16)
    labels = [f"{recipe} ({seeds(own)})" for recipe, own in found.items()]
    axis.set(yticks=range(len(found)), yticklabels=labels, ylim=(len(found) - 0.5, -0.5))
    axis.set_xlabel("validation error (%)")
    axis.grid(visible=False, axis="y")
    return figure


def plot_efficiency(records: Sequence[Record]) -> Figure:
    """Test error against the number of training images, a line for each model.

    The line shows the mean over seeds, and small points show the seeds. If there are runs with as many training images
    as the official archive has, crosses show the published errors.

    Args:
        records: the records of one data set.
    """
    points = efficiency(records)
    models = [model for model in PUBLISHED if any(model in by_model for by_model in points.values())]
    with sns.axes_style("whitegrid"):
        figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for model, style in zip(models, line_styles(len(models)), strict=True):
        own = {images: by_model[model] for images, by_model in points.items() if model in by_model}
        errors = {images: [record["test_error"] for record in some] for images, some in own.items()}
        means = [statistics.mean(values) for values in errors.values()]
        colour = style["color"]
        axis.plot(list(errors), means, label=f"{model} ({seeds(*own.values())})", **style)
        for images, values in errors.items():
            axis.plot([images] * len(values), values, ".", color=colour, alpha=0.6)
        if OFFICIAL_IMAGES in points:
            axis.plot(OFFICIAL_IMAGES, PUBLISHED[model].error, "x", color=colour, ms=9, mew=2)
    if OFFICIAL_IMAGES in points:
        axis.plot([], [], "x", color="0.4", ms=9, mew=2, ls="", label="published, official archive")
    axis.set(xscale="log", yscale="log", xlabel="training images", ylabel="test error (%)")
    axis.set_xticks(list(points))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.legend(frameon=False)
    return figure
