"""Group structure that plain weights hide: an exported group network is recognised, and taken back to its generators.

Expanding a generator gives S rows of one filter for every output channel, turned and permuted copies of each other.
Going back is the least-squares inverse of the expansion: every entry of the generator is the mean of its S copies, and
the *residual*, ``|W - expand(K)| / |W|``, says how far the rows are from sharing it. It is at rounding level for an
exported network and close to ``sqrt(1 - 1/S)`` for ordinary filters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gconv.functional.expansion import Tables, expand
from gconv.groups.point_groups import GROUPS, Group
from gconv.groups.point_groups import group as find_group
from gconv.system.errors import InputError

TOLERANCE = 1e-4  # single-precision exports stay below 1e-5
FORCED_TOLERANCE = 0.1  # for a group that the user names: broken by noise or quantisation, but still there
# Kernels that a turn changes by less than this could be anybody's: they fit whatever the group.
_LEAST_CHANGE = 10 * TOLERANCE

# escnn lists rotations, then rotations of the mirror image; its flip reverses the columns.
_ESCNN_ORDERS = {"p4m": (0, 1, 2, 3, 6, 5, 4, 7), "pmm": (0, 1, 3, 2)}


class Layout(NamedTuple):
    """Where plain channels keep channel c and group element s, in whose order of elements, in whose frame.

    Attributes:
        group: the group.
        order: ``order[p]`` is our index of the element at position p of the group axis.
        group_major: whether the planar channel is ``p C + c``, in place of ``c S + p``.
        turned: whether kernels must be turned by 90 degrees: escnn's single flip reverses columns, that of pm rows.
    """

    group: Group
    order: tuple[int, ...]
    group_major: bool = False
    turned: bool = False

    def __str__(self) -> str:
        text = f"{self.group.name}, {'group' if self.group_major else 'channel'}-major"
        if self.order != tuple(range(self.group.order)):
            text += ", elements in escnn's order"
        return text + (", columns flipped" if self.turned else "")

    def to_ours(self, weight: Tensor, *, lifting: bool, first: int | None = None) -> Tensor:
        """The plain filter ``[O S, I S_in, k, k]`` with channels ``c S + s`` as
        :func:`gconv.functional.expansion.expand` has.

        With ``first`` only that many of the O output channels.
        """
        rows = self._positions(weight.shape[0])
        weight = weight.index_select(0, rows if first is None else rows[: first * self.group.order])
        if not lifting:
            weight = weight.index_select(1, self._positions(weight.shape[1]))
        return weight.rot90(1, (-2, -1)) if self.turned else weight

    def _positions(self, channels: int) -> Tensor:
        """Where our channel ``c S + s`` is found in this layout."""
        s = self.group.order
        positions = torch.arange(channels)
        pairs = positions.view(s, -1).T if self.group_major else positions.view(-1, s)
        return pairs[:, torch.tensor(self.order).argsort()].flatten()


@dataclass(frozen=True, eq=False)
class Fit:
    """A plain filter read as an expanded one.

    Attributes:
        generator: ``[O, I, S_in, k, k]``, the one that comes closest; S_in is 1 where the input is planar.
        residual: relative, 0 if the rows share this generator exactly.
        telling: whether turning the kernels changes them; 1x1, constant or zero kernels say little about a group.
    """

    generator: Tensor
    residual: float
    telling: bool


@dataclass(frozen=True, eq=False)
class Recognition:
    """What :func:`recognise` found: the layout, and by name the layers that share it; the others are planar."""

    layout: Layout
    fits: dict[str, Fit]

    @property
    def told(self) -> int:
        """The number of plain weights in layers whose kernels tell."""
        return self.layout.group.order * sum(fit.generator.numel() for fit in self.fits.values() if fit.telling)


def collapse(expanded: Tensor, group: Group, *, lifting: bool) -> tuple[Tensor, float]:
    """The generator whose expansion is closest to a filter, and the relative residual.

    Args:
        expanded: ``[O S, I S_in, k, k]`` as :func:`gconv.functional.expansion.expand` returns it.
        group: the group.
        lifting: whether the input is planar, so that S_in is 1.

    Returns:
        ``[O, I, S_in, k, k]``, the inverse of ``expand`` where there is one; and ``|W - expand(K)| / |W|``.
    """
    rows, columns, k, _ = expanded.shape
    s, s_in = group.order, 1 if lifting else group.order
    o, i = rows // s, columns // s_in
    table = Tables.build(group, k, lifting=lifting, device=expanded.device).expansion
    copies = expanded.reshape(o, s, i, s_in * k * k).transpose(1, 2).reshape(o, i, -1)
    total = copies.new_zeros(o, i, s_in * k * k).index_add(2, table, copies)
    generator = (total / s).view(o, i, s_in, k, k)
    return generator, _relative(expand(generator, table) - expanded, expanded)


def read(weight: Tensor, layout: Layout, *, lifting: bool) -> Fit:
    """The plain filter ``[O S, I S_in, k, k]`` taken back to the generator that comes closest in this layout."""
    ours = layout.to_ours(weight, lifting=lifting)
    kernels = ours.flatten(2)
    turns = Tables.build(layout.group, weight.shape[-1]).pixels.view(layout.group.order, -1)[1:]
    telling = all(_relative(kernels[..., turn] - kernels, kernels) > _LEAST_CHANGE for turn in turns)
    return Fit(*collapse(ours, layout.group, lifting=lifting), telling)


def recognise(weights: Mapping[str, Tensor], forced: Group | None = None) -> Recognition | None:
    """The largest group whose structure most of a network's weights share, in one layout throughout; None if none does.

    Every group is tried in channel-major and group-major layout, in our order of elements and in escnn's. A network
    has the structure if the layers that fit, and whose kernels tell anything, hold more weights than those that do not
    fit: one oriented filter bank, or a layer of zeros, does not make a network equivariant.

    Args:
        weights: plain filters ``[O, I, k, k]`` by name, finite and not empty.
        forced: only this group, if need be up to a larger residual; kernels that tell nothing count as well.

    Raises:
        InputError: two groups of the same size fit alike, or the forced one does not fit.
    """
    if forced is not None:
        for tolerance in (TOLERANCE, FORCED_TOLERANCE):
            if found := _sharing(forced, weights, tolerance):
                return max(found, key=lambda recognition: recognition.told)
        raise _misfit(forced, weights)
    groups = sorted((find_group(name) for name in GROUPS if name != "z2"), key=lambda on: -on.order)
    for order in dict.fromkeys(on.order for on in groups):
        found = [r for on in groups if on.order == order for r in _sharing(on, weights, TOLERANCE, must_tell=True)]
        best = [r for r in found if r.told == max(other.told for other in found)]
        names = list(dict.fromkeys(r.layout.group.name for r in best))
        if len(names) > 1:
            raise ambiguous(f"the weights are those of {' and '.join(names)} alike", names)
        if best:
            return best[0]
    return None


def ambiguous(what: str, names: Sequence[str]) -> InputError:
    """The error that asks for a group."""
    return InputError(f"{what}: name the group, with --group or group=; accepted: {', '.join(names)}")


def layout_of(matrices: Sequence[npt.NDArray[np.float64]]) -> Layout | None:
    """The channel-major layout whose group elements act by these 2x2 matrices on centred (row, column) coordinates.

    None if they are not one of our groups, neither upright nor turned by 90 degrees.
    """
    quarter = find_group("p4").matrices[1]
    for turned, name in product((False, True), GROUPS):
        on = find_group(name)
        seen = [quarter @ matrix @ quarter.T if turned else matrix for matrix in matrices]
        order = [next((s for s, own in enumerate(on.matrices) if np.allclose(own, matrix)), -1) for matrix in seen]
        if sorted(order) == list(range(on.order)):
            return Layout(on, tuple(order), turned=turned)
    return None


def _layouts(group: Group) -> Iterator[Layout]:
    own = tuple(range(group.order))
    for group_major in (False, True):
        yield Layout(group, own, group_major)
        if group.name in _ESCNN_ORDERS:
            yield Layout(group, _ESCNN_ORDERS[group.name], group_major)
        if group.name == "pm":
            yield Layout(group, own, group_major, turned=True)


def _sharing(
    on: Group, weights: Mapping[str, Tensor], tolerance: float, *, must_tell: bool = False
) -> list[Recognition]:
    """The readings, one for each layout of a group that fits, in which most of the weights share the structure."""
    found = []
    for layout in _layouts(on):
        fits, misfits = _fits(layout, weights, tolerance)
        recognition = Recognition(layout, fits)
        if fits and (not must_tell or recognition.told > misfits):
            found.append(recognition)
    return found


def _within(weight: Tensor, layout: Layout, tolerance: float) -> Fit | None:
    """The plain filter read as a group-to-group one, else as a lifting one, if it is within the tolerance."""
    for lifting in _roles(weight, layout.group):
        # A few output channels that alone miss by more than the whole filter may turn an ordinary one down at once.
        some = layout.to_ours(weight, lifting=lifting, first=4)
        _, residual = collapse(some, layout.group, lifting=lifting)
        if residual * some.norm() <= tolerance * weight.norm():
            fit = read(weight, layout, lifting=lifting)
            if fit.residual <= tolerance:
                return fit
    return None


def _roles(weight: Tensor, group: Group) -> tuple[bool, ...]:
    """As what a plain filter can be read by its channels: values of ``lifting``."""
    if weight.shape[0] % group.order:
        return ()
    return (True,) if weight.shape[1] % group.order else (False, True)


def _fits(layout: Layout, weights: Mapping[str, Tensor], tolerance: float) -> tuple[dict[str, Fit], int]:
    """The layers within the tolerance, and the number of weights in the others; none if those are half of all."""
    fits: dict[str, Fit] = {}
    misfits = 0
    total = sum(weight.numel() for weight in weights.values())
    # The largest layers first: an ordinary network is turned down after a few of them.
    for name in sorted(weights, key=lambda name: -weights[name].numel()):
        if fit := _within(weights[name], layout, tolerance):
            fits[name] = fit
            continue
        misfits += weights[name].numel()
        if 2 * misfits >= total:
            return {}, misfits
    return fits, misfits


def _misfit(group: Group, weights: Mapping[str, Tensor]) -> InputError:
    """The error for a group that a network does not have, with the residual of its largest layer that could."""
    possible = {name: weight for name, weight in weights.items() if _roles(weight, group)}
    if not possible:
        what = f"no layer has a multiple of {group.order} outputs"
        return InputError(f"the weights are not those of {group.name}: {what}")
    name, weight = max(possible.items(), key=lambda item: item[1].numel())
    readings = product(_layouts(group), _roles(weight, group))
    residual = min(read(weight, layout, lifting=lifting).residual for layout, lifting in readings)
    return InputError(
        f"the weights are not those of {group.name}: the rows of {name} share one generator only up to a relative "
        f"residual of {residual:.2g}; accepted: at most {FORCED_TOLERANCE}"
    )


def _relative(difference: Tensor, reference: Tensor) -> float:
    norm = reference.norm().item()
    return difference.norm().item() / norm if norm else 0.0
