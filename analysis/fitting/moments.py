"""Second moments of what flows through a layer, averaged over the group: all that a data-aware fit needs to know.

At one output position a layer sees a patch ``p [n]``, n = I S k k, of its input and computes ``y_s = K_s p`` for every
element s of the group. The expanded filter is a permutation of the generator, ``K_s p = K (P_s p)``, so the squared
error summed over *all* |H| outputs of a layer K that is to imitate a layer K* (which may see another input p*) is

    sum_s |K_s p - K*_s p*|^2  =  sum_s |K (P_s p) - K* (P_s p*)|^2,

the error at the identity alone under moments averaged over the group's orbit of the patch. Whatever K minimises it is
a generator, and the layer that a generator expands to is equivariant: no moment can break the symmetry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv.functional.expansion import to_planar
from gconv.nn.conv import GConv2d
from gconv.nn.modes import evaluating
from gconv.nn.separable_conv import SeparableGConv2d

PATCHES = 200_000
"""Patches of one layer that are looked at; drawn at random where there are more."""
_BATCH = 250
_GRADIENT_BATCH = 64
_BLOCK_BYTES = 2**26
_MOMENT_BYTES = 2**30
_KEPT_BYTES = 2**28  # of inputs and outputs at a time; large networks see smaller batches
_WORK = 6e10  # patches times (entries of a patch)², beyond which fewer are looked at
_AT_LEAST = 3  # patches for each entry; the average over the orbit is worth as many again for each element
_ROUNDING = 1e-12  # relative to the power: a variance below this is that of a constant


@dataclass(frozen=True)
class Moments:
    """Orbit averages over patches p of a layer's input and the outputs y that the layer should give. All float64.

    Attributes:
        second: ``[n, n]``, E p pᵀ; n = I S k k in the order of the generator ``[I, S, k, k]``.
        cross: ``[O, n]``, E y pᵀ.
        power: ``[O]``, E y².
        mean: ``[n]``, E p.
        target: ``[O]``, E y.
    """

    second: Tensor
    cross: Tensor
    power: Tensor
    mean: Tensor
    target: Tensor

    def centred(self) -> Moments:
        """Covariances in place of second moments: for a layer whose bias takes up any error of the mean."""
        variance = self.power - self.target.square()
        return Moments(
            self.second - torch.outer(self.mean, self.mean),
            self.cross - torch.outer(self.target, self.mean),
            torch.where(variance > _ROUNDING * self.power, variance, 0),
            self.mean,
            self.target,
        )


class _Sums:
    """The sums over patches of one layer, before the average over the orbit."""

    def __init__(self, layer: GConv2d | SeparableGConv2d, device: torch.device) -> None:
        o, i, s, k = layer.filter_shape
        self.layer, self.count = layer, 0
        self.n, self.outputs = i * s * k * k, o * s
        self.second = _zeros(self.n, self.n, device=device)
        self.cross = _zeros(self.outputs, self.n, device=device)
        self.power = _zeros(self.outputs, device=device)
        self.mean = _zeros(self.n, device=device)
        self.target = _zeros(self.outputs, device=device)

    def enough(self, patches: int) -> float:
        """How many of the patches to look at: fewer where they are large, but never too few for their second moment."""
        return min(patches, max(_AT_LEAST * self.n, _WORK / self.n**2))

    def add(self, x: Tensor, y: Tensor, share: float, generator: torch.Generator) -> None:
        """Add this share of the patches of inputs ``[N, I, S, H, W]`` with outputs ``[N, O, S, H', W']``."""
        x, y = to_planar(x), to_planar(y).flatten(2)
        kernel, (stride, padding, dilation) = self.layer.kernel_size[0], self.layer.sampling
        size = max(1, _BLOCK_BYTES // (8 * self.n * y.shape[2]))
        for some, out in zip(x.split(size), y.split(size), strict=True):
            patches = F.unfold(some, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
            out = out.transpose(1, 2).flatten(0, 1)
            if share < 1:
                kept = torch.rand(len(patches), generator=generator) < share
                patches, out = patches[kept], out[kept]
            p, out = patches.double(), out.double()  # errors are small differences of these sums
            self.count += len(p)
            self.second.addmm_(p.mT, p)
            self.cross.addmm_(out.mT, p)
            self.power += out.square().sum(0)
            self.mean += p.sum(0)
            self.target += out.sum(0)

    def averaged(self) -> Moments:
        """The moments, averaged over the patches and over the orbit of each."""
        o, i, s, k = self.layer.filter_shape
        # Row s of the table says where P_s puts each entry of a patch, within one input channel.
        channel = s * k * k * torch.arange(i, device=self.second.device)
        orbit = (self.layer.tables.expansion.view(s, 1, -1) + channel.view(1, i, 1)).flatten(1)
        cross, second, mean = self.cross.view(o, s, self.n), torch.zeros_like(self.second), torch.zeros_like(self.mean)
        mixed = torch.zeros_like(cross[:, 0])
        for element, to in enumerate(orbit):
            back = torch.argsort(to)
            second += self.second[back][:, back]
            mixed += cross[:, element, back]
            mean += self.mean[back]
        total = s * max(1, self.count)
        power, target = (sums.view(o, s).sum(1) / total for sums in (self.power, self.target))
        return Moments(second / total, mixed / total, power, mean / total, target)


def _zeros(*size: int, device: torch.device) -> Tensor:
    return torch.zeros(*size, dtype=torch.float64, device=device)


class _Reached(Exception):
    """The last layer of interest has run; the rest of the network need not."""


def collect_moments(
    original: nn.Module,
    converted: nn.Module,
    names: Sequence[str],
    images: Tensor,
    *,
    seed: int = 0,
    patches: int = PATCHES,
) -> dict[str, Moments]:
    """Moments of some layers over images: inputs from the converted network, wanted outputs from the original one.

    Streams over batches, small ones where the maps are large: beside these, the memory is one ``[n, n]`` matrix a layer
    and a block of patches. Both networks run in eval mode and only as far as the last of the layers.

    Args:
        original: the network to be imitated.
        converted: the network so far; may be the original itself.
        names: group-to-group layers, in the order in which they run.
        images: ``[N, C, H, W]``.
        seed: of the choice of patches where a layer has more than ``patches``.
        patches: how many to look at, about; fewer where a patch has more than some 1,000 entries.
    """
    like = next(original.parameters())
    sums = {name: _Sums(original.get_submodule(name), like.device) for name in names}  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with evaluating(original), evaluating(converted), torch.no_grad():
        for batch in images.split(_batch_size(original, names, images, _BATCH)):
            batch = batch.to(like)
            _run_with_hooks(converted, names, inputs, None, batch)
            _run_with_hooks(original, names, None, outputs, batch)
            for name, layer in sums.items():
                share = layer.enough(patches) / (len(images) * outputs[name].shape[-2:].numel())
                layer.add(inputs.pop(name), outputs.pop(name), share, generator)
    return {name: layer.averaged() for name, layer in sums.items()}


def _run_with_hooks(
    model: nn.Module,
    names: Sequence[str],
    inputs: dict[str, Tensor] | None,
    outputs: dict[str, Tensor] | None,
    batch: Tensor,
) -> None:
    """Run as far as the last layer, and keep the inputs or the outputs of all."""
    hooks = []
    for name in names:

        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            if inputs is not None:
                inputs[name] = given[0].clone()  # what follows may change it in place
            if outputs is not None:
                outputs[name] = output.clone()
            if name == names[-1]:
                raise _Reached

        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        model(batch)
    except _Reached:
        pass
    finally:
        for handle in hooks:
            handle.remove()


def _batch_size(model: nn.Module, names: Sequence[str], images: Tensor, most: int) -> int:
    """How many images to run at a time, so that what these layers read and give stays within ``_KEPT_BYTES``."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with evaluating(model), torch.no_grad():
        _run_with_hooks(model, names, inputs, outputs, images[:1].to(next(model.parameters())))
    each = sum(maps.nbytes for maps in (*inputs.values(), *outputs.values()))
    return min(most, max(1, _KEPT_BYTES // max(1, each)))


def channel_weights(model: nn.Module, names: Sequence[str], images: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """How much the class scores mind each output channel of some layers: ``[O]`` for each, float64.

    The mean over images of ``|d scores / d y_o|²``, summed over the group axis and the plane: what an error of variance
    one in that channel does to the scores, to first order. The square is estimated with one random direction v an
    image, ``E (v . d scores / d y_o)²``; v has mean zero over the classes, as a common offset changes no prediction.

    Args:
        model: the trained network.
        names: of its layers.
        images: ``[N, C, H, W]``.
        seed: of the directions.
    """
    like = next(model.parameters())
    size = _batch_size(model, names, images, _GRADIENT_BATCH)
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, Tensor] = {}
    total: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    hooks = []
    for name in names:

        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor, name: str = name) -> Tensor:
            outputs[name] = output
            return output.clone()  # for what follows, which may change it in place

        hooks.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        with evaluating(model), torch.enable_grad():
            for batch in images.split(size):
                # The images carry the gradient, so that there is one even where all weights are frozen.
                scores = model(batch.to(like).requires_grad_())
                direction = torch.randn(scores.shape, generator=generator).to(scores)
                direction -= direction.mean(1, keepdim=True)
                gradients = torch.autograd.grad((scores * direction).sum(), [outputs[name] for name in names])
                for name, gradient in zip(names, gradients, strict=True):
                    total[name] += gradient.double().square().sum((0, *range(2, gradient.dim())))
    finally:
        for handle in hooks:
            handle.remove()
    return {name: torch.as_tensor(weight) / len(images) for name, weight in total.items()}


def passes(model: nn.Module, names: Sequence[str], longest: int | None = None) -> list[list[str]]:
    """Layers in groups of neighbours whose moments fit into memory together, at most ``longest`` in each."""
    groups: list[list[str]] = []
    size = 0
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, (GConv2d, SeparableGConv2d))
        own = 2 * 8 * layer.fan_in**2  # the sums and, while a layer is finished, their average
        if not groups or size + own > _MOMENT_BYTES or len(groups[-1]) == longest:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    return groups
