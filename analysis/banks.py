"""Filter banks: the learned filters of a network, layer by layer, in one convention and in float64."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from gconv.conv import GConv2d, LiftingConv2d, SeparableGConv2d
from gconv.groups import Group


@dataclass(frozen=True, eq=False)
class FilterBank:
    """The filters of one layer.

    Attributes:
        name: the layer's name in the network.
        weight: the generator ``[O, I, S_in, k, k]``, float64 on the CPU; ``S_in`` is 1 for a lifting layer.
        group: the group that it is expanded under.
    """

    name: str
    weight: Tensor
    group: Group

    @property
    def lifting(self) -> bool:
        """Whether the layer reads planar maps, so that there is no group axis to be redundant along."""
        return self.weight.shape[2] == 1 and self.group.order > 1


def filter_banks(model: nn.Module) -> list[FilterBank]:
    """The filter banks of all group-convolution layers, in the order of the network.

    A separable layer gives the full filter that its factors stand for.
    """
    return [
        FilterBank(name, layer.weight.detach().double().cpu(), layer.group)
        for name, layer in model.named_modules()
        if isinstance(layer, (LiftingConv2d, GConv2d, SeparableGConv2d))
    ]
