"""Checks of the arguments that the layers share with ``nn.Conv2d``."""

from __future__ import annotations

from numbers import Integral

import numpy as np

from gconv.system.errors import InputError


def at_least(low: int, name: str, value: object) -> int:
    """The value as an int.

    Raises:
        InputError: it is not a whole number, or below ``low``.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise InputError(f"{name} is {value!r}. Give a whole number of at least {low}.")
    return int(value)


def square(low: int, name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """An int or a pair of equal ints, as a pair.

    Raises:
        InputError: it is neither, or below ``low``.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or pair[0] != pair[1]:
        raise InputError(f"{name} is {value!r}. Give a whole number, or a pair of two equal ones.")
    size = at_least(low, name, pair[0])
    return size, size


def refuse_options(layer: str, bias: object, groups: object, padding_mode: object) -> None:
    """Check the options of ``nn.Conv2d`` that the layers have with one value only, and ``bias``.

    Raises:
        InputError: ``bias`` is not a bool, or one of the others has another value than its default.
    """
    if not isinstance(bias, (bool, np.bool_)):
        where = "After dilation comes bias, not groups as in nn.Conv2d."
        raise InputError(f"bias of {layer} is {bias!r}. Give True or False. {where}")
    if groups != 1:
        way = 'For fewer parameters, try SeparableGConv2d with form="gc".'
        raise InputError(f"{layer} has no channel groups, but groups is {groups!r}. Leave it out. {way}")
    if padding_mode != "zeros":
        way = f"Leave it out, and pad x with torch.nn.functional.pad(x, (p, p, p, p, 0, 0), mode={padding_mode!r})"
        raise InputError(f"{layer} pads with zeros only, but padding_mode is {padding_mode!r}. {way}")
