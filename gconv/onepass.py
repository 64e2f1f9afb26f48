"""The forms ``gc`` and ``gc_in`` by a compiled kernel: mix and planar kernels in one pass over the maps.

One after the other, on whole maps, the two are a matter of memory. ``csrc/separable.c`` takes an image row by row, so
that what lies between them stays in the cache, forward and backward. It is for maps on a CPU, in single precision and
channels-last; everywhere else the operations of PyTorch do the same (:meth:`gconv.separable.Form.run`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .compiled import address, compiled, library, takes
from .functional import lies_channels_last
from .mixing import DirectMixing, IrrepMixing

Mixing = DirectMixing | IrrepMixing

MOST_K, MOST_ORDER = 15, 8  # as in csrc/separable.c
_LARGEST = 2**31 - 1  # of an int there

_int, _pointer = ctypes.c_int, ctypes.c_void_p


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _int) for name in ("order", "in_channels", "out_channels", "rank", "planar_first")),
        *((name, _int) for name in ("k", "stride", "padding", "height", "width", "out_height", "out_width")),
        *((name, _int) for name in ("products", "in_basis", "biased", "weights", "weights_back")),
        *((name, _pointer) for name in ("table", "packed")),
    )


@cache
def variants() -> dict[int, int]:
    """The versions that run on this processor, by number, the best first; and how many floats their vectors have."""
    if library() is None:
        return {}
    found: dict[int, int] = {}
    number = 0
    while (lanes := compiled().gconv_lanes(number)) >= 0:
        if lanes:
            found[number] = lanes
        number += 1
    return found


class Sizes(NamedTuple):
    """Of a layer: S, I, O, R, whether the planar kernels run before the mix, k, stride, padding and dilation."""

    order: int
    in_channels: int
    out_channels: int
    rank: int
    planar_first: bool
    k: int
    stride: int
    padding: int
    dilation: int

    def output(self, x: Tensor) -> tuple[int, int]:
        """The height and the width of what becomes of a map."""
        height, width = ((side + 2 * self.padding - self.k) // self.stride + 1 for side in x.shape[2:])
        return height, width


def runs(x: Tensor, sizes: Sizes) -> bool:
    """Whether the kernel takes this map ``[N, S I, H, W]`` and this layer."""
    if not (variants() and takes(x) and lies_channels_last(x)):
        return False
    s, i, o, rank, _, k, _, padding, dilation = sizes
    known = dilation == 1 and k <= MOST_K and padding < k and s <= MOST_ORDER
    some = len(x) > 0 and min(sizes.output(x)) > 0
    pixels = (x.shape[2] + 2 * k) * (x.shape[3] + 2 * k)  # more than of any map
    few = pixels * s * max(i, o) * rank <= _LARGEST
    return known and some and few


@dataclass(frozen=True, eq=False)
class Kernel:
    """A layer's filters, to be run by the compiled kernel.

    Attributes:
        sizes: of the layer.
        mixing: as the form makes it.
        planes: ``[R, S C, 1, k, k]``, likewise.
        bias: ``[S O]``, or None.
        slowly: the same layer by PyTorch's operations: its output from a map, the mixing, the planes and the bias.
        packed: all that as the kernel reads it, where it is kept; else it is made anew in every pass.
    """

    sizes: Sizes
    mixing: Mixing
    planes: Tensor
    bias: Tensor | None
    slowly: Callable[[Tensor, Mixing, Tensor, Tensor | None], Tensor]
    packed: Tensor | None = None

    def kept(self) -> Kernel:
        """The same, packed: for passes without gradients."""
        return replace(self, packed=pack(self))

    def run(self, x: Tensor, more: Tensor | None = None, relu: bool = False) -> Tensor:
        """The output ``[N, S O, H', W']`` for a map ``[N, S I, H, W]``.

        Args:
            x: the map.
            more: is added to the output; channels-last.
            relu: whether ReLU comes then; only without gradients.
        """
        given = (x, more, self.bias, self.planes, *self.mixing.matrices)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
            assert not relu
            y: Tensor = _Differentiable.apply(self, *given)
            return y
        return forward(self, x, pack(self) if self.packed is None else self.packed, more=more, relu=relu)

    def settings(self, variant: int | None = None) -> list[int]:
        """What the kernel is told beside tensors: the version, by default the best here, the copies and the sizes."""
        sizes, mixing = self.sizes, self.mixing
        variant = next(iter(variants())) if variant is None else variant
        blocks = [(n, *w.shape[1:]) for n, w in zip(mixing.copies, mixing.matrices, strict=True)]
        in_basis, biased = isinstance(mixing, IrrepMixing), self.bias is not None
        return [int(n) for n in (variant, in_basis, biased, *sizes, *(n for block in blocks for n in block))]


class _Differentiable(torch.autograd.Function):
    """The kernel with its gradients; those of these are PyTorch's."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        x: Tensor,
        more: Tensor | None,
        bias: Tensor | None,
        planes: Tensor,
        *matrices: Tensor,
    ) -> Tensor:
        ctx.kernel, ctx.packed = kernel, pack(kernel)
        ctx.save_for_backward(x, bias, planes, *matrices)
        return forward(kernel, x, ctx.packed, more=more)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kernel, (gradient,) = ctx.kernel, gradients
        of_more = gradient if ctx.needs_input_grad[2] else None
        x, bias, planes, *matrices = given = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients are to have some themselves
            y = kernel.slowly(x, kernel.mixing.with_matrices(tuple(matrices)), planes, bias)
            wanted = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
            found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
            of_x, *others = (next(found) if t is not None and t.requires_grad else None for t in given)
            return None, of_x, of_more, *others
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
        of_x, of_matrices, of_planes = torch.ops.gconv.separable_backward(
            x, gradient, ctx.packed, ctx.needs_input_grad[4], kernel.settings()
        )
        each = of_matrices.split([matrix.numel() for matrix in matrices])
        of_planes = of_planes if ctx.needs_input_grad[4] else None
        return None, of_x, of_more, of_bias, of_planes, *map(Tensor.view_as, each, matrices)


def forward(
    kernel: Kernel,
    x: Tensor,
    packed: Tensor,
    variant: int | None = None,
    more: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The output of the layer, channels-last; plus a map that lies so too, and then ReLU, if asked."""
    y: Tensor = torch.ops.gconv.separable(x, packed, more, relu, kernel.settings(variant))
    return y


def pack(kernel: Kernel, variant: int | None = None) -> Tensor:
    """Filters and bias as a version of the kernel reads them."""
    told = _Told.of(kernel.settings(variant))
    with torch.no_grad():
        matrices = torch.cat([matrix.flatten() for matrix in kernel.mixing.matrices])
        planes, basis = kernel.planes.contiguous(), getattr(kernel.mixing, "basis", None)
        packed = matrices.new_empty(told.length)
        layer = told.layer(packed)
        given = (matrices, planes, None if basis is None else basis.contiguous(), kernel.bias)
        compiled().gconv_pack(told.variant, ctypes.byref(layer), *map(address, given))
    return packed


class _Told(NamedTuple):
    """What the kernel is told of a layer, for one of its versions.

    Attributes:
        variant: which version.
        sizes: of the layer.
        in_basis: whether the mix is in a basis of the group axis.
        biased: whether there is a bias.
        table: ``[P, 9]``, the matrix products of the mix, as in ``csrc/separable.c``.
        matrices: how many values the matrices have.
        weights: how many the packed ones.
        weights_back: how many the packed transposed ones.
        length: of all that is packed.
    """

    variant: int
    sizes: Sizes
    in_basis: bool
    biased: bool
    table: Tensor
    matrices: int
    weights: int
    weights_back: int
    length: int

    @classmethod
    def of(cls, settings: Sequence[int]) -> _Told:
        """From what :meth:`Kernel.settings` gives."""
        return _told(tuple(settings))

    @property
    def planes(self) -> int:
        """How many values the packed planar kernels have."""
        sizes = self.sizes
        channels = sizes.order * (sizes.in_channels if sizes.planar_first else sizes.out_channels)
        return sizes.rank * sizes.k**2 * _rounded(channels, variants()[self.variant])

    def layer(self, packed: Tensor, x: Tensor | None = None) -> _Layer:
        """For the kernel, of a map; it points into these tensors."""
        maps = (0, 0, 0, 0) if x is None else (*x.shape[2:], *self.sizes.output(x))
        counts = len(self.table), self.in_basis, self.biased, self.weights, self.weights_back
        return _Layer(*self.sizes[:-1], *maps, *counts, self.table.data_ptr(), packed.data_ptr())


@lru_cache(maxsize=1024)
def _told(settings: tuple[int, ...]) -> _Told:
    fields = len(Sizes._fields)
    variant, in_basis, biased = settings[:3]
    sizes, blocks = Sizes(*settings[3 : 3 + fields]), settings[3 + fields :]  # type: ignore[arg-type]
    lanes = variants()[variant]
    rows, starts = [], [0, 0, 0]
    reads, writes = [], []
    for term in range(sizes.rank):
        reads.append(term * sizes.order * sizes.in_channels if sizes.planar_first else 0)
        writes.append(0 if sizes.planar_first else term * sizes.order * sizes.out_channels)
    for copies, columns, depth in zip(*(blocks[n::3] for n in range(3)), strict=True):
        for term in range(sizes.rank):
            for _ in range(copies):
                added = term > 0
                adds = (added, False) if sizes.planar_first else (False, added)
                rows.append((reads[term], depth, writes[term], columns, *adds, *starts))
                reads[term] += depth
                writes[term] += columns
            starts[0] += columns * depth
            starts[1] += _rounded(columns, lanes) * depth
            starts[2] += _rounded(depth, lanes) * columns
    # Of terms that are added to the same values, the first must come first.
    table = torch.tensor(rows, dtype=torch.int32)
    matrices, weights, weights_back = starts
    told = _Told(variant, sizes, bool(in_basis), bool(biased), table, matrices, weights, weights_back, length=0)
    bias = _rounded(sizes.order * sizes.out_channels, lanes)
    return told._replace(length=weights + weights_back + 2 * told.planes + 2 * sizes.order**2 + bias)


def _rounded(values: int, lanes: int) -> int:
    return values + -values % lanes


def _forward(x: Tensor, packed: Tensor, more: Tensor | None, relu: bool, settings: list[int]) -> Tensor:
    told = _Told.of(settings)
    sizes = told.sizes
    y = x.new_empty((len(x), *sizes.output(x), sizes.order * sizes.out_channels)).permute(0, 3, 1, 2)
    layer, threads = told.layer(packed, x), torch.get_num_threads()
    tensors = address(x), address(more), int(relu), address(y)
    if compiled().gconv_forward(told.variant, ctypes.byref(layer), len(x), threads, *tensors):
        raise MemoryError("no memory for the rows of a convolution")
    return y


def _backward(
    x: Tensor, gradient: Tensor, packed: Tensor, with_planes: bool, settings: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    told = _Told.of(settings)
    sizes, threads = told.sizes, torch.get_num_threads()
    sums = x.new_zeros((threads, told.weights + told.planes))
    channels = sizes.order * (sizes.in_channels if sizes.planar_first else sizes.out_channels)
    shape = (sizes.rank, channels, 1, sizes.k, sizes.k) if with_planes else (0,)
    of_x, of_matrices, of_planes = torch.empty_like(x), x.new_empty(told.matrices), x.new_empty(shape)
    given = (x, gradient, sums, of_x, of_matrices, of_planes if with_planes else None)
    layer, tensors = told.layer(packed, x), map(address, given)
    if compiled().gconv_backward(told.variant, ctypes.byref(layer), len(x), threads, *tensors):
        raise MemoryError("no memory for the rows of a convolution")
    return of_x, of_matrices, of_planes


# As operations of PyTorch, so that what watches or records these sees one.
_OPERATIONS = torch.library.Library("gconv", "FRAGMENT")
_OPERATIONS.define("separable(Tensor x, Tensor packed, Tensor? more, bool relu, int[] settings) -> Tensor")
_OPERATIONS.define(
    "separable_backward(Tensor x, Tensor gradient, Tensor packed, bool with_planes, int[] settings)"
    " -> (Tensor, Tensor, Tensor)"
)
_OPERATIONS.impl("separable", _forward, "CPU")
_OPERATIONS.impl("separable_backward", _backward, "CPU")
