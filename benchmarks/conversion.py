"""Conversions compared at equal size: ours, plain SVD, Tucker-2 and CP of the expanded filters, training from scratch.

From the root of the repository: ``python -m benchmarks.conversion run`` does every run of ``RUNS`` that has no record
yet (so it can be stopped and continued; hours on two cores), and ``… table`` prints the tables of README.md and of the
notebook. Runs on rotmnist-regen need that data set. Every choice (options, budgets, the fine-tuning's recipe) was made
on training and validation images; the test error is read off once per stage and record.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gconv
from analysis import convert
from analysis.batchnorm import reestimate_batchnorm
from analysis.finetuning import finetune
from gconv.data import Dataset, load_dataset
from gconv.files import atomic_path
from gconv.training import environment, evaluate

from .tensor_baselines import at_macs, at_parameters

RECORDS = Path(__file__).parent / "records" / "conversion"
CHECKPOINTS = Path("checkpoints")
HELD_OUT = tuple(f"p4cnn-rotmnist-regen-heldout-seed{seed}" for seed in range(3))
WIDE = "p4cnn-w30-rotmnist-regen"
P4M = "p4m-cnn-rotdigits"
SCRATCH = (*(f"gc-p4cnn-small-rotmnist-regen-seed{seed}" for seed in range(2)), "gc-p4cnn-rotmnist-regen")
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
    *(Run(name, "ours", "params", budget) for name in HELD_OUT for budget in (0.28, 0.45)),
    Run(WIDE, "ours gc_in", "rank", 1, EPOCHS),  # 24,640 parameters and 13.0 M MACs
    *(Run(HELD_OUT[0], "svd gc", "params", budget) for budget in (0.28, 0.45)),
    *(Run(HELD_OUT[0], method, "params", 3420, EPOCHS) for method in ("svd gc", "tucker", "cp")),
    *(Run(HELD_OUT[0], method, "params", 8910, EPOCHS) for method in ("svd g", "svd gc", "tucker", "cp")),
    *(Run(HELD_OUT[0], method, "params", b) for b in (0.28, 0.45) for method in ("tucker", "cp")),
    *(Run(HELD_OUT[0], method, "macs", b) for b in (0.15, 0.3) for method in ("ours", "svd gc", "tucker", "cp")),
    *(Run(P4M, method, "params", b, EPOCHS) for b in (0.15, 0.4) for method in ("ours", "svd gc", "tucker", "cp")),
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
    network, layers = _converted(run, original, data, everything)
    reestimate_batchnorm(network, train.images)
    stages = {"converted": _scores(network, data)}
    seconds = {"conversion": time.perf_counter() - began}
    recipe: dict[str, Any] | None = None
    if run.epochs:
        began = time.perf_counter()
        recipe = finetune(network, original, [], train, epochs=run.epochs, seed=0)
        stages["finetuned"] = _scores(network.eval(), data)
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
            "validation_error": evaluate(original, data.validation).error,
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


def _converted(
    run: Run, original: nn.Module, data: Dataset, everything: bool
) -> tuple[nn.Module, list[dict[str, Any]]]:
    if run.method in ("tucker", "cp"):
        by: Callable[..., nn.Module] = at_parameters if run.unit == "params" else at_macs
        target = run.budget
        if target < 1:
            whole = gconv.cost(original, original.input_shape)
            target *= whole.parameters if run.unit == "params" else whole.macs_executed
        return by(original, "tucker2" if run.method == "tucker" else "cp", int(target)), []
    budget: dict[str, Any] = {run.unit: int(run.budget) if run.budget >= 1 else run.budget}
    form = run.method.partition(" ")[2] or "auto"
    if run.method.startswith("ours"):
        train = data.train_and_validation if everything else data.train
        table = RECORDS / f"sensitivity_{run.checkpoint}.json"
        known = json.loads(table.read_text(encoding="utf-8")) if table.exists() else None
        network, report = convert(
            original,
            form,
            data=train,
            validation=None if everything else data.validation,
            sensitivity=known,
            **budget,
        )
        if report.sensitivity is not None and known is None:
            with atomic_path(table) as path:
                path.write_text(json.dumps(report.sensitivity) + "\n", encoding="utf-8")
    else:
        network, report = convert(original, form, allocation="uniform", **budget)
    for layer in network.modules():  # not by measured time: a record should not depend on it
        if isinstance(layer, gconv.SeparableGConv2d):
            layer.execution = layer.form.default_execution
    return network, [{"name": row.name, "form": row.form, "rank": row.rank} for row in report.layers]


def _scores(network: nn.Module, data: Dataset) -> dict[str, float]:
    validation, test = evaluate(network, data.validation), evaluate(network, data.test)
    return {"validation_error": validation.error, "test_error": test.error}


def rows() -> list[dict[str, Any]]:
    """One row for each record, and one for each network trained from scratch at the size of a converted one.

    Errors are on test images, in per cent; ``epochs`` are those of fine-tuning or of training from scratch.
    """
    found = []
    for document in load_records():
        run, stages, original = document["run"], document["stages"], document["original"]
        found.append(
            {
                "network": run["checkpoint"],
                "data": document["dataset"],
                "method": run["method"],
                "parameters": document["parameters"],
                "macs": document["macs_executed"],
                "equivariance": document["equivariance_error"],
                "original": original["test_error"],
                "share": document["parameters"] / original["parameters"],
                "converted": stages["converted"]["test_error"],
                "epochs": run["epochs"] or None,
                "finetuned": stages.get("finetuned", {}).get("test_error"),
            }
        )
    for name in SCRATCH:
        path = CHECKPOINTS / f"{name}.pt"
        if path.exists():
            source = gconv.read(path)
            counted = gconv.cost(source.model, source.model.input_shape)
            found.append(
                {
                    "network": name,
                    "data": source.record["dataset"],
                    "method": "from scratch",
                    "parameters": counted.parameters,
                    "macs": counted.macs_executed,
                    "equivariance": None,
                    "original": None,
                    "share": None,
                    "converted": None,
                    "epochs": source.record["recipe"]["epochs"],
                    "finetuned": source.record["test_error"],
                }
            )
    return found


def table() -> str:
    """The rows as Markdown, smallest networks last; equal sizes stand together."""
    lines = [
        "| network | method | parameters | MACs as executed | equivariance error | original | converted | trained |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows(), key=lambda row: (row["data"] == "rotdigits", -round(row["parameters"], -3))):
        equivariance = "" if row["equivariance"] is None else f"{row['equivariance']:.0e}"
        errors = ["" if row[key] is None else f"{row[key]:.2f} %" for key in ("original", "converted", "finetuned")]
        if row["epochs"] is not None:
            errors[-1] += f" ({row['epochs']} epochs)"
        sizes = (f"{row['parameters']:,}", f"{row['macs']:,}", equivariance)
        lines.append(f"| {' | '.join((row['network'], row['method'], *sizes, *errors))} |")
    return "\n".join(lines)


def load_records() -> list[dict[str, Any]]:
    """All records, in the order of ``RUNS``."""
    return [json.loads(run.path.read_text(encoding="utf-8")) for run in RUNS if run.path.exists()]


def main(argv: list[str]) -> None:
    if argv[:1] == ["run"]:
        RECORDS.mkdir(parents=True, exist_ok=True)
        for run in RUNS:
            if run.path.exists() or (argv[1:] and argv[1] not in run.path.name):
                continue
            document = record(run)
            with atomic_path(run.path) as path:
                path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            print(run.path.name, document["parameters"], document["stages"], flush=True)
    elif argv == ["table"]:
        print(table())
    else:
        sys.exit("usage: python -m benchmarks.conversion run [PART OF A NAME] | table")


if __name__ == "__main__":
    main(sys.argv[1:])
