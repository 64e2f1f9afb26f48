"""What SIGINT and SIGTERM do, where they are heeded and where the process was started with SIGINT ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gconv.system.signals import StopRequest, sigint_blocked, sigterm_interrupts

ROOT = Path(__file__).resolve().parents[3]
BOTH = (signal.SIGINT, signal.SIGTERM)


def in_background(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as a shell starts it in the background: SIGINT is ignored."""
    start = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", start, sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_is_noted_and_the_second_interrupts(number):
    request = StopRequest(True)
    before = [signal.getsignal(each) for each in BOTH]
    with request.listening():
        assert not request.received
        signal.raise_signal(number)
        assert request.received
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert [signal.getsignal(each) for each in BOTH] == before


def test_a_run_that_signals_end_at_once_sets_no_handler():
    before = [signal.getsignal(each) for each in BOTH]
    with StopRequest(False).listening():
        assert [signal.getsignal(each) for each in BOTH] == before


def test_sigterm_interrupts_within_the_context_only():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_waits_while_it_is_blocked_and_is_not_lost():
    reached = []

    def start():
        with sigint_blocked():
            signal.raise_signal(signal.SIGINT)
            reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert reached == [True]


def test_in_another_thread_nothing_changes():
    seen = []

    def look():
        before = [signal.getsignal(each) for each in BOTH]
        for context in (StopRequest(True).listening(), sigterm_interrupts(), sigint_blocked()):
            with context:
                seen.append([signal.getsignal(each) for each in BOTH] == before)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [True] * 3


def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path):
    code = """
import signal
from gconv.system.signals import StopRequest, sigint_blocked, sigterm_interrupts
request = StopRequest(True)
with request.listening():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert not request.received
    signal.raise_signal(signal.SIGTERM)
    assert request.received
with sigint_blocked():
    signal.raise_signal(signal.SIGINT)
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with sigterm_interrupts():
    signal.raise_signal(signal.SIGTERM)
print("here")
"""
    done = in_background("-c", code, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "here\n", "")


def test_a_training_run_in_the_background_ignores_ctrl_c_and_heeds_sigterm(tmp_path):
    code = """
import os, signal, sys, torch
from gconv.train import main
adam, taken = torch.optim.Adam.step, []
def step(self):
    adam(self)
    taken.append(1)
    if len(taken) in (2, 3): os.kill(os.getpid(), signal.SIGINT)
    if len(taken) == 5: os.kill(os.getpid(), signal.SIGTERM)
torch.optim.Adam.step = step
code = main("rotdigits --model p4cnn --width 2 --batch-size 16 --out net.pt".split())
print(code, len(taken))
"""
    done = in_background("-c", code, folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "130 5\n"), done.stderr
    assert "to continue: python -m gconv.train rotdigits --resume net.pt" in done.stderr


def test_the_suite_itself_may_run_in_the_background(tmp_path):
    """Its tests that send SIGINT pass there too; one of this file stands for all of them."""
    name = f"{Path(__file__).relative_to(ROOT)}::{test_ctrl_c_waits_while_it_is_blocked_and_is_not_lost.__name__}"
    done = in_background("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", name, folder=ROOT)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
