"""The forms ``gc`` and ``gc_in`` by a compiled kernel: group mix and spatial kernels in one pass over the maps.

Run one after the other on whole maps, these two steps are limited by memory. ``csrc/separable_conv.c`` works on a few
rows of an image at a time, so that the map between the two steps stays in the cache, forward and backward. The kernel
takes maps on a CPU, in single precision, in the layout that the layers give them. For all other maps PyTorch's
operations do the same (:meth:`gconv.functional.forms.Form.run`).

A small layer takes a fraction of a millisecond, and in that time only few operations of PyTorch can be called. So the
kernel reads a layer's parameters in their own layout and returns their gradients likewise, and everything that depends
only on the layer's size is computed once.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gconv.functional.expansion import (
    Sampling,
    Tables,
    from_group_major,
    is_group_major,
    new_group_major,
    to_group_major,
)
from gconv.functional.form_base import FilterShape
from gconv.functional.forms import FORMS
from gconv.functional.mixing import basis_like
from gconv.groups.point_groups import Group
from gconv.system.errors import InputError

from .dispatch import Sizes, basis_for, best, in_basis_pays, is_supported_size, rounded
from .library import Layer, address, is_supported, launch, threads

_MAX_INT = 2**31 - 1  # of a C int


class _Product(NamedTuple):
    """One of the matrix products that a mix consists of: a row of the table in ``csrc/layer.h``."""

    read: int
    depth: int
    written: int
    columns: int
    added: bool
    added_back: bool
    packed: int
    packed_back: int
    term: int
    size: int
    matrices: int
    first: bool


@dataclass(frozen=True, eq=False)
class Kernel:
    """The compiled kernel for layers of one size, whatever their parameters; obtained from :func:`kernel_of`.

    The parameters are ``mix`` and ``spatial``, in the shapes of the forms ``gc`` and ``gc_in``, and a bias ``[O]`` or
    None. For a full filter ``spatial`` is without values, ``[0, k k, k, k]``. Maps are ``[N, C, S, H, W]``, in the
    layout that :func:`gconv.functional.expansion.is_group_major` tests.

    Attributes:
        group: the layer's group.
        sizes: the layer's sizes.
        in_basis: whether the mix is done in the irreducible representations of the group.
        biased: whether there is a bias.
        variant: the number of the kernel's version.
        lanes: this version pads channels to a multiple of this number.
        table: ``[P, 12]``, the matrix products of the mix, each a :class:`_Product`.
        matrices: the representations that the products are made from, ``[S, d, d]`` each, one after the other.
        basis: ``[S, S]``, the change of basis.
        pixels: ``[S, k k]``, for each transformed spatial kernel the entries of the kernel in their new order.
        weights: the number of values of the packed matrices.
        weights_back: the number of values of the packed transposed matrices.
    """

    group: Group
    sizes: Sizes
    in_basis: bool
    biased: bool
    variant: int
    lanes: int
    table: Tensor
    matrices: Tensor
    basis: Tensor
    pixels: Tensor
    weights: int
    weights_back: int

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
        """The shapes of mix, spatial and bias."""
        s, i, o, rank, spatial_first, k, *_ = self.sizes
        mix, spatial = FORMS["gc_in" if spatial_first else "gc"].factor_shapes(FilterShape(o, i, s, k), rank)
        spatial = (0, *spatial[1:]) if self.sizes.whole else spatial
        return mix, spatial, (o,) if self.biased else None

    @property
    def spatial_values(self) -> int:
        """The number of values of the packed spatial kernels."""
        sizes = self.sizes
        channels = sizes.order * (sizes.in_channels if sizes.spatial_first else sizes.out_channels)
        return 0 if sizes.whole else sizes.rank * sizes.k**2 * rounded(channels, self.lanes)

    @property
    def biases(self) -> int:
        """The number of values of the packed bias."""
        return rounded(self.sizes.order * self.sizes.out_channels, self.lanes)

    def is_supported(self, x: Tensor) -> bool:
        """Whether it runs on this map, if :func:`gconv.kernels.library.is_supported` holds for the map too."""
        return len(x) > 0 and layer_on(self, *x.shape[3:]) is not None and is_group_major(x)

    def can_fuse_add(self, residual: Tensor | None, x: Tensor) -> bool:
        """Whether it can add this map to the output for x; true where there is none."""
        if residual is None:
            return True
        shape = (len(x), self.sizes.out_channels, self.sizes.order, *self.sizes.output(*x.shape[3:]))
        return residual.shape == shape and is_supported(residual) and is_group_major(residual)

    def _layer(self, height: int, width: int) -> Any:
        """The layer on maps of this size, for the compiled functions; :meth:`is_supported` has accepted the size."""
        layer = layer_on(self, height, width)
        assert layer is not None
        return ctypes.byref(layer)

    def pack(self, mix: Tensor, spatial: Tensor, bias: Tensor | None) -> Tensor:
        """The parameters in the layout that the kernel reads.

        Raises:
            InputError: the parameters do not have the shapes of the layer's.
        """
        shapes = tuple(None if of is None else tuple(of.shape) for of in (mix, spatial, bias))
        if shapes != self.shapes:
            given, accepted = (", ".join(str(of and list(of)) for of in some) for some in (shapes, self.shapes))
            raise InputError(f"parameters of shapes {given} do not fit their layer; accepted: {accepted}")
        packed = mix.new_empty(self.weights + self.weights_back + 2 * self.spatial_values + self.biases)
        bias = None if bias is None else bias.contiguous()
        tensors = mix.contiguous(), spatial.contiguous(), bias  # has a name, because an address keeps nothing alive
        layer = self._layer(self.sizes.k, self.sizes.k)  # any size of maps will do
        launch("pack", self.variant, layer, threads(), *map(address, tensors), address(packed))
        return packed

    def forward(self, x: Tensor, packed: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """The output ``[N, O, S, H', W']``, without gradients.

        Args:
            x: ``[N, I, S, H, W]``.
            packed: the parameters, from :meth:`pack`.
            residual: a map that is added to the output.
            relu: whether to apply ReLU after that.
        """
        sizes, (height, width) = self.sizes, x.shape[3:]
        y = new_group_major(x, len(x), sizes.out_channels, sizes.order, *sizes.output(height, width))
        tensors = address(packed), address(x), address(residual), int(relu), address(y)
        launch("forward", self.variant, self._layer(height, width), len(x), threads(), *tensors)
        return y

    def backward(
        self, x: Tensor, gradient: Tensor, packed: Tensor, with_spatial: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The gradients of the map, the mix, the spatial kernels if asked, and the bias if there is one."""
        mix, spatial, bias = self.shapes
        of_spatial = x.new_empty(spatial) if with_spatial else None
        of_bias = None if bias is None else x.new_empty(bias)
        found = new_group_major(x, *x.shape), x.new_empty(mix), of_spatial, of_bias
        tensors = packed, x, gradient, *found
        launch("backward", self.variant, self._layer(*x.shape[3:]), len(x), threads(), *map(address, tensors))
        return found

    def run(
        self, x: Tensor, mix: Tensor, spatial: Tensor, bias: Tensor | None, residual: Tensor | None = None
    ) -> Tensor:
        """The same as :meth:`forward`, from the parameters themselves and with gradients."""
        y: Tensor = _Differentiable.apply(self, x, mix, spatial, bias, residual)
        return y


def reference(
    group: Group, sizes: Sizes, in_basis: bool, x: Tensor, mix: Tensor, spatial: Tensor, bias: Tensor | None
) -> Tensor:
    """What the kernel of a layer computes, by PyTorch's operations.

    Args:
        group: the layer's group.
        sizes: the layer's sizes.
        in_basis: as of :func:`kernel_of`.
        x: ``[N, I, S, H, W]``.
        mix: with the shape that the form gives it.
        spatial: likewise; for a full filter without values, ``[0, k k, k, k]``.
        bias: ``[O]``, or None.
    """
    s, i, o, rank, spatial_first, k, *sampling, whole = sizes
    if whole:
        spatial = torch.eye(rank, dtype=x.dtype, device=x.device).view(1, rank, k, k).expand(i, -1, -1, -1)
    form = FORMS["gc_in" if spatial_first else "gc"]
    basis = basis_like(group, x) if in_basis else None
    filters = form.filters(mix, spatial, Tables.build(group, k, device=x.device), basis)
    biases = None if bias is None else bias.repeat(s)
    y = form.run(to_group_major(x), *filters, biases, FilterShape(o, i, s, k), rank, Sampling(*sampling))
    return from_group_major(y, s)


@lru_cache(maxsize=1024)
def kernel_of(group: Group, sizes: Sizes, in_basis: bool | None, biased: bool) -> Kernel | None:
    """The kernel for layers of a size, in the version that is fastest for it; None where no version can run.

    Args:
        group: the layer's group.
        sizes: the layer's sizes.
        in_basis: whether its mix is to be done in the irreducible representations of the group; None: whether that is
            faster.
        biased: whether it has a bias.
    """
    if in_basis is None:
        faster = bool(in_basis_pays(group, sizes.out_channels, sizes.in_channels, sizes.stride))
        return kernel_of(group, sizes, faster, biased)
    version = best(group, sizes, in_basis)
    if version is None or not is_supported_size(sizes):
        return None
    return new_kernel(group, sizes, in_basis, biased, *version)


def full_kernel(group: Group, shape: FilterShape, sampling: Sampling, biased: bool) -> Kernel | None:
    """The kernel for full layers: a filter is of the form ``gc_in`` and rank ``k k``, with single pixels as kernels."""
    o, i, s, k = shape
    return kernel_of(group, Sizes(s, i, o, k * k, True, k, *sampling, whole=True), True, biased)


def full_parameters(weight: Tensor, pixels: Tensor, shape: FilterShape) -> tuple[Tensor, Tensor]:
    """The mix and the spatial kernels that :func:`full_kernel` takes for a full filter.

    Args:
        weight: ``[O, I, S, k, k]``.
        pixels: the table of the group (:class:`gconv.functional.expansion.Tables`).
        shape: ``(O, I, S, k)``.
    """
    o, i, s, k = shape
    mix = FORMS["gc_in"].fold(weight, pixels).view(i, o, s, k * k).permute(0, 3, 1, 2)
    return mix, mix.new_empty(0, k * k, k, k)


def new_kernel(group: Group, sizes: Sizes, in_basis: bool, biased: bool, variant: int, lanes: int) -> Kernel | None:
    """The kernel for layers of a size in a given version; None where its matrices are too large.

    Args:
        group: the layer's group.
        sizes: the layer's sizes, with which the kernel can do.
        in_basis: as of :func:`kernel_of`.
        biased: likewise.
        variant: the number of the version.
        lanes: this version pads channels to a multiple of this number.
    """
    basis, copies, kinds = basis_for(group, in_basis)
    products, packed, packed_back = _products(sizes, copies, kinds, lanes)
    if max(packed, packed_back) > _MAX_INT:
        return None
    table = torch.tensor(products, dtype=torch.int32)
    flat, basis = torch.cat([kind.flatten() for kind in kinds]).float(), basis.float().contiguous()
    pixels = torch.tensor(group.pixel_table(sizes.k), dtype=torch.int32)
    return Kernel(group, sizes, in_basis, biased, variant, lanes, table, flat, basis, pixels, packed, packed_back)


def _products(
    sizes: Sizes, copies: tuple[int, ...], kinds: tuple[Tensor, ...], lanes: int
) -> tuple[list[_Product], int, int]:
    """The matrix products of a mix, and how many values their packed matrices and the transposed ones have."""
    s, i, o, rank, spatial_first, *_ = sizes
    products = []
    packed = packed_back = 0
    reads = [term * s * i if spatial_first else 0 for term in range(rank)]
    writes = [0 if spatial_first else term * s * o for term in range(rank)]
    begins = np.cumsum([0, *(kind.numel() for kind in kinds)])
    # Values are written in ascending order, which the kernel relies on. Where several terms are added to the same
    # values, the first term overwrites.
    for term in range(rank):
        for number, kind, begin in zip(copies, kinds, begins, strict=False):
            d = kind.shape[1]
            depth, columns = d * i, d * o
            for copy in range(number):
                added = (term > 0, False) if spatial_first else (False, term > 0)
                where = reads[term], depth, writes[term], columns, *added, packed, packed_back
                products.append(_Product(*where, term, d, int(begin), copy == 0))
                reads[term] += depth
                writes[term] += columns
            packed += rounded(columns, lanes) * depth
            packed_back += rounded(depth, lanes) * columns
    return products, packed, packed_back


@lru_cache(maxsize=4096)
def layer_on(kernel: Kernel, height: int, width: int) -> Layer | None:
    """A layer on maps of this size, as the compiled functions take it; None where they are too large or too small."""
    sizes = kernel.sizes
    output = sizes.output(height, width)
    pixels = (height + 2 * sizes.k) * (width + 2 * sizes.k)  # more than any map has
    values = pixels * sizes.order * max(sizes.in_channels, sizes.out_channels) * sizes.rank
    if min(output) <= 0 or values > _MAX_INT:
        return None
    counts = len(kernel.table), kernel.in_basis, kernel.biased, kernel.weights, kernel.weights_back
    tensors = kernel.table, kernel.matrices, kernel.basis, kernel.pixels
    return Layer(*sizes[:-2], sizes.whole, height, width, *output, *counts, *(tensor.data_ptr() for tensor in tensors))


class _Differentiable(torch.autograd.Function):
    """The kernel with its gradients. Second derivatives are PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, x: Tensor, mix: Tensor, spatial: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        ctx.kernel, ctx.packed = kernel, kernel.pack(mix, spatial, bias)
        ctx.save_for_backward(x, mix, spatial, bias)
        return kernel.forward(x, ctx.packed, residual)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kernel, (gradient,) = ctx.kernel, gradients
        of_residual = gradient if ctx.needs_input_grad[5] else None
        given = ctx.saved_tensors
        if torch.is_grad_enabled():  # the caller wants gradients of these gradients
            y = reference(kernel.group, kernel.sizes, kernel.in_basis, *given)
            wanted = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
            return None, *(next(found) if t is not None and t.requires_grad else None for t in given), of_residual
        if not is_group_major(gradient):
            gradient = new_group_major(gradient, *gradient.shape).copy_(gradient)
        return None, *kernel.backward(given[0], gradient, ctx.packed, ctx.needs_input_grad[3]), of_residual
