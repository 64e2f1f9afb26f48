"""Group-convolution layers with the full filter, with the interface of ``nn.Conv2d``: lifting, and group to group."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .base import GroupConvBase
from .packed_weights import RunConfig


class FullConvBase(GroupConvBase):
    """A layer with the full generator as its ``weight``. It starts as an ``nn.Conv2d`` of the expanded width does."""

    weight: nn.Parameter
    _factors = ("weight",)

    def _add_filter(self, like: dict[str, Any]) -> None:
        o, i, s_in, k = self.filter_shape
        self.weight = nn.Parameter(torch.empty(o, i, s_in, k, k, **like))

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from ``+- 1 / sqrt(fan_in)``. The group axis counts in fan_in."""
        bound = 1 / math.sqrt(self.fan_in)
        nn.init.uniform_(self.weight, -bound, bound)
        self._reset_bias()

    def _new_filters(self, how: RunConfig) -> tuple[Any, ...]:
        return (self._expanded(self.weight, how.channels_last),)


class LiftingConv2d(FullConvBase):
    """From planar maps to the group: the kernels are applied in all their S transformed copies.

    Input ``[N, I, H, W]`` (or ``[N, I, 1, H, W]``), output ``[N, O, S, H', W']``. The parameters are
    ``weight [O, I, 1, k, k]`` and ``bias [O]``. Arguments are those of ``nn.Conv2d``, but the two entries of a pair
    must be equal, because a quarter turn exchanges them.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: k.
        stride: step between output pixels. Exact equivariance needs
            ``(n + 2 padding - dilation (k - 1) - 1) % stride == 0`` on maps of size n.
        padding: zeros added on each side.
        dilation: distance between kernel entries.
        bias: whether to learn an offset per channel, shared over the group axis.
        group: one of ``gconv.GROUPS``.
        groups: 1. The layers have no channel groups.
        padding_mode: ``"zeros"``. The layers have no other padding.
        device: where the parameters are made.
        dtype: their type.

    Raises:
        InputError: an argument is out of range, a pair has unequal entries, or the group is unknown.
    """

    _lifting = True


class GConv2d(FullConvBase):
    """Group convolution with the full filter: ``y[o, s] = sum_i sum_s' x[i, s'] * K_s[o, i, s'] + b[o]``.

    Input ``[N, I, S, H, W]``, output ``[N, O, S, H', W']``; ``weight [O, I, S, k, k]`` and ``bias [O]`` as in GrouPy.
    Arguments and errors are those of :class:`LiftingConv2d`.

    A full filter is also a ``gc_in`` filter of rank ``k k``, whose spatial kernels select one pixel each. Run so, with
    its group 1x1 mixing in the irreducible representations of the group, it can have a fraction of the
    multiply-accumulates of the expanded filter. Where the compiled kernel is then clearly faster, it runs the layer so
    (:func:`gconv.kernels.dispatch.mixes_pay`). :meth:`macs` counts the expanded filter in any case.
    """
