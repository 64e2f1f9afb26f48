"""Training a classifier on images held in memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm

from gconv.system.distributed import processes, rank
from gconv.system.errors import InputError
from gconv.system.signals import StopRequest

from .evaluation import check_split
from .recipe import Recipe
from .steps import Loss, State, Trainer

if TYPE_CHECKING:
    from .datasets import Split


def fit(
    model: nn.Module,
    train: Split,
    recipe: Recipe,
    *,
    seed: int,
    validation: Split | None = None,
    loss: Loss | None = None,
    resume: State | None = None,
    after_epoch: Callable[[dict[str, Any], State], None] = lambda row, resume: None,
    on_stop: Callable[[State], None] | None = None,
    label: str | None = "training",
    precision: str = "float32",
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Train a network in place. All random numbers depend on the seed and the epoch's number alone.

    In a distributed run (:mod:`gconv.system.distributed`) every process takes its part of each batch. Weights,
    batch-norm statistics and history are those of one process with the whole batch, to rounding.

    Args:
        model: a classifier; it stays on its device.
        train: the images to learn from.
        recipe: how to train.
        seed: decides the data order and the augmentation; the initial weights are those of ``model``.
        validation: images to score after every epoch, if any.
        loss: the mean loss of a batch, of the images as the network sees them, the class scores and the labels; by
            default the cross-entropy of the recipe.
        resume: to continue an interrupted run, the last state that ``after_epoch`` or ``on_stop`` got.
        after_epoch: called after every epoch with its row of the history and the state of the run. It must write or
            copy the state at once, because the next step changes it.
        on_stop: called with the state of the run when SIGINT or SIGTERM ends it. The step under way is finished
            first, and ``KeyboardInterrupt`` is raised afterwards. Without ``on_stop``, and in a distributed run,
            signals do what they usually do.
        label: the name of the run on the progress bar on stderr; None for no bar.
        precision: of the forward pass: ``float32``, or ``bfloat16`` through autocast; the weights keep their type.
        compiled: whether the forward and backward pass run through ``torch.compile``.

    Returns:
        The history: one row of plain data per epoch of this call.

    Raises:
        InputError: the network cannot learn from these images or labels; the batch is larger than the set; the state
            does not fit; the precision is unknown; there is no compiler; or the loss is no longer finite.
    """
    _check(model, train, validation, recipe)
    trainer = Trainer(model, train, recipe, seed, loss=loss, precision=precision, compiled=compiled)
    if resume is not None:
        trainer.restore(resume)
    return _run(trainer, validation, after_epoch, on_stop, label)


def _run(
    trainer: Trainer,
    validation: Split | None,
    after_epoch: Callable[[dict[str, Any], State], None],
    on_stop: Callable[[State], None] | None,
    label: str | None,
) -> list[dict[str, Any]]:
    stop = StopRequest(enabled=on_stop is not None and processes() == 1)
    history: list[dict[str, Any]] = []
    with _Progress(trainer, label) as progress, stop.listening():
        while trainer.epoch < trainer.recipe.epochs:
            for _ in trainer.rest_of_epoch():
                progress.step()
                if stop.received and on_stop is not None and trainer.step < trainer.steps:
                    with trainer.average.in_use():
                        on_stop(trainer.state())
                    raise KeyboardInterrupt
            with trainer.average.in_use():
                row = trainer.finish_epoch(validation)
                history.append(row)
                progress.epoch(row)
                after_epoch(row, trainer.state())
            if stop.received:
                raise KeyboardInterrupt
        trainer.average.keep()
    return history


def _check(model: nn.Module, train: Split, validation: Split | None, recipe: Recipe) -> None:
    check_split(train, model)
    if (train.labels == train.labels[0]).all():
        raise InputError(f"all training images have the label {train.labels[0]}; give images of two classes or more")
    if recipe.batch_size > len(train.labels):
        raise InputError(
            f"a batch of {recipe.batch_size} is larger than the training set of {len(train.labels)} images"
        )
    if validation is not None:
        check_split(validation, model)


class _Progress:
    """A bar on stderr, or a line for each epoch where stderr is not a terminal; and an error if training diverges."""

    def __init__(self, trainer: Trainer, label: str | None) -> None:
        self.trainer, self.label = trainer, label
        self.silent = label is None or rank() > 0
        steps, epochs = trainer.steps, trainer.recipe.epochs
        hide = True if self.silent else None  # None: where stderr is not a terminal
        done = trainer.epoch * steps + trainer.step
        self.bar = tqdm(total=epochs * steps, initial=done, desc=label, unit="step", disable=hide, leave=False)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self) -> None:
        self.bar.update()
        loss = self.trainer.last_loss
        if not math.isfinite(loss):
            what = f"{self.label or 'training'} diverged in epoch {self.trainer.epoch + 1}: the loss is {loss}"
            raise InputError(f"{what}; try a smaller learning rate")

    def epoch(self, row: dict[str, Any]) -> None:
        measured = [key for key in row if key.endswith(("loss", "error"))]
        shown = ", ".join(f"{key.replace('_', ' ')} {row[key]:.4g}" for key in measured)
        self.bar.set_postfix_str(shown)
        if self.bar.disable and not self.silent:
            epochs = f"epoch {row['epoch']}/{self.trainer.recipe.epochs}"
            print(f"{self.label}: {epochs}, {shown}, {row['seconds']:.1f} s", file=sys.stderr)
