"""The figure of a sweep: error against parameters, multiply-accumulates and latency."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from matplotlib.transforms import Bbox

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
# In points: the text of a name, the markers, and the distance between a name and what it must not touch.
_LABEL, _POINT, _STAR, _GAP = 8, 6, 13, 2


def plot_pareto(rows: Sequence[dict[str, Any]], error: str) -> Figure:
    """A panel for each cost, with the original, the converted networks and their Pareto front.

    The name of a converted network is its budget.

    Args:
        rows: the rows of :func:`analysis.sweep`. Those whose budget is out of reach are left out.
        error: which of their errors to draw.
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
    figure.draw_without_rendering()  # the layout decides where the points are
    for axis, cost in zip(axes, _COSTS, strict=True):
        _name_points(axis, found, cost, error)
    return figure


def _front(rows: Sequence[dict[str, Any]], cost: str, error: str) -> list[tuple[float, float]]:
    """The points of the Pareto front, from left to right."""
    return sorted(((row[cost], row[error]) for row in rows if row["pareto"][cost]), key=lambda at: (at[0], -at[1]))


def _panel(axis: Axes, rows: Sequence[dict[str, Any]], cost: str, error: str) -> None:
    color, others, line = sns.color_palette("colorblind")[0], "0.6", "0.5"
    original, *converted = rows
    axis.axhline(original[error], color=line, lw=0.8, ls="--", zorder=1)
    axis.plot(*zip(*_front(rows, cost, error), strict=True), color=color, lw=1.2, label="Pareto front")
    for label, shade, wanted in (("converted, on the front", color, True), ("converted", others, False)):
        chosen = [row for row in converted if row["pareto"][cost] is wanted]
        axis.plot(
            [r[cost] for r in chosen], [r[error] for r in chosen], "o", ms=_POINT, color=shade, label=label, zorder=4
        )
    # Below the points, so that it does not hide a network with the same cost.
    axis.plot(original[cost], original[error], "*", ms=_STAR, color="black", label="original", zorder=3)
    name, formatter = _COSTS[cost]
    axis.set(xlabel=name, xlim=(0, 1.25 * max(row[cost] for row in rows)))
    axis.xaxis.set_major_formatter(formatter)


def _name_points(axis: Axes, rows: Sequence[dict[str, Any]], cost: str, error: str) -> None:
    """Write its budget near each converted network's point, away from all markers, other names and the front.

    A name that finds no place beside its point is joined to it by a line.
    """
    pixel = axis.figure.dpi / 72  # pixels per point
    places = axis.transData.transform([(row[cost], row[error]) for row in rows])
    sizes = [_STAR, *[_POINT] * (len(rows) - 1)]
    taken = [_box(x, y, size * pixel, size * pixel) for (x, y), size in zip(places, sizes, strict=True)]
    front = [_box(x, y, 2, 2) for x, y in _along(axis.transData.transform(_front(rows, cost, error)))]
    for row, (x, y) in sorted(zip(rows[1:], places[1:], strict=True), key=lambda item: item[0][error]):
        text = str(row["requested"])
        probe = axis.text(0, 0, text, size=_LABEL)
        box = probe.get_window_extent()
        probe.remove()
        size = box.width + 2 * _GAP * pixel, box.height
        dx, dy, beside = _free_place(x, y, size, taken, front, axis.get_window_extent())
        taken.append(_box(x + dx, y + dy, *size))
        line = {"arrowstyle": "-", "color": "0.6", "lw": 0.6, "shrinkA": 0, "shrinkB": 2}
        axis.annotate(
            text, (row[cost], row[error]), (dx / pixel, dy / pixel), textcoords="offset points", ha="center",
            va="center", size=_LABEL, color="0.3", arrowprops=None if beside else line,
        )  # fmt: skip


def _free_place(
    x: float, y: float, size: tuple[float, float], taken: Sequence[Bbox], front: Sequence[Bbox], frame: Bbox
) -> tuple[float, float, bool]:
    """Where a name can stand: the offset of its centre from the point, in pixels, and whether it is beside the point.

    The places are tried from near to far. If every near one covers the front, the name may cover it.
    """
    width, height = size
    for avoided, reach in (([*taken, *front], 4), (taken, 40)):
        for step in range(reach):
            for turn in (1, 7, 2, 6, 0, 3, 5, 4, 9, 15, 11, 13):  # eighths and sixteenths, above and right first
                angle = math.pi * (turn / 4 if turn < 8 else turn / 8)
                dx = math.cos(angle) * (width / 2 + height / 2 + step * height / 2)
                dy = math.sin(angle) * (height + step * height / 2)
                box = _box(x + dx, y + dy, width, height)
                inside = frame.containsx(box.x0) and frame.containsx(box.x1) and frame.containsy(box.y0)
                if inside and frame.containsy(box.y1) and not any(box.overlaps(other) for other in avoided):
                    return dx, dy, step == 0
    return 0.0, height, False


def _along(points: np.ndarray) -> Iterator[tuple[float, float]]:
    """Points on the line through some points, about 3 pixels apart."""
    for (x0, y0), (x1, y1) in pairwise(points):
        for share in np.linspace(0, 1, 2 + int(math.hypot(x1 - x0, y1 - y0) / 3)):
            yield x0 + share * (x1 - x0), y0 + share * (y1 - y0)


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    """The box around a centre."""
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)
