"""Putting one module of a network in the place of another."""

from __future__ import annotations

from torch import nn


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in the place of ``old``, which is a part of ``model``, under every name that it has.

    A network may use one module in several places. Replacing it under one name alone would leave the others as they
    were: the network would get larger, and what was shared would be shared no longer.
    """
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old]:
        model.set_submodule(name, new)
