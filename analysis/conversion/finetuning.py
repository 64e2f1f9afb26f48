"""What the training after a conversion is to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from analysis.fitting.distillation import Distillation
from gconv.system.errors import InputError


def _forget(state: dict[str, Any]) -> None:
    """Keep nothing."""


@dataclass(frozen=True)
class Finetuning:
    """The training of a converted network, with the original network as its teacher.

    Attributes:
        epochs: passes over the training images.
        distillation: the loss.
        after_epoch: called after every epoch with all that a continuation needs, as plain data.
        resume: what ``after_epoch`` was given last in an interrupted call with the same arguments.

    Raises:
        InputError: the number of epochs is not a whole number, or there is nothing to resume.
    """

    epochs: int = 0
    distillation: Distillation = Distillation()
    after_epoch: Callable[[dict[str, Any]], None] = _forget
    resume: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or isinstance(self.epochs, bool) or self.epochs < 0:
            raise InputError(f"finetune is {self.epochs!r}. Give a whole number of epochs, such as 5.")
        if self.resume is not None and not self.epochs:
            raise InputError("resume continues fine-tuning. Give the arguments of the interrupted call as they were.")

    @classmethod
    def of(cls, value: int | Finetuning) -> Finetuning:
        """The fine-tuning that a number of epochs stands for, or the given one."""
        return value if isinstance(value, Finetuning) else cls(value)

    def to_dict(self, seed: int) -> dict[str, Any]:
        """Plain data that tells one fine-tuning from another."""
        return {"epochs": self.epochs, "seed": seed, "distillation": asdict(self.distillation)}
