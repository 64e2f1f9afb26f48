"""Convert and retrain against training from scratch: one size, one recipe, one number of epochs in all.

From the root of the repository: ``python -m benchmarks.retraining run`` does every run of ``RUNS`` that has no record
yet (so it can be stopped and continued; hours on two cores), and ``… table`` prints their
table. Each run trains a full P4CNN by the published recipe for half of its 50 epochs, converts it to 3,420
parameters, and retrains that by the same recipe for the other half; from scratch, the same size is trained for all 50
(``python -m gconv.experiments rotmnist``). With a weight of ``separability``, the full network is trained under the
penalty of :mod:`gconv.penalty`. All on the train and validation images, as nothing is chosen; test errors are read off
once per stage.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import gconv
from analysis import convert
from analysis.finetuning import Distillation, DistilledLoss
from gconv import experiments, tables
from gconv.files import atomic_path
from gconv.memory import reuse_freed_memory
from gconv.training import environment, evaluate, fit

RECORDS = Path(__file__).parent / "records" / "retraining"
WORK = Path("out") / "retraining"
DATA, FORM, EPOCHS = "rotmnist-regen", "gc_in", 25
WEIGHTS = (0.0, 0.1, 1.0)


@dataclass(frozen=True)
class Run:
    """One network: its seed, the weight of the penalty on the full network, and whether that teaches the small one."""

    seed: int
    separability: float = 0.0
    distilled: bool = False

    @property
    def path(self) -> Path:
        """Where its record lies."""
        taught = "_distilled" if self.distilled else ""
        return RECORDS / f"{FORM}_separability{self.separability:g}{taught}_seed{self.seed}.json"


RUNS = tuple(
    run
    for seed in range(3)
    for run in (*(Run(seed, weight) for weight in WEIGHTS), *(Run(seed, weight, True) for weight in (0.0,)))
)


def record(run: Run) -> dict[str, Any]:
    """Train the full network, or take it from an earlier run; convert, retrain, and score every stage."""
    data = gconv.load_dataset(DATA)
    images = data.train_and_validation
    recipe = replace(gconv.RECIPES["published"], epochs=EPOCHS, decay_epoch=round(0.8 * EPOCHS))
    full_recipe = replace(recipe, separability=run.separability, separability_form=FORM)
    kept = WORK / f"p4cnn_{EPOCHS}epochs_separability{run.separability:g}_seed{run.seed}.pt"
    if not kept.exists():
        torch.manual_seed(run.seed)
        network = gconv.create_model("p4cnn")
        history = fit(network, images, full_recipe, seed=run.seed, label="full network")
        gconv.save(network, kept, record={"history": history})
    source = gconv.read(kept)
    full = source.model.eval()
    small, report = convert(full, FORM, rank=1, data=images, test=data.test)
    stages = {"full": evaluate(full, data.test).error}
    stages |= {stage: report.accuracy[stage] for stage in ("converted", "batch_norm")}
    loss = DistilledLoss(small, full, [], Distillation()) if run.distilled else None
    # Another order of images than the full network saw.
    history = fit(small, images, recipe, seed=run.seed + 1000, loss=loss, label="retraining")
    stages["retrained"] = evaluate(small, data.test).error
    return {
        "run": asdict(run),
        "dataset": data.name,
        "dataset_sha256": data.sha256,
        "recipe": full_recipe.to_dict(),
        "parameters": gconv.cost(small, small.input_shape).parameters,
        "macs_executed": gconv.cost(small, small.input_shape).macs_executed,
        "test_error": stages,
        "history": {"full": source.record["history"], "retraining": history},
        "environment": environment(torch.device("cpu")),
    }


def table() -> str:
    """The runs over seeds, and training from scratch, as Markdown."""
    rows = []
    found = [json.loads(run.path.read_text(encoding="utf-8")) for run in RUNS if run.path.exists()]
    for distilled in (False, True):
        for weight in WEIGHTS:
            own = [r for r in found if (r["run"]["separability"], r["run"]["distilled"]) == (weight, distilled)]
            if not own:
                continue
            errors = {stage: [record["test_error"][stage] for record in own] for stage in own[0]["test_error"]}
            how = f"{EPOCHS} epochs in full, {EPOCHS} converted" + (
                ", with the full one as teacher" if distilled else ""
            )
            rows.append(
                {
                    "training": how,
                    "penalty": f"{weight:g}" if weight else "",
                    "parameters": f"{round(statistics.mean(record['parameters'] for record in own)):,}",
                    "seeds": str(len(own)),
                    "full network": tables.spread(errors["full"]),
                    "converted, batch norm re-estimated": tables.spread(errors["batch_norm"]),
                    "at the end": tables.spread(errors["retrained"]),
                }
            )
    scratch = [
        record
        for record in experiments.load_records(Path(__file__).parents[1] / experiments.FOLDER, DATA)
        if record["run"] == experiments.Run("gc-p4cnn-small", record["run"].seed, DATA)
    ]
    if scratch:
        rows.append(
            {
                "training": f"{2 * EPOCHS} epochs from scratch (gc)",
                "penalty": "",
                "parameters": f"{scratch[0]['parameters']:,}",
                "seeds": str(len(scratch)),
                "full network": "",
                "converted, batch norm re-estimated": "",
                "at the end": tables.spread([record["test_error"] for record in scratch]),
            }
        )
    return tables.as_markdown(rows)


def main(argv: list[str]) -> None:
    if argv[:1] == ["run"] and len(argv) == 1:
        reuse_freed_memory()
        for run in RUNS:
            if run.path.exists():
                continue
            document = record(run)
            with atomic_path(run.path) as path:
                path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            print(run.path.name, document["parameters"], document["test_error"], flush=True)
    elif argv == ["table"]:
        print(table())
    else:
        sys.exit("usage: python -m benchmarks.retraining run | table")


if __name__ == "__main__":
    main(sys.argv[1:])
