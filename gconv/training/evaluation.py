"""Scoring a classifier on images held in memory, and checking that it can take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from gconv.models.networks import Model
from gconv.nn.modes import evaluating
from gconv.system.errors import InputError

if TYPE_CHECKING:
    from .datasets import Split


@dataclass(frozen=True)
class Score:
    """The result of a classifier on a set of images.

    Attributes:
        loss: mean cross-entropy.
        error: wrongly classified images in per cent.
        images: the number of images.
    """

    loss: float
    error: float
    images: int


def evaluate(model: nn.Module, split: Split, *, batch_size: int = 500, label: str | None = None) -> Score:
    """The loss and the error of a classifier in eval mode, on its device and in its precision.

    Afterwards every part of the model is in the mode that it was in.

    Args:
        model: a classifier.
        split: images and labels.
        batch_size: images per pass.
        label: the name of the work on a progress bar on stderr; None for no bar.

    Raises:
        InputError: there are no images.
    """
    count = len(split.labels)
    if count == 0:
        raise InputError("the data set has no images to evaluate on")
    like = next(model.parameters())
    loss = wrong = 0.0
    with evaluating(model), torch.inference_mode():
        hide = True if label is None else None  # None hides the bar where stderr is not a terminal
        for start in tqdm(range(0, count, batch_size), desc=label, disable=hide, leave=False, unit="batch"):
            labels = split.labels[start : start + batch_size].to(like.device, torch.int64)
            scores = model(split.images[start : start + batch_size].to(like))
            loss += F.cross_entropy(scores, labels, reduction="sum").item()
            wrong += (scores.argmax(1) != labels).sum().item()
    return Score(loss / count, 100 * wrong / count, count)


def check_split(split: Split, model: nn.Module) -> None:
    """Check that a network can learn from these images, or be scored on them.

    Raises:
        InputError: there are no images; there is not one label for each image; the images have a shape that the network
            does not take, or NaN or infinite pixels; or the labels are not whole numbers in the range of its classes.
    """
    images, labels = split
    if len(images) == 0:
        raise InputError("the data set has no images")
    if labels.shape != (len(images),) or labels.is_floating_point() or labels.dtype == torch.bool:
        given = f"{len(images):,} images and labels {list(labels.shape)} of {labels.dtype}"
        raise InputError(f"{given}; give one whole number for each image")
    if not images.isfinite().all():
        first = int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
        raise InputError(f"image number {first} has NaN or infinite pixels; give finite numbers")
    with evaluating(model), torch.no_grad():
        try:
            classes = model(images[:1].to(next(model.parameters()))).shape[1]
        except (IndexError, RuntimeError, InputError) as error:
            accepted = f"; it takes {list(model.input_shape)}" if isinstance(model, Model) else f": {error}"
            raise InputError(f"the network cannot take images {list(images.shape[1:])}{accepted}") from error
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"labels go from {labels.min()} to {labels.max()}; give labels from 0 to {classes - 1}")
