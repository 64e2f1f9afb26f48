"""Recipes: how a network is trained, as plain data, and the named ones."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from gconv.system.errors import InputError, one_of

SCHEDULES = ("step", "cosine")
AUGMENTATIONS = ("none", "rotation", "affine")


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
        augmentation: ``none``; ``rotation`` by a random angle; or ``affine``: that, and scaled and sheared by up to a
            tenth and moved by up to a fourteenth of the image. Another draw for every image and epoch.
        label_smoothing: share of the target that is spread evenly over the classes (Szegedy et al., 2016).
        averaging: decay a step of the exponential average of all weights and batch-norm statistics, which is what is
            scored and kept; 0 for none.
        separability: weight of the penalty on what rank 1 of ``separability_form`` leaves out
        (:mod:`gconv.training.regularization`).
        separability_form: one of ``gconv.FORMS``.
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
    separability: float = 0.0
    separability_form: str = "gc"

    def __post_init__(self) -> None:
        for what, given, accepted in (
            ("schedule", self.schedule, SCHEDULES),
            ("augmentation", self.augmentation, AUGMENTATIONS),
        ):
            if given not in accepted:
                raise one_of(what, given, accepted)
        for what, count, least in (("epochs", self.epochs, 0), ("batch_size", self.batch_size, 1)):
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise InputError(f"{what} is {count!r}; accepted: a whole number of at least {least}")
        for what in ("learning_rate", "weight_decay", "separability"):
            if not 0 <= getattr(self, what) < math.inf:
                raise InputError(f"{what} is {getattr(self, what)!r}; accepted: a number of at least 0")
        for what, share in (("label_smoothing", self.label_smoothing), ("averaging", self.averaging)):
            if not 0 <= share < 1:
                raise InputError(f"{what} is {share!r}; accepted: 0 to below 1")

    def rate(self, epoch: int, progress: float = 0.0) -> float:
        """The learning rate in epoch number ``epoch``, counted from 0, after this share of its steps."""
        if self.schedule == "step":
            return self.learning_rate * (0.1 if epoch >= self.decay_epoch else 1.0)
        done = (epoch + progress) / self.epochs
        warm = 0.1
        share = done / warm if done < warm else (1 + math.cos(math.pi * (done - warm) / (1 - warm))) / 2
        return self.learning_rate * share

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a record: what a run has in common with every other, and the rest where it is not default."""
        always = ("epochs", "batch_size", "learning_rate", "weight_decay", "decay_epoch", "schedule")
        default = Recipe()
        used = {key: value for key, value in asdict(self).items() if key in always or value != getattr(default, key)}
        return {"optimizer": "adam", **used}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """The recipe that :meth:`to_dict` described.

        Raises:
            InputError: there is something else in it.
        """
        known = {field.name for field in fields(cls)}
        if unknown := set(data) - known - {"optimizer"}:
            raise InputError(f"a recipe has no {', '.join(sorted(unknown))}; accepted: {', '.join(sorted(known))}")
        if data.get("optimizer", "adam") != "adam":
            raise one_of("optimizer", data["optimizer"], ["adam"])
        return cls(**{key: value for key, value in data.items() if key in known})


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
"""From the published recipe on, an ingredient at a time; ``averaged`` goes on from ``rotation``, without ``affine``."""

RECIPES: dict[str, Recipe] = INGREDIENTS | {"modern": replace(_AVERAGED, epochs=100)}
"""The recipes that go by a name. ``modern`` is ``averaged`` for longer."""
