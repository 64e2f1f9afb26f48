"""How a training run of an experiment is done and recorded. PyTorch is imported with this module."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gconv.models.checkpoint import read, save
from gconv.models.cost import cost
from gconv.models.memory import training_memory
from gconv.models.networks import Model
from gconv.models.zoo import create_model
from gconv.system.errors import InputError, one_of
from gconv.system.files import atomic_path
from gconv.training.datasets import Dataset, Split, load_dataset
from gconv.training.device import environment
from gconv.training.evaluation import evaluate
from gconv.training.loop import fit
from gconv.training.recipe import RECIPES, Recipe
from gconv.training.steps import State, steps_of_epoch

from .runs import Run, record_path


def perform(run: Run, records: Path, work: Path, device: str) -> str:
    """Train, or continue to train, score, and write the record.

    Args:
        run: what to do.
        records: the folder of all records.
        work: the folder of all networks.
        device: ``cpu`` or ``cuda``.

    Returns:
        The result in one line.

    Raises:
        InputError: the run cannot be done, or its network is there and belongs to another run.
        KeyboardInterrupt: SIGINT or SIGTERM came; the network and the state of its training are saved.
    """
    job = _prepare(run, work, device)
    job.train()
    began = time.perf_counter()
    job.score()
    testing = time.perf_counter() - began
    job.save(snapshots=[])
    return _write_record(job, record_path(run, records), testing)


@dataclass
class _Job:
    """A run with everything that it needs."""

    run: Run
    data: Dataset
    split: Split
    recipe: Recipe
    model: Model
    path: Path
    facts: dict[str, Any]
    history: list[dict[str, Any]]
    resume: State | None = None

    def save(self, state: State | None = None, **more: Any) -> None:
        save(self.model, self.path, record={**self.facts, **more, "history": self.history}, resume=state)

    def train(self) -> None:
        if len(self.history) == self.recipe.epochs:
            return
        fit(
            self.model,
            self.split,
            self.recipe,
            seed=self.run.seed,
            validation=self.data.validation if self.run.held_out else None,
            resume=self.resume,
            after_epoch=self._after_epoch,
            on_stop=self.save,
            label=None,
        )

    def _after_epoch(self, row: dict[str, Any], state: State) -> None:
        self.history.append(row)
        self.save(state)

    def score(self) -> None:
        if self.run.held_out:
            self.facts["validation_error"] = evaluate(self.model, self.data.validation).error
        else:
            test = evaluate(self.model, self.data.test)
            self.facts |= {"test_error": test.error, "test_loss": test.loss, "test_images": test.images}


def _prepare(run: Run, work: Path, device: str) -> _Job:
    data = load_dataset(run.data, progress=False)
    split = data.train if run.held_out else data.train_and_validation
    if run.images is not None:
        split = Split(*(part[: run.images] for part in split))
    recipe = recipe_of(run, len(split.labels))
    path = work / run.data / f"{run.name}.pt"
    history: list[dict[str, Any]] = []
    resume = None
    if path.exists():
        kept = read(path)
        if kept.record.get("dataset_sha256") != data.sha256 or _recipe_in(kept.record) != recipe:
            raise InputError(f"{path} is of other data or of another recipe; remove it, or give another --work")
        model, history, resume = kept.model, kept.record["history"], kept.resume
    else:
        torch.manual_seed(run.seed)
        model = create_model(run.model)
    facts: dict[str, Any] = {
        "dataset": data.name,
        "dataset_description": data.description,
        "dataset_sha256": data.sha256,
        "trained_on": "train" if run.held_out else "train and validation",
        "train_images": len(split.labels),
        "seed": run.seed,
        "recipe": recipe.to_dict(),
        "environment": environment(torch.device(device)),
    }
    return _Job(run, data, split, recipe, model.to(device), path, facts, history, resume)


def _recipe_in(record: dict[str, Any]) -> Recipe | None:
    return Recipe.from_dict(record["recipe"]) if isinstance(record.get("recipe"), dict) else None


def _write_record(job: _Job, path: Path, testing: float) -> str:
    counted = cost(job.model, job.model.input_shape)
    device = next(job.model.parameters()).device
    training = sum(row["seconds"] for row in job.history)
    record = job.facts | {
        "run": asdict(job.run),
        "steps": job.recipe.epochs * steps_of_epoch(len(job.split.labels), job.recipe.batch_size),
        "parameters": counted.parameters,
        "macs_published": counted.macs_published,
        "macs_executed": counted.macs_executed,
        "training_memory_batch_2": training_memory(job.model, job.data.train.images[:2].to(device)),
        "seconds": {"training": round(training, 1), "testing": round(testing, 1)},
        "history": job.history,
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    what = "validation" if job.run.held_out else "test"
    return f"{what} error {record[f'{what}_error']:.2f} % after {job.recipe.epochs} epochs"


def recipe_of(run: Run, images: int) -> Recipe:
    """The recipe of a run on that many images. Its batch is not larger than the set.

    Raises:
        InputError: an unknown recipe.
    """
    if run.recipe not in RECIPES:
        raise one_of("recipe", run.recipe, RECIPES)
    recipe = RECIPES[run.recipe]
    if run.epochs is not None:
        recipe = replace(recipe, epochs=run.epochs, decay_epoch=round(0.8 * run.epochs))
    return replace(recipe, batch_size=min(recipe.batch_size, images))
