"""Measured time: which execution of a layer is faster here, and what a network takes."""

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
from gconv.nn.modes import evaluating
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.memory import raise_mmap_threshold

BATCH = 16
_ROUNDS = 15
BUDGET_ROUNDS = 100
"""Of :func:`latency`, as far as the time goes, where a budget is to be kept: a few rounds tell it only roughly."""
_SECONDS = 3.0
_LAYER_SECONDS = 0.1
_TRIAL = 3
_HOPELESS = 2.0
_MARGIN = 0.97  # a layer leaves the dense execution only for one that is faster beyond noise


def medians(
    runs: Sequence[Callable[[], object]],
    *,
    rounds: int = _ROUNDS,
    seconds: float = _SECONDS,
    cuda: bool = False,
    hopeless: float = math.inf,
) -> tuple[list[float], int]:
    """Median milliseconds of each, taking turns so that a drift of the machine's speed hits all; and the rounds.

    Args:
        runs: what is timed.
        rounds: after the first, which warms up.
        seconds: none is begun after these, but for one.
        cuda: wait for the GPU.
        hopeless: a run whose best of three rounds takes more than this many times the best of all is not repeated.
    """
    raise_mmap_threshold()  # as a process has that loads a network by gconv.load, whatever this one did before
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
    """What the times are from."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine()


def latency(before: nn.Module, after: nn.Module, images: Tensor, *, rounds: int = _ROUNDS) -> dict[str, Any]:
    """Median forward times of two networks in eval mode, and with what they were measured."""
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
    """A batch of what each layer reads, for random images."""
    like = next(model.parameters())
    images = torch.rand(BATCH, *input_shape, generator=torch.Generator().manual_seed(0)).to(like)
    kept: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: kept.__setitem__(name, given[0])
        )
        for name in names
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def layer_times(layer: nn.Module, x: Tensor, others: Sequence[nn.Module] = ()) -> list[float]:
    """Median milliseconds of a layer and of others on the same input, in eval mode, interleaved.

    Those that are far from the fastest get but a few rounds, as only their order matters.
    """
    layers = [copy.deepcopy(one).eval() for one in (layer, *others)]
    with torch.inference_mode():
        runs: list[Callable[[], object]] = [lambda one=one: one(x) for one in layers]  # type: ignore[misc]
        return medians(runs, seconds=_LAYER_SECONDS, cuda=x.is_cuda, hopeless=_HOPELESS)[0]


def faster_execution(separable: SeparableGConv2d, x: Tensor) -> tuple[Execution, dict[Execution, float]]:
    """The execution to choose for a separable layer on such inputs, and the milliseconds of all that its form has.

    Dense, which runs in the time of the full layer, unless another one is faster beyond noise.
    """
    executions = separable.form.executions
    variants = [copy.deepcopy(separable) for _ in executions]
    for variant, execution in zip(variants, executions, strict=True):
        variant.execution = execution
    first, *others = variants
    times = dict(zip(executions, layer_times(first, x, others), strict=True))
    fastest = min(times, key=times.__getitem__)
    return (fastest if times[fastest] < _MARGIN * times["dense"] else "dense"), times
