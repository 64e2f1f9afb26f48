"""What training on several processes needs of ``torch.distributed``; all of it does nothing in a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from .errors import InputError


def processes() -> int:
    """How many processes train together; 1 unless ``torch.distributed`` was initialised."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is; number 0 writes and prints."""
    return distributed.get_rank() if processes() > 1 else 0


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of these values of all processes, in place."""
    if processes() > 1:
        distributed.all_reduce(values)
    return values


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Take part in the run that ``torchrun`` started, if it did; gives the kind of device of this process.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; every process takes the GPU of its local rank.

    Raises:
        InputError: a machine has fewer GPUs than processes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise InputError(f"process {local} of this machine has no GPU of its own; accepted: --device cpu, or fewer")
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        if cuda:
            torch.cuda.set_device(local)
        yield "cuda" if cuda else "cpu"
    finally:
        distributed.destroy_process_group()
