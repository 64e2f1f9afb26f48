"""What a conversion may cost or lose: one budget, checked, and the limit that it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

from gconv.system.errors import InputError

BUDGETS = ("rank", "energy", "params", "macs", "latency", "max_drop")
DEFAULT_ENERGY = 0.95
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}
_COUNT = "a fraction up to 1 of what the network has, or a whole number above 1"
_TIME = "a fraction up to 1 of what the network takes, or a time such as 3.5ms"


@dataclass(frozen=True)
class Budget:
    """One budget.

    Attributes:
        kind: one of ``BUDGETS``.
        value: ``rank`` and ``energy`` (a share) are for every layer. ``params``, ``macs`` (as executed, for one image)
            and ``latency`` (milliseconds) are for the whole network. ``max_drop`` is in points of validation accuracy.
        fraction: whether the value is a fraction of what the network has as given.
    """

    kind: str
    value: float
    fraction: bool = False

    @classmethod
    def of(cls, **given: int | float | str | None) -> Budget:
        """The budget that is not None. The default is 95 % of the energy.

        Raises:
            InputError: several are given, or a value is out of range.
        """
        named = {kind: value for kind, value in given.items() if value is not None}
        if len(named) > 1:
            what = ", ".join(f"{kind} {value}" for kind, value in named.items())
            raise InputError(f"several budgets are given: {what}. Give one of {', '.join(BUDGETS)}.")
        ((kind, value),) = named.items() or [("energy", DEFAULT_ENERGY)]
        return _CHECKS[kind](kind, value)

    def limit(self, present: float) -> float:
        """The value in absolute terms, for a network that has ``present`` as given."""
        return self.value * present if self.fraction else self.value

    def to_dict(self) -> dict[str, float | bool | str]:
        """Plain data for a report."""
        return {"budget": self.kind, "value": self.value, "fraction": self.fraction}


def _rank(kind: str, value: object) -> Budget:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise InputError(f"rank is {value!r}. Give a whole number of at least 1.")
    return Budget(kind, int(value))


def _energy(kind: str, value: object) -> Budget:
    number = None if isinstance(value, str) else _number(value, {})
    if number is None or not 0 < number <= 1:
        raise InputError(f"energy is {value!r}. Give a share above 0 and up to 1, such as 0.95.")
    return Budget(kind, number)


def _count(kind: str, value: object) -> Budget:
    number = _number(value, _UNITS)
    unit = isinstance(value, str) and value.strip().lower()[-1:] in _UNITS
    if number is None or number <= 0 or (number > 1 and number != int(number)) or (number <= 1 and unit):
        raise InputError(f"{kind} is {value!r}. Give {_COUNT}.")
    # 1 means the whole network, not one parameter. A whole number may have a unit, as in 8.9k.
    return Budget(kind, number if number <= 1 else int(number), fraction=number <= 1)


def _latency(kind: str, value: object) -> Budget:
    absolute = isinstance(value, str) and value.strip().lower().endswith("ms")
    number = _number(value.strip()[:-2], {}) if absolute and isinstance(value, str) else _number(value, {})
    if number is None or number <= 0 or (not absolute and number > 1):
        raise InputError(f"latency is {value!r}. Give {_TIME}.")
    return Budget(kind, number, fraction=not absolute)


def _max_drop(kind: str, value: object) -> Budget:
    number = _number(value, {})
    if number is None or not 0 < number < 100:
        raise InputError(f"max_drop is {value!r}. Give points of accuracy above 0 and below 100, such as 0.5.")
    return Budget(kind, number)


def _number(value: object, units: dict[str, int]) -> float | None:
    """The finite number that a value is or spells, or None."""
    unit = 1
    if isinstance(value, str):
        text = value.strip().lower()
        if text[-1:] in units:
            text, unit = text[:-1], units[text[-1]]
        value = text
    elif isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    return round(number * unit, 6) if unit > 1 else number


_CHECKS = {
    "rank": _rank,
    "energy": _energy,
    "params": _count,
    "macs": _count,
    "latency": _latency,
    "max_drop": _max_drop,
}
