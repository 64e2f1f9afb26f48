"""Refining fitted layers: not what a convolution gives is to be as before, but what the batch norm and ReLU make of it.

The fit of :mod:`analysis.fitting.alternating` is linear, and pays for errors that the ReLU behind the layer would have
hidden. Here
each converted layer and the batch norm behind it go on from there by gradient descent, one layer after the other in the
order in which they run: the input comes from the network converted and refined so far, the target from the original
one, as in the fit. No labels are used, and nothing but the layer at hand is changed. What is optimised are factors,
bias and the affine pair, one for each channel, so whatever comes out is equivariant.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.models.networks import Model
from gconv.nn.modes import evaluating

# Chosen on the validation part of rotmnist-regen, with one network (P4CNN, gc_in at rank 1).
PASSES = 1
"""Over the training images, for each layer."""
_BATCH = 64
_LEARNING_RATE = 1e-2
_PROBE = 256
_LEAST_STEPS = 10  # fewer are not worth it
_WORK = 2 * 10**13
"""Multiply-accumulates of all forward passes together; larger networks see fewer images."""


def refinement_steps(layers: int, macs: float, images: int) -> int:
    """How many steps each layer gets.

    Args:
        layers: that were converted.
        macs: multiply-accumulates of an image, of both networks together.
        images: to learn from.
    """
    seen = min(PASSES * images, _WORK / max(1, layers * macs))
    steps = int(seen) // _BATCH
    return steps if steps >= _LEAST_STEPS else 0


def refine(
    original: nn.Module, converted: nn.Module, names: Sequence[str], images: Tensor, steps: int, *, seed: int = 0
) -> None:
    """Refine converted layers in place; those without a batch norm behind them, and the rest of the network, stay.

    Args:
        original: the network to be imitated.
        converted: the network with fitted layers.
        names: of these, in the order in which they run.
        images: ``[N, C, H, W]``, without labels.
        steps: of gradient descent (Adam, its rate falling to zero) on 64 images, for each layer; none without any.
        seed: of the choice of images.
    """
    if not steps:
        return
    generator = torch.Generator().manual_seed(seed)
    like = next(original.parameters())
    activation = F.relu if isinstance(original, Model) else nn.Identity()  # in other networks we do not know of one

    def draw(count: int) -> Tensor:
        return images[torch.randint(len(images), (count,), generator=generator)].to(like)

    with evaluating(original), evaluating(converted):
        norms = _norms_behind(original, names, images[:1].to(like))
        for name in names:
            if name not in norms:
                continue
            layer, norm = converted.get_submodule(name), converted.get_submodule(norms[name])

            def error(batch: Tensor, name: str = name, layer: nn.Module = layer, norm: nn.Module = norm) -> Tensor:
                with torch.no_grad():
                    wanted = activation(_until(original, norms[name], batch, output=True))
                    given = _until(converted, name, batch, output=False)
                return (activation(norm(layer(given))) - wanted).square().sum() / wanted.square().sum()

            _descend(nn.ModuleList([layer, norm]), error, draw, steps)


def _descend(
    parts: nn.ModuleList, error: Callable[[Tensor], Tensor], draw: Callable[[int], Tensor], steps: int
) -> None:
    """Adam on an error of (layer, batch norm); all is undone unless the error of some other images fell."""
    norm = parts[1]
    parameters = list(parts.parameters())
    trainable = [parameter.requires_grad for parameter in parameters]
    before = copy.deepcopy(parts.state_dict())
    probe = draw(_PROBE)
    with torch.no_grad():
        start = error(probe)
    optimizer = torch.optim.Adam(parts.requires_grad_(True).parameters(), lr=_LEARNING_RATE)
    norm.train()  # its statistics are to be those of the layer as it is then
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 - step / steps)
        with torch.enable_grad():
            gradients = torch.autograd.grad(error(draw(_BATCH)), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    parts.eval()
    with torch.no_grad():
        if not error(probe) < start:  # also where there was nothing to imitate, and the error is not a number
            parts.load_state_dict(before)
    for parameter, was in zip(parameters, trainable, strict=True):
        parameter.grad = None
        parameter.requires_grad_(was)


class _Reached(Exception):
    """What was looked for has been found; the rest of the network need not run."""


def _until(model: nn.Module, name: str, batch: Tensor, *, output: bool) -> Tensor:
    """The input or the output of a module, without running what comes after it."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, given: tuple[Tensor, ...], *out: Tensor) -> None:
        kept.append((out[0] if output else given[0]).clone())  # what follows may change it in place
        raise _Reached

    module = model.get_submodule(name)
    handle = module.register_forward_hook(keep) if output else module.register_forward_pre_hook(keep)
    try:
        model(batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return kept[0]


def _norms_behind(model: nn.Module, names: Sequence[str], image: Tensor) -> dict[str, str]:
    """For each of these layers the batch norm that reads what it gives, where there is one, by name."""
    outputs: dict[str, Tensor] = {}  # kept alive, so that no other tensor is mistaken for one of them
    found: dict[str, str] = {}
    hooks = []
    for name, module in model.named_modules():
        if name in names:

            def keep(module: nn.Module, given: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                outputs[name] = out

            hooks.append(module.register_forward_hook(keep))
        elif isinstance(module, _BatchNorm):

            def look(module: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                found.update({layer: name for layer, out in outputs.items() if out is given[0]})

            hooks.append(module.register_forward_pre_hook(look))
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in hooks:
            handle.remove()
    return found
