"""The networks of the ICIP 2021 paper, by name, for any group, width and separable form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from gconv.functional.expansion import channels_last, relu
from gconv.functional.forms import FORMS
from gconv.groups.point_groups import group
from gconv.nn.batchnorm import GroupBatchNorm2d
from gconv.nn.conv import GConv2d, LiftingConv2d
from gconv.nn.pooling import GroupMaxPool, SpatialMaxPool2d, SpatialMeanPool2d
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError, one_of


@dataclass(frozen=True)
class ModelSpec:
    """Everything that rebuilds an untrained model, as plain data.

    Attributes:
        name: one of ``MODELS``; it decides the architecture and the defaults of the rest.
        group: one of ``GROUPS``; z2 means plain convolutions.
        widths: channels of the CNN ``(w,)``, or of a ResNet's three stages.
        separable: the form of all group-to-group k x k convolutions (one of ``FORMS``), ``c`` for the channel-separable
            planar network, or None for full filters.
        in_channels: channels of the input image.
        classes: number of class scores.
    """

    name: str
    group: str
    widths: tuple[int, ...]
    separable: str | None
    in_channels: int
    classes: int = 10

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {**asdict(self), "widths": list(self.widths)}


class Inference(Protocol):
    """What may run in place of a network's layers."""

    def program(self, net: Model, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What gives the scores of ``x``; None where the layers are to run."""


class Model(nn.Module):
    """A network that knows the spec it was built from."""

    image_size: int
    _inference: Inference | None = None

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """One image ``(in_channels, H, W)`` at the published size."""
        return self.spec.in_channels, self.image_size, self.image_size

    @property
    def fused(self) -> bool:
        """Whether it has lost batch norms to its convolutions (:func:`gconv.fuse`), so that the spec alone does not
        tell its architecture."""
        return self._inference is not None

    def forward(self, x: Tensor) -> Tensor:
        """The class scores of images ``[N, in_channels, H, W]``."""
        program = None if self._inference is None else self._inference.program(self, x)
        return self._layers(x) if program is None else program(x)

    def _layers(self, x: Tensor) -> Tensor:
        """The scores, layer by layer."""
        raise NotImplementedError

    def run_by(self, inference: Inference) -> None:
        """Let a program made from this network run in its place where it can; for :func:`gconv.fuse`."""
        self._inference = inference

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
        # A 1x1 filter is its own mix: separating it would only add parameters.
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


def _active(norm: nn.Module, x: Tensor) -> Tensor:
    """ReLU of the batch norm (or of what stands in its place), by both in one go while training.

    Not where somebody looks at what the batch norm gives, nor for a tracer, which is to see two steps.
    """
    both = isinstance(norm, GroupBatchNorm2d) and norm.training and type(x) is Tensor and not norm._forward_hooks
    return norm(x, relu=True) if both else relu(norm(x))


def _convolved(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """A convolution, the batch norm of it and ReLU."""
    whole = isinstance(norm, nn.Identity) and not norm._forward_hooks and not norm.training
    return conv(x, relu=True) if whole and _may_do_more(conv, x) else _active(norm, conv(x))


def _may_do_more(conv: nn.Module, x: Tensor) -> bool:
    """Whether a layer may do what comes after it too: nobody looks at what it gives, and no tracer at the steps."""
    ours = isinstance(conv, (GConv2d, SeparableGConv2d))
    return ours and type(x) is Tensor and not conv._forward_hooks


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

    def _layers(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        for i in range(1, 8):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            # ReLU of the largest is the largest after ReLU, with a quarter of the values left to clamp.
            x = relu(self.pool(norm(conv(x)))) if i == 2 else _convolved(conv, norm, x)
        return self.fc(self.group_pool(x).flatten(1))


class _Block(nn.Module):
    """Pre-activation residual block: BN, ReLU, conv, BN, ReLU, conv, plus the identity or a 1x1 convolution."""

    def __init__(self, conv: Callable[..., nn.Module], in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = GroupBatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = GroupBatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = None if same else conv(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = _active(self.bn1, x)
        passed = x if self.shortcut is None else self.shortcut(active)
        between = _convolved(self.conv1, self.bn2, active)
        return self.conv2(between, residual=passed) if _may_do_more(self.conv2, x) else passed + self.conv2(between)


class ResNet44(Model):
    """The 44-layer pre-activation network of the CIFAR-10 experiments: three stages of seven blocks.

    Two consequences of the published architecture, kept as they are: its 3x3 stride-2 layers with padding 1 are not
    exactly equivariant on even maps (32 and 16 here), and its linear head reads ``channels x |H|`` features, so the
    class scores are not invariant. Input ``[N, in_channels, H, W]``, output ``[N, classes]``.
    """

    image_size = 32

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        first, _, last = spec.widths
        self.stem = self._first_conv(first, padding=1, bias=False)
        in_channels = first
        for stage, width in enumerate(spec.widths, start=1):
            blocks = []
            for number in range(7):
                stride = 2 if stage > 1 and number == 0 else 1
                blocks.append(_Block(self._conv, in_channels, width, stride))
                in_channels = width
            self.add_module(f"stage{stage}", nn.Sequential(*blocks))
        self.bn = GroupBatchNorm2d(last)
        self.pool = SpatialMeanPool2d()
        self.fc = nn.Linear(last * group(spec.group).order, spec.classes)

    def _layers(self, x: Tensor) -> Tensor:
        x = self.stem(channels_last(x))
        for stage in (1, 2, 3):
            x = getattr(self, f"stage{stage}")(x)
        return self.fc(self.pool(_active(self.bn, x)).flatten(1))


def _cnn(name: str, width: int, group: str = "p4", separable: str | None = None) -> tuple[type[Model], ModelSpec]:
    return CNN, ModelSpec(name, group, (width,), separable, in_channels=1)


def _resnet(name: str, *widths: int, group: str = "p4m", separable: str | None = None) -> tuple[type[Model], ModelSpec]:
    return ResNet44, ModelSpec(name, group, widths, separable, in_channels=3)


_REGISTRY = {
    spec.name: (build, spec)
    for build, spec in (
        _cnn("z2cnn", 20, "z2"),
        _cnn("c-z2cnn", 57, "z2", "c"),
        _cnn("p4cnn", 10),
        _cnn("g-p4cnn-small", 10, separable="g"),
        _cnn("g-p4cnn", 17, separable="g"),
        _cnn("gc-p4cnn-small", 10, separable="gc"),
        _cnn("gc-p4cnn", 30, separable="gc"),
        _resnet("resnet44", 32, 64, 128, group="z2"),
        _resnet("p4m-resnet44", 11, 23, 45),
        _resnet("g-p4m-resnet44", 19, 38, 76, separable="g"),
        _resnet("gc-p4m-resnet44", 28, 56, 112, separable="gc"),
    )
}
MODELS = tuple(_REGISTRY)


def create_model(
    name: str,
    *,
    group: str | None = None,
    width: int | None = None,
    separable: str | None = None,
    in_channels: int | None = None,
    classes: int = 10,
) -> Model:
    """A new, randomly initialised network.

    Args:
        name: one of ``MODELS``, case-insensitive. The published width, group and form are the defaults.
        group: another group (:data:`gconv.GROUPS`).
        width: another width; the stages of a ResNet get ``(w, 2 w, 4 w)``.
        separable: another form for the group-to-group layers, one of :data:`gconv.FORMS`.
        in_channels: channels of the input image; by default 1 for the CNNs, 3 for the ResNets.
        classes: number of class scores.

    Raises:
        InputError: an unknown name, group or form, a width below 1, or a separable form on the group z2.
    """
    if not isinstance(name, str) or name.lower() not in _REGISTRY:
        raise one_of("model", name, MODELS)
    _, spec = _REGISTRY[name.lower()]
    changes: dict[str, Any] = {"group": group, "separable": separable, "in_channels": in_channels}
    changes = {key: value.lower() if isinstance(value, str) else value for key, value in changes.items()}
    if width is not None:
        changes["widths"] = tuple(width * 2**stage for stage in range(len(spec.widths)))
    changed = {key: value for key, value in changes.items() if value is not None}
    return build_model(replace(spec, classes=classes, **changed))


def build_model(spec: ModelSpec) -> Model:
    """The network of a spec, randomly initialised.

    Raises:
        InputError: the spec is not one that :func:`create_model` could have made.
    """
    if spec.name not in _REGISTRY:
        raise one_of("model", spec.name, MODELS)
    build, default = _REGISTRY[spec.name]
    planar = group(spec.group).order == 1
    forms = tuple(FORMS) if not planar else ("c",) if build is CNN else ()
    if spec.separable is not None and spec.separable not in forms:
        raise one_of(f"form (of {spec.name} on {spec.group})", spec.separable, forms or ["none"])
    if len(spec.widths) != len(default.widths):
        raise InputError(f"{spec.name} takes {len(default.widths)} widths, got {list(spec.widths)}")
    sizes = {"width": min(spec.widths), "in_channels": spec.in_channels, "classes": spec.classes}
    for label, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{label} is {value!r}; accepted: a whole number of at least 1")
    return build(spec)
