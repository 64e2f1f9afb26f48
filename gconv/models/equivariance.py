"""Measuring whether a network commutes with its group, and finding the layers that prevent it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gconv.functional.expansion import act
from gconv.groups.point_groups import Group
from gconv.groups.point_groups import group as find_group
from gconv.nn.capture import Call, watch_calls


@dataclass(frozen=True)
class InexactLayer:
    """A layer whose stride samples a map of this size asymmetrically, so that it cannot be exactly equivariant.

    Attributes:
        name: the layer's name in the network; empty for the module itself.
        size: (H, W) of its input.
        stride: its stride.
        exact_sizes: the nearest smaller and larger sizes at which every axis is sampled symmetrically.
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

    The module runs in its present mode, without gradients. Use eval mode, unless it has no batch norm. How g acts on
    the output follows from the output's shape: on ``[N, C, S, H, W]`` it acts on pixels and group axis, on
    ``[N, C, S]`` on the group axis, on ``[N, C, H, W]`` on the pixels, and ``[N, classes]`` must not change at all.

    Args:
        module: a layer or a network.
        group: the group to test under.
        input: ``[N, C, S, H, W]`` or planar ``[N, C, H, W]``.

    Raises:
        InputError: an unknown group, or an input that the module does not take.
    """
    acting = find_group(group)
    with torch.no_grad():
        reference, sampled = _sampled_sizes(module, input)
        errors = tuple(
            _relative(module(act(acting, g, input)), _acted(acting, g, reference)) for g in range(acting.order)
        )
    inexact = []
    for name, layer, size in sampled:
        at_fault = [n for flips, n in zip(acting.reversed_axes(), size, strict=True) if flips and _left_over(layer, n)]
        if at_fault:
            inexact.append(InexactLayer(name, size, _first(layer.stride), _exact_sizes(layer, at_fault[0])))
    return EquivarianceReport(errors, tuple(inexact))


def _sampled_sizes(module: nn.Module, input: Tensor) -> tuple[Tensor, list[tuple[str, Any, tuple[int, int]]]]:
    """The output, and the layers with a stride: name, layer, and the (H, W) that they read, in the order they run.

    A layer that reads maps of several sizes is listed once for each.
    """
    names = {layer: name for name, layer in module.named_modules() if hasattr(layer, "kernel_size")}
    strided = [layer for layer in names if _first(layer.stride) > 1]
    found: dict[tuple[Any, tuple[int, int]], None] = {}  # in the order of the pass

    def note(call: Call) -> None:
        if call.input is not None:
            height, width = call.input.shape[-2:]
            found[call.layer, (height, width)] = None

    with watch_calls(strided, before=note):
        output: Tensor = module(input)
    return output, [(names[layer], layer, size) for layer, size in found]


def _acted(group: Group, element: int, y: Tensor) -> Tensor:
    """The action on an output. One with a group axis and no plane is treated as a map of a single pixel."""
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
    """Rows behind the last step of a strided window, which it does not read. The sampling is symmetric iff 0."""
    kernel, stride = _first(layer.kernel_size), _first(layer.stride)
    padding, dilation = _first(getattr(layer, "padding", 0)), _first(getattr(layer, "dilation", 1))
    return (n + 2 * padding - dilation * (kernel - 1) - 1) % stride


def _exact_sizes(layer: Any, n: int) -> tuple[int, ...]:
    stride = _first(layer.stride)
    below = next((m for m in range(n - 1, max(n - stride, 0), -1) if _left_over(layer, m) == 0), None)
    above = next(m for m in range(n + 1, n + stride + 1) if _left_over(layer, m) == 0)
    return (above,) if below is None else (below, above)
