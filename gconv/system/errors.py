"""The one exception that means "the input is at fault", shared by the library and the command lines."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Something the caller gave cannot be used.

    The message is one line that names what was wrong, what was given and what is accepted. Command lines print it
    and exit with code 2; from Python it is an ordinary ``ValueError``.
    """


def one_of(what: str, given: object, accepted: Iterable[object]) -> InputError:
    """The error for a name outside a known list: ``unknown model 'x'; accepted: a, b, c``."""
    return InputError(f"unknown {what} {str(given)!r}; accepted: {', '.join(map(str, accepted))}")
