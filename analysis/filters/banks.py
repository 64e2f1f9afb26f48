"""Filter banks: the learned filters of a network, layer by layer, in one convention and in float64.

The network may be one of ours or not, and live or a state dict. :mod:`.layers` finds its convolutions; here they get
their group. How foreign layers and files are read is in :mod:`gconv.interop.readers`, and how plain weights reveal a
group in :mod:`gconv.interop.recognition`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import Tensor, nn

from gconv.groups.point_groups import GROUPS, Group
from gconv.groups.point_groups import group as find_group
from gconv.interop.readers import load_source as load_source
from gconv.interop.readers import plain_state
from gconv.interop.recognition import ambiguous, recognise
from gconv.system.errors import InputError
from gconv.system.tensor_files import check_finite

from .layers import FoundLayer, Skipped, layers_of_network, layers_of_state, notes_of

# The groups of this order in GrouPy, and in most code with weights of this shape.
_USUAL_GROUPS = {4: "p4", 8: "p4m"}
_ORDERS = {find_group(name).order for name in GROUPS}
_Z2 = find_group("z2")


@dataclass(frozen=True, eq=False, repr=False)
class FilterBank:
    """The filters of one layer.

    Attributes:
        name: the layer's name in the network.
        weight: the generator ``[O, I, S_in, k, k]``, float64 on the CPU; ``S_in`` is 1 for a lifting or planar layer.
        group: the group under which the generator is expanded; z2 for a planar layer.
        residual: how far the layer's filter is from the expansion of ``weight``, relative to its norm. It is 0 unless
            the generator was recovered from an expanded filter.
        form: the separable form of the layer; None if it is not separable.
        channel_groups: ``groups`` of a planar convolution. If it is not 1, I counts the input channels of one group,
            and different groups read different input channels.
        taken_back: whether the generator was recovered from an expanded filter. The filters that such a layer can learn
            are unknown: escnn's are combinations of a band-limited basis, which spans only some of all filters.
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
        """Whether the layer reads planar maps, so that its filters have no group axis."""
        return self.weight.shape[2] == 1 and self.group.order > 1

    @property
    def kind(self) -> str:
        """``full``, ``lifting`` or the name of a separable form; ``planar``, or ``grouped`` if in channel groups."""
        if self.group.order == 1:
            return "planar" if self.channel_groups == 1 else "grouped"
        return self.form or ("lifting" if self.lifting else "full")

    def __repr__(self) -> str:
        residual = f", residual={self.residual:.1e}" if self.taken_back else ""
        shape = list(self.weight.shape)
        return f"FilterBank({self.name!r}, {self.kind}, group={self.group.name}, weight={shape}{residual})"


class FilterBanks(list[FilterBank]):
    """The filter banks of a network, in its order. Printed, it is a table of the layers.

    Attributes:
        skipped: the layers left out.
        inferred: the group that was inferred and from what, if the network does not say its group; else None.
        assumptions: what the source does not say and was assumed, one sentence each.
    """

    def __init__(
        self,
        banks: Iterable[FilterBank] = (),
        skipped: Sequence[Skipped] = (),
        inferred: str | None = None,
        assumptions: Sequence[str] = (),
    ) -> None:
        super().__init__(banks)
        self.skipped = list(skipped)
        self.inferred = inferred
        self.assumptions = list(assumptions)

    @property
    def notes(self) -> list[str]:
        """What a reader must know beside the filters: the inferred group, what was assumed, what was skipped."""
        inferred = [] if self.inferred is None else [f"group inferred: {self.inferred}"]
        return inferred + self.assumptions + notes_of(self.skipped)

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [(b.name, b.kind, b.group.name, "x".join(map(str, b.weight.shape))) for b in self]
        return [("layer", "kind", "group", "weight"), *rows]

    def _total(self) -> str:
        layers = f"{len(self)} filter bank{'' if len(self) == 1 else 's'}"
        return f"{layers}, {sum(bank.weight.numel() for bank in self):,} entries"

    def __repr__(self) -> str:
        cells = self._cells() if self else []
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self._total(), *(f"  {line.rstrip()}" for line in lines), *self.notes])

    def _repr_html_(self) -> str:
        """The table for notebooks."""
        heading, *rows = self._cells()
        lines = ["<tr>" + "".join(f"<th>{escape(text)}</th>" for text in heading) + "</tr>"]
        lines += ["<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows]
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<p>{self._total()}</p><table>{''.join(lines)}</table>{notes}"


def filter_banks(
    source: nn.Module | Mapping[str, Tensor] | str | Path, *, group: str | Group | None = None
) -> FilterBanks:
    """The filter banks of all convolutions, in the order of the network.

    ======================================  =========================================================================
    source                                  group and filter
    ======================================  =========================================================================
    layers of this package                  their own group; a separable layer gives the product of its factors
    live escnn ``R2Conv``                   its own group; the generator is recovered from the expanded filter
    5-D weights ``[O, I, S_in, k, k]``      from the size of the group axis: 4 is p4 and 8 is p4m, in GrouPy's
                                            convention, which is ours; for 2 the group must be given. A lifting layer
                                            (size 1) has the group of the layer that follows
    only 4-D weights ``[O, I, k, k]``       the largest group whose structure they share
                                            (:func:`gconv.interop.recognition.recognise`), else planar
    4-D weights beside any of the others    planar
    ======================================  =========================================================================

    Grouped, depthwise and 1x1 convolutions of a live network are planar layers like any other.

    A state dict does not name the types of its layers, except of ours: their group and form are in PyTorch's metadata
    of the state dict, as long as it is not copied into another dictionary. For other layers, tensors called ``weight``
    (and escnn's ``filter``) are read as convolutions by their dimensions. Layers whose name or bias shows another kind
    are skipped, and ``assumptions`` says what could not be told.

    Args:
        source: a network, a state dict, or a file as :func:`.load_source` reads it.
        group: the group of 5-D weights, or of the structure in 4-D weights, if the network does not say it. With z2 all
            4-D weights are planar.

    Returns:
        A list; ``skipped`` has the layers that were left out. It is empty if there is no convolution.

    Raises:
        InputError: the file or dictionary cannot be used, weights are not finite, the group is ambiguous, or the given
            group contradicts the layers or is not found in the weights.
    """
    forced = None if group is None else find_group(group)
    if isinstance(source, (str, Path)):
        source = load_source(source)
    if isinstance(source, nn.Module):
        found = list(layers_of_network(source))
    elif isinstance(source, Mapping):
        found = list(layers_of_state(plain_state(source, "the dictionary")))
    else:
        raise InputError(f"a {type(source).__name__} has no filters; give a network, a state dict, or a file")
    layers = [layer for layer in found if isinstance(layer, FoundLayer)]
    check_finite({layer.name: layer.weight for layer in layers if isinstance(layer.weight, Tensor)}, "the network")
    by_axis = any(layer.has_group_axis for layer in layers)
    outcomes, inferred = _by_group_axis(layers, forced) if by_axis else _by_structure(layers, forced)
    in_order = [outcomes[layer.name] if isinstance(layer, FoundLayer) else layer for layer in found]
    banks = [outcome for outcome in in_order if isinstance(outcome, FilterBank)]
    skipped = [outcome for outcome in in_order if isinstance(outcome, Skipped)]
    return FilterBanks(banks, skipped, inferred, _assumptions(layers, outcomes))


_Outcomes = dict[str, FilterBank | Skipped]


def _bank(layer: FoundLayer, group: Group) -> FilterBank:
    """The filters of a layer under this group, unchanged."""
    weight = layer.generator(group)
    return FilterBank(layer.name, weight, group, layer.residual, layer.form, layer.channel_groups, layer.taken_back)


def _by_structure(layers: Sequence[FoundLayer], forced: Group | None) -> tuple[_Outcomes, str | None]:
    """The banks of a network that has only plain weights, and the text of ``FilterBanks.inferred``."""
    outcomes: _Outcomes = {layer.name: _bank(layer, _Z2) for layer in layers}
    plain = {layer.name: layer.generator(_Z2).squeeze(2) for layer in layers if layer.channel_groups == 1}
    found = recognise(plain, forced) if plain and forced != _Z2 else None
    if found is None:
        return outcomes, None
    for name, fit in found.fits.items():
        outcomes[name] = FilterBank(name, fit.generator, found.layout.group, fit.residual, taken_back=True)
    return outcomes, f"{found.layout}, recognised in plain weights"


def _by_group_axis(layers: Sequence[FoundLayer], forced: Group | None) -> tuple[_Outcomes, str | None]:
    """The banks of a network with generators, and the text of ``FilterBanks.inferred``."""
    outcomes: _Outcomes = {layer.name: _bank(layer, _Z2) for layer in layers if not layer.has_group_axis}
    generators = [layer for layer in layers if layer.has_group_axis]
    doubt = None if forced else _three_dimensional(generators)
    inferred = set()
    for layer, order in zip(generators, _orders(generators), strict=True):
        problem = layer.problem or (None if layer.typed else doubt)
        if order is not None and order not in _ORDERS and not forced:
            problem = f"no group here has {order} elements, the size of its third axis; it may be a 3-D convolution"
        if problem is not None:
            outcomes[layer.name] = Skipped(layer.name, problem)
            continue
        group = _group_of(layer, order, forced)
        outcomes[layer.name] = _bank(layer, group)
        if layer.group is None and forced is None:
            inferred.add(group.name)
    return outcomes, f"{' and '.join(sorted(inferred))}, by the size of the weights' group axis" if inferred else None


def _three_dimensional(generators: Sequence[FoundLayer]) -> str | None:
    """Why the 5-D weights of a state dict may be those of 3-D convolutions; None if nothing speaks for it."""
    untyped = [layer for layer in generators if not layer.typed]
    sizes = {layer.name: (layer.axis_size, layer.generator(_Z2).shape[-1]) for layer in untyped if layer.axis_size > 1}
    odd = next((name for name, (depth, _) in sizes.items() if depth not in _ORDERS), None)
    if odd is not None:
        why = f"no group here has {sizes[odd][0]} elements, the size of the third axis of {odd}"
    elif sizes and all(depth == k for depth, k in sizes.values()):
        why = f"the kernels of {' and '.join(sizes)} are as deep as they are wide"
    else:
        return None
    return f"it may be a 3-D convolution: {why}; give the group, with --group or group=, if there is one"


def _orders(generators: Sequence[FoundLayer]) -> list[int | None]:
    """The order of each layer's group; None where no layer knows it.

    A lifting layer that does not know its order has that of the next layer that does, or else of the last one.
    """
    orders = [
        layer.group.order if layer.group else layer.axis_size if _has_order(layer) else layer.order
        for layer in generators
    ]
    for i in reversed(range(len(orders) - 1)):
        orders[i] = orders[i] or orders[i + 1]
    for i in range(1, len(orders)):
        orders[i] = orders[i] or orders[i - 1]
    return orders


def _has_order(layer: FoundLayer) -> bool:
    """Whether the group axis has one entry per element: always if separable, never if lifting."""
    return layer.form is not None or layer.axis_size > 1


def _group_of(layer: FoundLayer, order: int | None, forced: Group | None) -> Group:
    """The group of a generator.

    Args:
        layer: the layer.
        order: the order of its group; None if nothing tells it.
        forced: the group that the caller gave.

    Raises:
        InputError: it is not the forced one, or nothing tells which of several groups it is.
    """
    if forced is not None:
        size = layer.axis_size
        if layer.group not in (None, forced) or (_has_order(layer) and size != forced.order):
            own = f"is a layer on {layer.group.name}" if layer.group else f"has a group axis of {size}"
            raise InputError(f"{layer.name} {own}, which contradicts the given group {forced.name}")
        return forced
    if layer.group is not None:
        return layer.group
    if order is None:
        raise ambiguous(f"the weights of {layer.name} have no group axis", GROUPS)
    names = [name for name in GROUPS if find_group(name).order == order]
    if len(names) > 1 and order not in _USUAL_GROUPS:
        raise ambiguous(f"{layer.name} has a group axis of {order}, as in {' and '.join(names)}", names)
    return find_group(_USUAL_GROUPS.get(order, names[0]))


def _assumptions(layers: Sequence[FoundLayer], outcomes: _Outcomes) -> list[str]:
    """What a state dict does not say about the layers that were read, unless their structure proves it."""
    read = {layer.name for layer in layers if not layer.typed}
    read &= {name for name, bank in outcomes.items() if isinstance(bank, FilterBank) and not bank.taken_back}
    dimensions = {5 if layer.has_group_axis else 4 for layer in layers if layer.name in read}
    assumed = {
        4: "4-dimensional weights were read as those of Conv2d without channel groups, not transposed",
        5: "5-dimensional weights were read as those of group convolutions, not 3-D convolutions",
    }
    texts = [text for number, text in assumed.items() if number in dimensions]
    return [f"the state dict does not name the types of its layers: {'; '.join(texts)}"] if texts else []
