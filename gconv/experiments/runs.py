"""The training runs of experiments: what defines one, and the record that it leaves.

A run is a model, a recipe, a number of training images and a seed. Its record is one JSON file. A run that has a record
is not done again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gconv.system.errors import InputError

PROG = "python -m gconv.experiments"


@dataclass(frozen=True)
class Run:
    """One training run. By default it learns from the train and validation images and is scored on the test images.

    Attributes:
        model: one of ``gconv.MODELS``, with its published width.
        seed: seed of the initial weights and the data order.
        data: name of the data set.
        recipe: one of ``gconv.RECIPES``.
        images: how many of the training images are used, from the first one on; None for all.
        epochs: how many epochs; None for as many as the recipe has.
        held_out: hold out the validation images and score on them, to choose between recipes. The test images are
            not used then.
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
        """The name of its files, without folder and suffix."""
        parts = [self.model, self.recipe]
        parts += [f"first{self.images}"] if self.images is not None else []
        parts += [f"{self.epochs}epochs"] if self.epochs is not None else []
        parts += ["heldout"] if self.held_out else []
        return "_".join([*parts, f"seed{self.seed}"])


def record_path(run: Run, records: Path) -> Path:
    """The file of a run's record, in the folder of all records."""
    return records / run.data / f"{run.name}.json"


def load_records(folder: Path, data: str) -> list[dict[str, Any]]:
    """All records of runs on a data set; under ``run``, each has its :class:`Run`.

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
