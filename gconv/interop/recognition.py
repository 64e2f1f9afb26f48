"""Group structure in plain weights: an exported group network is recognised, and its generators are recovered.

The expansion of a generator has S rows for every output channel. The rows are copies of one filter, transformed by the
elements of the group. The generator is recovered by the least-squares inverse of the expansion: every entry is the mean
of its S copies. The *residual*, ``|W - expand(K)| / |W|``, says how far the rows are from sharing one generator. It is
at rounding level for an exported network, and close to ``sqrt(1 - 1/S)`` for ordinary filters.
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

TOLERANCE = 1e-4  # the residuals of single-precision exports are below 1e-5
FORCED_TOLERANCE = 0.1  # for a group given by the user; noise or quantisation may have disturbed the structure
# Kernels that the group's elements change by less carry no information about the group: they fit any group.
_LEAST_CHANGE = 10 * TOLERANCE

# escnn lists the rotations, then the rotations of the mirror image; its flip reverses the columns.
_ESCNN_ORDERS = {"p4m": (0, 1, 2, 3, 6, 5, 4, 7), "pmm": (0, 1, 3, 2)}


class Layout(NamedTuple):
    """How the plain channels of a group network are ordered, and how its kernels are oriented.

    Attributes:
        group: the group.
        order: ``order[p]`` is our index of the element at position p of the group axis.
        group_major: whether channel c and position p are at the plain channel ``p C + c``. Otherwise it is ``c S + p``.
        rotated: whether the kernels must be rotated by 90 degrees to be ours: the flip of escnn's smallest mirror group
            reverses columns, that of our pm reverses rows.
    """

    group: Group
    order: tuple[int, ...]
    group_major: bool = False
    rotated: bool = False

    def __str__(self) -> str:
        text = f"{self.group.name}, {'group' if self.group_major else 'channel'}-major"
        if self.order != tuple(range(self.group.order)):
            text += ", elements in escnn's order"
        return text + (", columns flipped" if self.rotated else "")

    def to_ours(self, weight: Tensor, *, lifting: bool, first: int | None = None) -> Tensor:
        """A plain filter of this layout in ours, as :func:`gconv.functional.expansion.expand` returns it.

        Args:
            weight: ``[O S, I S_in, k, k]`` in this layout.
            lifting: whether the input is planar, so that S_in is 1.
            first: keep only this many of the O output channels.

        Returns:
            ``[O S, I S_in, k, k]``, the element s of channel c at ``c S + s``.
        """
        rows = self._positions(weight.shape[0])
        weight = weight.index_select(0, rows if first is None else rows[: first * self.group.order])
        if not lifting:
            weight = weight.index_select(1, self._positions(weight.shape[1]))
        return weight.rot90(1, (-2, -1)) if self.rotated else weight

    def _positions(self, channels: int) -> Tensor:
        """For each of our channels ``c S + s``, its index in this layout."""
        s = self.group.order
        positions = torch.arange(channels)
        pairs = positions.view(s, -1).T if self.group_major else positions.view(-1, s)
        return pairs[:, torch.tensor(self.order).argsort()].flatten()


@dataclass(frozen=True, eq=False)
class Fit:
    """A plain filter read as an expanded one.

    Attributes:
        generator: ``[O, I, S_in, k, k]``, the least-squares generator; S_in is 1 if the input is planar.
        residual: the relative residual; 0 if the rows share this generator exactly.
        informative: whether the group's elements change the kernels. Kernels that are 1x1, constant or zero carry no
            information about the group.
    """

    generator: Tensor
    residual: float
    informative: bool


@dataclass(frozen=True, eq=False)
class Recognition:
    """What :func:`recognise` found.

    Attributes:
        layout: the layout that the group layers share.
        fits: these layers by name. All other layers are planar.
    """

    layout: Layout
    fits: dict[str, Fit]

    @property
    def evidence(self) -> int:
        """The number of plain weights in layers with informative kernels."""
        return self.layout.group.order * sum(fit.generator.numel() for fit in self.fits.values() if fit.informative)


def collapse(expanded: Tensor, group: Group, *, lifting: bool) -> tuple[Tensor, float]:
    """The generator whose expansion is closest to a filter in least squares, and the relative residual.

    Args:
        expanded: ``[O S, I S_in, k, k]`` as :func:`gconv.functional.expansion.expand` returns it.
        group: the group.
        lifting: whether the input is planar, so that S_in is 1.

    Returns:
        The generator ``[O, I, S_in, k, k]`` and ``|W - expand(K)| / |W|``. The residual is 0 for an expanded filter.
    """
    rows, columns, k, _ = expanded.shape
    s, s_in = group.order, 1 if lifting else group.order
    o, i = rows // s, columns // s_in
    table = Tables.build(group, k, lifting=lifting, device=expanded.device).expansion
    copies = expanded.reshape(o, s, i, s_in * k * k).transpose(1, 2).reshape(o, i, -1)
    total = copies.new_zeros(o, i, s_in * k * k).index_add(2, table, copies)
    generator = (total / s).view(o, i, s_in, k, k)
    return generator, _relative_norm(expand(generator, table) - expanded, expanded)


def read(weight: Tensor, layout: Layout, *, lifting: bool) -> Fit:
    """The generator of a plain filter ``[O S, I S_in, k, k]`` in this layout, by least squares."""
    ours = layout.to_ours(weight, lifting=lifting)
    kernels = ours.flatten(2)
    tables = Tables.build(layout.group, weight.shape[-1]).pixels.view(layout.group.order, -1)[1:]
    informative = all(_relative_norm(kernels[..., table] - kernels, kernels) > _LEAST_CHANGE for table in tables)
    return Fit(*collapse(ours, layout.group, lifting=lifting), informative)


def recognise(weights: Mapping[str, Tensor], forced: Group | None = None) -> Recognition | None:
    """The largest group whose structure most of a network's weights have, in one layout for all layers.

    Every group is tried in channel-major and group-major layout, in our order of elements and in escnn's. A network has
    the structure if the layers that fit, and whose kernels are informative, hold more weights than the layers that do
    not fit: a single oriented filter bank, or a layer of zeros, does not make a network equivariant.

    Args:
        weights: plain filters ``[O, I, k, k]`` by name, finite and not empty.
        forced: try only this group. Then kernels that are not informative count too, and if necessary a larger residual
            is accepted.

    Returns:
        None if no group fits.

    Raises:
        InputError: two groups of the same order fit equally well, or the forced one does not fit.
    """
    if forced is not None:
        for tolerance in (TOLERANCE, FORCED_TOLERANCE):
            if found := _sharing(forced, weights, tolerance):
                return max(found, key=lambda recognition: recognition.evidence)
        raise _misfit(forced, weights)
    groups = sorted((find_group(name) for name in GROUPS if name != "z2"), key=lambda group: -group.order)
    for order in dict.fromkeys(group.order for group in groups):
        of_order = [group for group in groups if group.order == order]
        found = [r for group in of_order for r in _sharing(group, weights, TOLERANCE, needs_evidence=True)]
        best = [r for r in found if r.evidence == max(other.evidence for other in found)]
        names = list(dict.fromkeys(r.layout.group.name for r in best))
        if len(names) > 1:
            raise ambiguous(f"the weights fit {' and '.join(names)} equally well", names)
        if best:
            return best[0]
    return None


def ambiguous(what: str, names: Sequence[str]) -> InputError:
    """The error that asks for a group.

    Args:
        what: why the group is not known.
        names: the groups that may be given.
    """
    return InputError(f"{what}: give the group, with --group or group=; accepted: {', '.join(names)}")


def layout_of(matrices: Sequence[npt.NDArray[np.float64]]) -> Layout | None:
    """The channel-major layout of a group whose elements act by these matrices.

    Args:
        matrices: a 2x2 matrix for each element, on centred (row, column) coordinates, in the order of the group axis.

    Returns:
        None if they form none of our groups, also after a rotation of the plane by 90 degrees.
    """
    rotation = find_group("p4").matrices[1]
    for rotated, name in product((False, True), GROUPS):
        group = find_group(name)
        seen = [rotation @ matrix @ rotation.T if rotated else matrix for matrix in matrices]
        order = [next((s for s, own in enumerate(group.matrices) if np.allclose(own, matrix)), -1) for matrix in seen]
        if sorted(order) == list(range(group.order)):
            return Layout(group, tuple(order), rotated=rotated)
    return None


def _layouts(group: Group) -> Iterator[Layout]:
    own = tuple(range(group.order))
    for group_major in (False, True):
        yield Layout(group, own, group_major)
        if group.name in _ESCNN_ORDERS:
            yield Layout(group, _ESCNN_ORDERS[group.name], group_major)
        if group.name == "pm":
            yield Layout(group, own, group_major, rotated=True)


def _sharing(
    group: Group, weights: Mapping[str, Tensor], tolerance: float, *, needs_evidence: bool = False
) -> list[Recognition]:
    """A reading for each layout of the group in which most of the weights have the structure."""
    found = []
    for layout in _layouts(group):
        fits, misfits = _fits(layout, weights, tolerance)
        recognition = Recognition(layout, fits)
        if fits and (not needs_evidence or recognition.evidence > misfits):
            found.append(recognition)
    return found


def _within(weight: Tensor, layout: Layout, tolerance: float) -> Fit | None:
    """The plain filter read as a group-to-group filter, else as a lifting one; None if it exceeds the tolerance."""
    for lifting in _roles(weight, layout.group):
        # The error of a few output channels is a lower bound of the whole error: it rejects most filters early.
        some = layout.to_ours(weight, lifting=lifting, first=4)
        _, residual = collapse(some, layout.group, lifting=lifting)
        if residual * some.norm() <= tolerance * weight.norm():
            fit = read(weight, layout, lifting=lifting)
            if fit.residual <= tolerance:
                return fit
    return None


def _roles(weight: Tensor, group: Group) -> tuple[bool, ...]:
    """The values of ``lifting`` that the channel numbers of a plain filter allow."""
    if weight.shape[0] % group.order:
        return ()
    return (True,) if weight.shape[1] % group.order else (False, True)


def _fits(layout: Layout, weights: Mapping[str, Tensor], tolerance: float) -> tuple[dict[str, Fit], int]:
    """The layers within the tolerance, and the number of weights in the other layers.

    There are no fits if the other layers hold half of all weights.
    """
    fits: dict[str, Fit] = {}
    misfits = 0
    total = sum(weight.numel() for weight in weights.values())
    # The largest layers first: an ordinary network is rejected after a few of them.
    for name in sorted(weights, key=lambda name: -weights[name].numel()):
        if fit := _within(weights[name], layout, tolerance):
            fits[name] = fit
            continue
        misfits += weights[name].numel()
        if 2 * misfits >= total:
            return {}, misfits
    return fits, misfits


def _misfit(group: Group, weights: Mapping[str, Tensor]) -> InputError:
    """The error for a group that a network does not have, with the residual of the largest layer of suitable size."""
    possible = {name: weight for name, weight in weights.items() if _roles(weight, group)}
    if not possible:
        what = f"no layer has a multiple of {group.order} outputs"
        return InputError(f"the weights do not have the structure of {group.name}: {what}")
    name, weight = max(possible.items(), key=lambda item: item[1].numel())
    readings = product(_layouts(group), _roles(weight, group))
    residual = min(read(weight, layout, lifting=lifting).residual for layout, lifting in readings)
    return InputError(
        f"the weights do not have the structure of {group.name}: the rows of {name} share one generator only up to a "
        f"relative residual of {residual:.2g}, and at most {FORCED_TOLERANCE} is accepted"
    )


def _relative_norm(difference: Tensor, reference: Tensor) -> float:
    norm = reference.norm().item()
    return difference.norm().item() / norm if norm else 0.0
