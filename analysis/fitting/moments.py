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
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gconv.functional.expansion import to_planar
from gconv.nn.capture import Call, watch_calls
from gconv.nn.conv import GConv2d
from gconv.nn.modes import evaluating
from gconv.nn.separable_conv import SeparableGConv2d

PATCHES = 200_000
"""Patches of one layer that are looked at; they are drawn at random if there are more."""
BATCH = 250  # images in a forward pass
GRADIENT_BATCH = 64  # images in a backward pass
BLOCK_BYTES = 2**26  # of unfolded patches at a time
MOMENT_BYTES = 2**30  # of the moments of several layers, taken in the same passes
KEPT_BYTES = 2**28  # of inputs and outputs at a time; large networks run on smaller batches
WORK = 6e10  # limit of patches times (entries of a patch)²; layers with large patches look at fewer
_AT_LEAST = 3  # patches for each entry of a patch; the average over the orbit is worth that many for each element
_ROUNDING = 1e-12  # relative to the power: a variance below this belongs to a constant


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
        """Covariances in place of second moments, for a layer with a bias: it makes up for any error of the mean."""
        variance = self.power - self.target.square()
        return Moments(
            self.second - torch.outer(self.mean, self.mean),
            self.cross - torch.outer(self.target, self.mean),
            torch.where(variance > _ROUNDING * self.power, variance, 0),
            self.mean,
            self.target,
        )


class MomentSums:
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
        """How many of the patches to look at: fewer if they are large, but always enough for their second moment."""
        return min(patches, max(_AT_LEAST * self.n, WORK / self.n**2))

    def add(self, x: Tensor, y: Tensor, share: float, generator: torch.Generator) -> None:
        """Add this share of the patches of inputs ``[N, I, S, H, W]`` with outputs ``[N, O, S, H', W']``."""
        x, y = to_planar(x), to_planar(y).flatten(2)
        kernel, (stride, padding, dilation) = self.layer.kernel_size[0], self.layer.sampling
        size = max(1, BLOCK_BYTES // (8 * self.n * y.shape[2]))
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
        # Row s of the table says where P_s puts each entry of a patch within one input channel.
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


class _Complete(Exception):
    """The last call of interest is over; the rest of the network need not run."""


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

    The images pass in batches, which are small if the maps are large. Besides these, the memory is one matrix
    ``[n, n]`` for each layer and a block of patches. Both networks run in eval mode, and only as far as the last of the
    layers. A layer that runs several times in one pass has the moments of all its calls together.

    Args:
        original: the network to be imitated.
        converted: the network as converted so far; it may be the original itself.
        names: group-to-group layers, in the order in which they run.
        images: ``[N, C, H, W]``.
        seed: of the choice of patches, if a layer has more than ``patches``.
        patches: about how many to look at; fewer if a patch has more than some 1,000 entries.
    """
    like = next(original.parameters())
    sums = {name: MomentSums(original.get_submodule(name), like.device) for name in names}  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    size, calls = _batch_size(original, names, images, BATCH)
    with evaluating(original), evaluating(converted), torch.no_grad():
        for batch in images.split(size):
            batch = batch.to(like)
            inputs = _maps(converted, names, batch, calls, outputs=False)
            outputs = _maps(original, names, batch, calls, outputs=True)
            for name, layer in sums.items():
                read, given = inputs.pop(name), outputs.pop(name)
                share = layer.enough(patches) / (len(images) * sum(y.shape[-2:].numel() for y in given))
                for x, y in zip(read, given, strict=True):
                    layer.add(x, y, share, generator)
    return {name: layer.averaged() for name, layer in sums.items()}


def _maps(
    model: nn.Module, names: Sequence[str], batch: Tensor, calls: int | None = None, *, outputs: bool
) -> dict[str, list[Tensor]]:
    """What these layers read, or what they give, call by call; the pass ends after so many calls of them."""
    name_of = {model.get_submodule(name): name for name in names}
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(call: Call) -> None:
        maps = call.output if outputs else call.input
        assert maps is not None
        found[name_of[call.layer]].append(maps.clone())  # later layers may change it in place
        if sum(map(len, found.values())) == calls:
            raise _Complete

    before, after = (None, keep) if outputs else (keep, None)
    with watch_calls(name_of, before=before, after=after), suppress(_Complete):
        model(batch)
    return found


def _batch_size(model: nn.Module, names: Sequence[str], images: Tensor, most: int) -> tuple[int, int]:
    """How many images to run at a time, and how often all these layers together are called in a pass.

    The size is such that what the layers read and give stays within ``KEPT_BYTES``. For that one image runs through
    the whole network.
    """
    sizes: list[int] = []

    def measure(call: Call) -> None:
        assert call.input is not None
        sizes.append(call.input.nbytes + call.output.nbytes)

    layers = [model.get_submodule(name) for name in names]
    with watch_calls(layers, after=measure), evaluating(model), torch.no_grad():
        model(images[:1].to(next(model.parameters())))
    return min(most, max(1, KEPT_BYTES // max(1, sum(sizes)))), len(sizes)


def channel_weights(model: nn.Module, names: Sequence[str], images: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """How much an error in each output channel of some layers matters to the class scores: ``[O]`` each, float64.

    It is the mean over images of ``|d scores / d y_o|²``, summed over the group axis, the plane and the layer's calls:
    what an error of variance one in that channel does to the scores, to first order. The square is estimated with one
    random direction v for each image, as ``E (v . d scores / d y_o)²``. The mean of v over the classes is zero, because
    an offset that all scores have in common changes no prediction.

    Args:
        model: the trained network.
        names: of its layers.
        images: ``[N, C, H, W]``.
        seed: of the directions.
    """
    like = next(model.parameters())
    size, _ = _batch_size(model, names, images, GRADIENT_BATCH)
    generator = torch.Generator().manual_seed(seed)
    name_of = {model.get_submodule(name): name for name in names}
    outputs: list[tuple[str, Tensor]] = []
    total: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)

    def keep(call: Call) -> Tensor:
        outputs.append((name_of[call.layer], call.output))
        return call.output.clone()  # for the layers behind it, which may change it in place

    with watch_calls(name_of, after=keep), evaluating(model), torch.enable_grad():
        for batch in images.split(size):
            outputs.clear()
            # The images carry the gradient, so that there is one even if all weights are frozen.
            scores = model(batch.to(like).requires_grad_())
            direction = torch.randn(scores.shape, generator=generator).to(scores)
            direction -= direction.mean(1, keepdim=True)
            gradients = torch.autograd.grad((scores * direction).sum(), [output for _, output in outputs])
            for (name, _), gradient in zip(outputs, gradients, strict=True):
                total[name] += gradient.double().square().sum((0, *range(2, gradient.dim())))
    return {name: torch.as_tensor(weight) / len(images) for name, weight in total.items()}


def passes(model: nn.Module, names: Sequence[str], longest: int | None = None) -> list[list[str]]:
    """The layers in groups of neighbours, at most ``longest`` in each, whose moments fit into memory together."""
    groups: list[list[str]] = []
    size = 0
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, (GConv2d, SeparableGConv2d))
        own = 2 * 8 * layer.fan_in**2  # the sums, and their average when the layer is finished
        if not groups or size + own > MOMENT_BYTES or len(groups[-1]) == longest:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    return groups
