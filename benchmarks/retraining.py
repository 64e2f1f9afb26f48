"""Convert and retrain, compared with training from scratch: the same size, recipe and total number of epochs.

From the root of the repository: ``python -m benchmarks.retraining run`` does every run of ``RUNS`` that has no record
yet. It can be stopped and continued, and takes hours on two cores. ``python -m benchmarks.retraining table`` prints the
table. A run trains a full P4CNN by the published recipe for half of its 50 epochs, converts it to 3,420 parameters, and
retrains that network by the same recipe for the other half. From scratch, a network of the same form and size is
trained for all 50 epochs; one of the form ``gc``, which has the same size, comes from ``python -m gconv.experiments
rotmnist``. With a weight of ``separability``, the full network is trained under the penalty of
:mod:`gconv.training.regularization`. All runs train on the train and validation images, as nothing is chosen. The test
error is computed once for each stage.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

import gconv
from analysis import convert
from analysis.fitting.distillation import Distillation, DistilledLoss
from analysis.plots.training_curves import line_styles
from gconv.experiments import runs, tables
from gconv.training.device import environment
from gconv.training.evaluation import evaluate
from gconv.training.loop import fit

from .recording import command

PROG = "python -m benchmarks.retraining"
RECORDS = Path(__file__).parent / "records" / "retraining"
WORK = Path("out") / "retraining"
DATA, FORM, EPOCHS = "rotmnist-regen", "gc_in", 25
WEIGHTS = (0.0, 1.0, 0.1)
STAGES = ("full", "converted", "batch_norm", "retrained")


@dataclass(frozen=True)
class Run:
    """One network.

    Attributes:
        seed: of all random numbers.
        separability: the weight of the penalty on the full network.
        distilled: whether the full network is the teacher of the small one.
        scratch: whether the small network is trained for all epochs, without a full one.
    """

    seed: int
    separability: float = 0.0
    distilled: bool = False
    scratch: bool = False

    @property
    def path(self) -> Path:
        """The file of its record."""
        if self.scratch:
            return RECORDS / f"{FORM}_scratch_seed{self.seed}.json"
        taught = "_distilled" if self.distilled else ""
        return RECORDS / f"{FORM}_separability{self.separability:g}{taught}_seed{self.seed}.json"


RUNS = (
    *(
        run
        for some in ((0, 1), (2,))
        for run in (
            *(Run(seed) for seed in some),
            *(Run(seed, WEIGHTS[1]) for seed in some),
            *(Run(seed, distilled=True) for seed in some),
        )
    ),
    *(Run(seed, scratch=True) for seed in range(3)),
    *(Run(seed, WEIGHTS[1], distilled=True) for seed in range(3)),
    *(Run(seed, WEIGHTS[2]) for seed in range(3)),
)


def record(run: Run) -> dict[str, Any]:
    """Train the full network or take it from an earlier run, convert it, retrain it, and score it after each stage."""
    data = gconv.load_dataset(DATA)
    images = data.train_and_validation
    if run.scratch:
        recipe = replace(gconv.RECIPES["published"], epochs=2 * EPOCHS, decay_epoch=round(1.6 * EPOCHS))
        torch.manual_seed(run.seed)
        small = gconv.create_model("gc-p4cnn-small", separable=FORM)
        history = {"retraining": fit(small, images, recipe, seed=run.seed, label="from scratch")}
        return _described(run, data, recipe, small, {"retrained": evaluate(small, data.test).error}, history)
    recipe = replace(gconv.RECIPES["published"], epochs=EPOCHS, decay_epoch=round(0.8 * EPOCHS))
    full_recipe = replace(recipe, low_rank_penalty=run.separability, low_rank_form=FORM)
    kept = WORK / f"p4cnn_{EPOCHS}epochs_separability{run.separability:g}_seed{run.seed}.pt"
    if not kept.exists():
        torch.manual_seed(run.seed)
        network = gconv.create_model("p4cnn")
        epochs = fit(network, images, full_recipe, seed=run.seed, label="full network")
        gconv.save(network, kept, record={"history": epochs})
    source = gconv.read(kept)
    full = source.model.eval()
    small, report = convert(full, FORM, rank=1, data=images, test=data.test)
    stages = {"full": evaluate(full, data.test).error}
    stages |= {stage: report.accuracy[stage] for stage in ("converted", "batch_norm")}
    loss = DistilledLoss(small, full, [], Distillation()) if run.distilled else None
    # With another seed, the images come in another order than the full network saw them in.
    history = {
        "full": source.record["history"],
        "retraining": fit(small, images, recipe, seed=run.seed + 1000, loss=loss, label="retraining"),
    }
    stages["retrained"] = evaluate(small, data.test).error
    return _described(run, data, full_recipe, small, stages, history)


def _described(
    run: Run,
    data: gconv.Dataset,
    recipe: gconv.Recipe,
    small: gconv.Model,
    test_error: dict[str, float],
    history: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """The record of a run."""
    cost = gconv.cost(small, small.input_shape)
    return {
        "run": asdict(run),
        "dataset": data.name,
        "dataset_sha256": data.sha256,
        "recipe": recipe.to_dict(),
        "parameters": cost.parameters,
        "macs_executed": cost.macs_executed,
        "test_error": test_error,
        "history": history,
        "environment": environment(torch.device("cpu")),
    }


def load_records() -> list[dict[str, Any]]:
    """The records there are, in the order of :data:`RUNS`."""
    return [json.loads(run.path.read_text(encoding="utf-8")) for run in RUNS if run.path.exists()]


def scratch_records() -> list[dict[str, Any]]:
    """The records of training a network of this size from scratch by the published recipe."""
    records = runs.load_records(Path(__file__).parents[1] / "checkpoints" / "records", DATA)
    return [r for r in records if r["run"] == runs.Run("gc-p4cnn-small", r["run"].seed, DATA)]


def _place(record: dict[str, Any]) -> tuple[bool, bool]:
    """Its place in the table: converted networks first, and of these the ones with a teacher last."""
    return bool(record["run"].get("scratch")), record["run"]["distilled"]


def ways() -> dict[str, list[dict[str, Any]]]:
    """The records by the way the network was trained; each way has one record for each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(load_records(), key=_place):
        how = f"{EPOCHS} epochs in full, {EPOCHS} converted"
        if record["run"]["distilled"]:
            how += ", with the full one as teacher"
        if record["run"]["separability"]:
            how += f", penalty {record['run']['separability']:g}"
        if record["run"].get("scratch"):
            how = _from_scratch(FORM)
        found.setdefault(how, []).append(record)
    return found


def _from_scratch(form: str) -> str:
    return f"{2 * EPOCHS} epochs from scratch ({form})"


def table() -> str:
    """One row for each way, with means over seeds, as Markdown."""

    def row(how: str, own: list[dict[str, Any]], errors: dict[str, list[float]]) -> dict[str, str]:
        return {
            "training": how,
            "parameters": f"{round(statistics.mean(record['parameters'] for record in own)):,}",
            "seeds": str(len(own)),
            "full network": tables.spread(errors.get("full", [])),
            "converted, batch norm re-estimated": tables.spread(errors.get("batch_norm", [])),
            "at the end": tables.spread(errors["retrained"]),
        }

    rows = [
        row(how, own, {stage: [r["test_error"][stage] for r in own if stage in r["test_error"]] for stage in STAGES})
        for how, own in ways().items()
    ]
    if scratch := scratch_records():
        errors = {"retrained": [record["test_error"] for record in scratch]}
        rows.append(row(_from_scratch("gc"), scratch, errors))
    return tables.as_markdown(rows)


def plot() -> Figure:
    """Training error by epoch, and test error at the end: one colour for each way, one line for each seed."""
    with sns.axes_style("whitegrid"):
        figure, (curves, ends) = plt.subplots(
            1, 2, figsize=(11, 4), width_ratios=(3, 2), layout="constrained", gridspec_kw={"wspace": 0.05}
        )
    found = ways()
    shown = {how: [tuple(record["history"].values()) for record in own] for how, own in found.items()}
    ended = {how: [record["test_error"]["retrained"] for record in own] for how, own in found.items()}
    if scratch := scratch_records():
        how = _from_scratch("gc")
        shown[how] = [(record["history"],) for record in scratch]
        ended[how] = [record["test_error"] for record in scratch]
    for row, (how, style) in enumerate(zip(shown, line_styles(len(shown)), strict=True)):
        for number, parts in enumerate(shown[how]):
            errors = [entry["train_error"] for part in parts for entry in part]
            label = f"{row + 1}: {how} ({tables.seeds(found.get(how, scratch))})" if number == 0 else None
            curves.plot(
                range(1, len(errors) + 1), errors, lw=1, ms=4, alpha=0.8, markevery=(row, 6), label=label, **style
            )
        ends.plot(ended[how], [row] * len(ended[how]), alpha=0.8, **{**style, "ls": ""})
        ends.plot(statistics.mean(ended[how]), row, "|", color="0.2", ms=16)
    curves.axvline(EPOCHS + 0.5, color="0.4", ls=":")
    curves.set(xlabel="epoch", ylabel="training error (%)", ylim=(0, None))
    curves.set_yscale("symlog", linthresh=0.01)  # the error reaches zero, which a logarithmic scale cannot show
    curves.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    ends.set(
        yticks=range(len(shown)), yticklabels=range(1, len(shown) + 1), ylim=(len(shown) - 0.5, -0.5),
        xlabel="test error at the end (%)", ylabel="number in the legend",
    )  # fmt: skip
    ends.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return command(PROG, argv, runs=RUNS, record=record, shown="test_error", table=table)


if __name__ == "__main__":
    sys.exit(main())
