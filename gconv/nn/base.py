"""The base class of the group-convolution layers: arguments, index tables, and the forward pass."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx, nn

from gconv.functional.expansion import (
    Sampling,
    expand,
    from_group_major,
    gconv2d,
    has_channels_last_strides,
    to_group_major,
)
from gconv.functional.expansion import relu as relu_of
from gconv.functional.form_base import Execution, ExecutionChoice, FilterShape
from gconv.groups.point_groups import Group
from gconv.groups.point_groups import group as find_group
from gconv.kernels.dispatch import mixes_pay
from gconv.kernels.library import is_supported
from gconv.kernels.ops import Settings, constant_for_compilers, is_for_operator, separable_conv, settings_of
from gconv.kernels.separable_conv import Kernel, full_kernel, full_parameters
from gconv.kernels.small_conv import convolve
from gconv.system.errors import InputError

from .arguments import at_least, refuse_options, square
from .index_tables import IndexedModule
from .packed_weights import PackedCache, PackedWeights, RunConfig
from .symbolic import is_traced_alone, node_of


class GroupConvBase(IndexedModule, ABC):
    """What all layers share: the arguments, the index tables, the bias, and the forward pass.

    A forward pass makes the filters of its convolutions from the parameters. In eval mode without gradients on a CPU
    the filters are kept for the next passes, until a parameter differs by value from what they were made from. State
    dicts, copies and pickles do not have them, and they are dropped when the layer goes back to training.
    """

    bias: nn.Parameter | None
    weight: Any  # the generator
    _factors: ClassVar[tuple[str, ...]]  # the names of the filter's parameters
    _execution: ExecutionChoice = "dense"
    _cache: PackedCache | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        group: str | Group,
        groups: int = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refuse_options(type(self).__name__, bias, groups, padding_mode)
        self.in_channels = at_least(1, "in_channels", in_channels)
        self.out_channels = at_least(1, "out_channels", out_channels)
        self.kernel_size = square(1, "kernel_size", kernel_size)
        self.stride = square(1, "stride", stride)
        self.padding = square(0, "padding", padding)
        self.dilation = square(1, "dilation", dilation)
        self.group = find_group(group)
        self.bias = nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype)) if bias else None
        self._add_tables(device)
        self._add_filter({"device": device, "dtype": dtype})
        self.reset_parameters()

    @abstractmethod
    def _add_filter(self, like: dict[str, Any]) -> None:
        """Create the parameters of the filter, on the device and with the dtype in ``like``."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw new values for all parameters."""

    @property
    def filter_shape(self) -> FilterShape:
        """``(O, I, S_in, k)`` of the generator."""
        s_in = 1 if self._lifting else self.group.order
        return FilterShape(self.out_channels, self.in_channels, s_in, self.kernel_size[0])

    @property
    def sampling(self) -> Sampling:
        """Stride, padding and dilation, each the same along both axes."""
        return Sampling(self.stride[0], self.padding[0], self.dilation[0])

    @property
    def fan_in(self) -> int:
        """The number of inputs that each output sums over: ``I S_in k k``."""
        return math.prod(self.filter_shape[1:]) * self.kernel_size[0]

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates per output position of the convolution with the expanded filter."""
        return self.out_channels * self.group.order * self.fan_in

    def macs(self, execution: str | None = None, kernel: str | None = None) -> tuple[int, int]:
        """Multiply-accumulates per position of the (input map, output map), as executed; see :func:`gconv.cost`."""
        return 0, self.dense_macs

    @property
    def execution(self) -> ExecutionChoice:
        """How the layer is told to compute its output: ``"auto"``, ``"dense"``, ``"factorized"`` or ``"irrep"``.

        Full layers have ``"dense"`` only. See :attr:`resolved_execution` for what runs.

        Raises:
            InputError: on assignment of a value that the layer does not have.
        """
        return self._execution

    @execution.setter
    def execution(self, execution: str) -> None:
        self._execution = self._checked_execution(execution)

    @property
    def resolved_execution(self) -> Execution:
        """How the layer runs on this machine: ``"dense"``, ``"factorized"`` or ``"irrep"``."""
        return "dense"

    @property
    def _execution_without_kernel(self) -> Execution:
        """How the layer runs in PyTorch's operations."""
        return "dense"

    def _checked_execution(self, execution: str) -> ExecutionChoice:
        if execution != "dense":
            raise InputError(f"{type(self).__name__} has no execution {execution!r}; accepted: dense")
        return "dense"

    def _reset_bias(self) -> None:
        """Draw the bias as ``nn.Conv2d`` does."""
        if self.bias is not None:
            bound = 1 / math.sqrt(self.fan_in)
            nn.init.uniform_(self.bias, -bound, bound)

    def _check_input(self, x: Tensor) -> None:
        i, s_in = self.filter_shape[1:3]
        if not ((x.dim() == 5 and x.shape[1:3] == (i, s_in)) or (x.dim() == 4 and s_in == 1 and x.shape[1] == i)):
            accepted = f"[N, {i}, {s_in}, H, W]" + (f" or [N, {i}, H, W]" if s_in == 1 else "")
            raise InputError(f"{type(self).__name__} got an input of shape {list(x.shape)}; accepted: {accepted}")

    def forward(self, x: Tensor, *, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """The layer's output.

        Args:
            x: a map, in the shape that the class states.
            residual: a map with the shape of the output, which is added to it.
            relu: whether to apply ReLU at the end.

        Returns:
            ``[N, O, S, H', W']``.

        Raises:
            InputError: the input has another shape.
        """
        if type(x) is not Tensor and isinstance(x, fx.Proxy):
            return self._node(x, residual, relu)
        self._check_input(x)
        if x.dim() == 4 and not self._lifting:
            x = x.unsqueeze(2)
        parameters = self._plain_parameters(x)
        kernel = None if parameters is None else self._kernel_for(x, parameters)
        settings = self._operator_settings() if kernel is None and is_for_operator(x) else None
        if settings is not None:
            y = separable_conv(x, *self._kernel_parameters(), self.bias, *settings)
        elif kernel is None:
            planar = to_group_major(x)
            how = RunConfig(self._execution_without_kernel, has_channels_last_strides(planar))
            y = from_group_major(self._run(planar, self._prepared(how, parameters)), self.group.order)
        elif kernel.can_fuse_add(residual, x):
            if torch.is_grad_enabled():
                y, residual = kernel.run(x, *self._kernel_parameters(), self.bias, residual), None
            else:
                (packed,) = self._prepared(RunConfig(self._execution_without_kernel, True, kernel), parameters).filters
                return kernel.forward(x, packed, residual, relu)
        else:
            y = GroupConvBase.forward(self, x)
        y = y if residual is None else y + residual
        return relu_of(y) if relu else y

    def _node(self, x: Any, residual: Any, relu: Any) -> Any:
        """The layer in a graph of ``torch.fx``: one node, or its definition where the layer itself is traced."""
        if is_traced_alone(self, x):
            return _by_definition(x, self.weight, self.bias, self.group.name, self.sampling, residual, relu)
        overridden = type(self).forward is not GroupConvBase.forward
        return node_of(self, x, _forward_without_hooks, overridden, residual=residual, relu=relu)

    @abstractmethod
    def _new_filters(self, how: RunConfig) -> tuple[Any, ...]:
        """The filters of the convolutions, from the parameters."""

    def _expanded(self, weight: Tensor, channels_last: bool) -> Tensor:
        """The expanded filter in the memory format of the maps. In another one, each convolution would copy it."""
        return expand(weight, self._tables_at(weight.device).expansion, group_major=True, channels_last=channels_last)

    def _run(self, x: Tensor, prepared: PackedWeights) -> Tensor:
        """The convolutions, ``[N, S_in I, H, W]`` to ``[N, S O, H', W']``. Here it is one, with the expanded filter."""
        (weight,) = prepared.filters
        return convolve(x, weight, prepared.bias, *self.sampling)

    def _prepare(self, how: RunConfig) -> PackedWeights:
        if how.kernel is not None:
            return PackedWeights((how.kernel.pack(*self._kernel_parameters(), self.bias),), None)
        bias = None if self.bias is None else self.bias.repeat(self.group.order)
        return PackedWeights(self._new_filters(how), bias)

    @property
    def runs_in_irreps(self) -> bool:
        """Whether the compiled kernel runs the full filter as group 1x1 mixing of single pixels (:class:`GConv2d`)."""
        whole = self._execution_without_kernel == "dense" and not self._lifting
        return whole and mixes_pay(self.group, self.filter_shape)

    def _kernel(self) -> Kernel | None:
        """The compiled kernel for this layer; None if PyTorch's operations run it."""
        if not self.runs_in_irreps:
            return None
        return full_kernel(self.group, self.filter_shape, self.sampling, self.bias is not None)

    @constant_for_compilers
    def _operator_settings(self) -> Settings | None:
        """How the operator that compilers know runs this layer; None where there is no compiled kernel for it."""
        return settings_of(self._kernel())

    def _kernel_parameters(self) -> tuple[Tensor, Tensor]:
        """The factors that the compiled kernel reads: the group mixing and the spatial kernels."""
        return full_parameters(self.weight, self.tables.pixels, self.filter_shape)

    def _kernel_for(self, x: Tensor, parameters: list[Tensor]) -> Kernel | None:
        """The compiled kernel for this layer, if it supports the map and the parameters."""
        kernel = self._kernel()
        usual = kernel is not None and is_supported(x, *parameters) and kernel.is_supported(x)
        return kernel if usual else None

    def _plain_parameters(self, x: Tensor) -> list[Tensor] | None:
        """The parameters of a layer on a CPU that nothing transforms; None for all others.

        None under compilers and tracers, and where a parameter is not an ``nn.Parameter``, because a functional call or
        a parametrisation has put another tensor in its place.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:  # type: ignore[attr-defined]
            return None
        own: list[Tensor] = []
        for name in (*self._factors, "bias"):
            parameter = self._parameters[name] if name in self._parameters else getattr(self, name)
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter or not parameter.is_cpu:
                return None
            own.append(parameter)
        return own

    def _prepared(self, how: RunConfig, parameters: list[Tensor] | None) -> PackedWeights:
        """The packed weights, kept from an earlier pass where that is possible."""
        if parameters is None:
            return self._prepare(how)
        # Under autocast the packed weights may be in half precision.
        if self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            if self._cache is not None:
                self._cache = None
            return self._prepare(how)
        cache = self._cache  # read once: another thread may replace it
        if cache is None or not cache.is_of(how, parameters):
            cache = PackedCache(how, [p.detach().clone() for p in parameters], self._prepare(how))
            self._cache = cache
        return cache.prepared

    def _forget(self) -> None:
        self._cache = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode as for any module. Training drops the filters that eval mode has kept."""
        if mode:
            self._cache = None
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """As of any module; PyTorch's metadata, which stands beside the tensors, also gets the layer's group and form.

        The names and shapes of the tensors do not tell them. Loading ignores them, and a reader of bare weights uses
        them (:func:`gconv.interop.readers.plain_state`).
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {}).update(self._kind())

    def _kind(self) -> dict[str, str]:
        """The group and, if there is one, the separable form, by their names."""
        return {"group": self.group.name}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_cache"}

    def _settings(self) -> dict[str, Any]:
        """Keywords of the constructor for a layer of the same shape, group and sampling."""
        like = next(self.parameters())
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "bias": self.bias is not None,
            "group": self.group,
            "device": like.device,
            "dtype": like.dtype,
        }

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, group={self.group.name}, kernel_size={self.kernel_size[0]}"
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
            value = getattr(self, name)[0]
            text += "" if value == default else f", {name}={value}"
        return text + ("" if self.bias is not None else ", bias=False")


def _forward_without_hooks(
    layer: GroupConvBase, x: Tensor, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    return GroupConvBase.forward(layer, x, residual=residual, relu=relu)


@fx.wrap
def _by_definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group: str,
    sampling: Sampling,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    y = gconv2d(x, weight, bias, group, sampling)
    y = y if residual is None else y + residual
    return relu_of(y) if relu else y
