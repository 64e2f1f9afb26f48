"""Training and evaluation of a classifier on images held in memory."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .errors import InputError
from .modes import evaluating

if TYPE_CHECKING:
    from .data import Split


@dataclass(frozen=True)
class Recipe:
    """How to train: Adam under a schedule of its rate. The defaults are the published rotated-MNIST run.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step; the last step of an epoch takes what is left.
        learning_rate: the highest.
        weight_decay: Adam's L2 penalty.
        decay_epoch: epochs at the full learning rate, of the schedule ``step``.
        schedule: ``step``: a tenth of the rate from ``decay_epoch`` on; ``cosine``: the rate rises linearly during the
            first tenth of all steps and then falls to zero as half a cosine.
    """

    epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 1e-2
    weight_decay: float = 1e-5
    decay_epoch: int = 40
    schedule: Literal["step", "cosine"] = "step"

    def rate(self, epoch: int, progress: float = 0.0) -> float:
        """The learning rate in epoch number ``epoch``, counted from 0, after this share of its steps."""
        if self.schedule == "step":
            return self.learning_rate * (0.1 if epoch >= self.decay_epoch else 1.0)
        done = (epoch + progress) / self.epochs
        warm = 0.1
        share = done / warm if done < warm else (1 + math.cos(math.pi * (done - warm) / (1 - warm))) / 2
        return self.learning_rate * share

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record."""
        return {"optimizer": "adam", **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """The recipe that :meth:`to_dict` described."""
        return cls(**{key: value for key, value in data.items() if key != "optimizer"})


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of a batch's images, its class scores and its labels: a scalar to minimise."""


def _cross_entropy(images: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(scores, labels)


@dataclass(frozen=True)
class Score:
    """A classifier's result on a set of images: mean cross-entropy, and the wrong ones in per cent."""

    loss: float
    error: float
    images: int


def evaluate(model: nn.Module, split: Split, *, batch_size: int = 500, label: str | None = None) -> Score:
    """Loss and error in eval mode, on the model's device and in its precision; the mode is put back afterwards.

    Args:
        model: a classifier.
        split: images and labels.
        batch_size: images at a time.
        label: what a progress bar on stderr calls the work; none is shown without it.

    Raises:
        InputError: there are no images.
    """
    count = len(split.labels)
    if count == 0:
        raise InputError("the data set has no images to evaluate on")
    like = next(model.parameters())
    loss = wrong = 0.0
    with evaluating(model), torch.inference_mode():
        hide = True if label is None else None  # None: hidden where stderr is not a terminal
        for start in tqdm(range(0, count, batch_size), desc=label, disable=hide, leave=False, unit="batch"):
            labels = split.labels[start : start + batch_size].to(like.device)
            scores = model(split.images[start : start + batch_size].to(like))
            loss += F.cross_entropy(scores, labels, reduction="sum").item()
            wrong += (scores.argmax(1) != labels).sum().item()
    return Score(loss / count, 100 * wrong / count, count)


def fit(
    model: nn.Module,
    train: Split,
    recipe: Recipe,
    *,
    seed: int,
    validation: Split | None = None,
    loss: Loss = _cross_entropy,
    resume: dict[str, Any] | None = None,
    after_epoch: Callable[[dict[str, Any], dict[str, Any]], None] = lambda row, resume: None,
    label: str = "training",
) -> list[dict[str, Any]]:
    """Train in place, deterministically: the order of images depends on the seed and the epoch's number alone.

    Args:
        model: a classifier; it stays on its device.
        train: the images to learn from.
        recipe: how.
        seed: of the data order (initialisation is the caller's).
        validation: images to score after every epoch, if any.
        loss: of (images, scores, labels) of a batch.
        resume: what ``after_epoch`` was given last, to continue an interrupted run.
        after_epoch: called with the epoch's row of the history and with what a continuation needs.
        label: what the progress bar on stderr calls the run.

    Returns:
        The history: one row of plain data per epoch of this call.

    Raises:
        InputError: there are no images, or the loss is no longer finite.
    """
    if len(train.labels) == 0:
        raise InputError("the data set has no images to train on")
    like = next(model.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    start = 0
    if resume is not None:
        try:
            optimizer.load_state_dict(resume["optimizer"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the state of the optimizer does not fit the network: {error}") from error
        start = resume["epochs_done"]
    images, labels = train.images.to(like), train.labels.to(like.device)
    steps = len(_batches(torch.arange(len(labels)), recipe.batch_size))
    history: list[dict[str, Any]] = []
    # disable=None: no bar where stderr is not a terminal; one line an epoch is printed there instead.
    bar = tqdm(total=recipe.epochs * steps, initial=start * steps, desc=label, unit="step", disable=None, leave=False)
    with bar:
        for epoch in range(start, recipe.epochs):
            began = time.perf_counter()
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(labels), generator=generator).to(like.device)
            model.train()
            loss_sum = wrong = 0.0
            for step, batch in enumerate(_batches(order, recipe.batch_size)):
                for parameters in optimizer.param_groups:
                    parameters["lr"] = recipe.rate(epoch, step / steps)
                scores = model(images[batch])
                value = loss(images[batch], scores, labels[batch])
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                loss_sum += value.item() * len(batch)
                wrong += (scores.argmax(1) != labels[batch]).sum().item()
                bar.update()
            row: dict[str, Any] = {
                "epoch": epoch + 1,
                "learning_rate": recipe.rate(epoch),
                "train_loss": loss_sum / len(labels),
                "train_error": 100 * wrong / len(labels),
            }
            if not torch.isfinite(torch.tensor(row["train_loss"])):
                what = f"{label} diverged in epoch {epoch + 1}: the loss is {row['train_loss']}"
                raise InputError(f"{what}; try a smaller learning rate")
            if validation is not None:
                row["validation_error"] = evaluate(model, validation).error
            row["seconds"] = round(time.perf_counter() - began, 2)
            history.append(row)
            measured = [key for key in row if key.endswith(("loss", "error"))]
            shown = ", ".join(f"{key.replace('_', ' ')} {row[key]:.4g}" for key in measured)
            bar.set_postfix_str(shown)
            if bar.disable:
                print(f"{label}: epoch {epoch + 1}/{recipe.epochs}, {shown}, {row['seconds']:.1f} s", file=sys.stderr)
            after_epoch(row, {"optimizer": optimizer.state_dict(), "epochs_done": epoch + 1})
    return history


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """Batches of ``size`` and a last one of what is left; a single image left over joins the batch before it.

    Batch norm cannot be trained on one image whose map has one pixel.
    """
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def pick_device(name: str) -> torch.device:
    """The device for ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.

    Raises:
        InputError: another name, or a GPU was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; accepted: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("no GPU is available to PyTorch here; accepted: --device cpu or auto")
    return torch.device(name)


def environment(device: torch.device) -> dict[str, Any]:
    """What a run was made with, for its record."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
