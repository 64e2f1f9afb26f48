"""What ``python -m gconv.train`` does: a training run from its options, or continued, to its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gconv.models.checkpoint import Checkpoint, read, save
from gconv.models.networks import Model
from gconv.models.zoo import MODELS, create_model
from gconv.system.distributed import processes, rank
from gconv.system.errors import InputError, one_of
from gconv.system.files import check_output

from .datasets import Dataset, Split, load_dataset
from .device import environment, pick_device
from .evaluation import Score, evaluate
from .logs import Log, history_file, tensorboard
from .loop import fit
from .recipe import RECIPES, Recipe
from .steps import PRECISIONS, State

_NETWORK_OPTIONS = ("model", "group", "separable", "width")
_RECIPE_OPTIONS = ("recipe", "epochs", "seed", "batch_size", "lr", "weight_decay", "all_data", "snapshots", "precision")
_RECORDED = {"dataset", "dataset_sha256", "recipe", "seed", "history", "snapshots", "trained_on"}


@dataclass(frozen=True)
class RunOptions:
    """The options of the command, under the names that they have there; None for an option that is not given."""

    dataset: str
    model: str | None = None
    group: str | None = None
    separable: str | None = None
    width: int | None = None
    recipe: str | None = None
    epochs: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    all_data: bool | None = None
    snapshots: str | None = None
    device: str = "auto"
    precision: str | None = None
    compile: bool = False
    history: str | None = None
    tensorboard: str | None = None
    resume: str | None = None
    out: str | None = None
    force: bool = False

    def given(self, names: tuple[str, ...]) -> list[str]:
        """Those of the names that are given, as flags."""
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]


@dataclass
class TrainingRun:
    """A training run that is about to begin or to continue.

    Attributes:
        model: the network to train.
        recipe: how.
        data: the data set.
        record: what the checkpoint says about the run.
        out: the file of the checkpoint.
        resume: the state of the run that is continued; None for a new run.
        compiled: whether the passes run through ``torch.compile``.
        logs: where else the history is written.
    """

    model: Model
    recipe: Recipe
    data: Dataset
    record: dict[str, Any]
    out: Path
    resume: State | None = None
    compiled: bool = False
    logs: tuple[Log, ...] = ()

    def train(self) -> Score | None:
        """Train to the end, score on the test set, and write the checkpoint; the score, in the process of rank 0.

        Raises:
            InputError: as :func:`gconv.fit`, or a file cannot be written.
            KeyboardInterrupt: SIGINT or SIGTERM came. The checkpoint keeps what was done, if it was a step or more.
        """
        if self.resume is None:
            self._snapshot(0)
        name = self.model.spec.name
        fit(
            self.model,
            self.images,
            self.recipe,
            seed=self.record["seed"],
            validation=self.data.validation if self.record["trained_on"] == "train" else None,
            resume=self.resume,
            after_epoch=self._after_epoch,
            on_stop=self._save,
            label=f"{name} on {self.data.name}",
            precision=self.record.get("precision", "float32"),
            compiled=self.compiled,
        )
        if rank() > 0:
            return None
        test = evaluate(self.model, self.data.test, label="testing")
        self.record |= {"test_error": test.error, "test_loss": test.loss, "test_images": test.images}
        self._save()
        return test

    @property
    def images(self) -> Split:
        """The images that it learns from."""
        return self.data.train if self.record["trained_on"] == "train" else self.data.train_and_validation

    def _after_epoch(self, row: dict[str, Any], resume: State) -> None:
        self.record["history"].append(row)
        self._snapshot(row["epoch"])
        self._save(resume)
        for log in self.logs:
            log(self.record["history"])

    def _save(self, resume: State | None = None) -> None:
        if rank() == 0:
            save(self.model, self.out, record=self.record, resume=resume)

    def _snapshot(self, epoch: int) -> None:
        if epoch in self.record["snapshots"] and rank() == 0:
            path = self.out.with_suffix("") / f"epoch-{epoch:03d}.pt"
            save(self.model, path, record={**self.record, "epoch": epoch}, half=True)


def prepare(options: RunOptions) -> TrainingRun:
    """The run that the options ask for: of a new network, of the one in a checkpoint, or an unfinished one continued.

    Raises:
        InputError: options that contradict each other or a file; a data set, a network, a recipe or a device that does
            not exist; or an output that cannot be written.
    """
    device = pick_device(options.device)
    events = None if options.tensorboard is None else tensorboard(options.tensorboard)
    start = None if options.resume is None else read(options.resume)
    if start is not None and start.resume is not None:
        run = _continued(options, start, start.resume)
    else:
        run = _begun(options, start)
    run.record |= {
        "train_images": len(run.images.labels),
        "environment": environment(device) | {"processes": processes()},
    }
    run.model.to(device)
    run.compiled = options.compile
    if rank() == 0:
        file = None if options.history is None else history_file(options.history)
        if file is not None and run.record["history"]:
            file(run.record["history"])
        run.logs = tuple(log for log in (file, events) if log is not None)
    return run


def _continued(options: RunOptions, start: Checkpoint, resume: State) -> TrainingRun:
    """The unfinished run of a checkpoint."""
    given = options.given((*_NETWORK_OPTIONS, *_RECIPE_OPTIONS))
    if given:
        unfinished = f"{options.resume} is an unfinished run and continues as it began"
        raise InputError(f"{unfinished}; leave out {', '.join(given)}")
    record = start.record
    if missing := _RECORDED - record.keys():
        raise InputError(f"{options.resume} is inconsistent: its record has no {', '.join(sorted(missing))}")
    if options.dataset.lower() != record["dataset"]:
        raise InputError(f"{options.resume} was being trained on {record['dataset']!r}, not {options.dataset!r}")
    out = Path(str(options.resume)) if options.out is None else check_output(options.out, force=options.force)
    if options.history is not None:
        check_output(options.history, force=True)  # it usually exists already, with the epochs that are done
    try:
        recipe = Recipe.from_dict(record["recipe"])
        sound = isinstance(resume["epochs_done"], int) and isinstance(resume["optimizer"], dict)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{options.resume} is inconsistent: its recipe or its state cannot be continued") from error
    if not sound:
        raise InputError(f"{options.resume} is inconsistent: its state cannot be continued")
    data = load_dataset(options.dataset)
    if data.sha256 != record["dataset_sha256"]:
        raise InputError(f"{data.name} is not the data of the run in {options.resume}: its sha256 differs")
    return TrainingRun(start.model, recipe, data, record, out, resume)


def _begun(options: RunOptions, start: Checkpoint | None) -> TrainingRun:
    """A new run: of a new network, or of the one in a finished or converted checkpoint."""
    snapshots, out = _check_new(options)
    data = load_dataset(options.dataset)
    recipe = _recipe(options, data)
    seed, channels = options.seed or 0, data.train.images.shape[1]
    torch.manual_seed(seed)
    model = _new_model(options, in_channels=channels, classes=data.classes) if start is None else start.model
    if (model.spec.in_channels, model.spec.classes) != (channels, data.classes):
        raise InputError(
            f"{model.spec.name} takes {model.spec.in_channels} channels and {model.spec.classes} classes; "
            f"{data.name} has {channels} and {data.classes}"
        )
    record: dict[str, Any] = {
        "dataset": data.name,
        "dataset_description": data.description,
        "dataset_sha256": data.sha256,
        "trained_on": "train and validation" if options.all_data else "train",
        "seed": seed,
        "recipe": recipe.to_dict(),
        "snapshots": snapshots,
        "history": [],
    }
    if options.precision is not None:
        record["precision"] = options.precision
    if start is not None:
        record["started_from"] = start.record
    return TrainingRun(model, recipe, data, record, out)


def _check_new(options: RunOptions) -> tuple[list[int], Path]:
    """The epochs of the snapshots and the output of a new run; its options are checked before its data is read."""
    if options.resume is not None:
        given = options.given(_NETWORK_OPTIONS)
        if given:
            raise InputError(f"the network comes from {options.resume}; leave out {', '.join(given)}")
        default = Path(options.resume).stem + "-retrained"
    elif options.model is None:
        raise InputError(f"--model is missing; accepted: {', '.join(MODELS)} (or --resume CKPT)")
    else:
        default = _new_model(options).spec.name
    name = f"{default}-{options.dataset.lower()}-seed{options.seed or 0}.pt" if options.out is None else options.out
    out = check_output(name, force=options.force)
    if out.is_dir():
        raise InputError(f"cannot write {out}: it is a directory")
    if options.history is not None:
        check_output(options.history, force=options.force)
    if options.precision not in (None, *PRECISIONS):
        raise one_of("precision", options.precision, PRECISIONS)
    epochs = _named_recipe(options).epochs if options.epochs is None else options.epochs
    snapshots = _snapshot_epochs(options.snapshots, epochs)
    if snapshots:
        if not out.suffix:
            raise InputError(f"--snapshots go to a folder named like --out without its suffix, but {out} has no suffix")
        check_output(out.with_suffix(""), force=options.force)
    return snapshots, out


def _new_model(options: RunOptions, **data: Any) -> Model:
    name, group, width, separable = options.model or "", options.group, options.width, options.separable
    try:
        return create_model(name, group=group, width=width, separable=separable, **data)
    except RuntimeError as error:  # the allocator's
        raise InputError(f"there is no memory for {name} with --width {width}") from error


def _recipe(options: RunOptions, data: Dataset) -> Recipe:
    named = _named_recipe(options)
    images = len(data.train.labels) + (len(data.validation.labels) if options.all_data else 0)
    epochs = named.epochs if options.epochs is None else options.epochs
    return replace(
        named,
        epochs=epochs,
        batch_size=options.batch_size or min(named.batch_size, images),
        learning_rate=named.learning_rate if options.lr is None else options.lr,
        weight_decay=named.weight_decay if options.weight_decay is None else options.weight_decay,
        decay_epoch=round(0.8 * epochs),
    )


def _named_recipe(options: RunOptions) -> Recipe:
    name = options.recipe or "published"
    if name.lower() not in RECIPES:
        raise one_of("recipe", name, RECIPES)
    return RECIPES[name.lower()]


def _snapshot_epochs(text: str | None, epochs: int) -> list[int]:
    try:
        wanted = sorted({int(item) for item in text.split(",")}) if text else []
    except ValueError:
        wanted = [-1]
    if wanted and not (wanted[0] >= 0 and wanted[-1] <= epochs):
        raise InputError(f"--snapshots is {text!r}; give epochs from 0 to {epochs}, separated by commas")
    return wanted
