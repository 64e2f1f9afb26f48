"""The figure of a conversion report. With matplotlib alone, and not even all of it: a command line waits for this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Seaborn's style "whitegrid", as the other figures have it.
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": ".8",
    "axes.grid": True,
    "axes.labelcolor": ".15",
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


def draw_spectra(figure: Figure, layers: Sequence[dict[str, Any]]) -> None:
    """What :func:`analysis.plots.plot_spectra` shows, in a figure with nothing in it."""
    forms = list(layers[0]["explained_energy"])
    colors = colormaps["viridis"](np.linspace(0, 1, len(layers) + 2)[1:-1])  # the ends are hard to see
    columns = min(len(forms), 3)
    rows = -(-len(forms) // columns)
    with rc_context(_STYLE):  # type: ignore[arg-type]  # whose keys are one of some hundred literals
        figure.set_size_inches(4 * columns, 3.6 * rows)
        figure.set_layout_engine("constrained")
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
        axis.set(title=f"form {form}", xlabel="rank", ylim=(0, 1.03))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[:, 0]:
        axis.set_ylabel("explained energy")
    columns = 1 + (len(layers) - 1) // 15
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, ncols=columns)
