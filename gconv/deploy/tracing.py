"""What calls what in a network: its layers, and the operations between them."""

from __future__ import annotations

from torch import fx, nn

from gconv.models.zoo import Model
from gconv.nn.base import GroupConvBase


def trace(net: Model) -> fx.Graph:
    """What calls what: the layers of a network, and the operations in between, in the order they run."""
    return _Tracer().trace(net)


class _Tracer(fx.Tracer):
    """Looks into blocks and sequences, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (GroupConvBase, nn.Conv2d)) or not any(True for _ in m.children())
