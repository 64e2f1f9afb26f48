"""What every command line of the project shares. Imports nothing heavy, so that ``--help`` is instant."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from .errors import InputError


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` whose errors are one line on stderr with exit code 2, and whose help keeps its line breaks."""

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
    """Run ``command`` and turn what it raises into an exit code: 0 done, 2 bad input (one line), 130 interrupted.

    Any other exception is our own failure: it keeps its traceback and exits with 1.
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
    """For the imports of a command: the garbage collector passes over what they make, now and when the process ends.

    It would go through the objects of PyTorch's modules many times while they load, and once more at the end, though
    they all stay. Where PyTorch is there already, as in a notebook, the process is not the command's own, and its
    collector is left as it is.
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


def number(kind: type[int] | type[float], low: float, high: float = float("inf")) -> Callable[[str], int | float]:
    """An argparse type: a whole or finite real number within ``[low, high]``."""
    noun = "a whole number" if kind is int else "a number"
    span = f"of at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {span}")
        return value

    return parse


def main_args(argv: Sequence[str] | None) -> Sequence[str]:
    """The arguments of this process, or the ones a test passes."""
    return sys.argv[1:] if argv is None else argv
