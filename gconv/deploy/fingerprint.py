"""Whether a network is still the one that a program was made from, and whether a program can stand in for it at all."""

from __future__ import annotations

from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.models.networks import Model
from gconv.nn.base import GroupConvBase
from gconv.nn.capture import forward_hooks
from gconv.nn.separable_conv import SeparableGConv2d

from .tracing import has_own_forward


def can_be_lowered(net: Model) -> bool:
    """Whether a program of ordinary layers would compute what the network computes, and as fast.

    No submodule may be in training mode, have a forward hook or a ``forward`` of its own, or compute a parameter from
    others (parametrisations). On a CPU, every layer must run dense, with finite weights in single precision.
    """
    modules = list(net.modules())
    if any(forward_hooks(modules)):
        return False
    return all(map(_runs_as_usual, modules)) and all(
        type(parameter) is nn.Parameter and (_is_counted(module) if parameter.is_cuda else _is_usual(parameter))
        for module in modules
        for parameter in module.parameters(recurse=False)
    )


def _runs_as_usual(module: nn.Module) -> bool:
    if module.training or has_own_forward(module):
        return False
    if not isinstance(module, GroupConvBase) or next(module.parameters()).is_cuda:
        return True
    runs_in_irreps = module.runs_in_irreps and module.kernel_size != (1, 1)  # there are few 1x1 layers
    return module.resolved_execution == "dense" and not runs_in_irreps


def _is_usual(parameter: nn.Parameter) -> bool:
    return parameter.is_cpu and parameter.dtype is torch.float32 and bool(parameter.isfinite().all())


def _is_counted(module: nn.Module) -> bool:
    """Whether PyTorch counts in-place changes of the module's tensors: not of tensors made in inference mode."""
    return not any(t.is_inference() for ts in (module.parameters(False), module.buffers(False)) for t in ts)


class Fingerprint:
    """What a network consisted of: its modules, their classes and hooks, how they run, and what their tensors hold.

    It is compared before every pass, so it is kept in a form that is compared fast.

    Args:
        net: the network.
        by_value: compare the values of the tensors, with a copy of them. Otherwise compare PyTorch's counters of
            in-place changes, which miss changes made through ``.data``. On a GPU the values cannot be compared
            without waiting for it.
    """

    def __init__(self, net: Model, *, by_value: bool) -> None:
        modules = list(net.modules())
        self._net = net
        self._kinds = [(module, type(module)) for module in modules]
        self._hooks = forward_hooks(modules)
        self._norms = [module for module in modules if isinstance(module, _BatchNorm)]
        self._executions = [(m, m.execution) for m in modules if isinstance(m, SeparableGConv2d)]
        parts = [part for m in modules for part in (m._modules, m._parameters)] + [m._buffers for m in self._norms]
        self._parts = [(part, list(part.values())) for part in parts if part]
        tensors = [value for _, values in self._parts for value in values if isinstance(value, Tensor)]
        self._tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        # As few comparisons as there are pieces of memory: after fuse, all parameters are in one.
        pieces = {tensor.untyped_storage().data_ptr(): tensor for tensor in self._tensors} if by_value else {}
        flat = [t.detach().new_empty(0).set_(t.untyped_storage()) for t in pieces.values()]
        self._memory = [(piece, piece.clone()) for piece in flat]
        self._versions = None if by_value else self._counters()

    def matches(self, net: Model) -> bool:
        """Whether ``net`` is that network, unchanged."""
        if self._net is not net or any(self._hooks):
            return False
        for module, kind in self._kinds:
            if type(module) is not kind or has_own_forward(module):
                return False
        for norm in self._norms:
            if norm.training:
                return False
        for layer, execution in self._executions:
            if layer.execution != execution:
                return False
        for part, values in self._parts:
            if len(part) != len(values) or not all(map(is_, part.values(), values)):
                return False
        if [tensor.data_ptr() for tensor in self._tensors] != self._places:
            return False
        if self._versions is None:
            return all(torch.equal(now, copy) for now, copy in self._memory)
        return self._counters() == self._versions

    def _counters(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]
