"""The exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedWeights:
    """An exponential moving average of all weights and batch-norm statistics of a network.

    Args:
        model: the network, which is being trained.
        decay: how much of the average stays in every step, below 1. In the first steps less of it stays, so that the
            initial weights are soon forgotten: ``(1 + n) / (10 + n)`` in step ``n``. With 0 there is no average, and
            the methods do nothing.

    Attributes:
        values: the averages, in the order of the network's state dict. While they are in use, the network's own
            weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self.values = [value.clone() for value in self._weights()] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after a step, whose number counts from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for average, value in self._pairs():
            average.lerp_(value, 1 - decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While this context is open, the network has its averaged weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def keep(self) -> None:
        """Give the network its averaged weights for good."""
        self._exchange()
        self.values = []

    @torch.no_grad()
    def restore(self, weights: list[Tensor]) -> None:
        """Continue: the network has its averaged weights, and ``weights`` are its own.

        Raises:
            ValueError: there are more or fewer of them than the network has.
            RuntimeError: they have other shapes.
        """
        for (average, value), own in zip(self._pairs(), weights, strict=True):
            average.copy_(value)
            value.copy_(own)

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, value in self._pairs():
            now = value.clone()
            value.copy_(average)
            average.copy_(now)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.values, self._weights(), strict=True)) if self.values else []

    def _weights(self) -> list[Tensor]:
        return [value.detach() for value in self._model.state_dict().values() if value.is_floating_point()]
