"""What SIGINT (Ctrl-C) and SIGTERM do to a run.

Only the main thread of a process can set a signal's handler; in other threads these contexts change nothing. A signal
that the process ignores stays ignored: a shell starts background jobs with SIGINT ignored, so that Ctrl-C, which a
terminal sends to all processes, does not end them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


class StopRequest:
    """Whether SIGINT or SIGTERM asked a run to stop, so that it can finish its training step before it does.

    Args:
        enabled: False for a run that signals end at once, as usual.

    Attributes:
        received: True after the first signal. The second one raises ``KeyboardInterrupt`` at once.
    """

    def __init__(self, enabled: bool) -> None:
        self.received = False
        self._signals = (signal.SIGINT, signal.SIGTERM) if enabled else ()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this context is open, the two signals are noted here."""
        with _handled(self._note, *self._signals):
            yield

    def _note(self, *_: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True


def interrupt(*_: object) -> NoReturn:
    """A handler that does what Ctrl-C does."""
    raise KeyboardInterrupt


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """While this context is open, SIGTERM does what Ctrl-C does."""
    with _handled(interrupt, signal.SIGTERM):
        yield


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """While this context is open, SIGINT waits. A process that is started in it never receives SIGINT."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # child processes inherit the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handled(handler: Callable[..., None], *signals: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
