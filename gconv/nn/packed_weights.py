"""What a layer makes of its parameters before it convolves, and the copy of it that is kept in eval mode."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gconv.functional.form_base import Execution
from gconv.kernels.separable_conv import Kernel


class RunConfig(NamedTuple):
    """How a layer runs: its execution, the memory format of the maps, and the compiled kernel if that runs it."""

    execution: Execution
    channels_last: bool
    kernel: Kernel | None = None


class PackedWeights(NamedTuple):
    """What the convolutions of a layer need beside the input: their filters, and the bias along the group axis.

    Both are group-major, as the maps inside the layers are (:mod:`gconv.functional.expansion`). The compiled kernel
    packs filters and bias into one tensor, which is then the only filter.
    """

    filters: tuple[Any, ...]
    bias: Tensor | None


class PackedCache(NamedTuple):
    """Packed weights, and what they were made from: how the layer ran, and copies of the parameters."""

    how: RunConfig
    parameters: list[Tensor]
    prepared: PackedWeights

    def is_of(self, how: RunConfig, parameters: list[Tensor]) -> bool:
        """Whether they are still right. Parameters are compared by value, as no version counter sees every change."""
        pairs = zip(parameters, self.parameters, strict=False)
        return (
            how == self.how
            and len(parameters) == len(self.parameters)
            and all(new.dtype == old.dtype and torch.equal(new, old) for new, old in pairs)
        )
