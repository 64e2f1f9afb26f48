"""The separable forms of a group-convolution filter: the fold, the factors, the execution and the cost of each.

A form folds the generator ``K [O, I, S, k, k]`` into one matrix per block, ``[blocks, rows, k k]``. A filter is
separable of rank R if every block is a product of two factors with inner dimension R. The factors ``mix`` (of the
group 1x1 mixing) and ``spatial`` (the spatial kernels) are stored in these shapes:

=========  ============  ======  ===========  ====================  ====================  ======================
form       block         row     input frame  ``mix``               ``spatial``           runs as
=========  ============  ======  ===========  ====================  ====================  ======================
g          each (o, i)   s       no           ``[O, I, R, S]``      ``[O, I, R, k, k]``   mixing, then depthwise
gc         each o        (i, s)  no           ``[O, R, I, S]``      ``[O, R, k, k]``      mixing, then depthwise
gc_in      each i        (o, t)  yes          ``[I, R, O, S]``      ``[I, R, k, k]``      depthwise, then mixing
g_turned   each (o, i)   t       yes          ``[O, I, R, S]``      ``[O, I, R, k, k]``   depthwise, then mixing
gc_turned  each o        (i, t)  yes          ``[O, R, I, S]``      ``[O, R, k, k]``      mixing, then depthwise
=========  ============  ======  ===========  ====================  ====================  ======================

``g`` and ``gc`` at rank 1 are the layers of Lengyel & van Gemert (ICIP 2021). Their spatial kernels ``d[s^-1 y]``
depend on the output element s.

The other forms take every kernel in the frame of the input element that it reads: ``K'[o, i, t, y] = K[o, i, t, t y]``.
The expansion of ``K'`` is ``K_s[o, i, s', y] = K'[o, i, s^-1 s', s'^-1 y]``, so their spatial kernels depend on the
input element s' alone. That is why ``gc_in`` can run one spatial kernel per input channel, transformed by s', *before*
the mixing.

The execution is chosen separately and changes nothing but rounding. ``dense`` builds the full filter. ``factorized`` is
the last column. ``irrep``, for ``gc`` and ``gc_in``, is the last column with the mixing in the irreducible
representations of the group (:mod:`gconv.functional.mixing`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gconv.system.errors import InputError, one_of

from .expansion import Sampling, Tables, from_group_major, to_group_major
from .form_base import EXECUTIONS, Convolution, ExecutionChoice, FilterShape, Form
from .mixing import Basis, DirectMixing, IrrepMixing, Mixing


class SharedPerPair(Form):
    """``g``: one spatial kernel for each (output, input) channel pair, shared along the group axis."""

    name = "g"
    block_axes = "oi"
    default_execution = "dense"

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.order, shape.in_channels * rank * shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        pairs = shape.out_channels * shape.in_channels * rank
        return pairs * shape.order**2, pairs * shape.order * shape.k**2

    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        o, i, rank, s = mix.shape
        k = spatial.shape[-1]
        # Each input channel is mixed alone, for every output channel: I groups with O S R outputs each.
        w = group_circulant(mix, tables.relative).permute(1, 0, 3, 2, 4).reshape(i * o * s * rank, s, 1, 1)
        return w, transformed(spatial.flatten(1, 2), tables.pixels).reshape(o * s, i * rank, k, k)

    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        o, i, s, _ = shape
        x = _channel_major(x, s)
        mixed = F.conv2d(x, w, groups=i).unflatten(1, (i, o * s, rank)).transpose(1, 2).flatten(1, 3)
        return _group_major(F.conv2d(mixed, d, None, *sampling, groups=o * s), s, bias)


class SharedPerOutput(Form):
    """``gc``: one spatial kernel for each output channel, shared along the group axis and over input channels."""

    name = "gc"
    block_axes = "o"
    executions = EXECUTIONS

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.in_channels * shape.order, rank * shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        maps = shape.out_channels * shape.order * rank
        return maps * shape.in_channels * shape.order, maps * shape.k**2

    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        # The axes are (o, r, i), then the one or two that the group axis becomes.
        return _mixing(mix, "oriuv->ruovi", "oriu,uab->raobi", tables, basis), _depthwise(spatial, tables)

    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        mixing: Mixing = w
        # Each term is a depthwise convolution, for which backends have a kernel. All terms in one convolution, and
        # their sum, would also lose the memory format.
        return _sum(
            F.conv2d(mixed, plane, bias if number == 0 else None, *sampling, groups=len(plane))
            for number, (mixed, plane) in enumerate(zip(mixing.each(x), d.unbind(), strict=True))
        )

    def convolutions(
        self, mix: Tensor, spatial: Tensor, tables: Tables, sampling: Sampling
    ) -> tuple[tuple[Convolution, ...], ...] | None:
        mixing, planes = self.filters(mix, spatial, tables)
        return tuple(
            (Convolution(one[:, :, None, None], 1, Sampling()), Convolution(plane, len(plane), sampling))
            for one, plane in zip(mixing.weights, planes, strict=True)
        )


class SharedPerInput(Form):
    """``gc_in``: one spatial kernel for each input channel, transformed by the input element that it reads."""

    name = "gc_in"
    block_axes = "i"
    input_frame = True
    executions = EXECUTIONS
    spatial_first = True

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.in_channels * shape.order * rank, shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        maps = shape.in_channels * shape.order * rank
        return maps * shape.out_channels * shape.order, maps * shape.k**2

    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        # The axes are (i, r, o), then the one or two that the group axis becomes.
        return _mixing(mix, "irouv->ruovi", "irou,uab->raobi", tables, basis), _depthwise(spatial, tables)

    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        mixing: Mixing = w
        return mixing.total((F.conv2d(x, plane, None, *sampling, groups=len(plane)) for plane in d.unbind()), bias)

    def convolutions(
        self, mix: Tensor, spatial: Tensor, tables: Tables, sampling: Sampling
    ) -> tuple[tuple[Convolution, ...], ...] | None:
        mixing, planes = self.filters(mix, spatial, tables)
        return tuple(
            (Convolution(plane, len(plane), sampling), Convolution(one[:, :, None, None], 1, Sampling()))
            for one, plane in zip(mixing.weights, planes, strict=True)
        )


class RotatedPerPair(Form):
    """``g_turned``: one spatial kernel for each (output, input) channel pair, transformed by the input element."""

    name = "g_turned"
    block_axes = "oi"
    input_frame = True
    default_execution = "dense"
    spatial_first = True

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.in_channels * shape.order * rank, shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        maps = shape.out_channels * shape.in_channels * shape.order * rank
        return maps * shape.order, maps * shape.k**2

    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        o, i, rank, s = mix.shape
        k = spatial.shape[-1]
        w = group_circulant(mix, tables.relative).permute(0, 3, 1, 4, 2).reshape(o * s, i * s * rank, 1, 1)
        # Every input map is filtered for every output channel: I S groups with O R outputs each.
        d = transformed(spatial.flatten(0, 1), tables.pixels).unflatten(0, (o, i)).permute(1, 2, 0, 3, 4, 5)
        return w, d.reshape(i * s * o * rank, 1, k, k)

    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        o, i, s, _ = shape
        filtered = F.conv2d(_channel_major(x, s), d, None, *sampling, groups=i * s)
        mixed = F.conv2d(filtered.unflatten(1, (i * s, o, rank)).transpose(1, 2).flatten(1, 3), w, groups=o)
        return _group_major(mixed, s, bias)


class RotatedPerOutput(Form):
    """``gc_turned``: one spatial kernel for each output channel, transformed by the input element that it reads.

    The spatial kernels depend on s' and the mixing depends on s and s', so there are maps for all pairs of elements.
    The spatial part costs S times that of ``gc``.
    """

    name = "gc_turned"
    block_axes = "o"
    input_frame = True

    def fan_ins(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        return shape.in_channels, shape.order * rank * shape.k**2

    def macs(self, shape: FilterShape, rank: int) -> tuple[int, int]:
        maps = shape.out_channels * shape.order**2 * rank
        return maps * shape.in_channels, maps * shape.k**2

    def filters(self, mix: Tensor, spatial: Tensor, tables: Tables, basis: Basis | None = None) -> tuple[Any, Tensor]:
        o, rank, i, s = mix.shape
        k = spatial.shape[-1]
        # S filters in a row, one for the maps of each input element, with R S O outputs.
        w = group_circulant(mix, tables.relative).permute(4, 1, 3, 0, 2).reshape(s * rank * s * o, i, 1, 1)
        d = transformed(spatial, tables.pixels).permute(1, 2, 0, 3, 4).unsqueeze(2).expand(s, rank, s, o, k, k)
        return w, d.reshape(s * rank * s * o, 1, k, k)

    def run(
        self, x: Tensor, w: Any, d: Tensor, bias: Tensor | None, shape: FilterShape, rank: int, sampling: Sampling
    ) -> Tensor:
        s = shape.order

        def of_element(maps: Tensor, w: Tensor, d: Tensor) -> Tensor:
            y = F.conv2d(F.conv2d(maps, w), d, None, *sampling, groups=len(d))
            return y if rank == 1 else y.unflatten(1, (rank, -1)).sum(1)

        # One input element after the other. All at once, the maps would need S times the memory.
        total = reduce(torch.add, map(of_element, x.chunk(s, 1), w.chunk(s), d.chunk(s)))
        return _biased(total, bias)


FORMS: dict[str, Form] = {
    form.name: form
    for form in (SharedPerPair(), SharedPerOutput(), SharedPerInput(), RotatedPerPair(), RotatedPerOutput())
}


def form_named(name: str | Form) -> Form:
    """The form of that name (case-insensitive).

    Raises:
        InputError: there is no such form.
    """
    if isinstance(name, Form):
        return name
    if not isinstance(name, str) or name.lower() not in FORMS:
        raise one_of("form", name, FORMS)
    return FORMS[name.lower()]


def check_execution(execution: str, form: Form | None = None) -> ExecutionChoice:
    """Check that ``execution`` is ``auto`` or one of ``EXECUTIONS`` and, if a form is given, that the form has it.

    Returns:
        ``execution``.

    Raises:
        InputError: it is unknown, or the form does not have it.
    """
    if execution == "auto":
        return "auto"
    if execution not in EXECUTIONS:
        raise one_of("execution", execution, ("auto", *EXECUTIONS))
    for known in EXECUTIONS if form is None else form.executions:
        if execution == known:
            return known
    assert form is not None
    having = ", ".join(name for name, other in FORMS.items() if execution in other.executions)
    raise InputError(
        f"form {form.name!r} has no execution {execution!r}, which is for {having}; accepted: "
        + ", ".join(("auto", *form.executions))
    )


def _mixing(mix: Tensor, direct: str, in_blocks: str, tables: Tables, basis: Basis | None) -> Mixing:
    """The group 1x1 mixing of a form, group-major. The strings say, as for ``einsum``, where the axes of ``mix`` go."""
    if basis is None:
        before, after = direct.split("->")
        weights = group_circulant(mix, tables.relative).permute([before.index(axis) for axis in after])
        rank, s, o, _, i = weights.shape
        return DirectMixing(weights.reshape(rank, s * o, s * i))
    weights_of = [torch.einsum(in_blocks, mix, matrices.to(mix)) for matrices in basis.matrices]
    return IrrepMixing(basis.basis.to(mix), basis.copies, tuple(w.flatten(3, 4).flatten(1, 2) for w in weights_of))


def _depthwise(spatial: Tensor, tables: Tables) -> Tensor:
    """``[C, R, k, k]`` as the filters ``[R, S C, 1, k, k]`` of depthwise convolutions."""
    k = spatial.shape[-1]
    copies = transformed(spatial, tables.pixels).permute(2, 1, 0, 3, 4)
    return copies.reshape(spatial.shape[1], -1, 1, k, k)


def _channel_major(x: Tensor, order: int) -> Tensor:
    """Group-major maps with channel c and element s as channel ``c S + s``."""
    return from_group_major(x, order).flatten(1, 2)


def _group_major(x: Tensor, order: int, bias: Tensor | None) -> Tensor:
    """The inverse of :func:`_channel_major`, plus a bias ``[S O]``."""
    return _biased(to_group_major(x.unflatten(1, (-1, order))), bias)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    # Under autocast the maps are in half precision and the bias is not. A convolution returns half precision then.
    return x if bias is None else x + bias.to(x.dtype).view(-1, 1, 1)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    """The sum, in place in the first term: nothing else has that."""
    total = next(terms)
    for term in terms:
        total += term
    return total


def group_circulant(mix: Tensor, relative: Tensor) -> Tensor:
    """Group-circulant matrices: of a function ``w [..., S]`` on the group ``[..., S, S]``, with ``w[s^-1 s']``."""
    s = mix.shape[-1]
    return mix.reshape(-1, s).index_select(1, relative).view(*mix.shape, s)


def transformed(spatial: Tensor, pixels: Tensor) -> Tensor:
    """The transformed copies ``d[s^-1 y]`` of spatial kernels: ``[A, B, k, k]`` to ``[A, S, B, k, k]``."""
    k = spatial.shape[-1]
    return spatial.flatten(2).index_select(2, pixels).unflatten(2, (-1, k, k)).transpose(1, 2)
