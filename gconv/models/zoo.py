"""The networks of the ICIP 2021 paper, by name, for any group, width, depth and separable form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeGuard

from gconv.functional.forms import FORMS
from gconv.groups.point_groups import group
from gconv.system.errors import InputError, one_of

from .networks import CNN, PUBLISHED_DEPTH, SHORTCUTS, Model, ModelSpec, ResNet


class _Entry(NamedTuple):
    """A network of the registry: its class, and the spec of the published one."""

    build: type[Model]
    spec: ModelSpec


def _cnn(name: str, width: int, group: str = "p4", separable: str | None = None) -> _Entry:
    return _Entry(CNN, ModelSpec(name, group, (width,), separable, in_channels=1))


def _resnet(name: str, *widths: int, group: str = "p4m", separable: str | None = None) -> _Entry:
    return _Entry(
        ResNet, ModelSpec(name, group, widths, separable, in_channels=3, depth=PUBLISHED_DEPTH, shortcut="raw")
    )


_REGISTRY = {
    entry.spec.name: entry
    for entry in (
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
    widths: Sequence[int] | None = None,
    depth: int | None = None,
    separable: str | None = None,
    in_channels: int | None = None,
    classes: int = 10,
) -> Model:
    """A new, randomly initialised network.

    Args:
        name: one of ``MODELS``, case-insensitive. The published widths, depth, group and form are the defaults.
        group: another group (:data:`gconv.GROUPS`).
        width: another width. The stages of a ResNet get ``(w, 2 w, 4 w)``.
        widths: all widths, in place of ``width``: three for a ResNet, one for a CNN.
        depth: another depth of a ResNet, 6 n + 2 layers with n blocks in each stage: 8, 14, 20, 26, ...
        separable: another form for the group-to-group layers, one of :data:`gconv.FORMS`.
        in_channels: channels of the input image; by default 1 for the CNNs, 3 for the ResNets.
        classes: number of class scores.

    Raises:
        InputError: an unknown name, group or form; a width below 1, the wrong number of widths, or both ``width`` and
            ``widths``; a depth that is not 6 n + 2, or of a CNN; or a separable form on the group z2.
    """
    if not isinstance(name, str) or name.lower() not in _REGISTRY:
        raise one_of("model", name, MODELS)
    if width is not None and widths is not None:
        raise InputError(f"both width={width!r} and widths={widths!r} were given. Give one of them.")
    spec = _REGISTRY[name.lower()].spec
    changes: dict[str, Any] = {"group": group, "separable": separable, "in_channels": in_channels, "depth": depth}
    changes = {key: value.lower() if isinstance(value, str) else value for key, value in changes.items()}
    if width is not None:
        changes["widths"] = tuple(width * 2**stage for stage in range(len(spec.widths)))
    elif widths is not None:
        changes["widths"] = tuple(widths)
    changed = {key: value for key, value in changes.items() if value is not None}
    return build_model(replace(spec, classes=classes, **changed))


def build_model(spec: ModelSpec) -> Model:
    """The network of a spec, randomly initialised.

    Raises:
        InputError: the spec is not one that :func:`create_model` could have made.
    """
    if spec.name not in _REGISTRY:
        raise one_of("model", spec.name, MODELS)
    build, published = _REGISTRY[spec.name]
    planar = group(spec.group).order == 1
    forms = tuple(FORMS) if not planar else ("c",) if build is CNN else ()
    if spec.separable is not None and spec.separable not in forms:
        raise one_of(f"form (of {spec.name} on {spec.group})", spec.separable, forms or ["none"])
    if len(spec.widths) != len(published.widths):
        wanted = "one width" if build is CNN else f"{len(published.widths)} widths, one for each stage"
        raise InputError(f"widths of {spec.name} are {list(spec.widths)}. Give {wanted}.")
    sizes = [("width", width) for width in spec.widths]
    sizes += [("in_channels", spec.in_channels), ("classes", spec.classes)]
    for label, value in sizes:
        if not _is_count(value):
            raise InputError(f"{label} is {value!r}. Give a whole number of at least 1.")
    return build(_checked_resnet(spec) if build is ResNet else _checked_cnn(spec))


def _checked_resnet(spec: ModelSpec) -> ModelSpec:
    """The spec with the published depth and shortcut where it names none."""
    spec = replace(spec, depth=PUBLISHED_DEPTH if spec.depth is None else spec.depth, shortcut=spec.shortcut or "raw")
    if not _is_count(spec.depth) or spec.depth < 8 or spec.depth % 6 != 2:
        raise InputError(f"depth of {spec.name} is {spec.depth!r}. Give 6 n + 2 layers, for example 8, 20, 26 or 44.")
    if spec.shortcut not in SHORTCUTS:
        raise one_of("shortcut", spec.shortcut, SHORTCUTS)
    return spec


def _checked_cnn(spec: ModelSpec) -> ModelSpec:
    if spec.depth is not None or spec.shortcut is not None:
        raise InputError(f"{spec.name} is a CNN of seven layers. Only ResNets have a depth and a shortcut.")
    return spec


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
