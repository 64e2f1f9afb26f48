"""Training in several processes with ``torch.distributed``. In a single process, nothing here has an effect."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from .errors import InputError


def processes() -> int:
    """The number of processes that train together; 1 if ``torch.distributed`` is not initialised."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0. Process 0 writes the files and prints."""
    return distributed.get_rank() if processes() > 1 else 0


def sum_over_processes(values: Tensor) -> Tensor:
    """Replace the values by their sum over all processes, and return them."""
    if processes() > 1:
        distributed.all_reduce(values)
    return values


@contextmanager
def joined(device: str) -> Iterator[str]:
    """While this context is open, this process takes part in the run that ``torchrun`` started, if it started one.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``. Every process uses the GPU whose number is its local rank.

    Yields:
        The kind of device of this process; ``device`` as it is given where ``torchrun`` started no run.

    Raises:
        InputError: the machine has fewer GPUs than processes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise InputError(
            f"process {local} of this machine has no GPU of its own; give --device cpu, or start fewer processes"
        )
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        if cuda:
            torch.cuda.set_device(local)
        yield "cuda" if cuda else "cpu"
    finally:
        distributed.destroy_process_group()
