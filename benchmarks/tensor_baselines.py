"""Generic compression of a group-equivariant network: its expanded filters are decomposed as those of plain layers.

A library for generic compression does not know the group. It sees a group-to-group layer as an ordinary convolution
with the expanded filter ``[O S, I S, k, k]`` (:func:`gconv.functional.expansion.expand`), and replaces it by a chain of
smaller ordinary convolutions. The chain has free parameters for all S transformed copies of a filter, so in general it
is not equivariant (:func:`gconv.equivariance_error` measures by how much). There are two decompositions, both fitted by
tensorly in float64:

- *Tucker-2*, on the two channel modes: Kim et al., "Compression of deep convolutional neural networks for fast and
  low power mobile applications", ICLR 2016.
- *CP*, of all four modes: Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned
  CP-decomposition", ICLR 2015.

Lifting and 1x1 layers are left alone, as :func:`analysis.conversion.convert.convert` leaves them.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import TypeVar

import tensorly
import torch
from tensorly.cp_tensor import cp_normalize
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor, nn

from gconv.functional.expansion import expand, to_planar
from gconv.models.cost import cost
from gconv.nn.conv import GConv2d
from gconv.system.errors import InputError, one_of

Network = TypeVar("Network", bound=nn.Module)

ITERATIONS, TOLERANCE, SEED = 100, 1e-6, 0
# Keeps the equations of CP's least squares solvable where factors coincide; relative to a filter of norm 1.
DAMPING = 1e-10


class _Chain(nn.Module, ABC):
    """Ordinary convolutions in place of one group convolution: ``[N, I, S, H, W]`` to ``[N, O, S, H', W']``.

    It is made on the meta device, where it has shapes and no values: enough to count it. :meth:`fit` gives it values.
    """

    ranks: tuple[int, ...]

    def __init__(self, layer: GConv2d, ranks: Sequence[int]) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        accepted = self.largest(layer)
        if len(self.ranks) != len(accepted) or not all(1 <= r <= m for r, m in zip(self.ranks, accepted, strict=True)):
            raise InputError(f"ranks {self.ranks} are out of range; accepted: 1 to {accepted}")
        self.out_channels, self.order = layer.out_channels, layer.group.order
        self.convs = self._convolutions(layer).to(layer.weight.dtype)

    @classmethod
    @abstractmethod
    def largest(cls, layer: GConv2d) -> tuple[int, ...]:
        """The largest useful rank of each kind: with these the decomposition can be exact."""

    @abstractmethod
    def _convolutions(self, layer: GConv2d) -> nn.Sequential:
        """The chain, on the meta device. The last convolution has the bias, if the layer has one."""

    @abstractmethod
    def decompose(self, filter: Tensor) -> list[Tensor]:
        """The weights of the convolutions in their order, from an expanded filter ``[O S, I S, k, k]`` in float64."""

    def fit(self, layer: GConv2d) -> _Chain:
        """Take the decomposition of the layer's expanded filter, and the layer's bias, device, dtype and mode."""
        self.to_empty(device=layer.weight.device)
        with torch.no_grad():
            for conv, weight in zip(self.convs, self.decompose(expanded_filter(layer)), strict=True):
                assert isinstance(conv, nn.Conv2d)
                conv.weight.copy_(weight)
                if conv.bias is not None and layer.bias is not None:
                    conv.bias.copy_(layer.bias.repeat_interleave(self.order))
        return self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convs(to_planar(x))
        return y.unflatten(1, (self.out_channels, self.order))

    def extra_repr(self) -> str:
        return f"ranks={self.ranks}"


class Tucker2Conv2d(_Chain):
    """Ranks ``(r_in, r_out)``: 1x1 from I S to r_in channels, k x k from r_in to r_out, 1x1 from r_out to O S."""

    @classmethod
    def largest(cls, layer: GConv2d) -> tuple[int, ...]:
        return layer.in_channels * layer.group.order, layer.out_channels * layer.group.order

    def _convolutions(self, layer: GConv2d) -> nn.Sequential:
        (into, out), (r_in, r_out) = self.largest(layer), self.ranks
        return nn.Sequential(
            nn.Conv2d(into, r_in, 1, bias=False, device="meta"),
            nn.Conv2d(r_in, r_out, layer.kernel_size, *layer.sampling, bias=False, device="meta"),
            nn.Conv2d(r_out, out, 1, bias=layer.bias is not None, device="meta"),
        )

    def decompose(self, filter: Tensor) -> list[Tensor]:
        """Weights ``[r_in, I S, 1, 1]``, ``[r_out, r_in, k, k]`` and ``[O S, r_out, 1, 1]``.

        Fitted by higher-order orthogonal iteration, which starts from the SVD.
        """
        r_in, r_out = self.ranks
        with tensorly.backend_context("numpy", local_threadsafe=True), warnings.catch_warnings():
            # One rank may exceed what the other leaves, if that times k k is smaller.
            warnings.filterwarnings("ignore", "Trying to compute SVD with n_eigenvecs", UserWarning)
            (core, (last, first)), _ = partial_tucker(
                filter.numpy(), (r_out, r_in), modes=[0, 1], n_iter_max=ITERATIONS, tol=TOLERANCE, random_state=SEED
            )
        first, core, last = (torch.from_numpy(array.copy()) for array in (first, core, last))
        return [first.T[..., None, None], core, last[..., None, None]]


class CPConv2d(_Chain):
    """Ranks ``(r,)``: 1x1 from I S to r channels, depthwise k x 1, depthwise 1 x k, 1x1 from r to O S."""

    @classmethod
    def largest(cls, layer: GConv2d) -> tuple[int, ...]:
        o, i, s, k = layer.filter_shape
        return (min(o, i) * s * k * k,)

    def _convolutions(self, layer: GConv2d) -> nn.Sequential:
        o, i, s, k = layer.filter_shape
        (r,) = self.ranks
        stride, padding, dilation = layer.sampling
        return nn.Sequential(
            nn.Conv2d(i * s, r, 1, bias=False, device="meta"),
            nn.Conv2d(r, r, (k, 1), (stride, 1), (padding, 0), (dilation, 1), groups=r, bias=False, device="meta"),
            nn.Conv2d(r, r, (1, k), (1, stride), (0, padding), (1, dilation), groups=r, bias=False, device="meta"),
            nn.Conv2d(r, o * s, 1, bias=layer.bias is not None, device="meta"),
        )

    def decompose(self, filter: Tensor) -> list[Tensor]:
        """Weights ``[r, I S, 1, 1]``, ``[r, 1, k, 1]``, ``[r, 1, 1, k]`` and ``[O S, r, 1, 1]``."""
        out, into, down, across = cp_factors(filter, *self.ranks)
        return [into.T[..., None, None], down.T[:, None, :, None], across.T[:, None, None, :], out[..., None, None]]


KINDS: dict[str, type[_Chain]] = {"tucker2": Tucker2Conv2d, "cp": CPConv2d}


def expanded_filter(layer: GConv2d) -> Tensor:
    """The filter of the equivalent ordinary convolution: ``[O S, I S, k, k]`` in float64, on the CPU."""
    return expand(layer.weight.detach(), layer.tables.expansion).double().cpu()


def cp_factors(filter: Tensor, rank: int) -> list[Tensor]:
    """The factors ``[O S, r]``, ``[I S, r]``, ``[k, r]`` and ``[k, r]`` of a filter ``[O S, I S, k, k]``.

    Fitted by alternating least squares. They start from the SVD; where the rank exceeds it, from random columns of a
    fixed seed. They stop after ``ITERATIONS``, converged or not. The four columns of each of the r terms get the same
    norm, which suits fine-tuning.
    """
    norm = filter.norm().item() or 1.0
    with tensorly.backend_context("numpy", local_threadsafe=True), warnings.catch_warnings():
        # The ranks of CP exceed the small modes (k), as they do in any convolution.
        warnings.filterwarnings("ignore", "Trying to compute SVD with n_eigenvecs", UserWarning)
        fitted = parafac(
            (filter / norm).numpy(), rank, ITERATIONS, init="svd", tol=TOLERANCE, l2_reg=DAMPING, random_state=SEED
        )
        weights, factors = cp_normalize(fitted)
    return [torch.from_numpy(factor * (norm * weights) ** 0.25) for factor in factors]


def tucker2(model: Network, ranks: tuple[int, int] | Mapping[str, tuple[int, int]]) -> Network:
    """A copy of the network, in eval mode, with its group-to-group layers replaced by :class:`Tucker2Conv2d`.

    Args:
        model: a network with full layers; it is not changed.
        ranks: ``(r_in, r_out)`` by layer, or one pair for all (each at most the layer's largest).

    Raises:
        InputError: no such layer, a rank out of range, or names that are not those of the layers.
    """
    return _compress(model, "tucker2", ranks)


def cp(model: Network, rank: int | Mapping[str, int]) -> Network:
    """A copy of the network, in eval mode, with its group-to-group layers replaced by :class:`CPConv2d`.

    Args:
        model: a network with full layers; it is not changed.
        rank: by layer, or one for all (at most the layer's largest).

    Raises:
        InputError: no such layer, a rank out of range, or names that are not those of the layers.
    """
    return _compress(model, "cp", {name: (r,) for name, r in rank.items()} if isinstance(rank, Mapping) else (rank,))


def at_parameters(model: Network, kind: str, target: int) -> Network:
    """The compressed network with at most ``target`` parameters, at the largest relative rank, the same in all layers.

    Args:
        model: a network with full layers; it is not changed.
        kind: ``tucker2`` or ``cp``.
        target: learnable entries of the whole network, batch norm and head included.

    Raises:
        InputError: the target is out of reach even at rank 1, an unknown kind, or no layer to compress.
    """
    return _compress(model, kind, ranks_at(model, kind, largest_fraction(model, kind, "parameters", target)))


def at_macs(model: Network, kind: str, target: int, input_shape: Sequence[int] | None = None) -> Network:
    """As :func:`at_parameters`, with at most ``target`` multiply-accumulates as executed (:func:`gconv.cost`).

    ``input_shape`` is that of one image, by default the model's own.
    """
    fraction = largest_fraction(model, kind, "macs_executed", target, input_shape)
    return _compress(model, kind, ranks_at(model, kind, fraction))


def fractions(model: nn.Module, kind: str) -> list[Fraction]:
    """All relative ranks that differ in some layer's rank, in ascending order; the last is 1.

    A relative rank between two of them gives the same ranks as the upper one, so there are no other choices.
    """
    largest = {m for layer in _layers(model).values() for m in _kind(kind).largest(layer)}
    return sorted({Fraction(r, m) for m in largest for r in range(1, m + 1)})


def ranks_at(model: nn.Module, kind: str, fraction: Fraction | float) -> dict[str, tuple[int, ...]]:
    """The ranks by layer at a relative rank f: ``ceil(f m)`` for each kind of rank, whose largest value is m.

    Tucker-2 has ``m = I S`` and ``O S``; CP has ``m = min(O, I) S k k``, above which no rank helps.
    """
    layers = _layers(model).items()
    return {name: tuple(ceil(fraction * m) for m in _kind(kind).largest(layer)) for name, layer in layers}


def largest_fraction(
    model: nn.Module, kind: str, measure: str, target: int, input_shape: Sequence[int] | None = None
) -> Fraction:
    """The largest relative rank at which ``measure``, an attribute of :class:`gconv.Cost`, is at most ``target``.

    Found by bisection, as costs never fall when f rises. Nothing is decomposed.

    Raises:
        InputError: the target is out of reach even at rank 1, an unknown kind, or no layer to compress.
    """
    size = input_shape or getattr(model, "input_shape", None)
    if not size:
        raise InputError("the network does not say the size of an image; give input_shape, such as (1, 28, 28)")
    layers, shapes = _layers(model), copy.deepcopy(model).to("meta")

    def total(fraction: Fraction) -> int:
        for name, ranks in ranks_at(model, kind, fraction).items():
            shapes.set_submodule(name, _kind(kind)(layers[name], ranks))
        return getattr(cost(shapes, size), measure)

    choices = fractions(model, kind)
    fitting = bisect_right(choices, target, key=total)
    if fitting == 0:
        smallest = total(choices[0])
        raise InputError(f"{measure} of {target:,} are out of reach; the least is {smallest:,}, at rank 1")
    return choices[fitting - 1]


def _compress(model: Network, kind: str, ranks: tuple[int, ...] | Mapping[str, tuple[int, ...]]) -> Network:
    chain, layers = _kind(kind), _layers(model)
    if not isinstance(ranks, Mapping):
        ranks = {name: tuple(map(min, ranks, chain.largest(layer))) for name, layer in layers.items()}
    if ranks.keys() != layers.keys():
        raise InputError(f"ranks are for {', '.join(ranks) or 'no layer'}; accepted: {', '.join(layers)}")
    compressed = copy.deepcopy(model)
    for name, layer in layers.items():
        compressed.set_submodule(name, chain(layer, ranks[name]).fit(layer))
    return compressed.eval()


def _kind(kind: str) -> type[_Chain]:
    if kind not in KINDS:
        raise one_of("kind", kind, KINDS)
    return KINDS[kind]


def _layers(model: nn.Module) -> dict[str, GConv2d]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, GConv2d) and m.kernel_size[0] > 1}
    if not layers:
        raise InputError("the network has no full group-to-group layer; give a p2 to p4m network that is not separable")
    return layers
