"""Memory: the peak of a pass, as the largest sum of live tensors; and how the C library keeps what is freed."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from .compiled import WatchesTensors

_USUAL_BLOCK = 31 * 2**20  # the largest that glibc learns from is 32 MiB with its own bytes and the alignment


class _Live(WatchesTensors):
    """Sums the storages that operations return, from when they appear to when nobody holds them any more."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or PyTorch would load its compiler, which takes longer than all that is done here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.live = {key: item for key, item in self.live.items() if not item[0].expired()}
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            # A view shares the storage of an input, which is counted already or was there before the pass.
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in inputs:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def forward_memory(model: nn.Module, images: Tensor) -> int:
    """Bytes of the tensors that a forward pass without gradients holds at its peak, beside the weights and its input.

    What an operation needs inside and frees before it returns is not seen.
    """
    with torch.no_grad(), _Live() as tracker:
        model(images)
    return tracker.peak


def training_memory(model: nn.Module, images: Tensor) -> int:
    """Bytes of the tensors that a forward and a backward pass hold at their peak, beside the weights and the input.

    The model in training mode, mean cross-entropy against the first class; its gradients count, and are left on it.
    """
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    model.train().zero_grad(set_to_none=True)
    with _Live() as tracker:
        F.cross_entropy(model(images), labels).backward()
    return tracker.peak


def keep_usual_blocks() -> None:
    """Let the C library keep freed blocks of the size of a small network's maps (below 31 MiB) for the next ones.

    glibc returns large blocks to the system at once, and gets new ones page by page, cleared, in every pass of a
    network. What is large it learns from the largest block freed so far, up to 32 MiB, so that
    the same network is fast or slow by what the process did before. This frees one such block, never touched, so it
    costs no memory; up to twice its size may stay with the process. Elsewhere it does nothing.
    """
    torch.empty(_USUAL_BLOCK, dtype=torch.uint8)


def reuse_freed_memory() -> None:
    """Let this process keep all memory that it frees, for its next tensors; on Linux with glibc, else nothing.

    Beyond :func:`keep_usual_blocks`, for the large maps of training. For programs that train, not for libraries.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            trim_threshold, mmap_max = -1, -4
            mallopt(mmap_max, 0)
            mallopt(trim_threshold, -1)
