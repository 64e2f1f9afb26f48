"""Fine-tuning a converted network, with the network that it comes from as its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv.nn.modes import evaluating
from gconv.system.errors import InputError
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
        weight: of the teacher against the labels, from 0 (labels alone) to 1.
        temperature: T, which softens both distributions.
        target: ``scores``; or ``layers``, which adds the mean squared error of every converted layer's output relative
            to the power of the teacher's.
    """

    weight: float = 0.9
    temperature: float = 4.0
    target: str = "scores"

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"the weight of distillation is {self.weight!r}; accepted: 0 to 1")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"the temperature of distillation is {self.temperature!r}; accepted: a number above 0")
        if self.target not in TARGETS:
            raise InputError(f"unknown target of distillation {self.target!r}; accepted: {', '.join(TARGETS)}")


def finetuning_recipe(epochs: int, images: int) -> Recipe:
    """How a converted network is trained on so many images: at a rate that rises a while and falls as a cosine."""
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
        teacher: the original one, in eval mode throughout.
        layers: the converted layers, for the target ``layers``.
        train: images and labels.
        epochs: passes over them.
        seed: of the order of images.
        distillation: the loss.
        resume: what ``after_epoch`` was given last, to continue an interrupted run.
        after_epoch: called with the epoch's row of the history and with what a continuation needs.

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
    """The loss of a batch; keeps the outputs of the layers of both networks while it is entered."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, layers: Sequence[str], distillation: Distillation
    ) -> None:
        self.teacher, self.how = teacher, distillation
        self.outputs: dict[nn.Module, dict[str, Tensor]] = {student: {}, teacher: {}}
        self.layers = tuple(layers) if distillation.target == "layers" else ()
        self.hooks: list[Any] = []

    def __enter__(self) -> DistilledLoss:
        for network, kept in self.outputs.items():
            for name in self.layers:
                self.hooks.append(
                    network.get_submodule(name).register_forward_hook(
                        lambda module, given, output, name=name, kept=kept: kept.__setitem__(name, output)
                    )
                )
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

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
        student, teacher = self.outputs.values()
        for name in self.layers:
            error = (student[name] - teacher[name]).square().mean()
            loss = loss + weight * error / teacher[name].square().mean().clamp_min(1e-12) / len(self.layers)
        return loss
