"""The separable group-convolution layer, with the interface of ``nn.Conv2d``."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gconv.functional.expansion import on_tensor_cores
from gconv.functional.form_base import Execution, ExecutionChoice, Form
from gconv.functional.forms import check_execution, form_named
from gconv.functional.mixing import basis_like, basis_of
from gconv.groups.point_groups import Group
from gconv.kernels.dispatch import Sizes
from gconv.kernels.separable_conv import Kernel, kernel_of
from gconv.system.errors import InputError

from .base import GroupConvBase
from .conv import GConv2d
from .execution import auto_execution, kernel_for
from .packed_weights import PackedWeights, RunConfig

_Layer = TypeVar("_Layer", bound=GroupConvBase)


class SeparableGConv2d(GroupConvBase):
    """Group convolution with a filter of rank R in one of the separable forms (:mod:`gconv.functional.forms`).

    Input and output are those of :class:`GConv2d`. The parameters are ``mix`` and ``spatial``, with the shapes that
    :mod:`gconv.functional.forms` lists, and ``bias [O]``. The arguments are those of :class:`LiftingConv2d`, and:

    Args:
        form: ``"g"``, ``"gc"``, ``"gc_in"``, ``"g_turned"`` or ``"gc_turned"``.
        rank: R, from 1 to ``form.max_rank(filter_shape)``.
        execution: how the layer computes its output; the result is the same to rounding. ``"factorized"`` runs the
            group 1x1 mixing and the spatial kernels one after the other. ``"irrep"``, for ``gc`` and ``gc_in``, does so
            with the mixing in the irreducible representations of the group; on the tensor cores of a GPU it mixes
            directly. ``"dense"`` builds the full filter and runs as :class:`GConv2d` does. ``"auto"``, or None, leaves
            the choice to the machine that the layer runs on (:mod:`gconv.nn.execution`): ``"irrep"`` where the form has
            it and it is faster for this size, and otherwise ``form.default_execution``.
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
        execution: str | None = "auto",
        groups: int = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Set before the base class makes the parameters, whose shapes depend on form and rank.
        self.form = form_named(form)
        self.rank = rank
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            bias,
            group=group,
            groups=groups,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self._basis = basis_of(self.group)
        self._auto_without_kernel = self._auto_execution("none")  # kept, as every pass without the kernel needs it
        self.execution = "auto" if execution is None else execution

    def _checked_execution(self, execution: str) -> ExecutionChoice:
        return check_execution(execution, self.form)

    @property
    def resolved_execution(self) -> Execution:
        """How the layer runs on this machine: ``execution``, or what ``"auto"`` stands for here.

        It holds for the layer's dtype and device. A pass that the compiled kernel cannot run, for example under
        autocast or for ``torch.export``, resolves ``"auto"`` as on a machine without the kernel.
        """
        execution = self._auto_execution() if self._execution == "auto" else self._execution
        return "factorized" if execution == "irrep" and on_tensor_cores(next(self.parameters())) else execution

    def _auto_execution(self, kernel: str | None = None) -> Execution:
        if kernel is None:
            kernel = kernel_for(next(self.parameters()))
        return auto_execution(self.form, self.group, self.filter_shape, self.rank, self.sampling, kernel)

    @property
    def _execution_without_kernel(self) -> Execution:
        return self._auto_without_kernel if self._execution == "auto" else self._execution

    def _add_filter(self, like: dict[str, Any]) -> None:
        self.form.check_rank(self.rank, self.filter_shape)
        mix, spatial = self.form.factor_shapes(self.filter_shape, self.rank)
        self.mix = nn.Parameter(torch.empty(mix, **like))
        self.spatial = nn.Parameter(torch.empty(spatial, **like))

    def reset_parameters(self) -> None:
        """Draw new factors such that their *filter* has the variance of the full layer's filter.

        Each factor is drawn as ``nn.Conv2d`` would draw it as a convolution of its own. Then both are multiplied by one
        number that makes the mean square of the filter exactly ``1 / (3 fan_in)``, the variance of a full filter.
        """
        self._reset_bias()
        fan_ins = self.form.fan_ins(self.filter_shape, self.rank)
        for factor, fan_in in zip((self.mix, self.spatial), fan_ins, strict=True):
            nn.init.uniform_(factor, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if self.mix.is_meta:  # there is nothing to scale, and PyTorch would load its compiler, which takes seconds
            return
        with torch.no_grad():
            scale = (3 * self.fan_in * self.weight.square().mean()) ** -0.25
            self.mix.mul_(scale)
            self.spatial.mul_(scale)

    @property
    def weight(self) -> Tensor:
        """The generator ``[O, I, S, k, k]`` of these factors. It is differentiable, and computed at each access."""
        return self.form.generator(self.mix, self.spatial, self.filter_shape, self.tables.pixels)

    def _new_filters(self, how: RunConfig) -> tuple[Any, ...]:
        if how.execution == "dense":
            return (self._expanded(self.weight, how.channels_last),)
        mix, spatial = self.mix, self.spatial
        basis = None
        # Irreducible representations save multiply-accumulates, which cost little on tensor cores.
        if how.execution == "irrep" and not on_tensor_cores(mix):
            basis = self._basis if torch.compiler.is_compiling() else basis_like(self.group, mix)
        return self.form.filters(mix, spatial, self._tables_at(mix.device), basis)

    def _run(self, x: Tensor, prepared: PackedWeights) -> Tensor:
        if self._execution_without_kernel == "dense":
            return super()._run(x, prepared)
        w, d = prepared.filters
        return self.form.run(x, w, d, prepared.bias, self.filter_shape, self.rank, self.sampling)

    def _kernel(self) -> Kernel | None:
        if self._execution == "dense" or "irrep" not in self.form.executions:
            return super()._kernel()
        o, i, s, k = self.filter_shape
        sizes = Sizes(s, i, o, self.rank, self.form.spatial_first, k, *self.sampling)
        in_basis = None if self._execution == "auto" else self._execution == "irrep"
        return kernel_of(self.group, sizes, in_basis, self.bias is not None)

    def _kernel_parameters(self) -> tuple[Tensor, Tensor]:
        return super()._kernel_parameters() if self._execution_without_kernel == "dense" else (self.mix, self.spatial)

    def macs(self, execution: str | None = None, kernel: str | None = None) -> tuple[int, int]:
        """As in the base class.

        Args:
            execution: the execution to count; by default the layer's own.
            kernel: resolve ``auto`` as on a machine of this class (:data:`gconv.kernels.dispatch.KERNELS`); by default
                as on this one.

        Raises:
            InputError: the layer has no such execution, or there is no such class.
        """
        if execution is None and kernel is None:
            execution = self.resolved_execution
        execution = check_execution(self._execution if execution is None else execution, self.form)
        if execution == "auto":
            execution = self._auto_execution(kernel)
        if execution == "dense":
            return super().macs()
        return self.form.macs_by_map(self.filter_shape, self.rank, self._basis if execution == "irrep" else None)

    def to_dense(self) -> GConv2d:
        """The full layer with the same output. Its parameters are copies."""
        with torch.random.fork_rng(devices=[]):  # the random values are replaced
            full = GConv2d(**self._settings())
        return _copy_into(full, self, weight=self.weight)

    @staticmethod
    def like(
        layer: GConv2d | SeparableGConv2d, form: str | Form, rank: int, execution: str | None = "auto"
    ) -> SeparableGConv2d:
        """A new, randomly initialised layer of the same shape, group and sampling as ``layer``.

        Raises:
            InputError: the layer does not map group to group, or the rank is out of range.
        """
        _check_separable(layer)
        return SeparableGConv2d(**layer._settings(), form=form, rank=rank, execution=execution)

    @staticmethod
    def from_dense(
        layer: GConv2d | SeparableGConv2d, form: str | Form, rank: int, execution: str | None = "auto"
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
        mix, spatial = form_named(form).factor(layer.weight, rank, layer.tables.pixels)
        return SeparableGConv2d.from_factors(layer, form, mix, spatial, execution=execution)

    @staticmethod
    def from_factors(
        layer: GConv2d | SeparableGConv2d,
        form: str | Form,
        mix: Tensor,
        spatial: Tensor,
        bias: Tensor | None = None,
        execution: str | None = "auto",
    ) -> SeparableGConv2d:
        """A layer with these factors, and the size, group, sampling, mode, dtype and device of ``layer``.

        Args:
            layer: a full or a separable layer.
            form: the form that the factors are of.
            mix: with the shape that :meth:`Form.factor_shapes <gconv.functional.form_base.Form.factor_shapes>` states.
                It is copied.
            spatial: likewise. Its shape tells the rank.
            bias: ``[O]``, for a layer that has one. By default the layer's own.
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
            way = "Leave it out, as the layer has none" if layer.bias is None else f"Give {list(layer.bias.shape)}"
            raise InputError(f"a bias of shape {list(bias.shape)} does not fit. {way}.")
        with torch.random.fork_rng(devices=[]):  # the random values are replaced
            separable = SeparableGConv2d.like(layer, form, rank, execution)
        replaced = {"mix": mix, "spatial": spatial} | ({} if bias is None else {"bias": bias})
        return _copy_into(separable, layer, **replaced)

    def _kind(self) -> dict[str, str]:
        return {**super()._kind(), "form": self.form.name}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form.name}, rank={self.rank}, execution={self.execution}"


def _copy_into(target: _Layer, source: GroupConvBase, **parameters: Tensor) -> _Layer:
    """Copy into ``target`` these parameters, the mode of ``source``, and its bias if none is among the parameters."""
    if source.bias is not None:
        parameters = {"bias": source.bias, **parameters}
    with torch.no_grad():
        for name, value in parameters.items():
            getattr(target, name).copy_(value)
    return target.train(source.training)


def _check_separable(layer: nn.Module) -> None:
    if not isinstance(layer, (GConv2d, SeparableGConv2d)):
        given = type(layer).__name__
        raise InputError(f"a {given} cannot be separated. Give a GConv2d or a SeparableGConv2d.")
