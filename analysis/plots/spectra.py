"""The figure of a conversion report. It imports only parts of matplotlib, because a command line waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator

# Seaborn's style "whitegrid", which the other figures use, without automatic layout.
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": ".8",
    "axes.grid": True,
    "axes.labelcolor": ".15",
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["Arial", "DejaVu Sans", "Liberation Sans", "Bitstream Vera Sans", "sans-serif"],
    "grid.color": ".8",
    "grid.linestyle": "-",
    "lines.solid_capstyle": "round",
    "text.color": ".15",
    "xtick.bottom": False,
    "xtick.color": ".15",
    "ytick.color": ".15",
    "ytick.left": False,
}

_PANEL = 3.4, 2.9  # inches
_GAP = 0.1


def draw_spectra(figure: Figure, layers: Sequence[dict[str, Any]]) -> None:
    """Draw the panels of :func:`analysis.plots.redundancy.plot_spectra` into an empty figure."""
    forms = list(layers[0]["explained_energy"])
    colors = colormaps["viridis"](np.linspace(0, 1, len(layers) + 2)[1:-1])  # without the ends, which are hard to see
    columns = min(len(forms), 3)
    rows = -(-len(forms) // columns)
    with rc_context(_STYLE):  # type: ignore[arg-type]  # whose keys are one of some hundred literals
        figure.set_layout_engine(None)  # as the style says
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(forms) :]:
        axis.remove()
    for axis, form in zip(axes.flat, forms, strict=False):
        for layer, color in zip(layers, colors, strict=True):
            kept = layer["explained_energy"][form]
            ranks = np.arange(1, len(kept) + 1)
            axis.plot(ranks, kept, marker=".", color=color, label=layer["name"])
            if layer["form"] == form:
                axis.plot(layer["rank"], kept[layer["rank"] - 1], "o", ms=10, mfc="none", mec=color, mew=1.5)
        axis.axhline(0.95, color="0.4", lw=0.8, ls=":")
        axis.set(xlabel="rank", ylim=(0, 1.03))
        axis.set_title(f"form {form}", y=1)  # without y, matplotlib computes its place at every drawing
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[:, 0]:
        axis.set_ylabel("explained energy")
    handles = axes[0, 0].get_legend_handles_labels()
    legend = figure.legend(*handles, loc="center right", frameon=False, ncols=1 + (len(layers) - 1) // 15)
    _arrange(figure, axes, legend)


def _arrange(figure: Figure, axes: np.ndarray, legend: Legend) -> None:
    """Give all panels one size, and the figure the size that the panels, their labels and the legend need.

    The labels are measured at the first panel only. Constrained layout is slower: it measures every panel twice.
    """
    first: Axes = axes[0, 0]
    inner, outer = first.bbox, first.get_tightbbox()
    assert outer is not None  # as the panel is visible
    left = (inner.x0 - outer.x0) / figure.dpi + _GAP
    below = (inner.y0 - outer.y0) / figure.dpi + _GAP
    above = (outer.y1 - inner.y1) / figure.dpi + _GAP
    right = legend.get_window_extent().width / figure.dpi + 2 * _GAP
    (rows, columns), (wide, high) = axes.shape, _PANEL
    width = left + columns * wide + (columns - 1) * _GAP + right
    height = rows * (above + high + below)
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=below / height,
        top=1 - above / height,
        wspace=_GAP / wide,
        hspace=(above + below) / high,
    )
