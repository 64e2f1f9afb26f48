"""A training run between two of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gconv.system.distributed import processes, rank, sum_over_processes
from gconv.system.errors import InputError, one_of

from .augmentation import DRAWS, augment
from .averaging import AveragedWeights
from .device import check_compiler
from .evaluation import evaluate
from .recipe import Recipe
from .regularization import rank1_residual

if TYPE_CHECKING:
    from .datasets import Split

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A batch's images, class scores and labels in; a scalar to minimise out."""

State = dict[str, Any]
"""What a continued run needs besides the network: plain data and tensors."""

PRECISIONS = ("float32", "bfloat16")
_LARGEST_SEED = 2**43  # times the factor below, it fits 64 bits
_SEEDS_APART = 1_000_003  # the epochs of two seeds have different generators


class Trainer:
    """Takes the steps of a training run and can say and restore where it is.

    Args:
        model: the network; it is trained in place, on its device.
        train: the images to learn from.
        recipe: how.
        seed: of the data order and the augmentation.
        loss: what to minimise; by default the cross-entropy of the recipe.
        precision: one of ``PRECISIONS``, for the forward pass.
        compiled: whether the passes run through ``torch.compile``.

    Attributes:
        epoch: the number of the current epoch, from 0.
        step: how many steps of this epoch are done.
        steps: the steps of an epoch.
        last_loss: the loss of the last step.
        average: the moving average of the weights, if the recipe asks for one.

    Raises:
        InputError: an unknown precision, a seed that is too large, or no compiler.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Split,
        recipe: Recipe,
        seed: int,
        *,
        loss: Loss | None = None,
        precision: str = "float32",
        compiled: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise one_of("precision", precision, PRECISIONS)
        if abs(seed) > _LARGEST_SEED:
            raise InputError(f"seed is {seed}; give a whole number of at most 2**43")
        like = next(model.parameters())
        self.model, self.recipe, self.seed, self.device = model, recipe, seed, like.device
        self.images, self.labels = train.images.to(like), train.labels.to(like.device, torch.int64)
        self.loss = loss or self._cross_entropy
        self.autocast = precision == "bfloat16"
        self.optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.forward: Callable[[Tensor], Tensor] = model
        if processes() > 1:
            # GroupBatchNorm2d combines the statistics of all processes itself.
            self.forward = DistributedDataParallel(model, broadcast_buffers=False)
        if compiled:
            check_compiler(self.device)
            self.forward = torch.compile(self.forward)
        self.average = AveragedWeights(model, recipe.averaging)
        self.steps = steps_of_epoch(len(self.labels), recipe.batch_size)
        self.epoch = self.step = 0
        self.loss_sum, self.wrong, self.seconds, self.last_loss = 0.0, 0, 0.0, 0.0

    def rest_of_epoch(self) -> Iterator[None]:
        """Take the remaining steps of this epoch, one in each iteration.

        Raises:
            InputError: the last batch is smaller than the number of processes.
        """
        generator = torch.Generator().manual_seed(self.seed * _SEEDS_APART + self.epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        draws = torch.rand(len(order), DRAWS, generator=generator)
        batches = _batches(order, self.recipe.batch_size)
        if len(batches[-1]) < processes():
            raise InputError(
                f"the last batch has {len(batches[-1])} images for {processes()} processes; give another batch size"
            )
        self.model.train()
        for batch in batches[self.step :]:
            began = time.perf_counter()
            self._take_step(batch, draws[batch])
            self.step += 1
            self.seconds += time.perf_counter() - began
            yield

    def _take_step(self, batch: Tensor, draws: Tensor) -> None:
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.recipe.rate(self.epoch, self.step / self.steps)
        mine = torch.arange(len(batch)).tensor_split(processes())[rank()]  # the part of this process
        which = batch[mine].to(self.device)
        images, labels = augment(self.images[which], draws[mine], self.recipe.augmentation), self.labels[which]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            scores = self.forward(images)
        scores = scores.to(self.images.dtype)
        value = self.loss(images, scores, labels)
        if self.recipe.low_rank_penalty:
            value = value + self.recipe.low_rank_penalty * rank1_residual(self.model, self.recipe.low_rank_form)
        self.optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel averages the gradients over processes. With these weights, whose mean over processes
        # is 1, that is the average over the images of the whole batch, also where the parts differ in size.
        (value * (len(mine) * processes() / len(batch))).backward()
        self.optimizer.step()
        # The loss of the whole batch: all processes see in the same step that it is not finite, and none waits.
        self.last_loss = sum_over_processes(value.detach() * (len(mine) / len(batch))).item()
        self.loss_sum += self.last_loss * len(batch)
        self.wrong += int((scores.argmax(1) != labels).sum())
        self.average.update(self.epoch * self.steps + self.step)

    def _cross_entropy(self, images: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels, label_smoothing=self.recipe.label_smoothing)

    def finish_epoch(self, validation: Split | None) -> dict[str, Any]:
        """Score the network, begin the next epoch, and return the epoch's row of the history."""
        began = time.perf_counter()
        images = len(self.labels)
        wrong = sum_over_processes(torch.tensor(self.wrong, device=self.device))
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "learning_rate": self.recipe.rate(self.epoch),
            "train_loss": self.loss_sum / images,
            "train_error": 100 * wrong.item() / images,
        }
        if validation is not None:
            row["validation_error"] = evaluate(self.model, validation).error
        row["seconds"] = round(self.seconds + time.perf_counter() - began, 2)
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.wrong, self.seconds = 0.0, 0, 0.0
        return row

    def state(self) -> State:
        """What a continued run needs besides the network, which must have its averaged weights now, if any."""
        state: State = {"optimizer": self.optimizer.state_dict(), "epochs_done": self.epoch}
        if self.step:
            partial = {"step": self.step, "loss_sum": self.loss_sum, "wrong": self.wrong, "seconds": self.seconds}
            state["partial_epoch"] = partial
        if self.average.values:
            state["weights"] = self.average.values
        return state

    def restore(self, state: State) -> None:
        """Continue from there. The network already has the weights that were saved with this state.

        Raises:
            InputError: the state does not fit the network and the recipe.
        """
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch = int(state["epochs_done"])
            partial = state.get("partial_epoch", {})
            self.step, self.loss_sum = int(partial.get("step", 0)), float(partial.get("loss_sum", 0.0))
            self.wrong, self.seconds = int(partial.get("wrong", 0)), float(partial.get("seconds", 0.0))
            if not (0 <= self.epoch <= self.recipe.epochs and 0 <= self.step < self.steps):
                raise ValueError(f"it is after epoch {self.epoch} and step {self.step}")
            for parameter, kept in self.optimizer.state.items():
                if any(kept[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                    raise ValueError("it is of weights of other shapes")
            if self.average.values:
                self.average.restore(state["weights"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"the state of the run does not fit the network and its recipe: {error}") from error


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """Batches of ``size``, and a last one of the rest. A rest of a single image joins the batch before it.

    The reason: batch norm cannot be trained on one image whose map has one pixel.
    """
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def steps_of_epoch(images: int, batch_size: int) -> int:
    """The number of steps in an epoch of that many images."""
    return len(_batches(torch.arange(images), batch_size))
