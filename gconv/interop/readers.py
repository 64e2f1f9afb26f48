"""Weights of other libraries: files of tensors in the usual formats, and live layers of escnn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gconv.functional.form_base import Form
from gconv.functional.forms import FORMS
from gconv.groups.point_groups import GROUPS, Group
from gconv.groups.point_groups import group as find_group
from gconv.models import checkpoint
from gconv.models.networks import Model
from gconv.system.errors import InputError
from gconv.system.tensor_files import check_finite, read_plain

from .recognition import Fit, layout_of, read

# The keys under which training scripts keep the state dict in a larger dictionary, and the prefixes that wrappers give
# to every name in it.
_NESTS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


class LayerKind(NamedTuple):
    """What a state dict says of one of its layers, beside the tensors.

    Attributes:
        group: the layer's group; None if it is not known.
        form: the separable form; None if it is not known, or if the layer has none.
    """

    group: Group | None = None
    form: Form | None = None


UNKNOWN = LayerKind()


class StateDict(dict[str, Tensor]):
    """The tensors of a state dict by name.

    Attributes:
        layers: by the layers' names, what PyTorch's metadata or a checkpoint says of them. Only this project's layers
            are there, and none if the state dict was copied into another dictionary or comes from safetensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor], layers: Mapping[str, LayerKind]) -> None:
        super().__init__(tensors)
        self.layers = dict(layers)


def load_source(path: str | Path) -> Model | StateDict:
    """The network in a gconv checkpoint, or the tensors of a bare state dict by name.

    The file is one of ``torch.save``, in either of its formats, or a ``.safetensors`` file. Nothing in it is executed.
    The state dict may be nested under ``state_dict``, ``model_state_dict`` or ``model``. The prefix ``module.`` or
    ``_orig_mod.`` of a wrapper is removed from the names. The zip format of ``torch.save`` has checksums, so every
    flipped bit is noticed. In the other formats it is noticed only if it damages the structure or makes an entry
    infinite or NaN.

    Args:
        path: the file.

    Raises:
        InputError: the file does not exist, is a directory, is damaged, holds no tensors or objects that are not plain
            data, or has entries that are not finite. The message is one line that names the file.
    """
    path = Path(path)
    content = read_plain(path)
    if isinstance(content, dict) and content.get("format") == checkpoint.FORMAT:
        return checkpoint.load(path)
    return plain_state(content, path)


def plain_state(content: Any, source: str | Path) -> StateDict:
    """The dense tensors of a state dict by name, without nesting and without the prefixes of wrappers.

    Args:
        content: a mapping of names to tensors, or one that holds it under one of the usual keys.
        source: the name of the source in error messages.

    Raises:
        InputError: there are no tensors, or some have NaN or infinite entries.
    """
    layers = _layer_kinds(content)
    for _ in _NESTS:  # not deeper: a dictionary may contain itself
        if isinstance(content, Mapping):
            content = next((inner for key in _NESTS if isinstance(inner := content.get(key), Mapping)), content)
    layers = {**layers, **_layer_kinds(content)}
    if not isinstance(content, Mapping):
        raise InputError(f"{source} holds a {type(content).__name__}; give a state dict, that is, tensors by name")
    state = {str(name): tensor.detach() for name, tensor in content.items() if _is_dense(tensor)}
    if not state:
        keys = ", ".join(_NESTS)
        raise InputError(f"{source} holds no tensors; give a state dict, by itself or under one of the keys {keys}")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            layers = {name.removeprefix(prefix): kind for name, kind in layers.items()}
    check_finite(state, source)
    return StateDict(state, layers)


def _layer_kinds(content: Any) -> dict[str, LayerKind]:
    """What a checkpoint of this project says of its layers, or PyTorch's metadata of a state dict; else nothing."""
    if isinstance(content, StateDict):
        return content.layers
    found = getattr(content, "_metadata", None)
    if isinstance(content, Mapping) and content.get("format") == checkpoint.FORMAT:
        found = content.get("layers")
    if not isinstance(found, Mapping):
        return {}
    kinds = {}
    for name, about in found.items():
        given = about if isinstance(about, Mapping) else {}
        group, form = str(given.get("group")), str(given.get("form"))
        kind = LayerKind(find_group(group) if group in GROUPS else None, FORMS.get(form))
        if kind != UNKNOWN:
            kinds[str(name)] = kind
    return kinds


def is_steerable(module: nn.Module) -> bool:
    """Whether a module is a layer of escnn with an expanded filter. It works without that package installed."""
    theirs = any(base.__module__.partition(".")[0] == "escnn" for base in type(module).__mro__)
    return theirs and hasattr(module, "expand_parameters")


def read_steerable(module: Any) -> tuple[Group, Fit] | str:
    """The group and the generator of a live escnn ``R2Conv``, or the reason why it cannot be read.

    Layers from regular to regular fields and from trivial to regular fields are read, for the groups that act exactly
    on the pixel grid: C1, C2, C4, D1, D2 and D4. The order of the elements is found from their matrices. The flip of D1
    reverses columns by default, and that of our pm reverses rows; then the generator is rotated by 90 degrees.
    """
    if not any(base.__name__ == "R2Conv" for base in type(module).__mro__):
        return f"it is an escnn {type(module).__name__}; of escnn's layers only R2Conv is read"
    source, target = module.in_type, module.out_type
    elements = target.fibergroup.elements  # None for a continuous group
    layout = layout_of([_on_pixels(target.gspace.basespace_action(g)) for g in elements]) if elements else None
    if layout is None:
        return f"its group {target.gspace.name} does not act exactly on the pixel grid"
    planar = all(field.is_trivial() for field in source.representations)
    fields = target.representations if planar else [*source.representations, *target.representations]
    if layout.group.order > 1 and any(field.name != "regular" for field in fields):
        kinds = sorted({field.name for field in (*source.representations, *target.representations)})
        return f"its fields are {', '.join(kinds)}; only regular to regular and trivial to regular fields are read"
    if module.groups != 1:
        return f"its channels are in {module.groups} groups; an escnn layer is read only without channel groups"
    with torch.no_grad():
        expanded, _ = module.expand_parameters()
    return layout.group, read(expanded.double().cpu(), layout, lifting=planar)


def _on_pixels(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The matrix on (row, column) for a matrix on (x, y), where y points up."""
    frame = np.array([[0, -1], [1, 0]])
    return frame @ matrix @ frame.T


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
