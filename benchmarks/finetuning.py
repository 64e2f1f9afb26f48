"""Ways to bring the smallest network back to the error of its original: other recipes, and more epochs.

From the root of the repository: ``python -m benchmarks.finetuning run`` does every run of ``RUNS`` that has no record
yet. It can be stopped and continued; a run takes some minutes. ``python -m benchmarks.finetuning table`` prints the
table. In every run the P4CNN for rotmnist-regen is converted to the form ``gc_in`` at rank 1 (3,420 parameters) and
fine-tuned with the original network as teacher. Only the 2,000 validation images are scored, by the error, which is
coarse, and by the divergence of the class scores from the teacher's, which is finer. The test set is not used.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import nn

import gconv
from analysis import convert
from analysis.fitting.distillation import Distillation, DistilledLoss, finetuning_recipe
from gconv.experiments import tables
from gconv.training.datasets import Dataset
from gconv.training.device import environment
from gconv.training.evaluation import evaluate
from gconv.training.loop import fit

from .conversion_runs import CHECKPOINTS, EPOCHS, HELD_OUT, run_by_default
from .recording import command

PROG = "python -m benchmarks.finetuning"
RECORDS = Path(__file__).parent / "records" / "finetuning"
WORK = Path("out") / "finetuning"
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "averaged": ({"averaging": 0.995}, {}),
    "averaged, twice the rate": ({"averaging": 0.998, "learning_rate": 4e-2}, {}),
    "averaged, half the batch": ({"averaging": 0.99, "batch_size": 32}, {}),
    "averaged, teacher alone": ({"averaging": 0.995}, {"weight": 1.0, "temperature": 2.0}),
    "from gc": ({}, {}),
}
"""By the name of the way: what it changes in the recipe, and in the distillation."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning: the seed of the original, the name of the way in ``WAYS``, and the epochs."""

    seed: int
    way: str = "default"
    epochs: int = EPOCHS

    @property
    def path(self) -> Path:
        """The file of its record."""
        return RECORDS / f"{self.way.replace(',', '').replace(' ', '-')}_{self.epochs}epochs_seed{self.seed}.json"

    @property
    def form(self) -> str:
        """The form that the network is converted to, at rank 1."""
        return "gc" if self.way == "from gc" else "gc_in"


RUNS = (
    *(Run(seed, way) for way in ("default", "averaged") for seed in range(3)),
    *(Run(0, way) for way in WAYS if way not in ("default", "averaged")),
    *(Run(0, epochs=epochs) for epochs in (20, 5, 40)),
)


def record(run: Run) -> dict[str, Any]:
    """Fine-tune the converted network, and score it on the validation images before and after."""
    source = gconv.read(CHECKPOINTS / f"{HELD_OUT[run.seed]}.pt")
    teacher, data = source.model.eval(), gconv.load_dataset(source.record["dataset"])
    student = _converted(run, teacher, data)
    converted = _scores(student, teacher, data)
    changes, distilling = WAYS[run.way]
    recipe = replace(finetuning_recipe(run.epochs, len(data.train.labels)), **changes)
    distillation = Distillation(**distilling)
    with DistilledLoss(student, teacher, [], distillation) as loss:
        history = fit(student, data.train, recipe, seed=0, loss=loss, label=run.way)
    return {
        "run": asdict(run),
        "dataset": data.name,
        "dataset_sha256": data.sha256,
        "recipe": {**recipe.to_dict(), "distillation": asdict(distillation)},
        "parameters": gconv.cost(student, student.input_shape).parameters,
        "original": {"validation_error": evaluate(teacher, data.validation).error},
        "converted": converted,
        "finetuned": _scores(student, teacher, data),
        "history": history,
        "environment": environment(torch.device("cpu")),
    }


def _converted(run: Run, teacher: gconv.Model, data: Dataset) -> gconv.Model:
    """The network that fine-tuning starts from. It is converted once and kept, as several runs start from it."""
    kept = WORK / f"{run.form}_seed{run.seed}.pt"
    if not kept.exists():
        small, _ = convert(teacher, run.form, rank=1, data=data.train)
        gconv.save(small, kept)
    small = gconv.load(kept)
    run_by_default(small)
    return small


def _scores(student: nn.Module, teacher: nn.Module, data: Dataset) -> dict[str, float]:
    """Error in per cent, and the mean divergence ``KL(teacher || student)`` of the class scores in nats."""
    student.eval()
    with torch.inference_mode():
        got, expected = (
            torch.cat([F.log_softmax(network(images), 1) for images in data.validation.images.split(500)])
            for network in (student, teacher)
        )
    divergence = F.kl_div(got, expected, log_target=True, reduction="batchmean")
    return {"validation_error": evaluate(student, data.validation).error, "divergence": float(divergence)}


def load_records() -> list[dict[str, Any]]:
    """The records there are, in the order of :data:`RUNS`."""
    return [json.loads(run.path.read_text(encoding="utf-8")) for run in RUNS if run.path.exists()]


def table() -> str:
    """One line for each run, ordered by way, epochs and seed, as Markdown."""
    ways = list(WAYS)
    records = sorted(load_records(), key=lambda r: (ways.index(r["run"]["way"]), r["run"]["epochs"], r["run"]["seed"]))
    return tables.as_markdown(
        [
            {
                "fine-tuning": record["run"]["way"],
                "epochs": str(record["run"]["epochs"]),
                "seed": str(record["run"]["seed"]),
                "original": f"{record['original']['validation_error']:.2f} %",
                "as converted": f"{record['converted']['validation_error']:.2f} %",
                "fine-tuned": f"{record['finetuned']['validation_error']:.2f} %",
                "divergence": f"{record['finetuned']['divergence']:.4f}",
                "training error, last epoch": f"{record['history'][-1]['train_error']:.2f} %",
            }
            for record in records
        ]
    )


def plot() -> Figure:
    """Validation error and divergence of the default way against epochs, beside the error of the original."""
    records = [r for r in load_records() if r["run"]["way"] == "default" and r["run"]["seed"] == 0]
    records.sort(key=lambda r: r["run"]["epochs"])
    epochs = [record["run"]["epochs"] for record in records]
    colour = sns.color_palette("colorblind")[0]
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    shown = {"validation_error": "validation error (%)", "divergence": "divergence from the original (nats)"}
    for axis, (key, name) in zip(axes, shown.items(), strict=True):
        values = [record["finetuned"][key] for record in records]
        axis.plot(epochs, values, "o-", color=colour, label="3,420 parameters")
        axis.set(xscale="log", xlabel="epochs of fine-tuning", ylabel=name, xticks=epochs, xticklabels=epochs)
        axis.xaxis.set_minor_locator(NullLocator())
    original = [record["original"]["validation_error"] for record in records[:1]]
    axes[0].axhline(*original, color="0.4", ls="--", lw=1, label="original")
    axes[0].legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return command(PROG, argv, runs=RUNS, record=record, shown="finetuned", table=table)


if __name__ == "__main__":
    sys.exit(main())
