"""The architectures of the ICIP 2021 paper: the seven-layer CNN and the pre-activation ResNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from gconv.functional.expansion import channels_last, relu
from gconv.groups.point_groups import group
from gconv.nn.base import GroupConvBase
from gconv.nn.batchnorm import GroupBatchNorm2d
from gconv.nn.capture import is_watched
from gconv.nn.conv import GConv2d, LiftingConv2d
from gconv.nn.pooling import GroupMaxPool, SpatialMaxPool2d, SpatialMeanPool2d
from gconv.nn.separable_conv import SeparableGConv2d

PUBLISHED_DEPTH = 44
STRIDES = (1, 2, 2)  # of the stages of a ResNet
SHORTCUTS = ("raw", "activated")


@dataclass(frozen=True)
class ModelSpec:
    """Everything that rebuilds an untrained model, as plain data.

    Attributes:
        name: one of :data:`gconv.MODELS`. It decides between CNN and ResNet, and the defaults of the rest.
        group: one of :data:`gconv.GROUPS`; z2 means plain convolutions.
        widths: channels of the CNN ``(w,)``, or of a ResNet's three stages.
        separable: the form of all group-to-group k x k convolutions (one of :data:`gconv.FORMS`), ``c`` for the
            channel-separable planar network, or None for full filters.
        in_channels: channels of the input image.
        classes: number of class scores.
        depth: layers of a ResNet, 6 n + 2; None for a CNN.
        shortcut: what the shortcut convolutions of a ResNet read. ``"raw"`` is the published architecture: they read
            the input of the block, and a batch norm follows. ``"activated"`` is what early versions of this package
            built, and what their files still load as: they read the input after its batch norm and ReLU, and no batch
            norm follows. None for a CNN.
    """

    name: str
    group: str
    widths: tuple[int, ...]
    separable: str | None
    in_channels: int
    classes: int = 10
    depth: int | None = None
    shortcut: str | None = None

    def __str__(self) -> str:
        """The name, and what differs from the published architecture of that name."""
        text = self.name if self.depth in (None, PUBLISHED_DEPTH) else f"{self.name}, depth {self.depth}"
        return f"{text}, shortcut activated" if self.shortcut == "activated" else text

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint. A CNN has no entries for depth and shortcut."""
        data = {**asdict(self), "widths": list(self.widths)}
        return {key: value for key, value in data.items() if value is not None or key not in ("depth", "shortcut")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        """The spec that :meth:`to_dict` made plain data of, in this version of the package or in an older one.

        Data of a ResNet without depth and shortcut are of an early version, and mean its architecture.

        Raises:
            TypeError, KeyError: the data are not those of a spec.
        """
        spec = cls(**{**data, "widths": tuple(data["widths"])})
        if len(spec.widths) == len(STRIDES) and "shortcut" not in data:
            spec = replace(spec, depth=PUBLISHED_DEPTH, shortcut="activated")
        return spec


class Executor(Protocol):
    """Computes the class scores of a network in another way than layer by layer; see :func:`gconv.fuse`."""

    def __call__(self, net: Model, x: Tensor) -> Tensor | None:
        """The scores of images ``x``, or None where the layers are to compute them."""


class Model(nn.Module):
    """A network that knows the spec it was built from.

    Attributes:
        spec: what rebuilds it, untrained.
        image_size: side of the images in the published experiments.
        executor: what may compute the scores in place of the layers; :func:`gconv.fuse` sets it. None for a network
            that is not fused.
    """

    image_size: int
    executor: Executor | None = None

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """One image ``(in_channels, H, W)`` at the published size."""
        return self.spec.in_channels, self.image_size, self.image_size

    @property
    def fused(self) -> bool:
        """Whether :func:`gconv.fuse` has folded batch norms into convolutions.

        The spec alone does not describe such a network.
        """
        return self.executor is not None

    def forward(self, x: Tensor) -> Tensor:
        """The class scores of images ``[N, in_channels, H, W]``."""
        scores = None if self.executor is None else self.executor(self, x)
        return self.layer_by_layer(x) if scores is None else scores

    def layer_by_layer(self, x: Tensor) -> Tensor:
        """The class scores as the layers compute them, also where an executor could compute them faster."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        spec = self.spec
        text = f"{spec}, group={spec.group}, widths={spec.widths}"
        return text if spec.separable is None else f"{text}, separable={spec.separable}"

    def _conv(self, in_channels: int, out_channels: int, kernel_size: int, **kwargs: Any) -> nn.Module:
        """A convolution from group maps to group maps, in the form that the spec asks for."""
        if self.spec.group == "z2":
            if self.spec.separable is None:
                return nn.Conv2d(in_channels, out_channels, kernel_size, **kwargs)
            # The paper's channel-separable baseline: two ordinary layers, each with its own bias.
            return nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1),
                nn.Conv2d(out_channels, out_channels, kernel_size, groups=out_channels, **kwargs),
            )
        # A 1x1 filter has no spatial part to share: separating it would only add parameters.
        if self.spec.separable is None or kernel_size == 1:
            return GConv2d(in_channels, out_channels, kernel_size, group=self.spec.group, **kwargs)
        return SeparableGConv2d(
            in_channels, out_channels, kernel_size, group=self.spec.group, form=self.spec.separable, **kwargs
        )

    def _first_conv(self, out_channels: int, **kwargs: Any) -> nn.Module:
        """The convolution on the image; never separable."""
        if self.spec.group == "z2":
            return nn.Conv2d(self.spec.in_channels, out_channels, 3, **kwargs)
        return LiftingConv2d(self.spec.in_channels, out_channels, 3, group=self.spec.group, **kwargs)


def _relu_behind(layer: nn.Module, x: Tensor) -> Tensor:
    """ReLU of what ``layer`` returned: in place where no hook and no other layer can have that tensor."""
    new = isinstance(layer, (GroupConvBase, nn.Conv2d, GroupBatchNorm2d, SpatialMaxPool2d)) and not is_watched(layer)
    return relu(x) if new else F.relu(x)


def _active(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch norm and ReLU. In training the batch norm does both at once, unless it is watched or traced."""
    both = isinstance(norm, GroupBatchNorm2d) and norm.training and type(x) is Tensor and not is_watched(norm)
    return norm(x, relu=True) if both else _relu_behind(norm, norm(x))


def _convolved(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """A convolution, its batch norm and ReLU.

    In a fused network the batch norm is an ``nn.Identity``. There the convolution does the ReLU where it can.
    """
    folded = type(norm) is nn.Identity and not is_watched(norm)
    if not folded:
        return _active(norm, conv(x))
    return conv(x, relu=True) if not norm.training and _can_do_more(conv, x) else _relu_behind(conv, conv(x))


def _can_do_more(conv: nn.Module, x: Tensor) -> bool:
    """Whether a layer can add a residual or take the ReLU itself: it is ours, and nobody watches or traces it."""
    return isinstance(conv, (GConv2d, SeparableGConv2d)) and type(x) is Tensor and not is_watched(conv)


class CNN(Model):
    """The seven-layer network of the rotated-MNIST experiments, for 28 x 28 images.

    Convolutions without padding (3x3 six times, 4x4 last), each followed by batch norm and ReLU; 2x2 max pooling after
    the second; maps 28-26-24-12-10-8-6-4-1. Then the maximum over the group axis and one linear layer: the class
    scores are invariant under the group. Input ``[N, in_channels, 28, 28]``, output ``[N, classes]``.
    """

    image_size = 28

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        (width,) = spec.widths
        self.conv1 = self._first_conv(width)
        self.bn1 = GroupBatchNorm2d(width)
        for i in range(2, 8):
            self.add_module(f"conv{i}", self._conv(width, width, 4 if i == 7 else 3))
            self.add_module(f"bn{i}", GroupBatchNorm2d(width))
        self.pool = SpatialMaxPool2d(2)
        self.group_pool = nn.Identity() if spec.group == "z2" else GroupMaxPool()
        self.fc = nn.Linear(width, spec.classes)

    def layer_by_layer(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        for i in range(1, 8):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            # ReLU and maximum commute. After the pooling, ReLU has only a quarter of the values to clamp.
            x = _relu_behind(self.pool, self.pool(norm(conv(x)))) if i == 2 else _convolved(conv, norm, x)
        return self.fc(self.group_pool(x).flatten(1))


class _Block(nn.Module):
    """Pre-activation residual block: BN, ReLU, conv, BN, ReLU, conv, plus the shortcut.

    The shortcut is the identity, or, where stride or width changes, a 1x1 convolution: of the block's input, followed
    by a batch norm; or, in the old architecture, of the activated input. See :class:`ModelSpec`.
    """

    def __init__(
        self, conv: Callable[..., nn.Module], in_channels: int, out_channels: int, stride: int, shortcut: str
    ) -> None:
        super().__init__()
        self.bn1 = GroupBatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = GroupBatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else conv(in_channels, out_channels, 1, stride=stride, bias=False)
        self.shortcut_bn = None if same or shortcut == "activated" else GroupBatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        active = _active(self.bn1, x)
        if self.shortcut is None:
            residual = x
        elif self.shortcut_bn is None:
            residual = self.shortcut(active)
        else:
            residual = self.shortcut_bn(self.shortcut(x))
        hidden = _convolved(self.conv1, self.bn2, active)
        return self.conv2(hidden, residual=residual) if _can_do_more(self.conv2, x) else residual + self.conv2(hidden)


class ResNet(Model):
    """The pre-activation network of the CIFAR-10 experiments: three stages of n blocks, 6 n + 2 layers.

    The stem is a 3x3 convolution without batch norm. After the third stage come batch norm, ReLU, the mean over the
    plane and a linear head. Strides are 1, 2, 2. No convolution has a bias.

    Two consequences of the published architecture: its 3x3 stride-2 layers with padding 1 are not exactly equivariant
    on even maps (32 and 16 here), and its linear head reads ``channels x |H|`` features, so the class scores are not
    invariant. Input ``[N, in_channels, H, W]``, output ``[N, classes]``.
    """

    image_size = 32

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        assert spec.depth is not None and spec.shortcut is not None
        first, _, last = spec.widths
        self.stem = self._first_conv(first, padding=1, bias=False)
        in_channels = first
        for stage, (width, stride) in enumerate(zip(spec.widths, STRIDES, strict=True), start=1):
            blocks = []
            for number in range((spec.depth - 2) // 6):
                blocks.append(_Block(self._conv, in_channels, width, 1 if number else stride, spec.shortcut))
                in_channels = width
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))
        self.bn = GroupBatchNorm2d(last)
        self.pool = SpatialMeanPool2d()
        self.fc = nn.Linear(last * group(spec.group).order, spec.classes)

    def layer_by_layer(self, x: Tensor) -> Tensor:
        x = self.stem(channels_last(x))
        for stage in (1, 2, 3):
            x = getattr(self, f"stage{stage}")(x)
        return self.fc(self.pool(_active(self.bn, x)).flatten(1))
