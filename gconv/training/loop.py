"""Training a classifier on images held in memory."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from gconv.kernels.config import kernel_config
from gconv.system.distributed import processes, rank, sum_over_processes
from gconv.system.errors import InputError, one_of
from gconv.system.signals import StopRequest

from .augmentation import DRAWS, augment
from .evaluation import check_split, evaluate
from .recipe import Recipe
from .regularization import rank1_residual

if TYPE_CHECKING:
    from .datasets import Split

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of a batch's images, its class scores and its labels: a scalar to minimise."""

PRECISIONS = ("float32", "bfloat16")


State = dict[str, Any]
"""What a continuation needs beside the network: plain data and tensors."""


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
    """Train in place, deterministically: what is drawn depends on the seed and the epoch's number alone.

    In a distributed run (:mod:`gconv.system.distributed`) every process takes its part of each batch; weights,
    batch-norm
    statistics and history are those of one process with the whole batch, to rounding.

    Args:
        model: a classifier; it stays on its device.
        train: the images to learn from.
        recipe: how.
        seed: of the data order and the augmentation (initialisation is the caller's).
        validation: images to score after every epoch, if any.
        loss: mean over a batch, of (images as seen, scores, labels); by default the recipe's cross-entropy.
        resume: what ``after_epoch`` or ``on_stop`` was given last, to continue an interrupted run.
        after_epoch: called with the epoch's row of the history and with what a continuation needs, to be written or
            copied there and then, as the next step changes it.
        on_stop: called with that when SIGINT or SIGTERM ends the run, after the step that is under way; then
            KeyboardInterrupt is raised. Without it, and in a distributed run, signals do what they always do.
        label: what the progress bar on stderr calls the run; there is none without it.
        precision: of the forward pass, ``float32`` or ``bfloat16`` (autocast; the weights stay as they are).
        compiled: run the forward and backward pass through ``torch.compile``.

    Returns:
        The history: one row of plain data per epoch of this call.

    Raises:
        InputError: images or labels that the network cannot learn from, a batch larger than the set, a state that does
            not fit, an unknown precision, no compiler for ``compiled``, or a loss that is no longer finite.
    """
    check_split(train, model)
    if (train.labels == train.labels[0]).all():
        raise InputError(f"all training images have the label {train.labels[0]}; accepted: two classes or more")
    if recipe.batch_size > len(train.labels):
        raise InputError(
            f"a batch of {recipe.batch_size} is larger than the training set of {len(train.labels)} images"
        )
    if validation is not None:
        check_split(validation, model)
    run = _Fit(model, train, recipe, seed, loss or _cross_entropy(recipe), precision, compiled)
    if resume is not None:
        run.restore(resume)
    stop = StopRequest(on_stop is not None and processes() == 1)
    total, done = recipe.epochs * run.steps, run.epoch * run.steps + run.step
    # disable=None: no bar where stderr is not a terminal; one line an epoch is printed there instead.
    silent = label is None or rank() > 0
    bar = tqdm(total=total, initial=done, desc=label, unit="step", disable=silent or None, leave=False)
    history: list[dict[str, Any]] = []
    with bar, stop.listening():
        while run.epoch < recipe.epochs:
            for _ in run.epoch_steps():
                bar.update()
                if not math.isfinite(run.last_loss):
                    what = f"{label or 'training'} diverged in epoch {run.epoch + 1}: the loss is {run.last_loss}"
                    raise InputError(f"{what}; try a smaller learning rate")
                if stop.received and run.step < run.steps:
                    assert on_stop is not None
                    with run.averaged():
                        on_stop(run.state())
                    raise KeyboardInterrupt
            with run.averaged():
                row = run.finish_epoch(validation)
                history.append(row)
                measured = [key for key in row if key.endswith(("loss", "error"))]
                shown = ", ".join(f"{key.replace('_', ' ')} {row[key]:.4g}" for key in measured)
                bar.set_postfix_str(shown)
                if bar.disable and not silent:
                    print(
                        f"{label}: epoch {run.epoch}/{recipe.epochs}, {shown}, {row['seconds']:.1f} s", file=sys.stderr
                    )
                after_epoch(row, run.state())
            if stop.received:
                raise KeyboardInterrupt
        run.keep_average()
    return history


def _cross_entropy(recipe: Recipe) -> Loss:
    return lambda images, scores, labels: F.cross_entropy(scores, labels, label_smoothing=recipe.label_smoothing)


class _Fit:
    """A training run between two of its steps: network, optimizer, position, and what was summed up in the epoch."""

    def __init__(
        self, model: nn.Module, train: Split, recipe: Recipe, seed: int, loss: Loss, precision: str, compiled: bool
    ) -> None:
        if precision not in PRECISIONS:
            raise one_of("precision", precision, PRECISIONS)
        like = next(model.parameters())
        self.model, self.recipe, self.seed, self.loss = model, recipe, seed, loss
        self.images, self.labels = train.images.to(like), train.labels.to(like.device, torch.int64)
        self.device = like.device
        self.autocast = precision == "bfloat16"
        self.optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.forward: Callable[[Tensor], Tensor] = model
        if processes() > 1:
            # The batch norms see to their statistics themselves.
            self.forward = DistributedDataParallel(model, broadcast_buffers=False)
        if compiled:
            _check_compiler(self.device)
            self.forward = torch.compile(self.forward)
        self.steps = steps_of_epoch(len(self.labels), recipe.batch_size)
        self.average = [value.clone() for value in self._averageable()] if recipe.averaging else []
        self.epoch = self.step = 0
        self.loss_sum, self.wrong, self.seconds = 0.0, 0, 0.0
        self.last_loss = 0.0

    def epoch_steps(self) -> Iterator[None]:
        """The rest of the steps of this epoch, one after the other."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        draws = torch.rand(len(order), DRAWS, generator=generator)
        batches = _batches(order, self.recipe.batch_size)
        if len(batches[-1]) < processes():
            raise InputError(
                f"the last batch has {len(batches[-1])} images for {processes()} processes; take another size"
            )
        self.model.train()
        for batch in batches[self.step :]:
            began = time.perf_counter()
            self._step(batch, draws[batch])
            self.step += 1
            self.seconds += time.perf_counter() - began
            yield

    def _step(self, batch: Tensor, draws: Tensor) -> None:
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.recipe.rate(self.epoch, self.step / self.steps)
        mine = torch.arange(len(batch)).tensor_split(processes())[rank()]
        which = batch[mine].to(self.device)
        images, labels = augment(self.images[which], draws[mine], self.recipe.augmentation), self.labels[which]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            scores = self.forward(images)
        scores = scores.to(self.images.dtype)
        value = self.loss(images, scores, labels)
        if self.recipe.separability:
            value = value + self.recipe.separability * rank1_residual(self.model, self.recipe.separability_form)
        self.optimizer.zero_grad(set_to_none=True)
        # The mean over processes, which is what their gradients are combined by, is that over the images.
        (value * (len(mine) * processes() / len(batch))).backward()
        self.optimizer.step()
        # Of the whole batch, so that all processes see at once that it is not finite.
        self.last_loss = sum_over_processes(value.detach() * (len(mine) / len(batch))).item()
        self.loss_sum += self.last_loss * len(batch)
        self.wrong += int((scores.argmax(1) != labels).sum())
        if self.average:
            number = self.epoch * self.steps + self.step
            decay = min(self.recipe.averaging, (1 + number) / (10 + number))  # the first steps are soon forgotten
            with torch.no_grad():
                for kept, value in zip(self.average, self._averageable(), strict=True):
                    kept.lerp_(value, 1 - decay)

    def finish_epoch(self, validation: Split | None) -> dict[str, Any]:
        """The row of the history; the next epoch begins."""
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
        """Everything that a continuation needs beside the network's state."""
        state: State = {"optimizer": self.optimizer.state_dict(), "epochs_done": self.epoch}
        if self.step:
            partial = {"step": self.step, "loss_sum": self.loss_sum, "wrong": self.wrong, "seconds": self.seconds}
            state["partial_epoch"] = partial
        if self.average:
            state["weights"] = self.average  # within averaged(), the two have changed places
        return state

    def restore(self, state: State) -> None:
        """Go on from there; the network has its weights already.

        Raises:
            InputError: the state does not fit.
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
            if self.average:
                with torch.no_grad():
                    for kept, value, now in zip(self.average, self._averageable(), state["weights"], strict=True):
                        kept.copy_(value)
                        value.copy_(now)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"the state of the run does not fit the network and its recipe: {error}") from error

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """For a while, the network has its averaged weights, if it has any."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def keep_average(self) -> None:
        """The averaged weights for good."""
        self._exchange()
        self.average = []

    def _exchange(self) -> None:
        with torch.no_grad():
            for kept, value in zip(self.average, self._averageable() if self.average else [], strict=True):
                now = value.clone()
                value.copy_(kept)
                kept.copy_(now)

    def _averageable(self) -> list[Tensor]:
        return [value.detach() for value in self.model.state_dict().values() if value.is_floating_point()]


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """Batches of ``size`` and a last one of what is left; a single image left over joins the batch before it.

    Batch norm cannot be trained on one image whose map has one pixel.
    """
    batches = list(order.split(size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def steps_of_epoch(images: int, batch_size: int) -> int:
    """How many steps an epoch has."""
    return len(_batches(torch.arange(images), batch_size))


def _check_compiler(device: torch.device) -> None:
    """Raises InputError if ``torch.compile`` cannot compile the smallest function."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except RuntimeError as error:  # of several kinds: no compiler, one that fails, or no headers
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"torch.compile does not work here ({reason}); it needs a C++ compiler") from error


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
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "kernel": kernel_config(),
        **({"tf32": torch.backends.cudnn.allow_tf32} if on_gpu else {}),
    }
