"""Re-estimating batch-norm statistics after the filters before them have changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.nn.modes import evaluating
from gconv.system.errors import InputError


def reestimate_batchnorm(model: nn.Module, images: Tensor, *, batch_size: int = 500) -> None:
    """Replace the running mean and variance of every batch-norm layer by averages over these images, in place.

    It takes one pass without gradients. Batch-norm layers normalise by the statistics of the batch, and keep the plain
    average of these over batches of (nearly) equal size. Every other layer, such as dropout, stays in eval mode. Modes
    and momenta are put back afterwards. Without batch norm nothing happens. Side effect: ``num_batches_tracked`` counts
    from zero.

    Args:
        model: any network.
        images: ``[N, ...]``, inputs like those that the network will see: training images, never test images.
        batch_size: how many images run at a time. Larger batches estimate the variance better.

    Raises:
        InputError: there are no images.
    """
    if len(images) == 0:
        raise InputError("batch norm cannot be re-estimated without images")
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    like = next(model.parameters())
    with _estimating(model, layers), torch.no_grad():
        for batch in images.tensor_split(-(-len(images) // batch_size)):
            model(batch.to(like))


@contextmanager
def _estimating(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    momenta = [layer.momentum for layer in layers]
    with evaluating(model):
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # PyTorch's cumulative average
                layer.train()
            yield
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
