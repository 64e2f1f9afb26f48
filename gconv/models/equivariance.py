"""Measuring whether a network commutes with its group, and saying why where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gconv.functional.expansion import act
from gconv.groups.point_groups import Group
from gconv.groups.point_groups import group as find_group


@dataclass(frozen=True)
class InexactLayer:
    """A layer whose stride samples a map of this size asymmetrically, so that it cannot be exactly equivariant.

    Attributes:
        name: the layer's name in the network (empty for the module itself).
        size: (H, W) of its input.
        stride: its stride.
        exact_sizes: the nearest sizes below and above at which every axis would be sampled symmetrically.
    """

    name: str
    size: tuple[int, int]
    stride: int
    exact_sizes: tuple[int, ...]

    def __str__(self) -> str:
        near = " or ".join(f"{n} x {n}" for n in self.exact_sizes)
        height, width = self.size
        where = f"{self.name or 'the layer'}: stride {self.stride} on a {height} x {width} map"
        return f"{where} is inexact; {near} is exact"


@dataclass(frozen=True)
class EquivarianceReport:
    """The result of :func:`equivariance_error`.

    Attributes:
        errors: relative error for each element of the group, in the order of the group axis.
        inexact: the layers that make exact equivariance impossible at this input size.
    """

    errors: tuple[float, ...]
    inexact: tuple[InexactLayer, ...]

    @property
    def max(self) -> float:
        """The largest relative error over the group."""
        return max(self.errors)

    def __str__(self) -> str:
        lines = [f"largest relative equivariance error {self.max:.2e}"]
        return "\n".join(lines + [str(layer) for layer in self.inexact])


def equivariance_error(module: nn.Module, group: str | Group, input: Tensor) -> EquivarianceReport:
    """How far ``module(g x)`` is from ``g module(x)``, for every g: ``|difference| / |module(x)|``, Euclidean norms.

    Run in the module's present mode, without gradients; use eval mode unless batch norm has no part in it. The
    output's kind follows from its shape: ``[N, C, S, H, W]`` turns with both axes, ``[N, C, S]`` with the group axis,
    ``[N, C, H, W]`` with the pixels, and ``[N, classes]`` must not change at all.

    Args:
        module: a layer or a network.
        group: the group to test under.
        input: ``[N, C, S, H, W]`` or planar ``[N, C, H, W]``.

    Raises:
        InputError: an unknown group, or an input that the module does not take.
    """
    of = find_group(group)
    names = {layer: name for name, layer in module.named_modules() if hasattr(layer, "kernel_size")}
    strided = [layer for layer in names if _first(layer.stride) > 1]
    # Keys of a dict: in the order of the pass, a layer that is used at several sizes once for each.
    sampled: dict[tuple[Any, tuple[int, int]], None] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        height, width = inputs[0].shape[-2:]
        sampled[layer, (height, width)] = None

    hooks = [layer.register_forward_pre_hook(note) for layer in strided]
    try:
        with torch.no_grad():
            reference = module(input)
    finally:
        for hook in hooks:
            hook.remove()
    inexact = []
    for layer, size in sampled:
        at_fault = [n for flips, n in zip(of.reversed_axes(), size, strict=True) if flips and _left_over(layer, n)]
        if at_fault:
            inexact.append(InexactLayer(names[layer], size, _first(layer.stride), _exact_sizes(layer, at_fault[0])))
    with torch.no_grad():
        errors = tuple(_relative(module(act(of, g, input)), _acted(of, g, reference)) for g in range(of.order))
    return EquivarianceReport(errors, tuple(inexact))


def _acted(group: Group, element: int, y: Tensor) -> Tensor:
    """The action on an output; one without a plane but with a group axis is seen as a map of a single pixel."""
    if y.dim() == 3 and y.shape[2] == group.order:
        return act(group, element, y[..., None, None])[..., 0, 0]
    return act(group, element, y)


def _relative(value: Tensor, reference: Tensor) -> float:
    if value.shape != reference.shape:
        return float("inf")
    norm = reference.double().norm().item()
    difference = (value.double() - reference.double()).norm().item()
    return difference / norm if norm else difference


def _first(value: Any) -> int:
    """An int, or the first of a pair."""
    return int(value[0] if isinstance(value, tuple) else value)


def _left_over(layer: Any, n: int) -> int:
    """Rows that the last step of a strided window leaves unread; 0 iff the sampling is symmetric."""
    kernel, stride = _first(layer.kernel_size), _first(layer.stride)
    padding, dilation = _first(getattr(layer, "padding", 0)), _first(getattr(layer, "dilation", 1))
    return (n + 2 * padding - dilation * (kernel - 1) - 1) % stride


def _exact_sizes(layer: Any, n: int) -> tuple[int, ...]:
    stride = _first(layer.stride)
    below = next((m for m in range(n - 1, max(n - stride, 0), -1) if _left_over(layer, m) == 0), None)
    above = next(m for m in range(n + 1, n + stride + 1) if _left_over(layer, m) == 0)
    return (above,) if below is None else (below, above)
