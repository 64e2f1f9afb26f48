"""The figure of a sweep: error against parameters, multiply-accumulates and latency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

ERRORS = {
    "validation_error": "validation error (%)",
    "test_error": "test error (%)",
    "output_error": "relative error of the class scores",
}
_COSTS = {
    "parameters": ("parameters", EngFormatter(sep="")),
    "macs_executed": ("multiply-accumulates of an image, as executed", EngFormatter(sep="")),
    "latency_share": ("latency, relative to the original", PercentFormatter(1, decimals=0)),
}
_LABEL = 8  # points


def plot_pareto(rows: Sequence[dict[str, Any]], error: str) -> Figure:
    """One panel for each cost: what was converted, named by its budget, the original, and the Pareto front as a line.

    Args:
        rows: of :func:`analysis.sweep`; those that are out of reach are left out.
        error: which of their errors is drawn.
    """
    found = [row for row in rows if row["out_of_reach"] is None]
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, len(_COSTS), figsize=(4.2 * len(_COSTS), 4), sharey=True, layout="constrained")
    for axis, cost in zip(axes, _COSTS, strict=True):
        _panel(axis, found, cost, error)
    axes[0].margins(y=0.12)
    axes[0].set_ylabel(ERRORS[error])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.draw_without_rendering()  # settles where the points are
    for axis, cost in zip(axes, _COSTS, strict=True):
        _name_points(axis, found[1:], cost, error)
    return figure


def _panel(axis: Axes, rows: Sequence[dict[str, Any]], cost: str, error: str) -> None:
    front, others, line = sns.color_palette("colorblind")[0], "0.6", "0.5"
    original, *converted = rows
    axis.axhline(original[error], color=line, lw=0.8, ls="--", zorder=1)
    on_front = sorted((row for row in rows if row["pareto"][cost]), key=lambda row: (row[cost], -row[error]))
    axis.plot([r[cost] for r in on_front], [r[error] for r in on_front], color=front, lw=1.2, label="Pareto front")
    for label, color, wanted in (("converted, on the front", front, True), ("converted", others, False)):
        chosen = [row for row in converted if row["pareto"][cost] is wanted]
        axis.plot([r[cost] for r in chosen], [r[error] for r in chosen], "o", ms=6, color=color, label=label, zorder=4)
    # Below the points: one that costs as much as the original must not be hidden by it.
    axis.plot(original[cost], original[error], "*", ms=13, color="black", label="original", zorder=3)
    name, formatter = _COSTS[cost]
    axis.set(xlabel=name, xlim=(0, 1.25 * max(row[cost] for row in rows)))
    axis.xaxis.set_major_formatter(formatter)


def _name_points(axis: Axes, rows: Sequence[dict[str, Any]], cost: str, error: str) -> None:
    """Write its budget above and to the right of each point, where the front does not run; one above the other."""
    points = 72 / axis.figure.dpi
    taken: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: row[error]):
        x, y = points * axis.transData.transform((row[cost], row[error]))
        text, rise = str(row["requested"]), 3.0
        while any(abs(x - other) < 5 * len(text) and abs(y + rise - height) < 1.2 * _LABEL for other, height in taken):
            rise += 1
        taken.append((x, y + rise))
        axis.annotate(text, (row[cost], row[error]), (4, rise), textcoords="offset points", size=_LABEL, color="0.3")
