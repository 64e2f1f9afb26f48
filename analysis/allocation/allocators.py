"""How a budget is shared out: the option that each layer takes, so that the sum of their costs is within a limit.

Every rule sees the same :class:`Problem`, a multiple-choice knapsack problem (Kellerer et al., Knapsack Problems, ch.
11): one option is chosen for each layer, and each option has a cost and an error. The rules differ in what they
minimise, and in how well.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import numpy as np
import numpy.typing as npt

from gconv.system.errors import InputError, one_of

from .pareto import front

COSTS = ("parameters", "macs", "milliseconds")
MAX_FRONT = 100_000
"""Largest number of entries of a front. A merge takes that times the options of a layer: 100 MB for 40 options."""
_ROUNDING = 1e-9  # relative: the last digits of a sum of times depend on its order; those of whole numbers do not


@dataclass(frozen=True)
class Option:
    """One way to run a layer. The first option of every layer leaves it as it is.

    Attributes:
        form, rank, execution: of the separable layer; None for the layer as it is.
        energy: the share of the filter's energy that is kept.
        parameters: of the layer's filter.
        macs: for one image, as executed.
        error: what replacing this layer alone adds to the error of the network; 0 for the layer as it is.
        relative_error: of the layer's own output; without data, of its filter.
        drop: points of validation accuracy that replacing this layer alone loses; None if it was not measured.
        milliseconds: of the layer on a batch; None if they were not measured.
    """

    form: str | None
    rank: int | None
    execution: str | None
    energy: float
    parameters: int
    macs: int
    error: float
    relative_error: float
    drop: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class Problem:
    """The options of every layer, the attribute that is the cost, and the limit on the sum of the costs."""

    layers: tuple[tuple[Option, ...], ...]
    cost: str
    limit: float

    def __post_init__(self) -> None:
        if self.cost not in COSTS:
            raise one_of("cost", self.cost, COSTS)
        for option in (option for layer in self.layers for option in layer):
            for name in ("energy", "error", "relative_error", self.cost):
                value = getattr(option, name)
                if value is None or not math.isfinite(value):
                    raise InputError(f"the {name} of an option is {value}. Give a finite number.")


Allocator = Callable[[Problem], list[int]]
ALLOCATORS: dict[str, Allocator] = {}


def reachable(problem: Problem) -> float:
    """The smallest limit that can be met: the sum of the cheapest options."""
    least: float = sum(min(getattr(option, problem.cost) for option in layer) for layer in problem.layers)
    return least


def allocate(problem: Problem, name: str = "auto") -> tuple[list[int], str]:
    """The index of the option that each layer takes, and the reason in words.

    Args:
        problem: the options and the limit.
        name: one of ``ALLOCATORS``; or ``auto``: the exact optimum if it is feasible, else ``lagrangian``.

    Raises:
        InputError: the name is unknown, the limit is out of reach, or the problem is too large for ``dynamic``.
    """
    if name != "auto" and name not in ALLOCATORS:
        raise one_of("allocator", name, ["auto", *ALLOCATORS])
    table = _Table(problem)
    if table.fits(table.start):
        return [0] * len(problem.layers), "within the limit as it is"
    if name != "auto":
        choice, why = ALLOCATORS[name](problem), f"{name}, as asked"
    else:
        try:
            columns, front = _exact(table)
        except _FrontTooLarge:
            choice, why = lagrangian(problem), f"lagrangian: the exact front would have more than {MAX_FRONT:,} entries"
        else:
            choice = table.indices(columns)
            why = f"exact dynamic programme: {len(problem.layers)} layers, at most {front:,} combinations on the front"
    spent = sum(getattr(layer[n], problem.cost) for layer, n in zip(problem.layers, choice, strict=True))
    if not spent <= table.limit:
        raise RuntimeError(f"allocator {name} spends {spent} {problem.cost} of {problem.limit}")
    return choice, why


Columns = npt.NDArray[np.int64]  # for each layer the column of its option in the table
Values = npt.NDArray[np.float64]  # [layers, columns]


class _Table:
    """A problem as arrays, with a row for each layer. Short rows are padded with infinite costs.

    The options of a row are sorted by cost, then error, then MACs: a rule that finds two equally good takes the first.
    """

    def __init__(self, problem: Problem) -> None:
        least = reachable(problem)
        self.limit = problem.limit * (1 + _ROUNDING) if problem.cost == "milliseconds" else problem.limit
        if not least <= self.limit:  # NaN too
            # Times are rounded up, so that the number that is named is in reach.
            shown = f"{math.ceil(least * 1e4) / 1e4:.4f}" if problem.cost == "milliseconds" else f"{least:,}"
            raise InputError(f"a limit of {problem.limit:,} {problem.cost} is out of reach. Give at least {shown}.")
        self.order = [
            sorted(range(len(layer)), key=lambda n: (getattr(layer[n], problem.cost), layer[n].error, layer[n].macs))
            for layer in problem.layers
        ]
        self.options = [[layer[n] for n in order] for layer, order in zip(problem.layers, self.order, strict=True)]
        self.rows = np.arange(len(self.order))
        self.start: Columns = np.array([order.index(0) for order in self.order], dtype=np.int64)
        self.cost = self.of(lambda option: getattr(option, problem.cost))
        self.error = self.of(lambda option: option.error)

    def of(self, value: Callable[[Option], float]) -> Values:
        table = np.full((len(self.options), max(map(len, self.options), default=0)), np.inf)
        for row, options in zip(table, self.options, strict=True):
            row[: len(options)] = [value(option) for option in options]
        return table

    def at(self, values: Values, choice: Columns) -> Values:
        return values[self.rows, choice]

    def fits(self, choice: Columns) -> bool:
        return bool(self.at(self.cost, choice).sum() <= self.limit)

    def indices(self, choice: Columns) -> list[int]:
        return [order[column] for order, column in zip(self.order, choice.tolist(), strict=True)]


def _allocator(rule: Callable[[_Table], Columns]) -> Allocator:
    """Registers a rule under its name. The rule is asked only if the limit can be met, and not by changing nothing."""

    @wraps(rule)
    def allocator(problem: Problem) -> list[int]:
        table = _Table(problem)
        return table.indices(table.start if table.fits(table.start) else rule(table))

    ALLOCATORS[rule.__name__] = allocator
    return allocator


@_allocator
def uniform(table: _Table) -> Columns:
    """One rank for all layers: the largest that fits. A form without that rank in a layer takes its largest below it.

    If a layer has several forms, it takes the one of least error. Only options that are cheaper than the layer compete;
    without one, the layer is left as it is. If no rank fits, every layer takes its cheapest option.
    """

    def at(rank: int, row: int) -> int:
        options, start = table.options[row], int(table.start[row])
        largest: dict[str | None, int] = {}
        for option in options:
            if option.rank is not None and option.rank <= rank:
                largest[option.form] = max(option.rank, largest.get(option.form, 0))
        cheaper = np.flatnonzero(table.cost[row] < table.cost[row, start]).tolist()
        allowed = [c for c in cheaper if options[c].rank == largest.get(options[c].form, -1)]
        return min(allowed, key=lambda c: options[c].error, default=start)

    ranks = {option.rank for options in table.options for option in options if option.rank is not None}
    for rank in sorted(ranks, reverse=True):
        choice = np.array([at(rank, row) for row in table.rows.tolist()])
        if table.fits(choice):
            return choice
    return table.cost.argmin(1)


@_allocator
def energy(table: _Table) -> Columns:
    """Every layer keeps the same share of its energy, at the least cost. The share is the largest that fits."""
    return _strictest(table, table.of(lambda option: option.energy))


@_allocator
def minmax(table: _Table) -> Columns:
    """The least ``max_l relative_error_l`` (ALDS; Liebenwein et al., NeurIPS 2021). Then what is left is spent."""
    relative = table.of(lambda option: option.relative_error)
    return _spend(table, _strictest(table, -relative), relative)


@_allocator
def lagrangian(table: _Table) -> Columns:
    """The least ``sum_l (error_l + alpha cost_l)`` at the smallest alpha >= 0 that meets the limit.

    It is found exactly (Everett, 1963; Shoham & Gersho, 1988): down the convex hulls of all layers, the flattest edge
    first. Then what is left of the limit is spent.
    """
    choice, _ = _descend(table, table.error)
    return _spend(table, choice, table.error)


@_allocator
def greedy(table: _Table) -> Columns:
    """Starting from the unchanged network, repeat the change of one layer that loses least accuracy per cost saved.

    This follows NetAdapt (Yang et al., ECCV 2018), but a change may go to any cheaper option. Ties go to the least
    error per cost saved. If the drop of any option was not measured, the error per cost saved alone decides, because
    points of accuracy and errors cannot be compared.
    """
    if any(option.drop is None for options in table.options for option in options if option.form is not None):
        return _descend(table, table.error)[0]
    return _descend(table, table.of(lambda option: option.drop or 0.0), table.error)[0]


@_allocator
def dynamic(table: _Table) -> Columns:
    """The exact optimum of the summed error, which the other rules are measured by.

    Raises:
        InputError: a front would have more than ``MAX_FRONT`` entries.
    """
    return _exact(table)[0]


def _strictest(table: _Table, quality: Values) -> Columns:
    """Each layer's cheapest option of at least some quality, the same for all: the highest one that fits."""
    quality[table.rows, table.start] = np.inf  # a layer can always be left as it is, whatever rounding says

    def at_least(least: float) -> Columns:
        return np.where(quality >= least, table.cost, np.inf).argmin(1)

    # A lower demand never costs more, so the first that fits is found by bisection.
    demands = np.unique(quality[np.isfinite(table.cost)])[::-1].tolist()
    return at_least(demands[bisect_left(demands, True, key=lambda least: table.fits(at_least(least)))])


def _descend(table: _Table, *losses: Values) -> tuple[Columns, float]:
    """Starting from the unchanged network, make the change with the least loss per cost saved until the limit is met.

    Returns the choice, and the last price: the loss per cost saved. Prices are compared in the first of the losses,
    and ties in the next one; after that the change that saves most comes first. For a single loss this walks along the
    merged lower convex hulls of all layers: prices rise, and each choice on the way minimises ``loss + price * cost``.
    """
    choice, price = table.start.copy(), 0.0
    while not table.fits(choice):
        saved = table.at(table.cost, choice)[:, None] - table.cost
        rows, columns = np.nonzero(saved > 0)
        prices = [(loss[rows, columns] - table.at(loss, choice)[rows]) / saved[rows, columns] for loss in losses]
        best = np.lexsort((-saved[rows, columns], *reversed(prices)))[0]
        choice[rows[best]], price = columns[best], float(prices[0][best])
    return choice, price


def _spend(table: _Table, choice: Columns, loss: Values) -> Columns:
    """While any change fits into what is left of the limit, make the one that lowers the loss most per cost."""
    choice = choice.copy()
    while True:
        cost = table.at(table.cost, choice)
        extra, gain = table.cost - cost[:, None], table.at(loss, choice)[:, None] - loss
        rows, columns = np.nonzero((gain > 0) & (extra <= table.limit - cost.sum()))
        if not rows.size:
            return choice
        extra, gain = extra[rows, columns], gain[rows, columns]
        paid = extra > 0
        best = np.where(paid, gain / np.where(paid, extra, 1), np.inf).argmax()
        choice[rows[best]] = columns[best]


class _FrontTooLarge(InputError):
    """The exact optimum would take too much memory."""


def _exact(table: _Table) -> tuple[Columns, int]:
    """The exact optimum, and the size of the largest front on the way.

    A front holds the partial allocations (cost, error) of the first layers that no other one beats in both. Only those
    are kept that can still lead to the optimum. For a limit C and any price alpha >= 0, the layers to come allow no
    error below ``error + alpha (cost - C) + sum min (error_l + alpha cost_l)``; this bound must not exceed the error of
    an allocation that is known already. Price and allocation are those of ``lagrangian``, where the bound is tightest.
    """
    choice, price = _descend(table, table.error)
    alpha = max(price, 0.0)
    best = table.at(table.error, _spend(table, choice, table.error)).sum()
    best += _ROUNDING * (abs(best) + alpha * table.limit)

    least_cost = table.cost.min(1)
    least_sum = (table.error + alpha * np.where(np.isfinite(table.cost), table.cost, 0)).min(1)
    cost, error = np.zeros(1), np.zeros(1)
    back: list[tuple[Columns, Columns]] = []
    largest = 0
    for row in table.rows.tolist():
        columns = front(table.cost[row], table.error[row])  # without the padding, whose error is infinite
        costs = (cost[:, None] + table.cost[row, columns]).ravel()
        errors = (error[:, None] + table.error[row, columns]).ravel()
        possible = costs + least_cost[row + 1 :].sum() <= table.limit
        possible &= errors + alpha * (costs - table.limit) + least_sum[row + 1 :].sum() <= best
        kept = np.flatnonzero(possible)
        kept = kept[front(costs[kept], errors[kept])]
        if kept.size > MAX_FRONT:
            raise _FrontTooLarge(f"the exact front has more than {MAX_FRONT:,} entries; accepted: auto or lagrangian")
        cost, error, largest = costs[kept], errors[kept], max(largest, kept.size)
        back.append((kept // columns.size, columns[kept % columns.size]))

    entry = cost.size - 1  # the most expensive one that fits: along a front the error falls
    for row, (previous, taken) in reversed(list(enumerate(back))):
        choice[row], entry = taken[entry], previous[entry]
    return choice, largest
