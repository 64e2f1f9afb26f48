"""The forms and ranks that a layer may take, what each costs and loses, and the choice among them under a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.measures.spectra import block_energies, explained_energy
from gconv.functional.form_base import Form
from gconv.functional.forms import FORMS, form_named
from gconv.functional.mixing import basis_of
from gconv.nn.conv import GConv2d
from gconv.nn.execution import auto_execution, kernel_for
from gconv.nn.separable_conv import SeparableGConv2d
from gconv.system.errors import InputError

from .allocators import Option
from .budget import Budget

# A layer at full rank keeps all energy up to rounding. A target of 1 must still be met there.
_ROUNDING = 1e-12
Layer = GConv2d | SeparableGConv2d


@dataclass(frozen=True)
class Choice:
    """What a layer becomes: an option, or None for the layer as it is; and the reason in words."""

    option: Option | None
    why: str


def forms_named(name: str) -> tuple[Form, ...]:
    """All forms for ``auto``, else the form of that name.

    Raises:
        InputError: there is no such form.
    """
    if isinstance(name, str) and name.lower() == "auto":
        return tuple(FORMS.values())
    if not isinstance(name, str) or name.lower() not in FORMS:
        raise InputError(f"unknown form {name!r}; accepted: auto, {', '.join(FORMS)}")
    return (form_named(name),)


def energy_curves(layer: Layer) -> dict[str, list[float]]:
    """For each form the share of the filter's energy that rank 1, 2, … keeps."""
    weight = layer.weight.detach().cpu()
    return {name: explained_energy(block_energies(weight, form, layer.group)).tolist() for name, form in FORMS.items()}


def present(layer: Layer, positions: tuple[int, int]) -> Option:
    """The option that leaves a layer as it is."""
    form = layer.form.name if isinstance(layer, SeparableGConv2d) else None
    return Option(form, None, None, 1.0, _parameters(layer), _executed(layer.macs(), positions), 0.0, 0.0)


def smaller_options(
    layer: Layer, curves: dict[str, list[float]], forms: Iterable[Form], positions: tuple[int, int]
) -> tuple[Option, ...]:
    """The layer as it is, then every form and rank with fewer parameters and no more MACs as executed.

    Their errors are those of the filter: the share of energy lost, and its root.

    Args:
        layer: a layer from group to group.
        curves: what :func:`energy_curves` gives for it.
        forms: those to consider.
        positions: of the layer's input map and output map (:class:`gconv.LayerCost`).
    """
    now = present(layer, positions)
    if layer.filter_shape.k == 1:  # nothing to separate
        return (now,)
    options = [
        option_at(layer, curves[form.name], form, rank, positions)
        for form in forms
        for rank in range(1, form.max_rank(layer.filter_shape) + 1)
    ]
    return now, *(o for o in options if o.parameters < now.parameters and o.macs <= now.macs)


def option_at(layer: Layer, curve: Sequence[float], form: Form, rank: int, positions: tuple[int, int]) -> Option:
    """A form and rank for a layer, run as ``auto`` does on this machine, or ``dense`` if that takes fewer MACs.

    (On a map that shrinks to a point, mixing channels at every position of the input costs more than the full filter at
    the one position of the output.)
    """
    kernel = kernel_for(layer.weight)
    default = auto_execution(form, layer.group, layer.filter_shape, rank, layer.sampling, kernel)
    counts = {way: executed_macs(layer, form, rank, way, positions) for way in (default, "dense")}
    execution = min(counts, key=counts.__getitem__)
    macs = counts[execution]
    lost = max(0.0, 1 - curve[rank - 1])
    parameters = form.parameters(layer.filter_shape, rank)
    return Option(form.name, rank, execution, curve[rank - 1], parameters, macs, lost, lost**0.5)


def executed_macs(layer: Layer, form: Form, rank: int, execution: str, positions: tuple[int, int]) -> int:
    """MACs of one image for a layer in a form of a rank, as executed."""
    if execution == "dense":
        return _executed((0, layer.dense_macs), positions)
    basis = basis_of(layer.group) if execution == "irrep" else None
    return _executed(form.macs_by_map(layer.filter_shape, rank, basis), positions)


def choose(
    layer: Layer,
    curves: dict[str, list[float]],
    forms: Sequence[Form],
    budget: Budget,
    positions: tuple[int, int],
) -> Choice:
    """The choice for one layer under a budget for every layer: ``rank`` or ``energy``.

    If one form is asked for, the layer takes its smallest rank within the budget, even if that has more parameters than
    the layer as given. If there are several forms, only options with fewer parameters than the layer as given, and no
    more MACs as executed, compete. Under ``energy`` the one with the fewest parameters is taken, and of equals the one
    that keeps more energy. Under ``rank`` it is the one that loses least energy per parameter saved.
    """
    if layer.filter_shape.k == 1:
        return Choice(None, "1x1: nothing to separate")
    now = present(layer, positions)
    within = [
        option_at(layer, curves[form.name], form, _smallest(curves[form.name], budget), positions) for form in forms
    ]
    if len(within) == 1:
        (option,) = within
        assert option.rank is not None
        if isinstance(layer, SeparableGConv2d) and layer.form.name == option.form and layer.rank <= option.rank:
            return Choice(None, f"already {layer.form.name} of rank {layer.rank}")
        larger = option.parameters - now.parameters
        return Choice(option, f"as asked, {larger:,} parameters more" if larger > 0 else "as asked")
    smaller = [option for option in within if option.parameters < now.parameters and option.macs <= now.macs]
    if not smaller:
        return Choice(None, "no form is smaller")
    if budget.kind == "energy":
        return Choice(min(smaller, key=lambda option: (option.parameters, -option.energy)), "fewest parameters")
    return Choice(
        min(smaller, key=lambda option: max(option.error, _ROUNDING) / (now.parameters - option.parameters)),
        "least energy lost per parameter saved",
    )


def _smallest(curve: list[float], budget: Budget) -> int:
    if budget.kind == "rank":
        return min(int(budget.value), len(curve))
    target = budget.value - _ROUNDING
    return next((rank for rank, kept in enumerate(curve, start=1) if kept >= target), len(curve))


def _executed(by_map: tuple[int, int], positions: tuple[int, int]) -> int:
    return by_map[0] * positions[0] + by_map[1] * positions[1]


def _parameters(layer: Layer) -> int:
    if isinstance(layer, SeparableGConv2d):
        return layer.form.parameters(layer.filter_shape, layer.rank)
    return layer.weight.numel()
