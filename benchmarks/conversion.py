"""Conversions compared at equal size: ours, plain SVD, Tucker-2 and CP of the expanded filters, training from scratch.

From the root of the repository: ``python -m benchmarks.conversion run`` does every run of
:mod:`benchmarks.conversion_runs` that has no record yet. It can be stopped and continued, and takes hours on two cores.
``python -m benchmarks.conversion table`` prints the table that the README and the notebook show.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, NullLocator

import gconv

from .conversion_runs import CHECKPOINTS, EPOCHS, HELD_OUT, P4M, RUNS, WIDE, load_records, record
from .recording import command

PROG = "python -m benchmarks.conversion"
SCRATCH = {
    "P4CNN": tuple(f"gc-p4cnn-small-rotmnist-regen-heldout-seed{seed}" for seed in range(3)),
    "P4CNN, w = 30": ("gc-p4cnn-rotmnist-regen-heldout",),
}
NETWORKS = dict.fromkeys(HELD_OUT, "P4CNN") | {WIDE: "P4CNN, w = 30", P4M: "P4M-CNN"}
METHODS = {"ours": "ours", "svd": "plain SVD, one rank", "tucker": "Tucker-2, expanded", "cp": "CP, expanded"}
ERRORS = ("original", "converted", "batch_norm", "finetuned")


@dataclass
class Row:
    """A line of the table: one method at one size, over the seeds that were run.

    Attributes:
        network: the name of the original, as the table shows it.
        data: the data set that errors are measured on.
        method: the name of the method, as the table shows it.
        parameters: number of parameters of the converted network, the mean over seeds.
        macs: multiply-accumulates for one image as executed, the mean over seeds.
        equivariance: the largest relative equivariance error of the converted networks in float64; None for networks
            that are trained from scratch.
        epochs: of fine-tuning, or of training from scratch; 0 for none.
        errors: test errors in per cent, one for each seed, by stage. A stage that was not run is missing.
    """

    network: str
    data: str
    method: str
    parameters: int
    macs: int
    equivariance: float | None
    epochs: int
    errors: dict[str, list[float]]


def rows() -> list[Row]:
    """One row for the records that differ only in the seed of the original; then those of training from scratch."""
    together: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for document in load_records():
        run = document["run"]
        key = (NETWORKS[run["checkpoint"]], run["method"], run["unit"], run["budget"], run["epochs"])
        together.setdefault(key, []).append(document)
    found = []
    for (network, method, *_, epochs), documents in together.items():
        kind, _, form = method.partition(" ")
        errors = {"original": [document["original"]["test_error"] for document in documents]}
        for stage in documents[0]["stages"]:
            errors[stage] = [document["stages"][stage]["test_error"] for document in documents]
        found.append(
            Row(
                network,
                documents[0]["dataset"],
                METHODS[kind] + (f", {form}" if form else ""),
                round(statistics.mean(document["parameters"] for document in documents)),
                round(statistics.mean(document["macs_executed"] for document in documents)),
                max(document["equivariance_error"] for document in documents),
                epochs,
                errors,
            )
        )
    return found + [_scratch(network, names) for network, names in SCRATCH.items()]


def _scratch(network: str, names: Sequence[str]) -> Row:
    """The row of the checkpoints that were trained from scratch at the size of the converted ones."""
    sources = [gconv.read(CHECKPOINTS / f"{name}.pt") for name in names]
    first = sources[0]
    counted = gconv.cost(first.model, first.model.input_shape, kernel="none")
    errors = {"finetuned": [source.record["test_error"] for source in sources]}
    epochs, method = first.record["recipe"]["epochs"], f"from scratch, {first.model.spec.separable}"
    return Row(
        network, first.record["dataset"], method, counted.parameters, counted.macs_executed, None, epochs, errors
    )


def table() -> str:
    """The rows as Markdown: by network, then from large to small, then by the error of the last stage."""
    lines = [
        "| network, data | method | parameters | MACs as executed, without the kernel | equivariance error | seeds "
        "| original | converted | batch norm | trained |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = list(dict.fromkeys(NETWORKS.values()))

    def place(row: Row) -> tuple[Any, ...]:
        # Sizes that differ by a few per cent come from one budget.
        return (
            order.index(row.network),
            -round(30 * math.log10(row.parameters)),
            statistics.mean(list(row.errors.values())[-1]),
        )

    for row in sorted(rows(), key=place):
        equivariance = "" if row.equivariance is None else f"{row.equivariance:.0e}"
        cells = [_cell(row.errors.get(stage)) for stage in ERRORS]
        cells[-1] += f" ({row.epochs} epochs)" if row.epochs else ""
        seeds = str(len(list(row.errors.values())[-1]))
        sizes = (f"{row.parameters:,}", f"{row.macs:,}", equivariance, seeds)
        lines.append(f"| {' | '.join((f'{row.network}, {row.data}', row.method, *sizes, *cells))} |")
    return "\n".join(lines)


def _cell(errors: list[float] | None) -> str:
    """The mean over seeds, with the standard deviation if there are several."""
    if errors is None:
        return ""
    spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{statistics.mean(errors):.2f}{spread} %"


PANELS = {"batch_norm": "batch norm re-estimated", "finetuned": f"fine-tuned for {EPOCHS} epochs, or from scratch"}
AXES = {"parameters": "parameters", "macs": "multiply-accumulates of an image, as executed"}


def plot(network: str, cost: str = "parameters") -> Figure:
    """Test error against size: one panel for each stage, one marker for each method and size.

    The marker is the mean over seeds, and the bar reaches from the smallest to the largest error.

    Args:
        network: one of the values of ``NETWORKS``.
        cost: ``parameters`` or ``macs``.
    """
    own = [row for row in rows() if row.network == network]
    names = list(dict.fromkeys(row.method.partition(",")[0] for row in own))
    colours = dict(zip(names, sns.color_palette("colorblind"), strict=False))
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 4.2), sharex=True, sharey=True, layout="constrained")
    for axis, (stage, title) in zip(axes, PANELS.items(), strict=True):
        axis.axhline(statistics.mean(own[0].errors["original"]), color="0.4", ls="--", lw=1, label="original")
        for number, (name, marker) in enumerate(zip(names, "osD^v", strict=False)):
            shown = [row for row in own if row.method.startswith(name) and stage in row.errors]
            sizes = [getattr(row, cost) for row in shown]
            errors = [statistics.mean(row.errors[stage]) for row in shown]
            ends = [
                (m - min(row.errors[stage]), max(row.errors[stage]) - m) for m, row in zip(errors, shown, strict=True)
            ]
            # Ours is the first. The others are hollow, so that equal results stay visible inside one another.
            look: dict[str, Any] = {"ms": 5, "zorder": 4} if number == 0 else {"ms": 9, "mfc": "none", "mew": 1.5}
            axis.errorbar(
                sizes, errors, np.transpose(ends) if ends else None, fmt=marker, color=colours[name], capsize=3, lw=1.2,
                label=name, **look,
            )  # fmt: skip
        axis.set(title=title, xlabel=AXES[cost])
        _logarithmic(axis)
    axes[0].set_ylabel("test error (%)")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _logarithmic(axis: Axes) -> None:
    """Both scales logarithmic, with ticks at round numbers."""
    axis.set(xscale="log", yscale="log")
    axis.margins(0.08)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_minor_locator(NullLocator())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return command(PROG, argv, runs=RUNS, record=record, shown="stages", table=table)


if __name__ == "__main__":
    sys.exit(main())
