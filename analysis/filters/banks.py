"""Filter banks: the learned filters of a network, layer by layer, in one convention and in float64.

The network may be ours or somebody else's, live or a dictionary of weights. What its layers are is decided here. How
foreign layers are read is in :mod:`gconv.interop.readers`, and how plain weights show that they have a group is in
:mod:`gconv.interop.recognition`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from gconv.groups.point_groups import GROUPS, Group
from gconv.groups.point_groups import group as find_group
from gconv.interop.readers import is_steerable, plain_state, read_steerable
from gconv.interop.readers import load_source as load_source
from gconv.interop.recognition import TOLERANCE, Fit, ambiguous, recognise
from gconv.nn.conv import GConv2d, LiftingConv2d
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError
from gconv.system.tensor_files import check_finite

# GrouPy, whose weights look like this, has these two groups; so has nearly everybody who writes them.
_USUAL_GROUPS = {4: "p4", 8: "p4m"}
_Z2 = find_group("z2")


@dataclass(frozen=True, eq=False)
class FilterBank:
    """The filters of one layer.

    Attributes:
        name: the layer's name in the network.
        weight: the generator ``[O, I, S_in, k, k]``, float64 on the CPU; ``S_in`` is 1 for a lifting or planar layer.
        group: the group that it is expanded under; z2 for a planar layer.
        residual: how far the layer's filter is from being the expansion of ``weight``, relative to its norm; 0 unless
            the generator had to be taken back from an expanded filter.
        form: the separable form that the layer has, if it has one.
        channel_groups: ``groups`` of a planar layer. Where it is not 1, I counts the input channels of one group, and
            the input channels of different groups have nothing to do with each other.
        taken_back: whether the generator had to be taken back from an expanded filter. What its layer could learn is
            then unknown: escnn's filters are combinations of a band-limited basis, which spans only part of them.
    """

    name: str
    weight: Tensor
    group: Group
    residual: float = 0.0
    form: str | None = None
    channel_groups: int = 1
    taken_back: bool = False

    @property
    def lifting(self) -> bool:
        """Whether the layer reads planar maps, so that there is no group axis to be redundant along."""
        return self.weight.shape[2] == 1 and self.group.order > 1

    @property
    def kind(self) -> str:
        """``full``, ``lifting`` or the name of a separable form; ``planar``, or ``grouped`` if in channel groups."""
        if self.group.order == 1:
            return "planar" if self.channel_groups == 1 else "grouped"
        return self.form or ("lifting" if self.lifting else "full")


@dataclass(frozen=True)
class Skipped:
    """A layer with weights of a convolution that gives no filter bank, and why."""

    name: str
    reason: str


class FilterBanks(list[FilterBank]):
    """The filter banks of a network, in its order.

    Attributes:
        skipped: the layers left out.
        inferred: where the network does not say its group, which one was taken and from what; else None.
    """

    def __init__(
        self, banks: Iterable[FilterBank] = (), skipped: Sequence[Skipped] = (), inferred: str | None = None
    ) -> None:
        super().__init__(banks)
        self.skipped = list(skipped)
        self.inferred = inferred


def filter_banks(
    source: nn.Module | Mapping[str, Tensor] | str | Path, *, group: str | Group | None = None
) -> FilterBanks:
    """The filter banks of all convolutions, in the order of the network.

    ======================================  =========================================================================
    source                                  group and filter
    ======================================  =========================================================================
    layers of this package                  their own; a separable layer gives the filter that its factors stand for
    live escnn ``R2Conv``                   its own, the expanded filter taken back to the generator
    5-D weights ``[O, I, S_in, k, k]``      by the size of the group axis: 4 is p4 and 8 p4m, as in GrouPy, whose
                                            convention it is; 2 must be named. A lifting layer (1) takes the group of
                                            the layer that follows
    only 4-D weights ``[O, I, k, k]``       the largest group whose structure they share (:func:`.recognise`), else
                                            planar
    4-D weights beside any of the others    planar
    ======================================  =========================================================================

    Grouped, depthwise and 1x1 convolutions are planar like any other. A state dict has no names for its layers' types:
    its tensors called ``weight`` (and escnn's ``filter``) are taken for convolutions by their dimensions.

    Args:
        source: a network; a state dict; or a file that :func:`.load_source` reads.
        group: the group of 5-D weights and of the structure in 4-D weights, where the network does not say it. With
            z2 4-D weights are planar whatever they share.

    Returns:
        A list with the layers that were left out in ``skipped``. It is empty if there is no convolution.

    Raises:
        InputError: the file or dictionary cannot be used, weights are not finite, the group is ambiguous, or the one
            named contradicts the layers or is not in the weights.
    """
    forced = None if group is None else find_group(group)
    if isinstance(source, (str, Path)):
        source = load_source(source)
    if isinstance(source, nn.Module):
        found = list(_in_module(source))
    elif isinstance(source, Mapping):
        found = list(_in_state(plain_state(source, "the dictionary")))
    else:
        raise InputError(f"no filters in a {type(source).__name__}; accepted: a network, a state dict, or a file")
    layers = [layer for layer in found if isinstance(layer, _Layer)]
    check_finite({layer.name: layer.weight for layer in layers}, "the network")
    by_axis = any(layer.weight.dim() == 5 for layer in layers)
    read, inferred = _by_group_axis(layers, forced) if by_axis else _by_structure(layers, forced)
    outcomes = [read[layer.name] if isinstance(layer, _Layer) else layer for layer in found]
    banks = [outcome for outcome in outcomes if isinstance(outcome, FilterBank)]
    return FilterBanks(banks, [outcome for outcome in outcomes if isinstance(outcome, Skipped)], inferred)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer as it was found.

    Attributes:
        name: as in the network.
        weight: float64 on the CPU; ``[O, I, k, k]`` plain, or ``[O, I, S_in, k, k]``, a generator.
        group: of a generator, if the layer knows it.
        order: of its group, if the layer knows no more than that.
        residual: of a generator that was taken from an expanded filter.
        form: as in :class:`FilterBank`; so is the next.
        channel_groups: of plain weights.
        taken_back: as in :class:`FilterBank`.
    """

    name: str
    weight: Tensor
    group: Group | None = None
    order: int | None = None
    residual: float = 0.0
    form: str | None = None
    channel_groups: int = 1
    taken_back: bool = False

    def bank(self, group: Group) -> FilterBank:
        """Its filters under this group, as they are."""
        weight = self.weight if self.weight.dim() == 5 else self.weight.unsqueeze(2)
        return FilterBank(self.name, weight, group, self.residual, self.form, self.channel_groups, self.taken_back)


_Outcomes = dict[str, FilterBank | Skipped]


def _by_structure(layers: Sequence[_Layer], forced: Group | None) -> tuple[_Outcomes, str | None]:
    """The banks of a network of plain weights alone, and the words for ``FilterBanks.inferred``."""
    read: _Outcomes = {layer.name: layer.bank(_Z2) for layer in layers}
    plain = {layer.name: layer.weight for layer in layers if layer.channel_groups == 1}
    found = recognise(plain, forced) if plain and forced != _Z2 else None
    if found is None:
        return read, None
    for name, fit in found.fits.items():
        read[name] = FilterBank(name, fit.generator, found.layout.group, fit.residual, taken_back=True)
    return read, f"{found.layout}, recognised in plain weights"


def _by_group_axis(layers: Sequence[_Layer], forced: Group | None) -> tuple[_Outcomes, str | None]:
    """The banks of a network with generators, and the words for ``FilterBanks.inferred``."""
    read: _Outcomes = {layer.name: layer.bank(_Z2) for layer in layers if layer.weight.dim() == 4}
    generators = [layer for layer in layers if layer.weight.dim() == 5]
    guessed = set()
    for layer, order in zip(generators, _orders(generators), strict=True):
        group = _group_of(layer, order, forced)
        if group is None:
            read[layer.name] = Skipped(layer.name, f"no group here has {order} elements; or it is a 3-d convolution")
            continue
        read[layer.name] = layer.bank(group)
        if layer.group is None and forced is None:
            guessed.add(group.name)
    return read, f"{' and '.join(sorted(guessed))}, by the size of the weights' group axis" if guessed else None


def _orders(generators: Sequence[_Layer]) -> list[int | None]:
    """The order of each layer's group. A lifting layer that does not know has that of the next that does, or the last.

    None where no layer knows.
    """
    orders = [
        layer.group.order if layer.group else s_in if (s_in := layer.weight.shape[2]) > 1 else layer.order
        for layer in generators
    ]
    for i in reversed(range(len(orders) - 1)):
        orders[i] = orders[i] or orders[i + 1]
    for i in range(1, len(orders)):
        orders[i] = orders[i] or orders[i - 1]
    return orders


def _group_of(layer: _Layer, order: int | None, forced: Group | None) -> Group | None:
    """The group of a generator; None if there is none of this order.

    Raises:
        InputError: it is not the forced one, or there are several.
    """
    if forced is not None:
        s_in = layer.weight.shape[2]
        if layer.group not in (None, forced) or s_in not in (1, forced.order):
            own = f"is a layer on {layer.group.name}" if layer.group else f"has a group axis of {s_in}"
            raise InputError(f"{layer.name} {own}, which does not go with the group {forced.name}")
        return forced
    if layer.group is not None:
        return layer.group
    if order is None:
        raise ambiguous(f"the weights of {layer.name} have no group axis", GROUPS)
    names = [name for name in GROUPS if find_group(name).order == order]
    if len(names) > 1 and order not in _USUAL_GROUPS:
        raise ambiguous(f"{layer.name} has a group axis of {order}, as in {' and '.join(names)}", names)
    return find_group(_USUAL_GROUPS.get(order, names[0])) if names else None


def _in_module(network: nn.Module) -> Iterator[_Layer | Skipped]:
    for name, module in network.named_modules():
        name = name or type(module).__name__  # the network is itself a layer
        if isinstance(module, (LiftingConv2d, GConv2d, SeparableGConv2d)):
            form = module.form.name if isinstance(module, SeparableGConv2d) else None
            yield _usable(_Layer(name, module.weight, module.group, form=form))
        elif is_steerable(module):
            read = read_steerable(module)
            yield Skipped(name, read) if isinstance(read, str) else _steered(name, *read)
        elif isinstance(module, nn.Conv2d):
            yield _usable(_Layer(name, module.weight, channel_groups=module.groups))
        elif isinstance(module, _ConvNd):
            yield Skipped(name, f"a {type(module).__name__}; accepted: Conv2d")
        elif isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() == 5:
            yield _usable(_Layer(name, weight, order=getattr(module, "output_stabilizer_size", None)))
        elif isinstance(weight, Tensor) and weight.dim() == 4:
            yield Skipped(name, f"a {type(module).__name__} with a 4-dimensional weight; accepted: Conv2d")


def _steered(name: str, group: Group, fit: Fit) -> _Layer | Skipped:
    if fit.residual > TOLERANCE:
        return Skipped(name, f"its rows do not share one generator: relative residual {fit.residual:.2g}")
    return _Layer(name, fit.generator, group, residual=fit.residual, taken_back=True)


def _in_state(state: Mapping[str, Tensor]) -> Iterator[_Layer | Skipped]:
    for key, tensor in state.items():
        name, _, leaf = key.rpartition(".")
        if leaf in ("weight", "filter") and tensor.dim() in (4, 5):
            yield _usable(_Layer(name or key, tensor))
        elif leaf == "weights" and tensor.dim() == 1 and key.removesuffix("weights") + "filter" not in state:
            yield Skipped(name or key, "coefficients as in escnn, whose state dict has the filter only after eval()")
        elif leaf == "weight" and tensor.dim() == 3:
            yield Skipped(name or key, "a 1-d convolution")
        elif tensor.dim() in (4, 5) and leaf != "sampled_basis":  # the basis that escnn's coefficients refer to
            yield Skipped(key, f"{tensor.dim()} dimensions, but called {leaf}; accepted: weight, or escnn's filter")


def _usable(layer: _Layer) -> _Layer | Skipped:
    """The layer with its weight in float64 on the CPU, if it is a square filter of real numbers."""
    weight = layer.weight
    if is_lazy(weight) or weight.is_meta:
        return Skipped(layer.name, "its weights do not exist yet")
    if not weight.is_floating_point() or weight.itemsize == 1:  # 8 bits are quantised: there are scales somewhere else
        dtype = str(weight.dtype).removeprefix("torch.")
        return Skipped(layer.name, f"its weights are {dtype}; accepted: real floats of 16 to 64 bits")
    *_, rows, columns = weight.shape
    if rows != columns:
        return Skipped(layer.name, f"its kernels are {rows}x{columns}; accepted: square ones")
    if weight.numel() == 0:
        return Skipped(layer.name, "it has no weights")
    return replace(layer, weight=weight.detach().double().cpu())
