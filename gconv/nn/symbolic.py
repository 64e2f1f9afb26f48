"""The layers in a graph of :func:`torch.fx.symbolic_trace`: one node each, as the layers of ``torch.nn`` are.

The default tracer looks into every module that is not from ``torch.nn``. It calls such a module with a *proxy* in place
of a tensor. A proxy has no shape and no strides, so the layers cannot choose how to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def is_traced_alone(layer: nn.Module, x: Any) -> bool:
    """Whether the tracer traces this layer itself, and not a network that the layer is a part of."""
    return getattr(x.tracer, "root", None) is layer


def node_of(layer: nn.Module, x: Any, forward: Callable[..., Tensor], overridden: bool, **options: Any) -> Any:
    """The output of a layer, as a node of the graph.

    Args:
        layer: a part of the network that is traced.
        x: its input.
        forward: a function of the module level that runs the layer without its hooks.
        overridden: whether the layer is of a subclass with a forward method of its own.
        options: keywords of ``forward``.
    """
    path = x.tracer.path_of_module(layer)
    if not (overridden or layer._forward_hooks or layer._forward_pre_hooks):
        return x.tracer.create_proxy("call_module", path, (x,), options)
    # The tracer has traced the hooks and the method of the subclass. A call of the module would run them again.
    module = x.tracer.create_proxy("get_attr", path, (), {})
    return x.tracer.create_proxy("call_function", forward, (module, x), options)
