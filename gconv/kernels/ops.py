"""The kernel of :mod:`gconv.kernels.separable_conv` as an operator of PyTorch, ``torch.ops.gconv.separable_conv``.

Layers call it while ``torch.compile`` compiles them. It has shapes for fake tensors, gradients, and a formula of its
FLOPs. Elsewhere layers call the kernel directly, which takes less time for small maps. Where the kernel is absent or
cannot take the map, the operator does the same by PyTorch's operations, on any device and in any type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gconv.functional.expansion import is_group_major, new_group_major
from gconv.functional.form_base import FilterShape
from gconv.functional.forms import FORMS
from gconv.functional.mixing import basis_of
from gconv.groups.point_groups import Group
from gconv.groups.point_groups import group as find_group

from .dispatch import Sizes
from .library import is_supported
from .separable_conv import Kernel, kernel_of, reference

Settings = tuple[str, bool, int, int, bool]
"""Of :func:`separable_conv`: group, spatial_first, stride, padding and in_basis."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_for_compilers(function: _Function) -> _Function:
    """A function that compilers call once and do not look into.

    As ``torch.compiler.assume_constant_result``, which would load the compiler for everybody.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def settings_of(kernel: Kernel | None) -> Settings | None:
    """What the operator takes beside the tensors, for the layers that a kernel is for."""
    if kernel is None:
        return None
    sizes = kernel.sizes
    return kernel.group.name, sizes.spatial_first, sizes.stride, sizes.padding, kernel.in_basis


def is_for_operator(x: Tensor) -> bool:
    """Whether a layer is to run as the operator on this map: while it is compiled, but not exported.

    An exported program is to run where this package is not.
    """
    if not torch.compiler.is_compiling():
        return False
    exporting = getattr(torch.compiler, "is_exporting", None)  # there since PyTorch 2.7
    if exporting is None or exporting() or torch.is_autocast_enabled("cpu"):
        return False
    return x.device.type == "cpu" and x.dtype is torch.float32


def sizes_of(
    x: Sequence[int], mix: Sequence[int], spatial: Sequence[int], spatial_first: bool, stride: int, padding: int
) -> Sizes:
    """The sizes of a layer, from the shapes of its map and its parameters."""
    first, rank, second, order = mix
    i, o = (first, second) if spatial_first else (second, first)
    return Sizes(order, i, o, rank, spatial_first, spatial[-1], stride, padding, 1, whole=spatial[0] == 0)


def _as_group_major(x: Tensor) -> Tensor:
    return x if is_group_major(x) else new_group_major(x, *x.shape).copy_(x)


def _kernel_for(
    x: Tensor, mix: Tensor, spatial: Tensor, bias: Tensor | None, group: str, sizes: Sizes, in_basis: bool
) -> Kernel | None:
    kernel = kernel_of(find_group(group), sizes, in_basis, bias is not None)
    parameters = [mix, spatial, *([] if bias is None else [bias])]
    usual = kernel is not None and is_supported(x, *parameters) and kernel.is_supported(x)
    return kernel if usual else None


class _Packs:
    """Packed parameters of the layers that ran last, beside copies of what they were made from."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, Lock()
        self._kept: dict[tuple[Kernel, int], tuple[list[Tensor], Tensor]] = {}

    def of(self, kernel: Kernel, mix: Tensor, spatial: Tensor, bias: Tensor | None) -> Tensor:
        """The parameters as the kernel reads them, made anew where any value has changed since."""
        parameters = [mix, spatial, *([] if bias is None else [bias])]
        key = kernel, mix.data_ptr()
        with self._lock:
            copies, packed = self._kept.pop(key, ([], mix))
        if not copies or not all(map(torch.equal, copies, parameters)):
            copies, packed = [t.detach().clone() for t in parameters], kernel.pack(mix, spatial, bias)
        with self._lock:
            self._kept[key] = copies, packed
            if len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]
        return packed


_packs = _Packs(64)


@torch.library.custom_op("gconv::separable_conv", mutates_args=())
def separable_conv(
    x: Tensor,
    mix: Tensor,
    spatial: Tensor,
    bias: Tensor | None,
    group: str,
    spatial_first: bool,
    stride: int,
    padding: int,
    in_basis: bool,
) -> Tensor:
    """A group convolution with a filter of the form ``gc``, or ``gc_in`` where ``spatial_first``.

    Args:
        x: ``[N, I, S, H, W]``.
        mix: ``[O, R, I, S]``, of ``gc_in`` ``[I, R, O, S]``.
        spatial: ``[O, R, k, k]``, of ``gc_in`` ``[I, R, k, k]``, of a full filter ``[0, k k, k, k]``.
        bias: ``[O]``, or None.
        group: the name of the group.
        spatial_first: whether the spatial kernels run before the mix.
        stride: the same along both axes.
        padding: zeros added on each side.
        in_basis: whether the mix is done in the irreducible representations of the group.

    Returns:
        ``[N, O, S, H', W']``.
    """
    x = _as_group_major(x)
    sizes = sizes_of(x.shape, mix.shape, spatial.shape, spatial_first, stride, padding)
    kernel = _kernel_for(x, mix, spatial, bias, group, sizes, in_basis)
    if kernel is None:
        return _as_group_major(reference(find_group(group), sizes, in_basis, x, mix, spatial, bias))
    return kernel.forward(x, _packs.of(kernel, mix, spatial, bias))


@separable_conv.register_fake
def _(
    x: Tensor,
    mix: Tensor,
    spatial: Tensor,
    bias: Tensor | None,
    group: str,
    spatial_first: bool,
    stride: int,
    padding: int,
    in_basis: bool,
) -> Tensor:
    sizes = sizes_of(x.shape, mix.shape, spatial.shape, spatial_first, stride, padding)
    return new_group_major(x, x.shape[0], sizes.out_channels, sizes.order, *sizes.output(x.shape[3], x.shape[4]))


@torch.library.custom_op("gconv::separable_conv_backward", mutates_args=())
def separable_conv_backward(
    gradient: Tensor,
    x: Tensor,
    mix: Tensor,
    spatial: Tensor,
    bias: Tensor | None,
    group: str,
    spatial_first: bool,
    stride: int,
    padding: int,
    in_basis: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`separable_conv` with respect to the map, the mix, the spatial kernels and the bias.

    The last one is empty where there is no bias.
    """
    x, gradient = _as_group_major(x), _as_group_major(gradient)
    sizes = sizes_of(x.shape, mix.shape, spatial.shape, spatial_first, stride, padding)
    kernel = _kernel_for(x, mix, spatial, bias, group, sizes, in_basis)
    if kernel is not None:
        of_x, of_mix, of_spatial, of_bias = kernel.backward(x, gradient, _packs.of(kernel, mix, spatial, bias), True)
        assert of_spatial is not None
    else:
        # PyTorch computes no gradients inside of an operator, but does in a new thread.
        with ThreadPoolExecutor(1) as pool:
            arguments = gradient, find_group(group), sizes, in_basis, x, mix, spatial, bias
            of_x, of_mix, of_spatial, of_bias = pool.submit(_reference_gradients, *arguments).result()
    empty = x.new_empty(0) if of_bias is None else of_bias
    return _as_group_major(of_x), of_mix.contiguous(), of_spatial.contiguous(), empty


def _reference_gradients(
    gradient: Tensor, group: Group, sizes: Sizes, in_basis: bool, *tensors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x, mix, spatial, bias = (None if t is None else t.detach().requires_grad_() for t in tensors)
    assert x is not None and mix is not None and spatial is not None
    y = reference(group, sizes, in_basis, x, mix, spatial, bias)
    of_x, of_mix, of_spatial, *rest = torch.autograd.grad(
        y, [t for t in (x, mix, spatial, bias) if t is not None], gradient
    )
    return of_x, of_mix, of_spatial, rest[0] if rest else None


@separable_conv_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, mix: Tensor, spatial: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_bias = x.new_empty(0 if bias is None else bias.shape)
    return new_group_major(x, *x.shape), mix.new_empty(mix.shape), spatial.new_empty(spatial.shape), of_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.group, ctx.spatial_first, ctx.stride, ctx.padding, ctx.in_basis = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, mix, spatial, bias = ctx.saved_tensors
    settings = ctx.group, ctx.spatial_first, ctx.stride, ctx.padding, ctx.in_basis
    *found, of_bias = separable_conv_backward(gradient, x, mix, spatial, bias, *settings)
    return *found, None if bias is None else of_bias, *(None for _ in settings)


separable_conv.register_autograd(_gradients, setup_context=_keep)


def _flops(x: Sequence[int], mix: Sequence[int], spatial: Sequence[int], group: str, settings: tuple[Any, ...]) -> int:
    """Twice the multiply-accumulates as executed."""
    spatial_first, stride, padding, in_basis = settings
    s, i, o, rank, _, k, *_ = sizes = sizes_of(x, mix, spatial, spatial_first, stride, padding)
    basis = basis_of(find_group(group)) if in_basis else None
    form = FORMS["gc_in" if spatial_first else "gc"]
    of_input, of_output = form.macs_by_map(FilterShape(o, i, s, k), rank, basis)
    height, width = x[3:]
    return 2 * x[0] * (of_input * height * width + of_output * math.prod(sizes.output(height, width)))


@register_flop_formula(torch.ops.gconv.separable_conv)
def _forward_flops(
    x: Sequence[int], mix: Sequence[int], spatial: Sequence[int], bias: Any, group: str, *settings: Any, **_: Any
) -> int:
    return _flops(x, mix, spatial, group, settings)


@register_flop_formula(torch.ops.gconv.separable_conv_backward)
def _backward_flops(
    gradient: Any, x: Sequence[int], mix: Sequence[int], spatial: Sequence[int], bias: Any, group: str, *settings: Any,
    **_: Any,
) -> int:  # fmt: skip
    # As many for the gradient of the map as for those of the parameters; what is computed again is not counted.
    return 2 * _flops(x, mix, spatial, group, settings)
