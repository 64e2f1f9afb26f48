"""The layer names of the ICIP 2021 code (and GrouPy's), with their signature.

The arguments by position are ``(in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True)``. ``P4ConvZ2``
and ``P4MConvZ2`` lift planar maps. The others map group to group. The prefix ``g`` or ``gc`` is the separable form, of
rank 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .conv import GConv2d, LiftingConv2d
from .separable_conv import SeparableGConv2d


class _Signature:
    """Mixin for the argument order of the ICIP layers. Keywords of the class statement are fixed arguments."""

    _fixed: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, **fixed: str) -> None:
        super().__init_subclass__()
        cls._fixed = fixed

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        *,
        groups: int = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        more: dict[str, Any] = {"groups": groups, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        super().__init__(  # type: ignore[call-arg]  # the layer class that comes next
            in_channels, out_channels, kernel_size, stride, padding, bias=bias, **self._fixed, **more
        )


class P4ConvZ2(_Signature, LiftingConv2d, group="p4"):
    """From planar maps to p4."""


class P4ConvP4(_Signature, GConv2d, group="p4"):
    """p4 to p4, full filter."""


class gP4ConvP4(_Signature, SeparableGConv2d, group="p4", form="g"):
    """p4 to p4, separable along the group axis."""


class gcP4ConvP4(_Signature, SeparableGConv2d, group="p4", form="gc"):
    """p4 to p4, separable along the group axis and over input channels."""


class P4MConvZ2(_Signature, LiftingConv2d, group="p4m"):
    """From planar maps to p4m."""


class P4MConvP4M(_Signature, GConv2d, group="p4m"):
    """p4m to p4m, full filter."""


class gP4MConvP4M(_Signature, SeparableGConv2d, group="p4m", form="g"):
    """p4m to p4m, separable along the group axis."""


class gcP4MConvP4M(_Signature, SeparableGConv2d, group="p4m", form="gc"):
    """p4m to p4m, separable along the group axis and over input channels."""
