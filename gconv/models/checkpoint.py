"""Checkpoints: one file of plain data from which a network is rebuilt, converted layers included.

========== =============================================================================================================
entry      what it is
========== =============================================================================================================
format     :data:`FORMAT`
version    :data:`VERSION` of the writer. Version 1 has no settings, frozen and rounded, and one dtype for all weights.
           Versions 1 and 2 have the execution that each layer ran in, be it chosen or not
model      the :class:`gconv.ModelSpec` as a dictionary
layers     form, rank and execution of each group-to-group layer (:func:`layer_choices`). The execution is ``auto``,
           and so left to the machine that reads the file, unless the user has set it
settings   by module, the plain attributes that were changed after it was built, for example the ``eps`` of a batch norm
frozen     the parameters with ``requires_grad=False``
state_dict the tensors by name
rounded    the original dtype of each tensor that is stored in half precision
record     how the network came about
resume     what an unfinished training run needs to continue, or None
========== =============================================================================================================
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gconv.functional.forms import check_execution, form_named
from gconv.nn.conv import GConv2d
from gconv.nn.replace import replace_module
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError
from gconv.system.files import atomic_path
from gconv.system.memory import raise_mmap_threshold
from gconv.system.tensor_files import check_finite, read_plain

from .comparison import structural_differences, tensor_differences
from .networks import Model, ModelSpec
from .zoo import build_model

FORMAT = "gconv-checkpoint"
VERSION = 3


@dataclass
class Checkpoint:
    """What a file holds.

    Attributes:
        model: the network, in eval mode.
        record: how it came about, as plain data: data set and its hash, recipe, seed, history, test error, conversion.
        resume: what an unfinished training run needs to continue; None for a finished network.
    """

    model: Model
    record: dict[str, Any] = field(default_factory=dict)
    resume: dict[str, Any] | None = None


def save(
    model: Model,
    path: str | Path,
    *,
    record: dict[str, Any] | None = None,
    resume: dict[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Write a network as one file, atomically.

    The file is written only if :func:`load` makes the same network of it: the same modules, settings and weights, and
    therefore the same scores in eval mode. A checkpoint describes the networks that :func:`gconv.create_model` and
    conversion make. It also describes settings that were changed later (for example the ``eps`` of a batch norm or the
    stride of a convolution), a last layer for another number of classes, any dtypes, and frozen parameters. It does not
    describe hooks that see only gradients or state dicts.

    Args:
        model: a network of :func:`gconv.create_model`, converted or not.
        path: the file; one that is there is replaced.
        record: how the network came about, as plain data.
        resume: what an unfinished training run needs to continue.
        half: store the weights in half precision (11 significant bits), for snapshots whose scores need not be exact.

    Raises:
        InputError: the network has something that a checkpoint does not describe, such as a module of another class, a
            forward hook, a replaced method or a shared parameter; its weights are not finite; record or resume are not
            plain data; or the path cannot be written.
    """
    built, content = _described(model, half)
    content |= {"record": record or {}, "resume": resume}
    # It is written to memory first. Given a path, PyTorch would name its archive after the temporary file, which has a
    # random name. Given an open file, it would raise a RuntimeError of its own on a full disk.
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
        buffer.seek(0)
        content = torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        what = "its spec, record or resume holds objects that are not plain data"
        raise InputError(f"cannot save the network: {what} (numbers, text, tensors, lists and dictionaries)") from error
    try:
        _fill(built, content)
    except _UNFIT as error:
        raise InputError(f"cannot save the network: {_one_line(error)}") from error
    # Now ``built`` is the network that will be loaded.
    _refuse(next(tensor_differences(model, built, _rounded if half else lambda tensor: tensor), None))
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _described(model: Model, half: bool) -> tuple[Model, dict[str, Any]]:
    """The network that is built from a description of ``model``, without its tensors; and the description.

    The two are compared part by part. They are not run on an example, which would prove less: as they run the same code
    on equal attributes, equal tensors give equal scores for every input.
    """
    if not isinstance(model, Model) or not isinstance(model.spec, ModelSpec):
        what = f"only networks of gconv.create_model can be saved with their architecture, not {type(model)}"
        raise InputError(
            f"{what}. Give the network itself if this is a wrapper, or use torch.save on its state_dict()."
        )
    if model.fused:
        what = "a fused network cannot be saved: its batch norms are folded into its convolutions"
        raise InputError(f"{what}. Save the network that it was made of, or use gconv.export.")
    spec, last = model.spec, getattr(model, "fc", None)
    if type(last) is nn.Linear:
        spec = replace(spec, classes=last.out_features)
    try:
        built, own = _build(spec, "cpu"), layer_choices(model)
        apply_choices(built, {name: own.get(name, choice) for name, choice in layer_choices(built).items()})
    except _UNFIT as error:
        raise InputError(f"cannot save the network: {_one_line(error)}") from error
    settings = _changed_settings(model, built)
    _apply_settings(built, settings)
    _refuse(next(structural_differences(model, built), None))
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    check_finite(state, "the network")
    stored = {name: _half(tensor) if half else tensor for name, tensor in state.items()}
    return built, {
        "format": FORMAT,
        "version": VERSION,
        "model": spec.to_dict(),
        "layers": layer_choices(built),
        "settings": settings,
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "state_dict": stored,
        "rounded": {name: str(state[name].dtype) for name in state if stored[name].dtype != state[name].dtype},
    }


def _refuse(difference: str | None) -> None:
    if difference is not None:
        advice = "Undo that, or use torch.save on its state_dict()."
        raise InputError(f"cannot save the network: {difference}, which a checkpoint does not describe. {advice}")


def _half(tensor: Tensor) -> Tensor:
    """In half precision, unless that cannot hold it: its largest number is 65,504."""
    if tensor.is_floating_point() and tensor.itemsize > 2 and torch.isfinite(tensor.half()).all():
        return tensor.half()
    return tensor


def _rounded(tensor: Tensor) -> Tensor:
    """As it comes back from half precision."""
    return _half(tensor).to(tensor.dtype)


def load(path: str | Path) -> Model:
    """The network in a checkpoint file, on the CPU and in eval mode.

    Raises:
        InputError: as :func:`read`.
    """
    raise_mmap_threshold()
    return read(path).model


def read(path: str | Path) -> Checkpoint:
    """Everything in a checkpoint file. Nothing from the file is executed.

    Raises:
        InputError: the file does not exist, is damaged, is not a checkpoint of this project, or is of a newer version;
            or its weights do not fit its architecture, or are not finite.
    """
    content = read_plain(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a gconv checkpoint; give a file that gconv.save or gconv.train wrote")
    version = content.get("version")
    if version not in range(1, VERSION + 1):
        raise InputError(f"{path} has checkpoint version {version!r}; accepted: 1 to {VERSION}")
    try:
        if version == 1:
            content = _from_version_1(content)
        if version != VERSION:
            content = {**content, "layers": _choices_before_version_3(content)}
        spec = ModelSpec.from_dict(content["model"])
        # First without memory, so that a spec cannot ask for more than the file has weights for.
        for device in ("meta", "cpu"):
            model = _build(spec, device)
            apply_choices(model, content["layers"])
            _check_shapes(model, content["state_dict"])
        _apply_settings(model, content["settings"])
        _fill(model, content)
        record, resume = dict(content["record"]), content["resume"]
    except _UNFIT as error:
        raise InputError(f"{path} is inconsistent: {_one_line(error)}") from error
    check_finite(model.state_dict(), path)
    return Checkpoint(model.eval(), record, resume)


_UNFIT = (InputError, KeyError, TypeError, ValueError, RuntimeError, AttributeError)
"""What building and filling a network raise where the data do not fit together."""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of version 1 as one of version 2.

    Weights that were stored in half precision became float32; all others had the dtype of the last layer.
    """
    state = content["state_dict"]
    dtype = torch.float64 if state["fc.weight"].dtype == torch.float64 else torch.float32
    rounded = {name: str(dtype) for name, value in state.items() if value.is_floating_point() and value.dtype != dtype}
    return {**content, "settings": {}, "frozen": [], "rounded": rounded}


def _choices_before_version_3(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The choices of a file of version 1 or 2, whose layers have the execution that they ran in.

    It stays if the user asked the conversion for it, or if ``auto`` never gives it for the layer's form: then it was
    chosen. Otherwise it may be what ``auto`` gave on the machine that wrote the file, and becomes ``auto``.
    """
    conversion = content["record"].get("conversion") or {}
    asked = conversion.get("request", {}).get("execution", "auto")
    choices = {}
    for name, choice in content["layers"].items():
        if choice["form"] is not None:
            form = form_named(choice["form"])
            execution = check_execution(choice["execution"], form)
            given_by_auto = execution in (form.default_execution, "irrep")
            choice = {**choice, "execution": "auto" if given_by_auto and execution != asked else execution}
        choices[name] = choice
    return choices


def _build(spec: ModelSpec, device: str) -> Model:
    """A network whose weights will be replaced, so that it leaves the user's random numbers alone."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return build_model(spec)


def _fill(model: Model, content: dict[str, Any]) -> None:
    """Give a network that was built from ``content`` its tensors, in the dtype and the memory layout that they had."""
    dtypes = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}
    rounded = {name: dtypes[dtype] for name, dtype in content["rounded"].items()}
    state = {
        name: tensor.to(rounded.get(name, tensor.dtype), copy=True) for name, tensor in content["state_dict"].items()
    }
    model.load_state_dict(state, assign=True)
    for name in content["frozen"]:
        model.get_parameter(name).requires_grad_(False)


def _check_shapes(model: Model, state: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        stored = state.get(name)
        if not isinstance(stored, Tensor) or stored.shape != tensor.shape:
            given = list(stored.shape) if isinstance(stored, Tensor) else "not a tensor" if name in state else "missing"
            raise InputError(f"{name} is {given}; its architecture has {list(tensor.shape)}")


def _settings(module: nn.Module) -> dict[str, Any]:
    """The plain data that a module was given when it was built: sizes, strides, eps and so on, by attribute."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: value for name, value in public.items() if name != "training" and _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in (type(None), bool, int, float, str)


def _changed_settings(model: Model, built: Model) -> dict[str, dict[str, Any]]:
    """By module, the settings of ``model`` that are not those of ``built``."""
    modules = dict(model.named_modules())
    changed: dict[str, dict[str, Any]] = {}
    for name, original in built.named_modules():
        module = modules.get(name)
        if module is not None and type(module) is type(original):
            known = _settings(original)
            settings = {key: value for key, value in _settings(module).items() if key in known and value != known[key]}
            changed |= {name: settings} if settings else {}
    return changed


def _apply_settings(model: Model, settings: dict[str, dict[str, Any]]) -> None:
    for name, changes in settings.items():
        module = model.get_submodule(name)
        for attribute, value in changes.items():
            if attribute not in _settings(module) or not _is_plain(value):
                raise InputError(f"{name} has no setting {attribute} that can be {value!r}")
            setattr(module, attribute, value)


def layer_choices(model: nn.Module) -> dict[str, dict[str, Any]]:
    """For each group-to-group layer its form (None if full), rank and execution as it was set, as plain data."""
    choices: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SeparableGConv2d):
            choices[name] = {"form": layer.form.name, "rank": layer.rank, "execution": layer.execution}
        elif isinstance(layer, GConv2d):
            choices[name] = {"form": None}
    return choices


def apply_choices(model: nn.Module, choices: dict[str, dict[str, Any]]) -> None:
    """Replace layers of ``model`` so that :func:`layer_choices` gives ``choices``. Replaced layers lose their weights.

    Raises:
        InputError: a choice names a layer that the model does not have, or a form or rank that does not exist.
    """
    current = layer_choices(model)
    if set(choices) != set(current):
        raise InputError(f"its layers {sorted(set(choices) ^ set(current))} are not those of the architecture")
    for name in [name for name, choice in choices.items() if choice != current[name]]:
        layer, choice = model.get_submodule(name), choices[name]
        assert isinstance(layer, (GConv2d, SeparableGConv2d))
        full = layer.to_dense() if isinstance(layer, SeparableGConv2d) else layer
        with torch.random.fork_rng(devices=[]):
            new = full if choice["form"] is None else SeparableGConv2d.like(full, **choice)
        replace_module(model, layer, new)
