"""The exception for bad input, which the library and the commands share."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Something that the caller gave cannot be used.

    The message is one line. It says what was wrong, what was given, and what to give instead. A command prints it and
    exits with 2. In Python it is an ordinary ``ValueError``.
    """


def one_of(what: str, given: object, accepted: Iterable[object]) -> InputError:
    """The error for a name that is not in a list, such as ``unknown model 'x'; accepted: a, b, c``."""
    return InputError(f"unknown {what} {str(given)!r}; accepted: {', '.join(map(str, accepted))}")
