"""Group-convolution layers: lifting, full and separable, with the interface of ``nn.Conv2d``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from numbers import Integral
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from gconv.functional.expansion import (
    Sampling,
    Tables,
    expand,
    from_group_major,
    has_channels_last_strides,
    on_tensor_cores,
    to_group_major,
)
from gconv.functional.expansion import relu as relu_of
from gconv.functional.forms import FORMS, Execution, FilterShape, Form, check_execution, form_named
from gconv.functional.mixing import Basis, basis_of, basis_on
from gconv.groups.point_groups import Group
from gconv.groups.point_groups import group as find_group
from gconv.kernels.dispatch import Sizes, in_basis_pays, mixes_pay
from gconv.kernels.library import convolve, is_supported
from gconv.kernels.separable_conv import Kernel, kernel_of
from gconv.system.errors import InputError

_Layer = TypeVar("_Layer", bound="GroupConvBase")


class _RunConfig(NamedTuple):
    """How a layer runs: its execution, the memory format of the maps, and the compiled kernel, if that does it."""

    execution: Execution
    channels_last: bool
    kernel: Kernel | None = None


class _PackedWeights(NamedTuple):
    """What the convolutions of a layer take beside the input: their filters, and the bias along the group axis.

    All group-major, as the maps are inside the layers (:mod:`gconv.functional.expansion`). For the compiled kernel the
    one filter
    is all that it packs.
    """

    filters: tuple[Any, ...]
    bias: Tensor | None


class _Cache(NamedTuple):
    """What was prepared, and from what: how the layer runs, and copies of the parameters."""

    how: _RunConfig
    parameters: list[Tensor]
    prepared: _PackedWeights

    def is_of(self, how: _RunConfig, parameters: list[Tensor]) -> bool:
        """Whether these are still the same, by value: no version counter sees every way to change a parameter."""
        pairs = zip(parameters, self.parameters, strict=False)
        return (
            how == self.how
            and len(parameters) == len(self.parameters)
            and all(new.dtype == old.dtype and torch.equal(new, old) for new, old in pairs)
        )


class GroupConvBase(nn.Module, ABC):
    """What the layers share: arguments checked once, index tables, bias, the shapes of input and output.

    The tables are non-persistent buffers: they follow the module to its device and never enter the state dict.

    What the convolutions need is made from the parameters in every forward pass, but for eval mode without gradients
    on a CPU: there it is kept for as long as the parameters equal those that it was made from. Neither the state dict
    nor a copy or a pickle has it, and a layer that goes back to training lets it go.

    Attributes:
        execution: ``"dense"``, ``"factorized"`` or ``"irrep"``; dense but for some separable layers.
    """

    execution: Execution = "dense"
    bias: nn.Parameter | None
    weight: Any  # the generator
    _factors: ClassVar[tuple[str, ...]]  # the names of the filter's parameters
    _cache: _Cache | None = None
    _expansion: Tensor
    _relative: Tensor
    _pixels: Tensor
    _lifting = False

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = _at_least(1, "in_channels", in_channels)
        self.out_channels = _at_least(1, "out_channels", out_channels)
        self.kernel_size = _square(1, "kernel_size", kernel_size)
        self.stride = _square(1, "stride", stride)
        self.padding = _square(0, "padding", padding)
        self.dilation = _square(1, "dilation", dilation)
        self.group = find_group(group)
        self.bias = nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype)) if bias else None
        for name, table in self._new_tables(device)._asdict().items():
            self.register_buffer(f"_{name}", table, persistent=False)
        self._add_filter({"device": device, "dtype": dtype})
        self.reset_parameters()

    @abstractmethod
    def _add_filter(self, like: dict[str, Any]) -> None:
        """Create the parameters of the filter, on the device and with the dtype in ``like``."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""

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
        """Multiply-accumulates an output position of the convolution with the expanded filter."""
        return self.out_channels * self.group.order * self.fan_in

    def macs(self, execution: str | None = None) -> tuple[int, int]:
        """Multiply-accumulates per position of the (input map, output map), as executed; see :func:`gconv.cost`."""
        return 0, self.dense_macs

    @property
    def tables(self) -> Tables:
        """The index tables of this layer's group and kernel size, on its device."""
        return Tables(self._expansion, self._relative, self._pixels)

    def _new_tables(self, device: torch.device | str | None) -> Tables:
        return Tables.build(self.group, self.kernel_size[0], lifting=self._lifting, device=device)

    def _reset_shared(self) -> None:
        """The bias as ``nn.Conv2d`` draws it; the tables anew, as they hold nothing after ``to_empty()``."""
        self._cache = None  # made with the former tables
        for name, table in self._new_tables(self._expansion.device)._asdict().items():
            setattr(self, f"_{name}", table)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.fan_in)
            nn.init.uniform_(self.bias, -bound, bound)

    def _check_input(self, x: Tensor) -> None:
        i, s_in = self.filter_shape[1:3]
        if not ((x.dim() == 5 and x.shape[1:3] == (i, s_in)) or (x.dim() == 4 and s_in == 1 and x.shape[1] == i)):
            accepted = f"[N, {i}, {s_in}, H, W]" + (f" or [N, {i}, H, W]" if s_in == 1 else "")
            raise InputError(f"{type(self).__name__} got an input of shape {list(x.shape)}; accepted: {accepted}")

    def forward(self, x: Tensor, *, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """The layer's output ``[N, O, S, H', W']``; plus a map of that shape, and then ReLU, if asked.

        Raises:
            InputError: the input's shape does not fit.
        """
        self._check_input(x)
        if x.dim() == 4 and not self._lifting:
            x = x.unsqueeze(2)
        parameters = self._plain_parameters(x)
        kernel = None if parameters is None else self._kernel_for(x, parameters)
        if kernel is None:
            planar = to_group_major(x)
            prepared = self._prepared(_RunConfig(self.execution, has_channels_last_strides(planar)), parameters)
            y = from_group_major(self._run(planar, prepared), self.group.order)
        elif kernel.can_fuse_add(residual, x):
            if torch.is_grad_enabled():
                y, residual = kernel.run(x, *self._kernel_parameters(), self.bias, residual), None
            else:
                (packed,) = self._prepared(_RunConfig(self.execution, True, kernel), parameters).filters
                return kernel.forward(x, packed, residual, relu)
        else:
            y = self.forward(x)
        y = y if residual is None else y + residual
        return relu_of(y) if relu else y

    @abstractmethod
    def _new_filters(self, how: _RunConfig) -> tuple[Any, ...]:
        """The filters of the convolutions, from the parameters."""

    def _expanded(self, weight: Tensor, channels_last: bool) -> Tensor:
        """The dense filter in the memory format of the maps, or every call of the convolution would copy it there."""
        return expand(weight, self._expansion, group_major=True, channels_last=channels_last)

    def _run(self, x: Tensor, prepared: _PackedWeights) -> Tensor:
        """The convolutions, ``[N, S_in I, H, W]`` to ``[N, S O, H', W']``: here one with the expanded filter."""
        (weight,) = prepared.filters
        return convolve(x, weight, prepared.bias, *self.sampling)

    def _prepare(self, how: _RunConfig) -> _PackedWeights:
        if how.kernel is not None:
            return _PackedWeights((how.kernel.pack(*self._kernel_parameters(), self.bias),), None)
        bias = None if self.bias is None else self.bias.repeat(self.group.order)
        return _PackedWeights(self._new_filters(how), bias)

    @property
    def runs_in_irreps(self) -> bool:
        """Whether the compiled kernel, where it is, is to run the whole filter as mixes of pixels; see GConv2d."""
        whole = self.execution == "dense" and not self._lifting
        return whole and mixes_pay(self.group, self.filter_shape)

    def _kernel(self) -> Kernel | None:
        """The compiled kernel, where it is to run this layer."""
        if not self.runs_in_irreps:
            return None
        o, i, s, k = self.filter_shape
        sizes = Sizes(s, i, o, k * k, _PIXELS.spatial_first, k, *self.sampling)
        return kernel_of(self.group, sizes, True, self.bias is not None)

    def _kernel_parameters(self) -> tuple[Tensor, Tensor]:
        """The mix and the planar kernels that it takes."""
        o, i, s, k = self.filter_shape
        mix = _PIXELS.fold(self.weight, self._pixels).view(i, o, s, k * k).permute(0, 3, 1, 2)
        pixels = torch.eye(k * k, dtype=mix.dtype).view(1, k * k, k, k).expand(i, -1, -1, -1)
        return mix, pixels

    def _kernel_for(self, x: Tensor, parameters: list[Tensor]) -> Kernel | None:
        """The compiled kernel, if that is to run this layer and takes the map and the parameters."""
        kernel = self._kernel()
        usual = kernel is not None and is_supported(x, *parameters) and kernel.is_supported(x)
        return kernel if usual else None

    def _plain_parameters(self, x: Tensor) -> list[Tensor] | None:
        """The parameters, on a CPU; None where what is not seen here may come with a map, or stands in for them.

        These are compilers and tracers, and tensors of other types: of functional calls, parametrisations, tracers.
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

    def _prepared(self, how: _RunConfig, parameters: list[Tensor] | None) -> _PackedWeights:
        """What runs, made anew or kept from before."""
        if parameters is None:
            return self._prepare(how)
        # Autocast may round what is prepared.
        if self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            if self._cache is not None:
                self._cache = None
            return self._prepare(how)
        cache = self._cache  # read once: another thread may replace it
        if cache is None or not cache.is_of(how, parameters):
            cache = _Cache(how, [p.detach().clone() for p in parameters], self._prepare(how))
            self._cache = cache
        return cache.prepared

    def train(self, mode: bool = True) -> Self:
        """As of any module; what is kept in eval mode is let go."""
        if mode:
            self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}

    def _settings(self) -> dict[str, Any]:
        """The constructor's keywords that make a layer of the same shape, group and sampling."""
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


class FullConvBase(GroupConvBase):
    """A layer with the whole generator as its ``weight``, initialised as ``nn.Conv2d`` is at the expanded width."""

    weight: nn.Parameter
    _factors = ("weight",)

    def _add_filter(self, like: dict[str, Any]) -> None:
        o, i, s_in, k = self.filter_shape
        self.weight = nn.Parameter(torch.empty(o, i, s_in, k, k, **like))

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from ``+- 1 / sqrt(fan_in)``, fan_in counting the group axis."""
        bound = 1 / math.sqrt(self.fan_in)
        nn.init.uniform_(self.weight, -bound, bound)
        self._reset_shared()

    def _new_filters(self, how: _RunConfig) -> tuple[Any, ...]:
        return (self._expanded(self.weight, how.channels_last),)


class LiftingConv2d(FullConvBase):
    """From planar maps to the group: every planar kernel is applied in all its S turned copies.

    Input ``[N, I, H, W]`` (or ``[N, I, 1, H, W]``), output ``[N, O, S, H', W']``; ``weight [O, I, 1, k, k]``,
    ``bias [O]``. Arguments as ``nn.Conv2d``, square only: a pair must have equal entries, as must every quarter turn.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: k.
        stride: exact equivariance needs ``(n + 2 padding - dilation (k - 1) - 1) % stride == 0`` on maps of size n.
        padding: zeros added on each side.
        dilation: distance between kernel entries.
        bias: whether to learn an offset per channel, shared over the group axis.
        group: one of ``gconv.GROUPS``.
        device: where the parameters are made.
        dtype: their type.

    Raises:
        InputError: an argument is out of range, not square, or an unknown group.
    """

    _lifting = True


class GConv2d(FullConvBase):
    """Group convolution with the full filter: ``y[o, s] = sum_i sum_s' x[i, s'] * K_s[o, i, s'] + b[o]``.

    Input ``[N, I, S, H, W]``, output ``[N, O, S, H', W']``; ``weight [O, I, S, k, k]`` and ``bias [O]`` as in GrouPy.
    Arguments and errors as :class:`LiftingConv2d`.

    A full filter is a ``gc_in`` filter of rank ``k k``, whose planar kernels pick one pixel each. Where that has less
    than half the multiply-accumulates of the expanded filter, its mixes being in the irreducible representations of the
    group, the compiled kernel runs the layer so. :meth:`macs` counts the expanded filter all the same.
    """


_PIXELS = FORMS["gc_in"]


class SeparableGConv2d(GroupConvBase):
    """Group convolution with a filter of rank R in one of the separable forms (:mod:`gconv.functional.forms`).

    Input and output as :class:`GConv2d`. Parameters ``mix`` and ``spatial`` have the shapes listed in
    :mod:`gconv.functional.forms`; ``bias [O]``. Further arguments as :class:`LiftingConv2d`, and:

    Args:
        form: ``"g"``, ``"gc"``, ``"gc_in"``, ``"g_turned"`` or ``"gc_turned"``.
        rank: R, from 1 to ``form.max_rank(filter_shape)``.
        execution: ``"factorized"`` runs mix and planar kernels one after the other; ``"irrep"`` does so with the mix in
            the irreducible representations of the group (``gc`` and ``gc_in``); ``"dense"`` builds the full filter and
            runs as :class:`GConv2d` does. Same output to rounding. Default: the form's own, or ``"irrep"`` where the
            form has it and the size is one at which that is the faster way. On the tensor cores of a GPU ``"irrep"``
            mixes directly too, as it does under ``torch.compile`` where there are few channels.
    """

    _factors = ("mix", "spatial")

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
        form: str | Form = "gc",
        rank: int = 1,
        execution: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Plain attributes, set first because the base class makes the parameters that depend on them.
        self.form = form_named(form)
        self.rank = rank
        self._basis = basis_of(find_group(group))
        if execution is None:
            counts = _at_least(1, "out_channels", out_channels), _at_least(1, "in_channels", in_channels)
            steps, _ = _square(1, "stride", stride)
            execution = self.default_execution(self.form, find_group(group), *counts, steps)
        self.execution = check_execution(execution, self.form)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias,
            group=group,
            device=device,
            dtype=dtype,
        )

    @staticmethod
    def default_execution(form: Form, group: Group, out_channels: int, in_channels: int, stride: int = 1) -> Execution:
        """How a layer of this form and size runs unless it is told."""
        pays = in_basis_pays(group, out_channels, in_channels, stride)
        if pays is None:  # no kernel
            pays = basis_of(group).pays(out_channels, in_channels)
        return "irrep" if pays and "irrep" in form.executions else form.default_execution

    def _add_filter(self, like: dict[str, Any]) -> None:
        self.form.check_rank(self.rank, self.filter_shape)
        mix, spatial = self.form.factor_shapes(self.filter_shape, self.rank)
        self.mix = nn.Parameter(torch.empty(mix, **like))
        self.spatial = nn.Parameter(torch.empty(spatial, **like))

    def reset_parameters(self) -> None:
        """Draw the factors so that the *filter they stand for* has the variance of the full layer's.

        Each factor is drawn as the convolution that it runs as would be; then both are scaled alike, so that the mean
        square of the filter is exactly ``1 / (3 fan_in)``, the variance that ``nn.Conv2d`` draws with.
        """
        self._reset_shared()  # first: after to_empty() there are no tables, and a filter is built below
        fan_ins = self.form.fan_ins(self.filter_shape, self.rank)
        for factor, fan_in in zip((self.mix, self.spatial), fan_ins, strict=True):
            nn.init.uniform_(factor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if self.mix.is_meta:  # nothing to scale, and PyTorch would load its compiler for it: seconds
            return
        with torch.no_grad():
            scale = (3 * self.fan_in * self.weight.square().mean()) ** -0.25
            self.mix.mul_(scale)
            self.spatial.mul_(scale)

    @property
    def weight(self) -> Tensor:
        """The generator ``[O, I, S, k, k]`` that the factors stand for; differentiable, computed on each access."""
        return self.form.generator(self.mix, self.spatial, self.filter_shape, self._pixels)

    def _new_filters(self, how: _RunConfig) -> tuple[Any, ...]:
        if self.execution == "dense":
            return (self._expanded(self.weight, how.channels_last),)
        basis = self._basis_for(self.execution)
        if basis is not None and torch.compiler.is_compiling():
            # Without the compiled kernel they pay only where there are many channels.
            basis = basis if basis.pays(self.out_channels, self.in_channels) else None
        elif basis is not None:
            # What the irreducible representations save are multiply-accumulates; on tensor cores the mix is direct.
            direct = on_tensor_cores(self.mix)
            basis = None if direct else basis_on(self.group, self.mix.device, self.mix.dtype)
        return self.form.filters(self.mix, self.spatial, self.tables, basis)

    def _run(self, x: Tensor, prepared: _PackedWeights) -> Tensor:
        if self.execution == "dense":
            return super()._run(x, prepared)
        w, d = prepared.filters
        return self.form.run(x, w, d, prepared.bias, self.filter_shape, self.rank, self.sampling)

    def _kernel(self) -> Kernel | None:
        if self.execution == "dense" or "irrep" not in self.form.executions:
            return super()._kernel()
        o, i, s, k = self.filter_shape
        sizes = Sizes(s, i, o, self.rank, self.form.spatial_first, k, *self.sampling)
        return kernel_of(self.group, sizes, self.execution == "irrep", self.bias is not None)

    def _kernel_parameters(self) -> tuple[Tensor, Tensor]:
        return super()._kernel_parameters() if self.execution == "dense" else (self.mix, self.spatial)

    def _basis_for(self, execution: str) -> Basis | None:
        return self._basis if execution == "irrep" else None

    def macs(self, execution: str | None = None) -> tuple[int, int]:
        """As in the base class, under this ``execution`` or, by default, the layer's own."""
        execution = check_execution(self.execution if execution is None else execution, self.form)
        if execution == "dense":
            return super().macs()
        return self.form.macs_by_map(self.filter_shape, self.rank, self._basis_for(execution))

    def to_dense(self) -> GConv2d:
        """The full layer with the same output; its parameters are copies."""
        with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced
            full = GConv2d(**self._settings())
        return _copy_into(full, self, weight=self.weight)

    @staticmethod
    def like(
        layer: GConv2d | SeparableGConv2d, form: str | Form, rank: int, execution: str | None = None
    ) -> SeparableGConv2d:
        """A new, randomly initialised layer of the same shape, group and sampling as ``layer``.

        Raises:
            InputError: the layer does not map group to group, or the rank is out of range.
        """
        _check_separable(layer)
        return SeparableGConv2d(**layer._settings(), form=form, rank=rank, execution=execution)

    @staticmethod
    def from_dense(
        layer: GConv2d | SeparableGConv2d, form: str | Form, rank: int, execution: str | None = None
    ) -> SeparableGConv2d:
        """The best rank-R approximation of a layer in this form (Frobenius norm, SVD in float64); exact at full rank.

        Args:
            layer: a full layer, or a separable one to be factored anew.
            form: the form to use.
            rank: R.
            execution: as in the constructor.

        Raises:
            InputError: the layer does not map group to group, the rank is out of range, or its weight is not finite.
        """
        _check_separable(layer)
        mix, spatial = form_named(form).factor(layer.weight, rank, layer._pixels)
        return SeparableGConv2d.from_factors(layer, form, mix, spatial, execution=execution)

    @staticmethod
    def from_factors(
        layer: GConv2d | SeparableGConv2d,
        form: str | Form,
        mix: Tensor,
        spatial: Tensor,
        bias: Tensor | None = None,
        execution: str | None = None,
    ) -> SeparableGConv2d:
        """A layer with these factors, and the size, group, sampling, mode, dtype and device of ``layer``.

        Args:
            layer: a full or a separable layer.
            form: the form that the factors are of.
            mix: with the shape that :meth:`Form.factor_shapes <gconv.functional.forms.Form.factor_shapes>` states;
            copied.
            spatial: likewise; it tells the rank.
            bias: ``[O]``, for a layer that has one; by default the layer's own.
            execution: as in the constructor.

        Raises:
            InputError: the layer does not map group to group, or the factors or the bias do not fit it.
        """
        _check_separable(layer)
        form = form_named(form)
        rank = spatial.shape[-3] if spatial.dim() > 2 else 1
        form.check_rank(rank, layer.filter_shape)
        shapes = form.factor_shapes(layer.filter_shape, rank)
        if (mix.shape, spatial.shape) != shapes:
            given = f"factors of shape {list(mix.shape)} and {list(spatial.shape)} do not fit form {form.name!r}"
            raise InputError(f"{given}; accepted at rank {rank}: {list(shapes[0])} and {list(shapes[1])}")
        if bias is not None and (layer.bias is None or bias.shape != layer.bias.shape):
            accepted = "none, as the layer has none" if layer.bias is None else list(layer.bias.shape)
            raise InputError(f"a bias of shape {list(bias.shape)} does not fit; accepted: {accepted}")
        with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced
            separable = SeparableGConv2d.like(layer, form, rank, execution)
        replaced = {"mix": mix, "spatial": spatial} | ({} if bias is None else {"bias": bias})
        return _copy_into(separable, layer, **replaced)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form.name}, rank={self.rank}, execution={self.execution}"


def _copy_into(target: _Layer, source: GroupConvBase, **parameters: Tensor) -> _Layer:
    """Give ``target`` these parameters, the mode of ``source``, and its bias unless another one is given."""
    if source.bias is not None:
        parameters = {"bias": source.bias, **parameters}
    with torch.no_grad():
        for name, value in parameters.items():
            getattr(target, name).copy_(value)
    return target.train(source.training)


def _check_separable(layer: nn.Module) -> None:
    if not isinstance(layer, (GConv2d, SeparableGConv2d)):
        given = type(layer).__name__
        raise InputError(f"a {given} cannot be separated; accepted: a group-to-group layer, full or separable")


def _at_least(low: int, name: str, value: object) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise InputError(f"{name} is {value!r}; accepted: a whole number of at least {low}")
    return int(value)


def _square(low: int, name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """An int or a pair of equal ints, as a pair."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or pair[0] != pair[1]:
        raise InputError(f"{name} is {value!r}; accepted: a whole number, or a pair of equal ones (square only)")
    size = _at_least(low, name, pair[0])
    return size, size
