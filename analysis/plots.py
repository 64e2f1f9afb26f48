"""Figures. Each function takes rows of measured numbers and returns what it drew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def plot_spectra(layers: Sequence[dict[str, Any]]) -> Figure:
    """Explained energy against rank, one panel per separable form and one line per layer; a ring marks the choice.

    Args:
        layers: rows as in ``report.json``: ``name``, ``explained_energy`` (form to list), ``form`` and ``rank``.
    """
    forms = list(layers[0]["explained_energy"])
    colors = sns.color_palette("viridis", len(layers))
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            1, len(forms), figsize=(4 * len(forms), 3.6), sharey=True, layout="constrained", squeeze=False
        )
    for axis, form in zip(axes[0], forms, strict=True):
        for layer, color in zip(layers, colors, strict=True):
            kept = layer["explained_energy"][form]
            ranks = np.arange(1, len(kept) + 1)
            axis.plot(ranks, kept, marker=".", color=color, label=layer["name"])
            if layer["form"] == form:
                axis.plot(layer["rank"], kept[layer["rank"] - 1], "o", ms=10, mfc="none", mec=color, mew=1.5)
        axis.axhline(0.95, color="0.4", lw=0.8, ls=":")
        axis.set(title=f"form {form}", xlabel="rank", ylim=(0, 1.03))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set_ylabel("explained energy")
    columns = 1 + (len(layers) - 1) // 22
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, ncols=columns)
    return figure
