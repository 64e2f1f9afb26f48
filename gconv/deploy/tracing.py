"""What a network calls: its layers, and the operations between them."""

from __future__ import annotations

from torch import fx, nn

from gconv.models.networks import Model
from gconv.nn.base import GroupConvBase


def trace(net: Model) -> fx.Graph:
    """The layers of a network, and the operations between them, in the order in which they run."""
    return _Tracer().trace(net)


class _Tracer(fx.Tracer):
    """Looks into blocks and sequences, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (GroupConvBase, nn.Conv2d)) or not any(True for _ in m.children())


def has_own_forward(layer: nn.Module) -> bool:
    """Whether this object has another ``forward`` than its class."""
    return "forward" in vars(layer)


def is_overridden(layer: nn.Module) -> bool:
    """Whether the object, or its class, has another ``forward`` than the known layer that it is derived from.

    Known are the layers of this package and of PyTorch. What an overridden layer computes does not follow from its
    kind.
    """
    known = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith(("gconv.", "torch.nn.")))
    return has_own_forward(layer) or getattr(type(layer), "forward", None) is not getattr(known, "forward", None)
