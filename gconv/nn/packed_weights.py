"""What a layer makes of its parameters before it convolves, and the copy of it that is kept in eval mode."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gconv.functional.form_base import Execution
from gconv.kernels.separable_conv import Kernel


class RunConfig(NamedTuple):
    """How a layer runs: its execution, the memory format of the maps, and the compiled kernel, if that does it."""

    execution: Execution
    channels_last: bool
    kernel: Kernel | None = None


class PackedWeights(NamedTuple):
    """What the convolutions of a layer take beside the input: their filters, and the bias along the group axis.

    All group-major, as the maps are inside the layers (:mod:`gconv.functional.expansion`). For the compiled kernel the
    one filter
    is all that it packs.
    """

    filters: tuple[Any, ...]
    bias: Tensor | None


class PackedCache(NamedTuple):
    """What was prepared, and from what: how the layer runs, and copies of the parameters."""

    how: RunConfig
    parameters: list[Tensor]
    prepared: PackedWeights

    def is_of(self, how: RunConfig, parameters: list[Tensor]) -> bool:
        """Whether these are still the same, by value: no version counter sees every way to change a parameter."""
        pairs = zip(parameters, self.parameters, strict=False)
        return (
            how == self.how
            and len(parameters) == len(self.parameters)
            and all(new.dtype == old.dtype and torch.equal(new, old) for new, old in pairs)
        )
