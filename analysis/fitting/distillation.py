"""Fine-tuning a converted network, with the network that it comes from as its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv.nn.capture import Captured, capture
from gconv.nn.modes import evaluating
from gconv.system.errors import InputError, one_of
from gconv.training.datasets import Split
from gconv.training.loop import fit
from gconv.training.recipe import Recipe

# Chosen on the validation part of rotmnist-regen; benchmarks/finetuning.py compares them with others.
_LEARNING_RATE = 2e-2
_BATCH_SIZE = 64
TARGETS = ("scores", "layers")


@dataclass(frozen=True)
class Distillation:
    """The loss ``(1 - weight) CE + weight T² KL(teacher / T || student / T)`` (Hinton et al., 2015).

    Attributes:
        weight: how much the teacher counts, from 0 (labels alone) to 1 (teacher alone).
        temperature: T, which softens both distributions.
        target: ``scores``; or ``layers``, which adds the mean squared error of every converted layer's output, relative
            to the power of the teacher's output.
    """

    weight: float = 0.9
    temperature: float = 4.0
    target: str = "scores"

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"the weight of distillation is {self.weight!r}. Give a number from 0 to 1.")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"the temperature of distillation is {self.temperature!r}. Give a number above 0.")
        if self.target not in TARGETS:
            raise one_of("target of distillation", self.target, TARGETS)


def finetuning_recipe(epochs: int, images: int) -> Recipe:
    """How a converted network is trained on so many images: the learning rate first rises, then falls as a cosine."""
    return Recipe(
        epochs,
        batch_size=min(_BATCH_SIZE, images),
        learning_rate=_LEARNING_RATE,
        weight_decay=0.0,
        schedule="cosine",
    )


def finetune(
    student: nn.Module,
    teacher: nn.Module,
    layers: Sequence[str],
    train: Split,
    *,
    epochs: int,
    seed: int = 0,
    distillation: Distillation = Distillation(),
    resume: dict[str, Any] | None = None,
    after_epoch: Callable[[dict[str, Any], dict[str, Any]], None] = lambda row, resume: None,
) -> dict[str, Any]:
    """Train a converted network in place, by :func:`finetuning_recipe`.

    Args:
        student: the converted network.
        teacher: the original network, in eval mode throughout.
        layers: the converted layers, for the target ``layers``.
        train: images and labels.
        epochs: passes over them.
        seed: of the order of images.
        distillation: the loss.
        resume: what ``after_epoch`` was given last, to continue an interrupted run.
        after_epoch: called after every epoch with its row of the history, and with what a continuation needs.

    Returns:
        The recipe and the history of this call, as plain data.
    """
    recipe = finetuning_recipe(epochs, len(train.labels))
    with DistilledLoss(student, teacher, layers, distillation) as loss:
        history = fit(
            student, train, recipe, seed=seed, loss=loss, resume=resume, after_epoch=after_epoch, label="fine-tuning"
        )
    return {**recipe.to_dict(), "distillation": asdict(distillation), "history": history}


class DistilledLoss:
    """The loss of a batch. While it is entered, it keeps the outputs of the layers of both networks.

    Args:
        student: the network that is trained.
        teacher: the network that it learns from.
        layers: names of the layers whose outputs are compared, if ``distillation.target`` is ``layers``.
        distillation: the loss.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, layers: Sequence[str], distillation: Distillation
    ) -> None:
        self.student, self.teacher, self.how = student, teacher, distillation
        self.layers = tuple(layers) if distillation.target == "layers" else ()
        self.seen: tuple[Captured, Captured] = (Captured(), Captured())
        self.watching = ExitStack()

    def __enter__(self) -> DistilledLoss:
        student, teacher = (capture(network, outputs=self.layers) for network in (self.student, self.teacher))
        self.seen = self.watching.enter_context(student), self.watching.enter_context(teacher)
        return self

    def __exit__(self, *_: object) -> None:
        self.watching.close()

    def __call__(self, images: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        weight, temperature = self.how.weight, self.how.temperature
        loss = (1 - weight) * F.cross_entropy(scores, labels)
        if not weight:
            return loss
        with evaluating(self.teacher), torch.no_grad():
            wanted = self.teacher(images)
        divergence = F.kl_div(
            F.log_softmax(scores / temperature, 1),
            F.log_softmax(wanted / temperature, 1),
            log_target=True,
            reduction="batchmean",
        )
        loss = loss + weight * temperature**2 * divergence
        student, teacher = (seen.outputs for seen in self.seen)
        for name in self.layers:
            error = (student[name] - teacher[name]).square().mean()
            loss = loss + weight * error / teacher[name].square().mean().clamp_min(1e-12) / len(self.layers)
        return loss
