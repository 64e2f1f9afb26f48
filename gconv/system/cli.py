"""What all command lines of the project share. It imports nothing slow, so that ``--help`` answers at once."""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from .errors import InputError

LARGEST = 10**9
"""The largest whole number that an option takes, a seed too."""


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that reports an error in one line on stderr and exits with 2.

    Args:
        prog: the command as the user types it.
        description: the first part of the help; its line breaks are kept.
        examples: the last part of the help, one command a line.
    """

    def __init__(self, prog: str, description: str, examples: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def run(prog: str, command: Callable[[], None]) -> int:
    """Run a command and return its exit code.

    The code is 0 if the command ends without an error. It is 2 for an :class:`InputError`, whose message is printed in
    one line on stderr, and 130 for a ``KeyboardInterrupt``. Any other exception is a fault of this project: it is not
    caught, so that Python prints its traceback and exits with 1.

    Args:
        prog: the command as the user types it; error messages begin with it.
        command: does the work.
    """
    try:
        command()
    except InputError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted; no half-written file was left behind", file=sys.stderr)
        return 130
    return 0


@contextmanager
def loading() -> Iterator[None]:
    """A context for the slow imports of a command: the garbage collector skips the objects that they create.

    Without it the collector visits the objects of PyTorch's modules many times while they load, and once more when the
    process ends. That is wasted time, because none of them is ever freed. If PyTorch is imported already, as in a
    notebook, the process does not belong to the command, and the collector is left as it is.
    """
    collecting = gc.isenabled()
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def number(kind: type[int] | type[float], low: float, high: float | None = None) -> Callable[[str], int | float]:
    """An argparse type: a whole number or a finite real number of at least ``low`` and at most ``high``.

    Without ``high``, whole numbers may go up to ``LARGEST``: far larger ones do not fit the integers of PyTorch.
    """
    noun = "a whole number" if kind is int else "a number"
    span = f"of at least {low:g}" if high is None else f"from {_written(low)} to {_written(high)}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= (math.inf if high is None else high) or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {span}")
        if kind is int and value > LARGEST:
            raise argparse.ArgumentTypeError(f"{text!r} is too large; give at most {LARGEST:,}")
        return value

    return parse


def _written(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def main_args(argv: Sequence[str] | None) -> Sequence[str]:
    """``argv``, or the arguments of this process if it is None."""
    return sys.argv[1:] if argv is None else argv
