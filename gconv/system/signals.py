"""What SIGINT (Ctrl-C) and SIGTERM do to a run; only a process's main thread can say, elsewhere all stays as it is."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Stop:
    """Whether SIGINT or SIGTERM came, while it listens: a network is not left in the middle of a step."""

    def __init__(self, listens: bool) -> None:
        self.asked = False
        self._listens = listens and threading.current_thread() is threading.main_thread()

    @contextmanager
    def listening(self) -> Iterator[None]:
        if not self._listens:
            yield
            return
        before = {name: signal.signal(name, self._note) for name in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _note(self, *_: object) -> None:
        if self.asked:  # a second time: at once
            raise KeyboardInterrupt
        self.asked = True


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def deaf() -> Iterator[None]:
    """Ctrl-C waits; processes that are started meanwhile do not hear it, for as long as they live."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
