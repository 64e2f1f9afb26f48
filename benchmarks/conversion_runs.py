"""The conversions that are compared at equal size: what each run does, and where its record lies.

``python -m benchmarks.conversion run`` does every run of ``RUNS`` that has no record yet. Runs on rotmnist-regen need
that data set. Every choice (options, budgets, the recipe of fine-tuning) was made on training and validation images.
The test error is computed once for each stage and record.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gconv
from analysis import convert
from analysis.fitting.bn_recalibration import reestimate_batchnorm
from analysis.fitting.distillation import finetune
from gconv.system.files import atomic_path
from gconv.training.datasets import Dataset, Split, load_dataset
from gconv.training.device import environment
from gconv.training.evaluation import evaluate

RECORDS = Path(__file__).parent / "records" / "conversion"
CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
HELD_OUT = tuple(f"p4cnn-rotmnist-regen-heldout-seed{seed}" for seed in range(3))
WIDE = "p4cnn-w30-rotmnist-regen"
P4M = "p4m-cnn-rotdigits"
EPOCHS = 10

Stages = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Run:
    """One conversion: a checkpoint, a method, a budget, and fine-tuning.

    Attributes:
        checkpoint: the original network, by the name of its file in ``checkpoints/``.
        method: ``ours``, with a form or with any; ``svd`` and a form, which is plain SVD at one rank for all layers;
            ``tucker`` or ``cp``, which decompose the expanded filters.
        unit: what the budget counts: ``params``, ``macs`` or ``rank``.
        budget: a number, or a fraction below 1 of the original's.
        epochs: of fine-tuning.
    """

    checkpoint: str
    method: str
    unit: str
    budget: float
    epochs: int = 0

    @property
    def path(self) -> Path:
        """The file of its record."""
        budget = f"{self.budget:g}" if self.budget < 1 else f"{int(self.budget)}"
        parts = (self.checkpoint, self.method.replace(" ", "-"), self.unit, budget, f"{self.epochs}epochs")
        return RECORDS / ("_".join(parts) + ".json")


RUNS = (
    *(Run(name, "ours gc_in", "rank", 1, EPOCHS) for name in HELD_OUT),  # 3,420 parameters, the fewest there can be
    *(Run(name, "ours", "params", 8910, EPOCHS) for name in HELD_OUT),
    Run(WIDE, "ours gc_in", "rank", 1, EPOCHS),  # 24,640 parameters and 13.0 M MACs
    *(Run(name, "ours", "params", budget) for name in HELD_OUT for budget in (0.28, 0.45)),
    Run(HELD_OUT[0], "ours", "params", 0.28, EPOCHS),  # the size that plain SVD has in the form gc at rank 2
    *(Run(HELD_OUT[0], method, "params", 3420, EPOCHS) for method in ("svd gc", "tucker", "cp")),
    *(Run(HELD_OUT[0], method, "params", 8910, EPOCHS) for method in ("svd g", "svd gc", "tucker", "cp")),
    *(Run(P4M, method, "params", b, EPOCHS) for b in (0.15, 0.4) for method in ("ours", "svd gc", "tucker", "cp")),
    *(Run(HELD_OUT[0], method, "params", b) for b in (0.28, 0.45) for method in ("svd gc", "tucker", "cp")),
    *(Run(HELD_OUT[0], m, "macs", 0.3, EPOCHS) for m in ("ours", "svd gc", "tucker", "cp")),
    *(Run(HELD_OUT[0], m, "macs", 0.19) for m in ("ours", "svd gc", "tucker", "cp")),
    *(Run(WIDE, method, "params", 24640) for method in ("svd gc", "tucker", "cp")),
)


def record(run: Run) -> dict[str, Any]:
    """Convert, re-estimate batch norm, fine-tune, and score the network after each of these stages."""
    source = gconv.read(CHECKPOINTS / f"{run.checkpoint}.pt")
    original = source.model
    data = load_dataset(source.record["dataset"])
    # A network that was trained on the validation images too is fine-tuned on them again: they then say nothing.
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


def _converted(
    run: Run, original: gconv.Model, data: Dataset, everything: bool
) -> tuple[nn.Module, Stages, list[dict[str, Any]]]:
    """The converted network, its scores before and after batch norm is re-estimated, and each layer's form and rank."""
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
    if run.unit != "macs":  # a budget of MACs has chosen how each layer runs
        run_by_default(network)
    stages = {stage: {"test_error": report.accuracy[stage]} for stage in ("converted", "batch_norm")}
    if validation is not None:
        for stage, errors in stages.items():
            errors["validation_error"] = report.accuracy["validation"][stage]
    return network, stages, [{"name": row.name, "form": row.form, "rank": row.rank} for row in report.layers]


def run_by_default(network: nn.Module) -> None:
    """Let every separable layer run as its form does by default: a record must not depend on measured times."""
    for layer in network.modules():
        if isinstance(layer, gconv.SeparableGConv2d):
            layer.execution = layer.form.default_execution


def _decomposed(run: Run, original: gconv.Model) -> nn.Module:
    """The network with its expanded filters decomposed by Tucker-2 or CP."""
    from .tensor_baselines import at_macs, at_parameters  # here, as it needs tensorly and reading records does not

    by: Callable[..., nn.Module] = at_parameters if run.unit == "params" else at_macs
    target = run.budget
    if target < 1:
        whole = gconv.cost(original, original.input_shape)
        target *= whole.parameters if run.unit == "params" else whole.macs_executed
    return by(original, "tucker2" if run.method == "tucker" else "cp", int(target))


def _scores(network: nn.Module, test: Split, validation: Split | None) -> dict[str, float]:
    """Errors in per cent."""
    scores = {"test_error": evaluate(network, test).error}
    if validation is not None:
        scores["validation_error"] = evaluate(network, validation).error
    return scores


def load_records() -> list[dict[str, Any]]:
    """All records, in the order of ``RUNS``."""
    return [json.loads(run.path.read_text(encoding="utf-8")) for run in RUNS if run.path.exists()]
