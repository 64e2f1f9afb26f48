"""Seeing what flows into and out of the layers of a network while it runs.

Hooks are the only way that works for any network: no tracing, no rewriting. What needs care is in this module once:
a layer may be called with keywords or without a tensor, it may be compiled, what it returned may be changed in place
later, the pass may fail, and often the pass need not go on once everything was seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_leaves

from gconv.system.errors import InputError


def is_watched(layer: nn.Module) -> bool:
    """Whether a hook may see what this layer is given or returns, or the gradients of these.

    A layer that is watched must run by itself: not together with what comes after it, and its output must not be
    changed in place.
    """
    own = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if own or torch.compiler.is_compiling():  # compilers see global hooks by themselves
        return bool(own)
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def forward_hooks(layers: Iterable[nn.Module]) -> list[Mapping[int, Any]]:
    """The tables in which PyTorch keeps the forward hooks of these layers and those of all layers, before and after.

    A table is empty as long as nobody watches. It stays the same object when hooks come and go, so a list that was made
    once can be looked at again.
    """
    own = [table for layer in layers for table in (layer._forward_hooks, layer._forward_pre_hooks)]
    return [*own, hooks._global_forward_hooks, hooks._global_forward_pre_hooks]


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        layer: the layer.
        input: the first tensor among its arguments, positional ones before keywords; None if it was given none.
        output: what it returned; None before it has run.
    """

    layer: nn.Module
    input: Tensor | None
    output: Any


@contextmanager
def watch_calls(
    layers: Iterable[nn.Module],
    *,
    before: Callable[[Call], None] | None = None,
    after: Callable[[Call], Any] | None = None,
) -> Iterator[None]:
    """Report every call of these layers. The hooks are removed when the context ends, also after an exception.

    Inside the context compiled modules run eagerly (from PyTorch 2.6 on), as a hook cannot be compiled with them.

    Args:
        layers: the layers to watch. One that is listed twice is watched once.
        before: called before a layer runs.
        after: called when a layer has run. What it returns, unless None, takes the place of the layer's output.
    """
    handles = []

    def on_entry(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert before is not None
        before(Call(layer, _first_tensor(args, kwargs), None))

    def on_exit(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        assert after is not None
        return after(Call(layer, _first_tensor(args, kwargs), output))

    with _eager():
        try:
            for layer in dict.fromkeys(layers):
                if before is not None:
                    handles.append(layer.register_forward_pre_hook(on_entry, with_kwargs=True))
                if after is not None:
                    handles.append(layer.register_forward_hook(on_exit, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass
class Captured:
    """What was captured last, by the names of the layers; see :func:`capture`."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def capture(
    model: nn.Module, *, inputs: Sequence[str] = (), outputs: Sequence[str] = (), stop: bool = False
) -> Iterator[Captured]:
    """Keep what some layers of ``model`` read and return while the context is entered.

    If a layer runs several times, the last run is kept. A kept tensor stays as it was: the network goes on with a copy
    of it, which later layers may change in place. A kept output is part of the computation, so that gradients can be
    taken with respect to it.

    ::

        with capture(model, inputs=["conv2"], outputs=["conv3"], stop=True) as seen:
            model(images)
        seen.inputs["conv2"], seen.outputs["conv3"]

    Args:
        model: the network.
        inputs: names of the layers whose input is kept: the first tensor that the layer is given.
        outputs: names of the layers whose output is kept.
        stop: end the pass, and with it the ``with`` block, as soon as every layer was captured.

    Raises:
        InputError: a layer is called without a tensor, or returns something else than a tensor.
    """
    seen = Captured()
    wanted = {"inputs": _by_layer(model, inputs), "outputs": _by_layer(model, outputs)}

    def stop_when_complete() -> None:
        if stop and len(seen.inputs) == len(set(inputs)) and len(seen.outputs) == len(set(outputs)):
            raise _Complete(seen)

    def before(call: Call) -> None:
        for name in wanted["inputs"].get(call.layer, ()):
            if call.input is None:
                raise InputError(f"{name} was called without a tensor. Only layers that read a tensor can be captured.")
            seen.inputs[name] = call.input.clone()
        stop_when_complete()

    def after(call: Call) -> Tensor | None:
        names = wanted["outputs"].get(call.layer, ())
        for name in names:
            if not isinstance(call.output, Tensor):
                kind = type(call.output).__name__
                raise InputError(f"{name} returned a {kind}. Only layers that return a tensor can be captured.")
            seen.outputs[name] = call.output
        stop_when_complete()
        return call.output.clone() if names else None

    with watch_calls(wanted["inputs"], before=before), watch_calls(wanted["outputs"], after=after):
        try:
            yield seen
        except _Complete as reached:
            if reached.seen is not seen:  # of another capture around this one
                raise


class _Complete(Exception):
    """Everything that a capture was for has been seen."""

    def __init__(self, seen: Captured) -> None:
        super().__init__()
        self.seen = seen


def _by_layer(model: nn.Module, names: Sequence[str]) -> dict[nn.Module, list[str]]:
    """The names of each layer: one that is used in two places has two."""
    found: dict[nn.Module, list[str]] = {}
    for name in dict.fromkeys(names):
        found.setdefault(model.get_submodule(name), []).append(name)
    return found


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    leaves = tree_leaves((args, list(kwargs.values())))
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)


def _eager() -> AbstractContextManager[Any]:
    """Run compiled modules eagerly. Where PyTorch's compiler was never loaded, nothing is compiled."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
