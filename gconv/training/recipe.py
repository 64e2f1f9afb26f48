"""Recipes: how a network is trained, as plain data, and the recipes that have a name."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from gconv.system.errors import InputError, one_of

SCHEDULES = ("step", "cosine")
AUGMENTATIONS = ("none", "rotation", "affine")


# The field names of older records and checkpoints, with what they are called now.
_OLD_NAMES = {"separability": "low_rank_penalty", "separability_form": "low_rank_form"}


@dataclass(frozen=True)
class Recipe:
    """How to train a network: with Adam, and a schedule for the learning rate.

    The defaults are the published rotated-MNIST run.

    Attributes:
        epochs: how many times the training images are seen.
        batch_size: images per step. The last step of an epoch takes the rest.
        learning_rate: the highest learning rate.
        weight_decay: weight of Adam's L2 penalty.
        decay_epoch: with the schedule ``step``, how many epochs the learning rate stays at its highest.
        schedule: ``step`` divides the learning rate by ten after ``decay_epoch`` epochs. ``cosine`` lets it rise
            linearly during the first tenth of all steps, and then fall to zero along half a cosine.
        augmentation: ``none``; ``rotation``, by any angle; or ``affine``, which also scales and shears by up to a tenth
            and shifts by up to a fourteenth of the image. Each image is augmented anew in each epoch.
        label_smoothing: share of the target that is spread evenly over the classes (Szegedy et al., 2016).
        averaging: decay, per step, of the exponential moving average of all weights and batch-norm statistics. The
            averaged network is the one that is scored and kept. 0 for no average.
        low_rank_penalty: weight of the penalty that pulls full filters towards rank 1 of ``low_rank_form``
            (:func:`gconv.training.regularization.rank1_residual`).
        low_rank_form: one of ``gconv.FORMS``.

    Raises:
        InputError: a value that is not one of these.
    """

    epochs: int = 50
    batch_size: int = 256
    learning_rate: float = 1e-2
    weight_decay: float = 1e-5
    decay_epoch: int = 40
    schedule: str = "step"
    augmentation: str = "none"
    label_smoothing: float = 0.0
    averaging: float = 0.0
    low_rank_penalty: float = 0.0
    low_rank_form: str = "gc"

    def __post_init__(self) -> None:
        for what, given, accepted in (
            ("schedule", self.schedule, SCHEDULES),
            ("augmentation", self.augmentation, AUGMENTATIONS),
        ):
            if given not in accepted:
                raise one_of(what, given, accepted)
        for what, count, least in (("epochs", self.epochs, 0), ("batch_size", self.batch_size, 1)):
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise InputError(f"{what} is {count!r}; give a whole number of at least {least}")
        for what in ("learning_rate", "weight_decay", "low_rank_penalty"):
            if not 0 <= getattr(self, what) < math.inf:
                raise InputError(f"{what} is {getattr(self, what)!r}; give a number of at least 0")
        for what, share in (("label_smoothing", self.label_smoothing), ("averaging", self.averaging)):
            if not 0 <= share < 1:
                raise InputError(f"{what} is {share!r}; give a number of at least 0 and below 1")

    def rate(self, epoch: int, progress: float = 0.0) -> float:
        """The learning rate in an epoch, counted from 0, when the share ``progress`` of its steps is done."""
        if self.schedule == "step":
            return self.learning_rate * (0.1 if epoch >= self.decay_epoch else 1.0)
        done = (epoch + progress) / self.epochs
        warm = 0.1
        share = done / warm if done < warm else (1 + math.cos(math.pi * (done - warm) / (1 - warm))) / 2
        return self.learning_rate * share

    def to_dict(self) -> dict[str, Any]:
        """This recipe as plain data for a record: the fields that every record has, and those that are not default."""
        always = ("epochs", "batch_size", "learning_rate", "weight_decay", "decay_epoch", "schedule")
        default = Recipe()
        used = {key: value for key, value in asdict(self).items() if key in always or value != getattr(default, key)}
        return {"optimizer": "adam", **used}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """The recipe that :meth:`to_dict` described, in this version or an older one.

        Raises:
            InputError: a field that no recipe has, or a value that it cannot have.
        """
        known = {field.name for field in fields(cls)}
        values = {_OLD_NAMES.get(key, key): value for key, value in data.items()}
        if unknown := set(values) - known - {"optimizer"}:
            raise InputError(f"a recipe has no {', '.join(sorted(unknown))}; accepted: {', '.join(sorted(known))}")
        if values.pop("optimizer", "adam") != "adam":
            raise one_of("optimizer", data["optimizer"], ["adam"])
        return cls(**values)


_COSINE = Recipe(schedule="cosine")
_SMALL_BATCH = replace(_COSINE, batch_size=64)
_ROTATION = replace(_SMALL_BATCH, augmentation="rotation")
_AFFINE = replace(_SMALL_BATCH, augmentation="affine")
_AVERAGED = replace(_ROTATION, averaging=0.998)

INGREDIENTS: dict[str, Recipe] = {
    "published": Recipe(),
    "cosine": _COSINE,
    "small-batch": _SMALL_BATCH,
    "rotation": _ROTATION,
    "affine": _AFFINE,
    "averaged": _AVERAGED,
    "smoothed": replace(_AVERAGED, label_smoothing=0.05),
}
"""From the published recipe to a better one, each with one ingredient more than the one before it.

``affine`` is an alternative to ``rotation``: ``averaged`` is ``rotation`` with one ingredient more.
"""

RECIPES: dict[str, Recipe] = INGREDIENTS | {"modern": replace(_AVERAGED, epochs=100)}
"""All recipes that have a name. ``modern`` is ``averaged`` with 100 epochs."""
