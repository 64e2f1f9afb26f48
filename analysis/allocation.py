"""Which form and rank a layer gets: the options it has, and the rules that choose among them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

from gconv.conv import GConv2d, SeparableGConv2d
from gconv.errors import InputError
from gconv.separable import FORMS, Form, form_named

from .spectra import block_energies, explained_energy

# A layer at full rank explains all energy up to rounding; a target of 1 must still be met there.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Option:
    """One way to run a layer.

    Attributes:
        form: the separable form.
        rank: its rank.
        energy: the share of the filter's energy that is kept.
        parameters: of the factors.
        macs: for one image, as executed.
    """

    form: Form
    rank: int
    energy: float
    parameters: int
    macs: int


@dataclass(frozen=True)
class Choice:
    """What a layer gets: an option, or None to leave it as it is; and the reason in words."""

    option: Option | None
    why: str


@dataclass(frozen=True)
class Budget:
    """What a conversion may keep: exactly one of the two.

    Attributes:
        rank: every layer gets this rank, or its largest if that is smaller.
        energy: every layer keeps at least this share of its energy, at the smallest rank that does.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise InputError("a conversion takes one budget; accepted: either rank or energy")
        if self.rank is not None and (not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1):
            raise InputError(f"rank is {self.rank!r}; accepted: a whole number of at least 1")
        if self.energy is not None and not (isinstance(self.energy, Real) and 0 < self.energy <= 1):
            raise InputError(f"energy is {self.energy!r}; accepted: a share above 0 and up to 1, such as 0.95")


def forms_named(name: str) -> tuple[Form, ...]:
    """All forms for ``auto``, else the one of that name.

    Raises:
        InputError: there is no such form.
    """
    if isinstance(name, str) and name.lower() == "auto":
        return tuple(FORMS.values())
    if not isinstance(name, str) or name.lower() not in FORMS:
        raise InputError(f"unknown form {name!r}; accepted: auto, {', '.join(FORMS)}")
    return (form_named(name),)


def energy_curves(layer: GConv2d | SeparableGConv2d) -> dict[str, list[float]]:
    """For each form the share of the filter's energy that rank 1, 2, … keeps."""
    weight = layer.weight.detach().cpu()
    return {name: explained_energy(block_energies(weight, form, layer.group)).tolist() for name, form in FORMS.items()}


def choose(
    layer: GConv2d | SeparableGConv2d,
    curves: dict[str, list[float]],
    forms: Iterable[Form],
    budget: Budget,
    positions: tuple[int, int],
) -> Choice:
    """The choice for one layer.

    One form asked for: its smallest rank within the budget, even where that has more parameters than before. Several:
    only options with fewer parameters than the layer at present, and no more MACs as executed, compete. Under
    ``energy`` the one with the fewest parameters wins, and of equals the one that keeps more; under ``rank`` the one
    that saves most parameters per share of energy lost.

    Args:
        layer: a layer from group to group.
        curves: what :func:`energy_curves` gives for it.
        forms: those asked for.
        budget: what may be kept.
        positions: of the layer's input map and output map (:class:`gconv.LayerCost`).
    """
    shape = layer.filter_shape
    if shape.k == 1:
        return Choice(None, "1x1: nothing to separate")
    present = _present_parameters(layer)
    within = [_smallest(form, curves[form.name], layer, budget, positions) for form in forms]
    if len(within) == 1:
        (option,) = within
        if isinstance(layer, SeparableGConv2d) and layer.form is option.form and layer.rank <= option.rank:
            return Choice(None, f"already {layer.form.name} of rank {layer.rank}")
        larger = f", {option.parameters - present:,} parameters more" if option.parameters > present else ""
        return Choice(option, f"as asked{larger}")
    most = _executed(layer.macs(), positions)
    smaller = [option for option in within if option.parameters < present and option.macs <= most]
    if not smaller:
        return Choice(None, "no form is smaller")
    if budget.rank is None:
        return Choice(min(smaller, key=lambda option: (option.parameters, -option.energy)), "fewest parameters")
    return Choice(
        min(smaller, key=lambda option: max(1 - option.energy, _ROUNDING) / (present - option.parameters)),
        "least energy lost per parameter saved",
    )


def _smallest(
    form: Form,
    curve: list[float],
    layer: GConv2d | SeparableGConv2d,
    budget: Budget,
    positions: tuple[int, int],
) -> Option:
    shape = layer.filter_shape
    if budget.rank is not None:
        rank = min(budget.rank, len(curve))
    else:
        assert budget.energy is not None
        target = budget.energy - _ROUNDING
        rank = next((r for r, kept in enumerate(curve, start=1) if kept >= target), len(curve))
    by_map = form.macs_by_map(shape, rank) if form.default_execution == "factorized" else (0, layer.dense_macs)
    return Option(form, rank, curve[rank - 1], form.parameters(shape, rank), _executed(by_map, positions))


def _executed(by_map: tuple[int, int], positions: tuple[int, int]) -> int:
    return by_map[0] * positions[0] + by_map[1] * positions[1]


def _present_parameters(layer: GConv2d | SeparableGConv2d) -> int:
    if isinstance(layer, SeparableGConv2d):
        return layer.form.parameters(layer.filter_shape, layer.rank)
    return layer.weight.numel()
