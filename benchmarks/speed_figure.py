"""The figure that the documentation shows, from the records of :mod:`benchmarks.speed`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")  # before pyplot is imported: no screen is needed
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from .speed_report import DENSE, Rows, layer_shares, load, networks, on_cpu

FIGURE = "speed.png"
TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
SHOWN = ("gconv", "gconv, fused", *DENSE, "lists", "escnn", "escnn, exported", "gconv, gc", "gconv, gc, fused")


def draw(folder: Path) -> Path:
    """Write the figure: layers against their MACs, and networks beside those of other designs; returns its path."""
    rows = on_cpu(load(folder))
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", width_ratios=[1.1, 1, 1])
    _layers(axes[0], rows)
    for axis, direction in zip(axes[1:], ("training", "inference"), strict=True):
        _networks(axis, rows, direction)
    path = folder / FIGURE
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _layers(axis: Axes, rows: Rows) -> None:
    """Time against MACs, both as shares of the dense limit: one colour and marker for each kind of layer."""
    shares = [entry for entry in layer_shares(rows) if entry[0]["variant"] not in (*DENSE, "lifting")]
    kinds = list(dict.fromkeys(row["variant"] for row, _, _ in shares))
    for kind, marker, color in zip(kinds, "o^svDP", sns.color_palette("colorblind"), strict=False):
        for direction in ("forward", "forward and backward"):
            wanted = kind, direction
            own = [(macs, share) for row, share, macs in shares if (row["variant"], row["direction"]) == wanted]
            filled = direction == "forward"
            face = color if filled else "none"
            label = kind if filled else None
            axis.plot(*zip(*own, strict=True), marker, color=color, mfc=face, ls="none", label=label)
    axis.plot([0.05, 1.2], [0.05, 1.2], color="0.4", lw=0.8, ls=":")
    axis.set(xscale="log", yscale="log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(FixedLocator(TICKS))
        scale.set_minor_locator(NullLocator())
        scale.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set(xlabel="MACs / those of the dense limit", ylabel="time / that of the dense limit", title="3x3 layers")
    title = "open: with backward"
    axis.legend(frameon=False, loc="lower right", title=title, fontsize="small", title_fontsize="small")


def _networks(axis: Axes, rows: Rows, direction: str) -> None:
    """Time of each network as a share of its dense limit, with quartiles: one bar for each variant."""
    ours, others = (sns.color_palette("colorblind")[number] for number in (0, 7))
    position = 0
    ticks: list[int] = []
    labels: list[str] = []
    for subject, batch in (("p4cnn", 128), ("p4m-resnet44", 32)):
        own = _variants(rows, [subject, direction, batch])
        limit = min((own[name]["median_ms"] for name in DENSE if name in own), default=None)
        if limit is None:
            continue
        for name in (name for name in SHOWN if name in own):
            low, high = (value / limit for value in own[name]["quartiles_ms"])
            share = own[name]["median_ms"] / limit
            color = ours if name.startswith("gconv") else others
            axis.barh(position, share, color=color, xerr=[[share - low], [high - share]], ecolor="0.3")
            ticks.append(position)
            labels.append(f"{subject}  {name}" if name == "gconv" else name)
            position += 1
        position += 1  # a gap between the networks
    axis.axvline(1, color="0.4", lw=0.8, ls=":")
    axis.set_yticks(ticks, labels, fontsize="small")
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set(xlabel="time / that of the dense limit", title=direction)


def _variants(rows: Rows, key: Sequence[object]) -> dict[str, dict[str, Any]]:
    """By variant the rows of this subject, direction and batch, from the first section that measured the limit too."""
    for (_, *own), variants in networks(rows).items():
        if own == key and any(name in variants for name in DENSE):
            return variants
    return {}
