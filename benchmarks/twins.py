"""P4CNN and the p4m-ResNets with the layers of other libraries, for comparisons of speed.

There are two networks, which repeat those of :mod:`gconv.models.networks`, and three kits of layers for them:

* :class:`Plain`: ``nn.Conv2d`` and ``nn.BatchNorm2d`` of the expanded width, with no weights shared. This is the *dense
  limit*, in either memory format.
* :class:`Lists`: the design of the first library for group convolutions. The filter is expanded in every pass by
  indexing with Python lists, and batch norm is ``nn.BatchNorm3d``.
* :class:`Escnn`: layers of escnn, if it is installed. :func:`escnn_exported` replaces them by the ordinary layers that
  escnn's own ``export()`` returns.

escnn requires a package that needs a Fortran compiler, and an old NumPy, but runs without that package. Install it in a
separate virtual environment: ``pip install --no-deps escnn``, then ``pip install torch "numpy<2" scipy lie_learn joblib
pymanopt autograd lazy_loader rich``. Leave scikit-learn out, as escnn does not work with its newer versions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv.functional.expansion import Tables
from gconv.groups.point_groups import group


class Kit(Protocol):
    """The layers of one library. Channels are those of the group network: fields, not planar channels."""

    def enter(self, images: Tensor) -> Any: ...
    def conv(self, in_channels: int, out_channels: int, k: int, *, first: bool = False, **how: Any) -> nn.Module: ...
    def norm(self, channels: int) -> nn.Module: ...
    def relu(self, channels: int) -> nn.Module: ...
    def max_pool(self, channels: int) -> nn.Module: ...
    def invariant(self, x: Any, channels: int) -> Tensor: ...
    def leave(self, x: Any) -> Tensor: ...


class TwinCNN(nn.Module):
    """The seven layers of P4CNN."""

    def __init__(self, kit: Kit, width: int = 10) -> None:
        super().__init__()
        self.kit, self.width = kit, width
        sizes = [3] * 6 + [4]
        self.convs = nn.ModuleList(kit.conv(width if i else 1, width, k, first=i == 0) for i, k in enumerate(sizes))
        self.norms = nn.ModuleList(kit.norm(width) for _ in sizes)
        self.relus = nn.ModuleList(kit.relu(width) for _ in sizes)
        self.pool = kit.max_pool(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.kit.enter(x)
        for i, (conv, norm, relu) in enumerate(zip(self.convs, self.norms, self.relus, strict=True)):
            x = relu(norm(conv(x)))
            if i == 1:
                x = self.pool(x)
        return self.fc(self.kit.invariant(x, self.width).flatten(1))


class _Block(nn.Module):
    def __init__(self, kit: Kit, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = kit.norm(into), kit.relu(into)
        self.conv1 = kit.conv(into, out, 3, stride=stride, padding=1, bias=False)
        self.norm2, self.relu2 = kit.norm(out), kit.relu(out)
        self.conv2 = kit.conv(out, out, 3, padding=1, bias=False)
        same = stride == 1 and into == out
        self.shortcut = None if same else kit.conv(into, out, 1, stride=stride, bias=False)
        self.shortcut_norm = None if same else kit.norm(out)

    def forward(self, x: Any) -> Any:
        residual = x if self.shortcut is None or self.shortcut_norm is None else self.shortcut_norm(self.shortcut(x))
        return residual + self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))


class TwinResNet(nn.Module):
    """The 44 layers of the p4m-ResNets."""

    def __init__(self, kit: Kit, widths: Sequence[int] = (11, 23, 45), order: int = 8, blocks: int = 7) -> None:
        super().__init__()
        self.kit = kit
        first, _, last = widths
        self.stem = kit.conv(3, first, 3, first=True, padding=1, bias=False)
        pairs = zip([first, *widths], widths, strict=False)
        self.blocks = nn.ModuleList(
            _Block(kit, into if number == 0 else out, out, 2 if number == 0 and stage else 1)
            for stage, (into, out) in enumerate(pairs)
            for number in range(blocks)
        )
        self.norm, self.relu = kit.norm(last), kit.relu(last)
        self.fc = nn.Linear(last * order, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.kit.enter(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(self.kit.leave(self.relu(self.norm(x))).flatten(-2).mean(-1).flatten(1))


class Plain:
    """The kit of ordinary layers of the expanded width."""

    def __init__(self, order: int, *, channels_last: bool = False) -> None:
        self.order = order
        self.format = torch.channels_last if channels_last else torch.contiguous_format

    def enter(self, images: Tensor) -> Tensor:
        return images.clone(memory_format=self.format)

    def conv(self, in_channels: int, out_channels: int, k: int, *, first: bool = False, **how: Any) -> nn.Module:
        into = in_channels if first else in_channels * self.order
        conv: nn.Module = nn.Conv2d(into, out_channels * self.order, k, **how)
        return conv.to(memory_format=self.format)  # type: ignore[call-overload]  # which Module.to does accept

    def norm(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels * self.order)

    def relu(self, channels: int) -> nn.Module:
        return nn.ReLU()

    def max_pool(self, channels: int) -> nn.Module:
        return nn.MaxPool2d(2)

    def invariant(self, x: Tensor, channels: int) -> Tensor:
        return x.unflatten(1, (channels, self.order)).amax(2)

    def leave(self, x: Tensor) -> Tensor:
        return x


class ListConv(nn.Module):
    """A group convolution that expands its filter in every pass, by indexing with Python lists."""

    def __init__(self, on: str, shape: tuple[int, ...], bias: bool, **how: Any) -> None:
        super().__init__()
        _, _, s_in, k, _ = shape
        self.order, self.how = group(on).order, how
        self.weight = nn.Parameter(torch.randn(shape) / math.prod(shape[1:]) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        first = s_in < self.order
        flat = Tables.build(group(on), k, lifting=first).expansion.view(self.order, s_in, k, k)
        self.indices = (flat // (k * k)).tolist(), (flat // k % k).tolist(), (flat % k).tolist()

    def forward(self, x: Tensor) -> Tensor:
        o, i, s_in, k, _ = self.weight.shape
        element, row, column = self.indices
        expanded = self.weight[:, :, element, row, column]  # [O, I, S, S_in, k, k]
        filters = expanded.permute(0, 2, 1, 3, 4, 5).reshape(o * self.order, i * s_in, k, k)
        y = F.conv2d(x.reshape(len(x), i * s_in, *x.shape[-2:]), filters, **self.how)
        y = y.view(len(x), o, self.order, *y.shape[2:])
        return y if self.bias is None else y + self.bias.view(1, o, 1, 1, 1)


class _PlanarMaxPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, s, h, w = x.shape
        return F.max_pool2d(x.view(n, c * s, h, w), 2).view(n, c, s, h // 2, w // 2)


class Lists:
    """The kit of layers that expand their filter with Python lists; all maps are ``[N, C, S, H, W]``."""

    def __init__(self, on: str) -> None:
        self.group = on

    def enter(self, images: Tensor) -> Tensor:
        return images

    def conv(self, in_channels: int, out_channels: int, k: int, *, first: bool = False, **how: Any) -> nn.Module:
        shape = out_channels, in_channels, 1 if first else group(self.group).order, k, k
        return ListConv(self.group, shape, **{"bias": True, **how})

    def norm(self, channels: int) -> nn.Module:
        return nn.BatchNorm3d(channels)

    def relu(self, channels: int) -> nn.Module:
        return nn.ReLU()

    def max_pool(self, channels: int) -> nn.Module:
        return _PlanarMaxPool()

    def invariant(self, x: Tensor, channels: int) -> Tensor:
        return x.amax(2)

    def leave(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)


def has_escnn() -> bool:
    """Whether escnn is installed."""
    return find_spec("escnn") is not None


class Escnn:
    """The kit of escnn's layers on regular fields, with a basis that spans all 3x3 filters."""

    def __init__(self, on: str) -> None:
        from escnn import gspaces
        from escnn import nn as enn

        self.enn = enn
        self.space = {"p4": lambda: gspaces.rot2dOnR2(4), "p4m": lambda: gspaces.flipRot2dOnR2(4)}[on]()

    def _type(self, channels: int) -> Any:
        return self.enn.FieldType(self.space, channels * [self.space.regular_repr])

    def _images(self, channels: int) -> Any:
        return self.enn.FieldType(self.space, channels * [self.space.trivial_repr])

    def enter(self, images: Tensor) -> Any:
        return self.enn.GeometricTensor(images, self._images(images.shape[1]))

    def conv(self, in_channels: int, out_channels: int, k: int, *, first: bool = False, **how: Any) -> nn.Module:
        into = self._images(in_channels) if first else self._type(in_channels)
        return self.enn.R2Conv(into, self._type(out_channels), k, frequencies_cutoff=lambda r: 4 * r, **how)

    def norm(self, channels: int) -> nn.Module:
        return self.enn.InnerBatchNorm(self._type(channels))

    def relu(self, channels: int) -> nn.Module:
        return self.enn.ReLU(self._type(channels))

    def max_pool(self, channels: int) -> nn.Module:
        return self.enn.PointwiseMaxPool2D(self._type(channels), 2)

    def invariant(self, x: Any, channels: int) -> Tensor:
        return self.enn.GroupPooling(x.type)(x).tensor

    def leave(self, x: Any) -> Tensor:
        return x.tensor


def escnn_exported(twin: nn.Module, order: int) -> nn.Module:
    """A network of :class:`Escnn` in eval mode, with each layer replaced by what escnn's ``export()`` returns."""
    made: nn.Module
    if isinstance(twin, TwinCNN):
        made = TwinCNN(Plain(order), twin.width)
    else:
        assert isinstance(twin, TwinResNet)
        widths = [len(twin.blocks[i * len(twin.blocks) // 3].conv2.out_type) for i in range(3)]  # type: ignore[union-attr, arg-type]
        made = TwinResNet(Plain(order), widths, order, len(twin.blocks) // 3)
    for name, module in list(twin.named_modules()):
        if hasattr(module, "export") and not name.endswith("pool"):
            made.set_submodule(name, module.export())
    made.fc = twin.fc
    return made.eval()
