"""Refining fitted layers, so that not the output of the convolution is as before, but that of the batch norm and ReLU.

The fit of :mod:`analysis.fitting.alternating` is linear: it also avoids errors that the ReLU behind the layer would
have hidden. Here each converted layer is trained further together with the batch norm behind it, by gradient descent,
one layer after the other in the order in which they run. As in the fit, the input comes from the network as converted
and refined so far, and the target from the original network. No labels are used, and nothing but this layer and its
batch norm is changed. What is trained are the factors, the bias, and the scale and shift of each channel, so the result
is equivariant.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gconv.models.networks import Model
from gconv.nn.capture import Call, capture, watch_calls
from gconv.nn.modes import evaluating

# Chosen on the validation part of rotmnist-regen, with one network (P4CNN, gc_in at rank 1).
PASSES = 1
"""Passes over the training images, for each layer."""
BATCH = 64  # images in a step
LEARNING_RATE = 1e-2  # of the first step; it falls to zero
_PROBE = 256
LEAST_STEPS = 10  # fewer steps are not worth it
WORK = 2 * 10**13
"""Limit of the multiply-accumulates of all forward passes together; larger networks see fewer images."""


def refinement_steps(layers: int, macs: float, images: int) -> int:
    """How many steps each layer is refined for.

    Args:
        layers: how many layers were converted.
        macs: multiply-accumulates of an image, of both networks together.
        images: how many images there are to learn from.
    """
    seen = min(PASSES * images, WORK / max(1, layers * macs))
    steps = int(seen) // BATCH
    return steps if steps >= LEAST_STEPS else 0


def refine(
    original: nn.Module, converted: nn.Module, names: Sequence[str], images: Tensor, steps: int, *, seed: int = 0
) -> None:
    """Refine converted layers in place.

    Layers without a batch norm behind them stay as they are, as do layers that run several times in one pass, and the
    rest of the network.

    Args:
        original: the network to be imitated.
        converted: the network with fitted layers.
        names: of the fitted layers, in the order in which they run.
        images: ``[N, C, H, W]``, without labels.
        steps: of gradient descent for each layer (Adam, with a rate that falls to zero), each on 64 images; 0 for none.
        seed: of the choice of images.
    """
    if not steps:
        return
    generator = torch.Generator().manual_seed(seed)
    like = next(original.parameters())
    # In this package's models a ReLU follows every batch norm. In other networks it is not known what follows.
    activation = F.relu if isinstance(original, Model) else nn.Identity()

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
                    wanted = activation(_output_of(original, norms[name], batch))
                    given = _input_of(converted, name, batch)
                return (activation(norm(layer(given))) - wanted).square().sum() / wanted.square().sum()

            _descend(nn.ModuleList([layer, norm]), error, draw, steps)


def _descend(
    parts: nn.ModuleList, error: Callable[[Tensor], Tensor], draw: Callable[[int], Tensor], steps: int
) -> None:
    """Adam on an error of (layer, batch norm). Unless the error on some other images fell, everything is undone."""
    norm = parts[1]
    parameters = list(parts.parameters())
    trainable = [parameter.requires_grad for parameter in parameters]
    before = copy.deepcopy(parts.state_dict())
    probe = draw(_PROBE)
    with torch.no_grad():
        start = error(probe)
    optimizer = torch.optim.Adam(parts.requires_grad_(True).parameters(), lr=LEARNING_RATE)
    norm.train()  # its statistics follow the layer
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        with torch.enable_grad():
            gradients = torch.autograd.grad(error(draw(BATCH)), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    parts.eval()
    with torch.no_grad():
        if not error(probe) < start:  # or if there is nothing to imitate, and the error is not a number
            parts.load_state_dict(before)
    for parameter, was in zip(parameters, trainable, strict=True):
        parameter.grad = None
        parameter.requires_grad_(was)


def _input_of(model: nn.Module, name: str, batch: Tensor) -> Tensor:
    with capture(model, inputs=[name], stop=True) as seen:
        model(batch)
    return seen.inputs[name]


def _output_of(model: nn.Module, name: str, batch: Tensor) -> Tensor:
    with capture(model, outputs=[name], stop=True) as seen:
        model(batch)
    return seen.outputs[name]


def _norms_behind(model: nn.Module, names: Sequence[str], image: Tensor) -> dict[str, str]:
    """For each of these layers the name of the batch norm that reads its output.

    Layers without one, and layers that run several times, are left out.
    """
    name_of = {module: name for name, module in model.named_modules()}
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}  # kept, so that no tensor is taken for another
    found: dict[str, str] = {}

    def keep(call: Call) -> None:
        outputs[name_of[call.layer]].append(call.output)

    def look(call: Call) -> None:
        behind = (name for name, given in outputs.items() if any(out is call.input for out in given))
        found.update(dict.fromkeys(behind, name_of[call.layer]))

    layers = [model.get_submodule(name) for name in names]
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with watch_calls(layers, after=keep), watch_calls(norms, before=look), torch.no_grad():
        model(image)
    return {name: norm for name, norm in found.items() if len(outputs[name]) == 1}
