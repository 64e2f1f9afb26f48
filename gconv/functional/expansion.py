"""Group convolution as functions of tensors: expand the generator, convolve, act on maps.

Shapes: a feature map is ``[N, C, S, H, W]`` with S = |H|, a planar map ``[N, C, H, W]``, a generator
``[O, I, S_in, k, k]``. In a planar layout, channel c and element s of a feature map are one channel. Its number is
``c S + s`` in :func:`gconv2d`, as in other libraries. Inside the layers the layout is *group-major*: the number is
``s C + c``, so the channels of one element are neighbours in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gconv.groups.point_groups import Group
from gconv.groups.point_groups import group as find_group
from gconv.system.errors import InputError


class Tables(NamedTuple):
    """The index tables of one group and kernel size as flat tensors on one device (meanings in
    :mod:`gconv.groups.point_groups`).

    Attributes:
        expansion: ``[S S_in k k]``, the index in the generator ``[S_in k k]`` of each entry of the expanded filter.
        relative: ``[S S]``, the index of ``s^-1 s'``.
        pixels: ``[S k k]``, the index of pixel ``s^-1 y``.
    """

    expansion: Tensor
    relative: Tensor
    pixels: Tensor

    @classmethod
    def build(cls, group: Group, k: int, *, lifting: bool = False, device: torch.device | str | None = None) -> Tables:
        """The tables for kernels of size k x k; ``lifting`` for filters on planar maps (``S_in = 1``)."""
        arrays = group.expansion_table(k, lifting=lifting), group.relative_table(), group.pixel_table(k)
        return cls(*(torch.tensor(array.ravel(), device=device) for array in arrays))


class Sampling(NamedTuple):
    """How a convolution samples the plane, the same along both axes.

    Attributes:
        stride: step between output pixels.
        padding: zeros added on each side.
        dilation: distance between kernel entries.
    """

    stride: int = 1
    padding: int = 0
    dilation: int = 1


def expand(weight: Tensor, expansion: Tensor, *, group_major: bool = False, channels_last: bool = False) -> Tensor:
    """The dense filter of a generator: ``K_s[o, i, s', y] = K[o, i, s^-1 s', s^-1 y]``.

    Args:
        weight: generator ``[O, I, S_in, k, k]``.
        expansion: the index table of that name in :class:`Tables`.
        group_major: whether input and output channels are group-major.
        channels_last: whether the result has the memory format channels-last.

    Returns:
        ``[O S, I S_in, k, k]``, a filter for an ordinary convolution over a planar layout.
    """
    o, i, s_in, k, _ = weight.shape
    s = expansion.numel() // (s_in * k * k)
    expanded = weight.reshape(o * i, s_in * k * k).index_select(1, expansion)
    out, into = ((2, 0), (3, 1)) if group_major else ((0, 2), (1, 3))
    expanded = expanded.view(o, i, s, s_in, k, k)
    if channels_last:
        return expanded.permute(*out, 4, 5, *into).reshape(o * s, k, k, i * s_in).permute(0, 3, 1, 2)
    return expanded.permute(*out, *into, 4, 5).reshape(o * s, i * s_in, k, k)


def to_planar(x: Tensor) -> Tensor:
    """``[N, C, S, H, W]`` to ``[N, C S, H, W]``; a planar map passes through."""
    return x.flatten(1, 2) if x.dim() == 5 else x


def to_group_major(x: Tensor) -> Tensor:
    """``[N, C, S, H, W]`` to group-major ``[N, S C, H, W]``, a view if a layer made it. Planar maps pass through."""
    if x.dim() == 4:
        return x
    if x.stride(1) == 1:  # channels-last; flattened in this order, also a single image keeps the strides of that format
        return x.permute(0, 3, 4, 2, 1).flatten(3).permute(0, 3, 1, 2)
    return x.transpose(1, 2).flatten(1, 2)


def from_group_major(x: Tensor, order: int) -> Tensor:
    """Group-major ``[N, S C, H, W]`` as ``[N, C, S, H, W]``, a view."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(n, h, w, order, c // order).permute(0, 4, 3, 1, 2)


def has_channels_last_strides(x: Tensor) -> bool:
    """Whether a planar map lies in memory channels-last; a map of one channel or one pixel counts by its strides."""
    if x.stride(1) != 1:
        return False
    try:
        return x.is_contiguous(memory_format=torch.channels_last)
    except RuntimeError:  # torch.vmap answers for the contiguous format only
        return False


def is_strictly_channels_last(x: Tensor) -> bool:
    """Whether a planar map lies in memory channels-last and in no other order."""
    return has_channels_last_strides(x) and not x.is_contiguous()


def is_group_major(x: Tensor) -> bool:
    """Whether ``[N, C, S, H, W]`` lies in memory as the outputs of the layers do: channels-last and group-major."""
    strides, expected = x.stride(), _grouped_strides(x.shape)
    return strides == expected or all(
        size == 1 or one == other for size, one, other in zip(x.shape, strides, expected, strict=True)
    )


def new_group_major(like: Tensor, *shape: int) -> Tensor:
    """An uninitialised map ``[N, C, S, H, W]``, channels-last and group-major, with the device and type of ``like``."""
    return like.new_empty_strided(shape, _grouped_strides(shape))


def _grouped_strides(shape: Sequence[int]) -> tuple[int, ...]:
    _, c, s, h, w = shape
    pixel = s * c
    return h * w * pixel, 1, c, w * pixel, pixel


def on_tensor_cores(x: Tensor) -> bool:
    """Whether convolutions of this map run on the tensor cores of a GPU: in half precision, or in TF32 if allowed.

    There the memory format decides the time, and multiply-accumulates hardly matter.
    """
    if x.device.type != "cuda":
        return False
    if torch.compiler.is_compiling():  # a graph cannot hold the questions that follow
        return True
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    half = x.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled("cuda")
    return half or (x.dtype == torch.float32 and is_tf32_allowed())


def is_tf32_allowed() -> bool:
    """Whether convolutions of float32 maps may round to TF32, by whichever interface of PyTorch that was set.

    PyTorch 2.9 replaced ``torch.backends.cudnn.allow_tf32`` by ``torch.backends.cudnn.conv.fp32_precision``. It raises
    an error when the former is read after the latter was written.
    """
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"


def channels_last(x: Tensor) -> Tensor:
    """A planar map in the memory format that convolutions are fastest in.

    This is channels-last for float32 on a CPU and on the tensor cores of a GPU. Other maps are returned unchanged.
    Convolutions and batch norm keep the format, so a network converts its input only. ``benchmarks/speed_networks.py``
    and ``benchmarks/speed_gpu.py`` measure the gain.
    """
    if not isinstance(x, Tensor):  # the proxy of a tracer
        return x
    if not (x.device.type == "cpu" and x.dtype == torch.float32) and not on_tensor_cores(x):
        return x
    if is_strictly_channels_last(x):
        return x
    try:
        # Not contiguous(), which returns a map of one channel with the strides that it has.
        return x.clone(memory_format=torch.channels_last)
    except RuntimeError:  # torch.vmap knows the contiguous format only
        return x


def relu(x: Tensor) -> Tensor:
    """ReLU of a map that nothing else reads. It is in place, except where gradients of views would make that slower."""
    return F.relu(x, inplace=not torch.is_grad_enabled())


def gconv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    group: str | Group = "p4",
    sampling: Sampling = Sampling(),
) -> Tensor:
    """Group convolution ``y[o, s] = sum_i sum_s' x[i, s'] * K_s[o, i, s'] + b[o]``, from its definition.

    Args:
        x: ``[N, I, S, H, W]``, or ``[N, I, H, W]`` for a lifting filter (``S_in = 1``).
        weight: generator ``[O, I, S_in, k, k]``.
        bias: ``[O]`` or None; shared over the group axis, or the result would not be equivariant.
        group: the group.
        sampling: stride, padding and dilation.

    Returns:
        ``[N, O, S, H', W']``.
    """
    group = find_group(group)
    tables = Tables.build(group, weight.shape[-1], lifting=weight.shape[2] == 1, device=weight.device)
    shared = None if bias is None else bias.repeat_interleave(group.order)
    y = F.conv2d(to_planar(x), expand(weight, tables.expansion), shared, *sampling)
    return y.unflatten(1, (weight.shape[0], group.order))


def act(group: str | Group, element: int, x: Tensor) -> Tensor:
    """The group's action on a map: ``(g x)[c, s](p) = x[c, g^-1 s](g^-1 p)``. On planar maps only the pixels move.

    Args:
        group: the group.
        element: index of g in it.
        x: ``[N, C, S, H, W]`` or ``[N, C, H, W]``. H and W may differ; a quarter turn exchanges them. A tensor of fewer
            dimensions, such as class scores, counts as invariant and is returned unchanged.

    Raises:
        InputError: an unknown group, or a group axis of another length.
    """
    group = find_group(group)
    if x.dim() < 4:
        return x
    if x.dim() == 5:
        if x.shape[2] != group.order:
            what = f"a map of shape {list(x.shape)} is not a map on {group.name}"
            raise InputError(f"{what}; accepted: [N, C, {group.order}, H, W]")
        x = x[:, :, torch.tensor(group.product[group.inverse[element]], device=x.device)]
    flips, turns = divmod(group.elements[element], 4)
    x = torch.rot90(x, turns, (-2, -1))
    return x.flip(-2) if flips else x
