"""Checkpoints: one file of plain data that rebuilds a network, converted layers included, and executes nothing."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gconv.nn.conv import GConv2d
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError
from gconv.system.files import atomic_path
from gconv.system.memory import raise_mmap_threshold
from gconv.system.tensor_files import check_finite, read_plain

from .networks import Model, ModelSpec
from .zoo import build_model

FORMAT = "gconv-checkpoint"
VERSION = 1


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

    Args:
        model: a network of :func:`gconv.create_model`, converted or not.
        path: the file; one that is there is replaced.
        record: how the network came about, as plain data.
        resume: what an unfinished training run needs to continue.
        half: store the weights in half precision (11 significant bits), for snapshots that are only to be looked at.

    Raises:
        InputError: the network was not made by this package's models, is a fused one, or the path cannot be written.
    """
    if not isinstance(model, Model):
        raise InputError(f"only networks of gconv.create_model can be saved with their architecture, not {type(model)}")
    if model.fused:
        raise InputError("a fused network has no checkpoint; accepted: the one it was made of, or gconv.export")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": model.spec.to_dict(),
        "layers": layer_choices(model),
        "state_dict": {name: _stored(tensor, half) for name, tensor in model.state_dict().items()},
        "record": record or {},
        "resume": resume,
    }
    # Not to a path, from which PyTorch takes the name of its archive, and the temporary one is random; and not to an
    # open file, as on a full disk it ends that with a RuntimeError of its own.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _stored(tensor: Tensor, half: bool) -> Tensor:
    tensor = tensor.detach().cpu()
    if half and tensor.is_floating_point() and torch.isfinite(tensor.half()).all():  # 65,504 is its largest number
        return tensor.half()
    return tensor


def load(path: str | Path) -> Model:
    """The network in a checkpoint file, on the CPU and in eval mode, ready to run at its full speed.

    Raises:
        InputError: as :func:`read`.
    """
    raise_mmap_threshold()
    return read(path).model


def read(path: str | Path) -> Checkpoint:
    """Everything in a checkpoint file. Nothing from the file is executed.

    Raises:
        InputError: there is no such file, it is damaged, no checkpoint of this project, of a newer version, or its
            weights do not fit its architecture or are not finite.
    """
    content = read_plain(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is not a gconv checkpoint; give a file that gconv.save or gconv.train wrote")
    if content.get("version") != VERSION:
        raise InputError(f"{path} has checkpoint version {content.get('version')!r}; accepted: {VERSION}")
    try:
        spec = ModelSpec.from_dict(content["model"])
        with torch.device("meta"):  # without memory, so that a spec cannot ask for more than the file has weights for
            _check_shapes(_build(spec, content["layers"]), content["state_dict"])
        model = _build(spec, content["layers"])
        if content["state_dict"]["fc.weight"].dtype == torch.float64:
            model.double()  # or its weights would be rounded; half-precision ones become float32
        model.load_state_dict(content["state_dict"])
        record, resume = dict(content["record"]), content["resume"]
    except (InputError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path} is inconsistent: {' '.join(str(error).split())}") from error
    check_finite(model.state_dict(), path)
    return Checkpoint(model.eval(), record, resume)


def _build(spec: ModelSpec, choices: dict[str, dict[str, Any]]) -> Model:
    """A network of that architecture; the user's random numbers are not used up for weights that will be replaced."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(spec)
        apply_choices(model, choices)
    return model


def _check_shapes(model: Model, state: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        stored = state.get(name)
        if not isinstance(stored, Tensor) or stored.shape != tensor.shape:
            given = list(stored.shape) if isinstance(stored, Tensor) else "not a tensor" if name in state else "missing"
            raise InputError(f"{name} is {given}; its architecture has {list(tensor.shape)}")


def layer_choices(model: nn.Module) -> dict[str, dict[str, Any]]:
    """For each group-to-group layer its form (None if full), rank and execution, as plain data."""
    choices: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SeparableGConv2d):
            choices[name] = {"form": layer.form.name, "rank": layer.rank, "execution": layer.execution}
        elif isinstance(layer, GConv2d):
            choices[name] = {"form": None}
    return choices


def apply_choices(model: nn.Module, choices: dict[str, dict[str, Any]]) -> None:
    """Replace the layers of ``model`` in place so that :func:`layer_choices` gives ``choices``; weights are not kept.

    Raises:
        InputError: a choice names a layer that the model does not have, or a form or rank that does not exist.
    """
    current = layer_choices(model)
    if set(choices) != set(current):
        raise InputError(f"its layers {sorted(set(choices) ^ set(current))} are not those of the architecture")
    for name, choice in choices.items():
        if choice == current[name]:
            continue
        layer = model.get_submodule(name)
        assert isinstance(layer, (GConv2d, SeparableGConv2d))
        full = layer.to_dense() if isinstance(layer, SeparableGConv2d) else layer
        model.set_submodule(name, full if choice["form"] is None else SeparableGConv2d.like(full, **choice))
