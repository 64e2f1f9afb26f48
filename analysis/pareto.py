"""The figure of a sweep: error against parameters, multiply-accumulates and latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

ERRORS = {
    "validation_error": "validation error (%)",
    "test_error": "test error (%)",
    "output_error": "relative error of the class scores",
}
_NAMES = {
    "parameters": "parameters",
    "macs_executed": "multiply-accumulates of an image, as executed",
    "latency_share": "latency, relative to the original",
}
_COUNT = EngFormatter(sep="")
_FORMATS: dict[str, Callable[..., str]] = {
    "parameters": _COUNT,
    "macs_executed": _COUNT,
    "latency_share": lambda x, _=None: f"{100 * x:.3g} %",
}
_TICKS = (1, 1.5, 2, 3, 5, 7)  # of every power of ten


def plot_pareto(rows: Sequence[dict[str, Any]], error: str) -> Figure:
    """One panel for each cost: what was converted, named by its budget, the original, and the Pareto front as a line.

    Args:
        rows: of :func:`analysis.sweep`; those that are out of reach are left out.
        error: which of their errors is drawn.
    """
    found = [row for row in rows if row["out_of_reach"] is None]
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, len(_NAMES), figsize=(4.2 * len(_NAMES), 4), sharey=True, layout="constrained")
    for axis, cost in zip(axes, _NAMES, strict=True):
        _panel(axis, found, cost, error)
    axes[0].set_ylabel(ERRORS[error])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _panel(axis: Axes, rows: Sequence[dict[str, Any]], cost: str, error: str) -> None:
    front, others, line = sns.color_palette("colorblind")[0], "0.6", "0.75"
    original, *converted = rows
    axis.axhline(original[error], color=line, lw=0.8, ls=":", zorder=1)
    on_front = sorted((row for row in rows if row["pareto"][cost]), key=lambda row: (row[cost], -row[error]))
    axis.plot([r[cost] for r in on_front], [r[error] for r in on_front], color=front, lw=1.2, label="Pareto front")
    for label, color, wanted in (("converted, on the front", front, True), ("converted", others, False)):
        chosen = [row for row in converted if row["pareto"][cost] is wanted]
        axis.plot([r[cost] for r in chosen], [r[error] for r in chosen], "o", ms=6, color=color, label=label)
    axis.plot(original[cost], original[error], "*", ms=13, color="black", label="original", zorder=3)
    for row in converted:
        axis.annotate(
            str(row["requested"]), (row[cost], row[error]), (0, 6), textcoords="offset points", ha="center", size=8,
            color="0.3",
        )  # fmt: skip
    axis.set(xscale="log", xlabel=_NAMES[cost])
    axis.margins(0.1, 0.12)
    axis.xaxis.set_major_locator(LogLocator(subs=_TICKS))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(_FORMATS[cost]))
