"""Conversions compared at equal size: ours, plain SVD, Tucker-2 and CP of the expanded filters, training from scratch.

From the root of the repository: ``python -m benchmarks.conversion run`` does every run of ``RUNS`` that has no record
yet (so it can be stopped and continued; hours on two cores), and ``… table`` prints the tables of README.md and of the
notebook. Runs on rotmnist-regen need that data set. Every choice (options, budgets, the fine-tuning's recipe) was made
on training and validation images; the test error is read off once per stage and record.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, NullLocator
from torch import nn

import gconv
from analysis import convert
from analysis.fitting.bn_recalibration import reestimate_batchnorm
from analysis.fitting.distillation import finetune
from gconv.system.files import atomic_path
from gconv.training.datasets import Dataset, Split, load_dataset
from gconv.training.evaluation import evaluate
from gconv.training.loop import environment

from .records import command

PROG = "python -m benchmarks.conversion"
RECORDS = Path(__file__).parent / "records" / "conversion"
CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
HELD_OUT = tuple(f"p4cnn-rotmnist-regen-heldout-seed{seed}" for seed in range(3))
WIDE = "p4cnn-w30-rotmnist-regen"
P4M = "p4m-cnn-rotdigits"
SCRATCH = {
    "P4CNN": tuple(f"gc-p4cnn-small-rotmnist-regen-heldout-seed{seed}" for seed in range(3)),
    "P4CNN, w = 30": ("gc-p4cnn-rotmnist-regen-heldout",),
}
EPOCHS = 10


@dataclass(frozen=True)
class Run:
    """One conversion: a checkpoint, a method, a budget, and fine-tuning.

    Methods: ``ours``, with any form where none is named; ``svd`` and a form, plain SVD at one rank for all layers;
    ``tucker`` and ``cp`` of the expanded filters. Units: ``params`` and ``macs``, fraction or absolute; ``rank``.
    """

    checkpoint: str
    method: str
    unit: str
    budget: float
    epochs: int = 0

    @property
    def path(self) -> Path:
        """Where its record lies."""
        budget = f"{self.budget:g}" if self.budget < 1 else f"{int(self.budget)}"
        parts = (self.checkpoint, self.method.replace(" ", "-"), self.unit, budget, f"{self.epochs}epochs")
        return RECORDS / ("_".join(parts) + ".json")


RUNS = (
    *(Run(name, "ours gc_in", "rank", 1, EPOCHS) for name in HELD_OUT),  # 3,420 parameters: no smaller ones exist
    *(Run(name, "ours", "params", 8910, EPOCHS) for name in HELD_OUT),
    Run(WIDE, "ours gc_in", "rank", 1, EPOCHS),  # 24,640 parameters and 13.0 M MACs
    *(Run(name, "ours", "params", budget) for name in HELD_OUT for budget in (0.28, 0.45)),
    Run(HELD_OUT[0], "ours", "params", 0.28, EPOCHS),  # the size of plain SVD gc at rank 2
    *(Run(HELD_OUT[0], method, "params", 3420, EPOCHS) for method in ("svd gc", "tucker", "cp")),
    *(Run(HELD_OUT[0], method, "params", 8910, EPOCHS) for method in ("svd g", "svd gc", "tucker", "cp")),
    *(Run(P4M, method, "params", b, EPOCHS) for b in (0.15, 0.4) for method in ("ours", "svd gc", "tucker", "cp")),
    *(Run(HELD_OUT[0], method, "params", b) for b in (0.28, 0.45) for method in ("svd gc", "tucker", "cp")),
    *(Run(HELD_OUT[0], m, "macs", 0.3, EPOCHS) for m in ("ours", "svd gc", "tucker", "cp")),
    *(Run(HELD_OUT[0], m, "macs", 0.19) for m in ("ours", "svd gc", "tucker", "cp")),
    *(Run(WIDE, method, "params", 24640) for method in ("svd gc", "tucker", "cp")),
)


def record(run: Run) -> dict[str, Any]:
    """Convert, re-estimate batch norm, fine-tune, and score every stage."""
    source = gconv.read(CHECKPOINTS / f"{run.checkpoint}.pt")
    original = source.model
    data = load_dataset(source.record["dataset"])
    # A network that saw the validation part in training learns from it again; then nothing may be read off it.
    everything = source.record["trained_on"] == "train and validation"
    train = data.train_and_validation if everything else data.train
    began = time.perf_counter()
    network, stages, layers = _converted(run, original, data, everything)
    seconds = {"conversion": time.perf_counter() - began}
    recipe: dict[str, Any] | None = None
    if run.epochs:
        began = time.perf_counter()
        recipe = finetune(network, original, [], train, epochs=run.epochs, seed=0)
        stages["finetuned"] = _scores(network.eval(), data.test, None if everything else data.validation)
        seconds["finetuning"] = time.perf_counter() - began
    counted = gconv.cost(network, original.input_shape)
    one = data.test.images[:1].double()
    return {
        "run": asdict(run),
        "dataset": data.name,
        "dataset_sha256": data.sha256,
        "trained_on": source.record["trained_on"],
        "original": {
            "parameters": gconv.cost(original, original.input_shape).parameters,
            "macs_executed": gconv.cost(original, original.input_shape).macs_executed,
            "test_error": source.record["test_error"],
            "validation_error": None if everything else evaluate(original, data.validation).error,
            "recipe": source.record["recipe"],
            "seed": source.record["seed"],
        },
        "parameters": counted.parameters,
        "macs_published": counted.macs_published,
        "macs_executed": counted.macs_executed,
        "equivariance_error": gconv.equivariance_error(copy.deepcopy(network).double(), original.spec.group, one).max,
        "equivariance_error_float32": gconv.equivariance_error(network, original.spec.group, one.float()).max,
        "stages": stages,
        "layers": layers,
        "finetuning": recipe,
        "seconds": seconds,
        "environment": environment(torch.device("cpu")),
    }


Stages = dict[str, dict[str, float]]


def _converted(
    run: Run, original: nn.Module, data: Dataset, everything: bool
) -> tuple[nn.Module, Stages, list[dict[str, Any]]]:
    """The network with batch norm re-estimated, its scores before and after that, and what each layer became."""
    train, validation = (data.train_and_validation, None) if everything else (data.train, data.validation)
    if run.method in ("tucker", "cp"):
        network = _decomposed(run, original)
        stages = {"converted": _scores(network, data.test, validation)}
        reestimate_batchnorm(network, train.images)
        stages["batch_norm"] = _scores(network, data.test, validation)
        return network, stages, []
    ours, _, form = run.method.partition(" ")
    table = RECORDS / f"sensitivity_{run.checkpoint}.json"
    known = json.loads(table.read_text(encoding="utf-8")) if table.exists() and ours == "ours" else None
    network, report = convert(
        original,
        form or "auto",
        **{run.unit: int(run.budget) if run.budget >= 1 else run.budget},  # type: ignore[arg-type]
        allocation="auto" if ours == "ours" else "uniform",
        minimise="auto" if ours == "ours" else "weights",
        data=train,
        validation=validation,
        test=data.test,
        sensitivity=known,
    )
    if ours == "ours" and report.sensitivity is not None and known is None:
        with atomic_path(table) as path:
            path.write_text(json.dumps(report.sensitivity) + "\n", encoding="utf-8")
    if run.unit != "macs":  # under which layers run as they were counted
        for layer in network.modules():  # not by measured time: a record should not depend on it
            if isinstance(layer, gconv.SeparableGConv2d):
                layer.execution = layer.form.default_execution
    stages = {stage: {"test_error": report.accuracy[stage]} for stage in ("converted", "batch_norm")}
    if validation is not None:
        for stage, errors in stages.items():
            errors["validation_error"] = report.accuracy["validation"][stage]
    return network, stages, [{"name": row.name, "form": row.form, "rank": row.rank} for row in report.layers]


def _decomposed(run: Run, original: nn.Module) -> nn.Module:
    from .tensor_baselines import at_macs, at_parameters  # needs tensorly, which reading records does not

    by: Callable[..., nn.Module] = at_parameters if run.unit == "params" else at_macs
    target = run.budget
    if target < 1:
        whole = gconv.cost(original, original.input_shape)
        target *= whole.parameters if run.unit == "params" else whole.macs_executed
    return by(original, "tucker2" if run.method == "tucker" else "cp", int(target))


def _scores(network: nn.Module, test: Split, validation: Split | None) -> dict[str, float]:
    scores = {"test_error": evaluate(network, test).error}
    if validation is not None:
        scores["validation_error"] = evaluate(network, validation).error
    return scores


NETWORKS = dict.fromkeys(HELD_OUT, "P4CNN") | {WIDE: "P4CNN, w = 30", P4M: "P4M-CNN"}
METHODS = {"ours": "ours", "svd": "plain SVD, one rank", "tucker": "Tucker-2, expanded", "cp": "CP, expanded"}
ERRORS = ("original", "converted", "batch_norm", "finetuned")


@dataclass
class Row:
    """A line of the table: one method at one size, over the seeds that were run.

    Attributes:
        network: the original, in words.
        data: the data set that errors are measured on.
        method: in words.
        parameters: of the converted network, the mean over seeds.
        macs: multiply-accumulates of an image as executed, likewise.
        equivariance: largest relative error of the converted networks in float64; None if not converted.
        epochs: of fine-tuning, or of training from scratch; 0 for none.
        errors: test errors in per cent, of each seed; by stage, where there is one.
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
    """The records, those that differ in the seed of the original only taken together; and training from scratch."""
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
    sources = [gconv.read(CHECKPOINTS / f"{name}.pt") for name in names]
    first = sources[0]
    counted = gconv.cost(first.model, first.model.input_shape)
    errors = {"finetuned": [source.record["test_error"] for source in sources]}
    epochs, method = first.record["recipe"]["epochs"], f"from scratch, {first.model.spec.separable}"
    return Row(
        network, first.record["dataset"], method, counted.parameters, counted.macs_executed, None, epochs, errors
    )


def table() -> str:
    """The rows as Markdown: by network, the largest first, those of one size by their last error."""
    lines = [
        "| network, data | method | parameters | MACs as executed | equivariance error | seeds "
        "| original | converted | batch norm | trained |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    order = list(dict.fromkeys(NETWORKS.values()))

    def place(row: Row) -> tuple[Any, ...]:
        # Sizes within a few per cent are one budget.
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
    if errors is None:
        return ""
    spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{statistics.mean(errors):.2f}{spread} %"


PANELS = {"batch_norm": "batch norm re-estimated", "finetuned": f"fine-tuned for {EPOCHS} epochs, or from scratch"}


def plot(network: str, cost: str = "parameters") -> Figure:
    """Test error against size: one panel for each stage, one mark for each method and size.

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
        for name, marker in zip(names, "osD^v", strict=False):
            shown = [row for row in own if row.method.startswith(name) and stage in row.errors]
            sizes = [getattr(row, cost) for row in shown]
            axis.plot(
                sizes, [statistics.mean(row.errors[stage]) for row in shown], marker, ms=7, alpha=0.85,
                color=colours[name], label=name,
            )  # fmt: skip
        axis.set(xscale="log", yscale="log", title=title, xlabel=AXES[cost])
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.margins(0.08)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes[0].set_ylabel("test error (%)")
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


AXES = {"parameters": "parameters", "macs": "multiply-accumulates of an image, as executed"}


def load_records() -> list[dict[str, Any]]:
    """All records, in the order of ``RUNS``."""
    return [json.loads(run.path.read_text(encoding="utf-8")) for run in RUNS if run.path.exists()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return command(PROG, argv, runs=RUNS, record=record, shown="stages", table=table)


if __name__ == "__main__":
    sys.exit(main())
