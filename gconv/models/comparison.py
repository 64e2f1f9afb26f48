"""Whether two networks are the same, module by module: the proof that a checkpoint describes the network it is of.

The scores of a network follow from the classes of its modules, from the attributes and tensors that these hold, and
from its forward hooks. All of these are compared here. Hooks that see only gradients or state dicts change no scores
and are passed over. So are attributes that somebody added and that no class knows.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.nn.capture import forward_hooks

_COMPARED_ELSEWHERE = {"training", "spec", "_modules", "_parameters", "_buffers"}
_WITHOUT_EFFECT_ON_SCORES = {
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}

_Pairs = list[tuple[str, nn.Module, nn.Module]]


def structural_differences(given: nn.Module, built: nn.Module) -> Iterator[str]:
    """In what two networks differ beside the values and dtypes of their tensors.

    Args:
        given: a network that may have been changed in any way.
        built: a network as its constructor made it.

    Yields:
        One difference after the other, in words that name its place in ``given``.
    """
    pairs: _Pairs = []
    yield from _module_differences(given, built, "", pairs)
    yield from _replaced_methods(pairs)
    if any(forward_hooks([])):
        yield "a forward hook is registered for all modules of this process"
    for name, one, other in pairs:
        yield from _attribute_differences(name, one, other)
        yield from _shape_differences(name, one, other)
    yield from _shared(pairs)
    if not given.training:
        # The mode decides what a batch norm computes, and nothing else in these networks.
        for name, one, _ in pairs:
            if isinstance(one, _BatchNorm) and one.training:
                yield f"{name} is in training mode, but the network is in eval mode"


def tensor_differences(
    given: nn.Module, built: nn.Module, stored: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Iterator[str]:
    """In which tensors two networks of the same structure differ, by value, dtype or ``requires_grad``.

    Args:
        given: a network.
        built: a network without structural differences from it.
        stored: the rounding of tensors that is intended between the two.

    Yields:
        One difference after the other, in words that name the tensor.
    """
    others = dict(_tensors(built))
    for name, tensor in _tensors(given):
        other = others[name]
        if tensor.dtype != other.dtype:
            yield f"{name} is {tensor.dtype}, not {other.dtype}"
        elif tensor.requires_grad != other.requires_grad:
            yield f"{name} has requires_grad={tensor.requires_grad}, not {other.requires_grad}"
        elif not torch.equal(stored(tensor.detach().cpu()), other.detach().cpu()):
            yield f"{name} has other values"


def _module_differences(given: nn.Module, built: nn.Module, name: str, pairs: _Pairs) -> Iterator[str]:
    """Walk through both networks together and collect the ``pairs`` of modules of the same name and class."""
    if type(given) is not type(built):
        yield f"{name or 'the network'} is of class {type(given).__name__}, not {type(built).__name__}"
        return
    pairs.append((name, given, built))
    children, others = _children(given), _children(built)
    for key in (key for key in children if key not in others):
        yield f"{_join(name, key)} is an additional module"
    for key, other in others.items():
        if key in children:
            yield from _module_differences(children[key], other, _join(name, key), pairs)
        else:
            yield f"{_join(name, key)} is missing"
    if isinstance(given, nn.Sequential) and list(children) != list(others):
        yield f"{name} runs its modules in another order"


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """The modules in a module by name. Unlike ``named_children`` it lists one that is in it twice under both names."""
    return {key: child for key, child in module._modules.items() if child is not None}


def _replaced_methods(pairs: _Pairs) -> Iterator[str]:
    """Methods that somebody assigned to a class, of this package or of PyTorch.

    They are found by the package in which they were defined. A method's own package is that of its class; or PyTorch,
    if one of its decorators wraps it.
    """
    classes = {cls: name for name, module, _ in reversed(pairs) for cls in type(module).__mro__}
    for cls in classes:
        if cls is object:
            continue
        homes = (cls.__module__.partition(".")[0], "torch")
        for attribute, value in vars(cls).items():
            method = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not callable(method) or inspect.isclass(method):
                continue
            home = getattr(method, "__globals__", {}).get("__name__", "")
            if home.partition(".")[0] not in homes:
                yield f"{classes[cls] or 'the network'} runs a replaced method, {cls.__name__}.{attribute}"


def _attribute_differences(name: str, given: nn.Module, built: nn.Module) -> Iterator[str]:
    """Differences in the attributes that are no modules and tensors: settings and forward hooks."""
    ours, others = _attributes(given), _attributes(built)
    for attribute in {**others, **ours}:
        place = _join(name, attribute)
        if attribute not in ours:
            yield f"{place} is missing"
        elif attribute in others or hasattr(type(built), attribute):  # otherwise no class reads it
            value, other = ours[attribute], others.get(attribute, getattr(type(built), attribute, None))
            if attribute.endswith("_hooks") and value:
                yield f"{name or 'the network'} has {attribute.strip('_').replace('_', ' ')}"
            elif not _same(value, other):
                yield f"{place} is {reprlib.repr(value)}, not {reprlib.repr(other)}"


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that a copy of the module would have. What a layer keeps only to save time is not among them."""
    state = module.__getstate__()
    left_out = _COMPARED_ELSEWHERE | _WITHOUT_EFFECT_ON_SCORES
    return {key: value for key, value in state.items() if key not in left_out}


def _shape_differences(name: str, given: nn.Module, built: nn.Module) -> Iterator[str]:
    ours, others = _own_tensors(given), _own_tensors(built)
    for key in {**others, **ours}:
        place = _join(name, key)
        if key not in ours:
            yield f"{place} is missing"
        elif key not in others:
            yield f"{place} is an additional tensor"
        elif type(ours[key]) is not type(others[key]):
            yield f"{place} is a {type(ours[key]).__name__}, not a {type(others[key]).__name__}"
        elif ours[key].layout != torch.strided or ours[key].is_meta:
            yield f"{place} has no dense values (it is sparse, or on the meta device)"
        elif ours[key].shape != others[key].shape:
            yield f"{place} has shape {list(ours[key].shape)}, not {list(others[key].shape)}"


def _shared(pairs: _Pairs) -> Iterator[str]:
    """Modules that have two names, and tensors that share their memory. A network that was just built has neither."""
    modules: dict[int, str] = {}
    tensors: dict[tuple[torch.device, int], str] = {}
    for name, module, _ in pairs:
        first = modules.setdefault(id(module), name)
        if first != name:
            yield f"{name} and {first} are the same module"
        for key, tensor in _own_tensors(module).items():
            place = _join(name, key)
            if key in module._non_persistent_buffers_set or tensor.numel() == 0:
                continue
            first = tensors.setdefault((tensor.device, tensor.data_ptr()), place)
            if first != place:
                yield f"{place} and {first} share their memory"


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module itself, by name."""
    return {key: value for key, value in (*module._parameters.items(), *module._buffers.items()) if value is not None}


def _tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in net.named_modules():
        for key, tensor in _own_tensors(module).items():
            yield _join(name, key), tensor


def _same(one: object, other: object) -> bool:
    """Whether two values are equal, tensors in them included. Values that cannot be compared are not."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return (one == other) is True


def _join(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute
