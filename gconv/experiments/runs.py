"""A training run of an experiment: what defines it, how it is done, and the record that it leaves.

A run is a model, a recipe, a number of training images and a seed. Its record is one JSON file, and what has a record
is not run again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gconv.system.errors import InputError, one_of

if TYPE_CHECKING:
    from gconv.training.recipe import Recipe

PROG = "python -m gconv.experiments"


@dataclass(frozen=True)
class Run:
    """One training run on the train and validation images, as published, and its test error after the last epoch.

    Attributes:
        model: one of ``gconv.MODELS``, at its published width.
        seed: of initialisation and data order.
        data: name of the data set.
        recipe: one of ``gconv.RECIPES``.
        images: how many of the training images, the first ones; None for all.
        epochs: another number than the recipe's.
        held_out: whether the validation part is held out and scored, for choosing between recipes; the test set is
            then not read.
    """

    model: str
    seed: int
    data: str = "rotmnist-regen"
    recipe: str = "published"
    images: int | None = None
    epochs: int | None = None
    held_out: bool = False

    @property
    def name(self) -> str:
        """Its file name without suffix."""
        parts = [self.model, self.recipe]
        parts += [f"first{self.images}"] if self.images is not None else []
        parts += [f"{self.epochs}epochs"] if self.epochs is not None else []
        parts += ["heldout"] if self.held_out else []
        return "_".join([*parts, f"seed{self.seed}"])


def record_path(run: Run, records: Path) -> Path:
    """Where the record of a run is."""
    return records / run.data / f"{run.name}.json"


def load_records(folder: Path, data: str) -> list[dict[str, Any]]:
    """All records on a data set.

    Raises:
        InputError: there are none, or a file is not a record.
    """
    found = []
    for path in sorted((folder / data).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found.append({**record, "run": Run(**record["run"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is not a record of {PROG}: {error}") from error
    if not found:
        raise InputError(f"there are no records in {folder / data}; {PROG} makes them")
    return found


def perform(run: Run, records: Path, work: Path, device: str) -> str:
    """Train (or continue to), score, and write the record. In one line, what came out."""
    import time

    import torch

    from gconv.models import checkpoint
    from gconv.models.cost import cost
    from gconv.models.memory import training_memory
    from gconv.models.zoo import create_model
    from gconv.system.files import atomic_path
    from gconv.training.datasets import Split, load_dataset
    from gconv.training.evaluation import evaluate
    from gconv.training.loop import environment, fit, steps_of_epoch

    data = load_dataset(run.data, progress=False)
    split = data.train if run.held_out else data.train_and_validation
    if run.images is not None:
        split = Split(*(part[: run.images] for part in split))
    recipe = recipe_of(run, len(split.labels))
    path = work / run.data / f"{run.name}.pt"
    history: list[dict[str, Any]] = []
    resume = None
    if path.exists():
        kept = checkpoint.read(path)
        if kept.record.get("dataset_sha256") != data.sha256 or kept.record.get("recipe") != recipe.to_dict():
            raise InputError(f"{path} is of other data or of another recipe; remove it, or take another --work")
        model, history, resume = kept.model, kept.record["history"], kept.resume
    else:
        torch.manual_seed(run.seed)
        model = create_model(run.model)
    model.to(device)
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

    def keep(state: dict[str, Any]) -> None:
        checkpoint.save(model, path, record={**facts, "history": history}, resume=state)

    def after_epoch(row: dict[str, Any], state: dict[str, Any]) -> None:
        history.append(row)
        keep(state)

    if len(history) < recipe.epochs:
        validation = data.validation if run.held_out else None
        fit(
            model, split, recipe, seed=run.seed, validation=validation, resume=resume,
            after_epoch=after_epoch, on_stop=keep, label=None,
        )  # fmt: skip
    began = time.perf_counter()
    if run.held_out:
        facts["validation_error"] = evaluate(model, data.validation).error
    else:
        score = evaluate(model, data.test)
        facts |= {"test_error": score.error, "test_loss": score.loss, "test_images": score.images}
    testing = time.perf_counter() - began
    checkpoint.save(model, path, record={**facts, "snapshots": [], "history": history})
    counted = cost(model, model.input_shape)
    facts |= {
        "run": run.__dict__,
        "steps": recipe.epochs * steps_of_epoch(len(split.labels), recipe.batch_size),
        "parameters": counted.parameters,
        "macs_published": counted.macs_published,
        "macs_executed": counted.macs_executed,
        "training_memory_batch_2": training_memory(model, data.train.images[:2].to(device)),
        "seconds": {"training": round(sum(row["seconds"] for row in history), 1), "testing": round(testing, 1)},
        "history": history,
    }
    target = record_path(run, records)
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    what = "validation" if run.held_out else "test"
    return f"{what} error {facts[f'{what}_error']:.2f} % after {recipe.epochs} epochs"


def recipe_of(run: Run, images: int) -> Recipe:
    """The recipe of a run on that many images: a batch is never larger than the set."""
    from gconv.training.recipe import RECIPES

    if run.recipe not in RECIPES:
        raise one_of("recipe", run.recipe, RECIPES)
    recipe = RECIPES[run.recipe]
    if run.epochs is not None:
        recipe = replace(recipe, epochs=run.epochs, decay_epoch=round(0.8 * run.epochs))
    return replace(recipe, batch_size=min(recipe.batch_size, images))
