"""Measured time: which execution of a layer is the fastest here, and what a network takes."""

from __future__ import annotations

import copy
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gconv.functional.form_base import Execution
from gconv.nn.capture import capture
from gconv.nn.modes import evaluating
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.memory import raise_mmap_threshold

BATCH = 16
_ROUNDS = 15
BUDGET_ROUNDS = 100
"""Rounds of :func:`latency` where a budget is to be kept, because a few rounds tell the time only roughly."""
_SECONDS = 3.0
_LAYER_SECONDS = 0.1
_TRIAL = 3
_HOPELESS = 2.0
_MARGIN = 0.97  # another execution than dense must take less than this share of its time, so that noise does not decide


def medians(
    runs: Sequence[Callable[[], object]],
    *,
    rounds: int = _ROUNDS,
    seconds: float = _SECONDS,
    cuda: bool = False,
    hopeless: float = math.inf,
) -> tuple[list[float], int]:
    """The median milliseconds of each run, and the number of rounds.

    In every round each run has its turn, so that a drift of the machine's speed affects all of them alike.

    Args:
        runs: what is timed.
        rounds: how many there are at most, after a first one that warms up.
        seconds: no round begins later than this, but there is always one.
        cuda: wait for the GPU.
        hopeless: a run whose best of three rounds is slower than the best of all by this factor is timed no further.
    """
    raise_mmap_threshold()  # so it is in a process that loads a network by gconv.load, whatever this one did before
    times: list[list[float]] = [[] for _ in runs]
    racing = list(zip(runs, times, strict=True))
    began = time.perf_counter()
    for turn in range(rounds + 1):
        for run, kept in racing:
            start = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            if turn:
                kept.append(1000 * (time.perf_counter() - start))
        if turn and time.perf_counter() - began > seconds:
            break
        if turn == _TRIAL:
            limit = hopeless * min(map(min, times))
            racing = [(run, kept) for run, kept in racing if min(kept) <= limit]
    return [statistics.median(kept) for kept in times], max(map(len, times))


def machine(device: torch.device) -> str:
    """The name of the processor or GPU that the times are measured on."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    """The processor's name if the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine()


def latency(before: nn.Module, after: nn.Module, images: Tensor, *, rounds: int = _ROUNDS) -> dict[str, Any]:
    """Median milliseconds of a forward pass of two networks in eval mode, and how they were measured."""
    with torch.inference_mode():
        times, done = medians([lambda: before(images), lambda: after(images)], rounds=rounds, cuda=images.is_cuda)
    return {
        "milliseconds": [round(value, 3) for value in times],
        "batch": len(images),
        "rounds": done,
        "machine": machine(images.device),
        "threads": torch.get_num_threads(),
    }


def layer_inputs(model: nn.Module, names: Sequence[str], input_shape: Sequence[int]) -> dict[str, Tensor]:
    """A batch of what each layer reads on random images, in its last call if there are several."""
    like = next(model.parameters())
    images = torch.rand(BATCH, *input_shape, generator=torch.Generator().manual_seed(0)).to(like)
    with capture(model, inputs=names) as seen, evaluating(model), torch.no_grad():
        model(images)
    return seen.inputs


def layer_times(layer: nn.Module, x: Tensor, others: Sequence[nn.Module] = ()) -> list[float]:
    """Median milliseconds of a layer and of others on the same input, in eval mode; they take turns.

    Those that are far slower than the fastest one run a few rounds only, because nothing but their order matters.
    """
    layers = [copy.deepcopy(one).eval() for one in (layer, *others)]
    with torch.inference_mode():
        runs: list[Callable[[], object]] = [lambda one=one: one(x) for one in layers]  # type: ignore[misc]
        return medians(runs, seconds=_LAYER_SECONDS, cuda=x.is_cuda, hopeless=_HOPELESS)[0]


def fastest_execution(
    separable: SeparableGConv2d, x: Tensor, others: Sequence[nn.Module] = ()
) -> tuple[Execution, dict[Execution, float], list[float]]:
    """The execution to choose for a separable layer on such inputs.

    It is ``dense``, which takes the time of the full layer, unless another execution is faster beyond noise.

    Args:
        separable: the layer.
        x: a batch of its inputs.
        others: further layers that are timed on the same input, in turns with the executions.

    Returns:
        The execution; the milliseconds of every execution that the form has; the milliseconds of the others.
    """
    executions = separable.form.executions
    variants = [copy.deepcopy(separable) for _ in executions]
    for variant, execution in zip(variants, executions, strict=True):
        variant.execution = execution
    first, *rest = variants
    found = layer_times(first, x, (*rest, *others))
    times = dict(zip(executions, found, strict=False))
    fastest = min(times, key=times.__getitem__)
    return (fastest if times[fastest] < _MARGIN * times["dense"] else "dense"), times, found[len(executions) :]
