"""The units, budgets and names of a sweep. Imports nothing heavy, so that a command line answers at once."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.allocation.budget import Budget
from gconv.system.errors import InputError, one_of

UNITS = ("params", "macs", "latency")
BUDGETS = (0.15, 0.2, 0.3, 0.4, 0.6)
COSTS = ("parameters", "macs_executed", "latency_share")
"""The costs that rows are compared by."""
ERRORS = ("validation_error", "test_error", "output_error")
"""The errors that rows are compared by: the first of these that was measured."""
FILES = ("sweep.json", "sweep.csv", "sweep.png")


def checked_budgets(unit: str, values: Sequence[float | str]) -> list[Budget]:
    """The budgets; one that is given twice counts once.

    Raises:
        InputError: the unit is unknown, there is no budget, or one is out of range.
    """
    if unit not in UNITS:
        raise one_of("unit", unit, UNITS)
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise InputError(f"budgets is {values!r}. Give a list of at least one, such as {list(BUDGETS)}.")
    return list(dict.fromkeys(Budget.of(**{unit: value}) for value in values))


def requested(budget: Budget) -> float | str:
    """The budget as :func:`analysis.convert` takes it."""
    return budget.value if budget.fraction or budget.kind != "latency" else f"{budget.value:.12g}ms"
