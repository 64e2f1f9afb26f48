"""The peak memory of a pass: the largest total size of the tensors that are alive at the same time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from gconv.kernels.library import TensorLifetimeMode


class _Live(TensorLifetimeMode):
    """Adds up the storages that operations return, each from when it appears to when nothing holds it any more."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or PyTorch would load its compiler, which takes longer than the pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.live = {key: item for key, item in self.live.items() if not item[0].expired()}
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            # A view shares the storage of an input. That is counted already, or it was there before the pass.
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in inputs:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def forward_memory(model: nn.Module, images: Tensor) -> int:
    """Bytes of the tensors that a forward pass without gradients holds at its peak, beside the weights and its input.

    Memory that an operation uses inside, and frees before it returns, is not seen.
    """
    with torch.no_grad(), _Live() as tracker:
        model(images)
    return tracker.peak


def training_memory(model: nn.Module, images: Tensor) -> int:
    """Bytes of the tensors that a forward and a backward pass hold at their peak, beside the weights and the input.

    The loss is the mean cross-entropy against the first class. The gradients count. The model is left in training mode
    and with these gradients.
    """
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    model.train().zero_grad(set_to_none=True)
    with _Live() as tracker:
        F.cross_entropy(model(images), labels).backward()
    return tracker.peak
