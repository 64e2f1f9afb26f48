"""The images that a conversion uses: which there are, and whether the network takes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gconv.models.checkpoint import Checkpoint
from gconv.system.errors import InputError
from gconv.training import datasets
from gconv.training.datasets import Dataset, Split


class Splits(NamedTuple):
    """Images with labels for each purpose; None where there are none.

    Attributes:
        train: layers are fitted on these, batch norm is re-estimated and fine-tuning learns from them.
        validation: the network was not trained on these; options are compared on them.
        test: the error is reported on these. Nothing is chosen by them.
    """

    train: Split | None = None
    validation: Split | None = None
    test: Split | None = None

    @classmethod
    def of(
        cls,
        data: Split | Iterable[tuple[Tensor, Tensor]] | None,
        validation: Split | None = None,
        test: Split | None = None,
    ) -> Splits:
        """The splits for these arguments of :func:`analysis.convert`; a loader is read to its end.

        Raises:
            InputError: the loader has no images, or batches that do not fit together.
        """
        return cls(None if data is None else _as_split(data), validation, test)

    def check(self, model: nn.Module) -> None:
        """Check that the network takes the images and has a score for every label.

        Raises:
            InputError: it does not, or images are missing or not finite.
        """
        for label, split in zip(("data", "validation", "test"), self, strict=True):
            if split is not None:
                _check_split(model, label, split)


def splits_for(name: str | None, source: Checkpoint) -> tuple[Dataset | None, Splits]:
    """A data set by name, and its splits for the conversion of a stored network.

    If the network was trained on the validation images too, they belong to the training images, and there are none for
    validation.

    Args:
        name: of a data set that :func:`gconv.load_dataset` knows; None for no images.
        source: the network as it was read from its file.

    Raises:
        InputError: there is no such data set, or its images or classes do not fit the network.
    """
    if name is None:
        return None, Splits()
    data = datasets.load_dataset(name)
    spec = source.model.spec
    channels = data.train.images.shape[1]
    if (spec.in_channels, spec.classes) != (channels, data.classes):
        raise InputError(
            f"the network takes {spec.in_channels} channels and {spec.classes} classes; "
            f"{data.name} has {channels} and {data.classes}"
        )
    if source.record.get("trained_on") == "train and validation":
        return data, Splits(data.train_and_validation, None, data.test)
    return data, Splits(data.train, data.validation, data.test)


def _as_split(data: Split | Iterable[tuple[Tensor, Tensor]]) -> Split:
    if isinstance(data, Split):
        return data
    batches = list(data) if isinstance(data, Iterable) else []
    advice = "Give a Split, such as Dataset.train, or a loader of batches (images, labels)."
    if not batches:
        raise InputError(f"data has no images. {advice}")
    try:
        images, labels = zip(*batches, strict=True)
        return Split(torch.cat(images), torch.cat(labels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"data has batches that are not images of one size with labels. {advice}") from error


def _check_split(model: nn.Module, label: str, split: Split) -> None:
    """Raises InputError unless the network takes the images and has a score for every label."""
    if not isinstance(split, Split):
        raise InputError(f"{label} is a {type(split).__name__}. Give a Split, such as Dataset.test.")
    images, labels = split
    if len(images) == 0 or len(images) != len(labels):
        raise InputError(
            f"{label} has {len(images)} images and {len(labels)} labels. Give at least one image, and a label for each."
        )
    if not torch.isfinite(images).all():
        raise InputError(f"{label} has NaN or infinite pixels. Give finite images.")
    like = next(model.parameters())
    try:
        with torch.no_grad():
            classes = model(images[:1].to(like)).shape[1]
    except (InputError, RuntimeError, IndexError) as error:
        given = f"{label} has images of shape {list(images.shape)}"
        wanted = getattr(model, "input_shape", None)
        if wanted is not None:
            raise InputError(f"{given}; accepted: [N, {', '.join(map(str, wanted))}]") from error
        raise InputError(f"{given}, which the network does not take: {error}") from error
    if labels.dim() != 1 or labels.is_floating_point():
        what = f"{label} has labels of shape {list(labels.shape)} and type {labels.dtype}"
        raise InputError(f"{what}. Give whole numbers of shape [N]: the number of each image's class.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(f"{label} has labels from {low} to {high}; accepted: 0 to {classes - 1}")
