"""Figures of training runs, from the records of :mod:`gconv.experiments`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, FuncFormatter, LogLocator, NullLocator

from gconv.tables import PUBLISHED, efficiency, is_published

Record = dict[str, Any]


def plot_table(records: Sequence[Record]) -> Figure:
    """Test error against parameters' number, ours as points (one a seed) beside the published mean and deviation.

    Args:
        records: of one data set (:func:`gconv.experiments.load_records`); those of other recipes are left out.
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
            label="ours, one point a seed" if row == 0 else None,
        )  # fmt: skip
    names = [f"{model}\n{published.parameters:,}" for model, published in PUBLISHED.items()]
    axis.set(yticks=range(len(names)), yticklabels=names, xlabel="test error (%)", ylim=(len(names) - 0.5, -0.5))
    axis.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_training(records: Sequence[Record]) -> Figure:
    """Training loss and error by epoch, a line for each model: the published recipe on all images, the first seed.

    Args:
        records: of one data set.
    """
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colours = sns.color_palette("colorblind", len(PUBLISHED))
    for model, colour in zip(PUBLISHED, colours, strict=True):
        own = [record for record in records if is_published(record, model) and record["seed"] == 0]
        for record in own:
            epochs = [row["epoch"] for row in record["history"]]
            for axis, key in zip(axes, ("train_loss", "train_error"), strict=True):
                axis.plot(epochs, [row[key] for row in record["history"]], color=colour, lw=1.3, label=model)
    for axis, label in zip(axes, ("training loss", "training error (%)"), strict=True):
        axis.set(yscale="log", xlabel="epoch", ylabel=label)
    axes[1].set_yscale("symlog", linthresh=0.01)  # it reaches zero
    axes[1].set_ylim(bottom=0)
    axes[1].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def plot_efficiency(records: Sequence[Record]) -> Figure:
    """Test error against the number of training images, a line for each model: means over seeds, seeds as points.

    Args:
        records: of one data set.
    """
    points = efficiency(records)
    models = list(dict.fromkeys(model for by_model in points.values() for model in by_model))
    with sns.axes_style("whitegrid"):
        figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for model, colour, marker in zip(models, sns.color_palette("colorblind"), "osD^vPX", strict=False):
        errors = {
            images: [record["test_error"] for record in by_model[model]]
            for images, by_model in points.items()
            if model in by_model
        }
        means = [statistics.mean(values) for values in errors.values()]
        axis.plot(list(errors), means, marker=marker, color=colour, label=model)
        for images, values in errors.items():
            axis.plot([images] * len(values), values, ".", color=colour, alpha=0.6)
    axis.set(xscale="log", yscale="log", xlabel="training images", ylabel="test error (%)")
    axis.set_xticks(list(points))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.legend(frameon=False)
    return figure
