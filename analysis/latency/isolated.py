"""Latency in a new process, which only loads two saved networks and runs them in turns, as their users will.

A process that has just converted a network has memory and caches with a history. So where a budget of time is to be
kept, ``python -m analysis.latency.isolated`` measures, on the same device, with the same number of threads and the same
environment.

A machine may run at several speeds, each for many seconds, because its clock changes or because others use it too. So
the time that is reported can be measured at a speed that was seen before (:func:`at_speed`).
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gconv.models import checkpoint
from gconv.models.networks import Model

from .timing import BUDGET_ROUNDS, latency

_NEAR = 1.03  # ratio of times from which on the speed is another one; medians at one speed differ by less
_PATIENCE = 30.0  # seconds
_PAUSE = 1.0  # seconds


def fresh_latency(
    before: nn.Module, after: nn.Module, images: Tensor, note: Callable[[str], None], *, known: float = math.inf
) -> dict[str, Any]:
    """Latency of two networks in eval mode, in many rounds, measured :func:`at_speed` in a new process.

    It is measured in this process if a network cannot be saved, or if the new process fails.

    Args:
        before: a network.
        after: another one.
        images: a batch ``[N, C, H, W]``; the networks run on its device and with its type.
        note: is called with one line if this process measured, and why.
        known: milliseconds of the first network, as measured before; infinite if they were not measured.

    Returns:
        The latency, and as ``process`` which process measured it: ``new`` or ``converting``.
    """
    try:
        return {**in_new_process(before, after, images, known), "process": "new"}
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())
        note(f"latency was measured in the converting process, which may take longer than a new one: {why}")
        return {**at_speed(before, after, images, known), "process": "converting"}


def at_speed(before: nn.Module, after: nn.Module, images: Tensor, known: float) -> dict[str, Any]:
    """:func:`analysis.latency.timing.latency` at a time when the first network takes no longer than ``known``.

    Until then it is measured again every second. After half a minute the measurement in which both networks together
    took least is returned.
    """
    began = time.perf_counter()
    best = latency(before, after, images, rounds=BUDGET_ROUNDS)
    while best["milliseconds"][0] > _NEAR * known and time.perf_counter() - began < _PATIENCE:
        time.sleep(_PAUSE)
        again = latency(before, after, images, rounds=BUDGET_ROUNDS)
        best = min(best, again, key=lambda found: sum(found["milliseconds"]))
    return best


def in_new_process(before: nn.Module, after: nn.Module, images: Tensor, known: float) -> dict[str, Any]:
    """The latency as this module measures and prints it when it is run.

    Raises:
        ValueError: a network cannot be saved, or what was printed is not a latency.
        OSError: no files can be written, or the process does not start or fails.
    """
    with tempfile.TemporaryDirectory(prefix="gconv-") as folder:
        for name, network in (("before.pt", before), ("after.pt", after)):
            checkpoint.save(cast(Model, network), Path(folder, name))  # refuses a network that it cannot describe
        batch = io.BytesIO()
        torch.save(images, batch)
        Path(folder, "images.pt").write_bytes(batch.getbuffer())
        command = [sys.executable, "-P", "-m", "analysis.latency.isolated", "before.pt", "after.pt", "images.pt"]
        done = subprocess.run(  # kills the process on Ctrl-C
            [*command, str(torch.get_num_threads()), str(known)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": import_path()},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    if done.returncode:
        said = _last_line(done.stderr) or "no message"
        raise ChildProcessError(f"the new one ended with exit code {done.returncode} ({said})")
    found: dict[str, Any] = json.loads(_last_line(done.stdout))
    return found


def import_path() -> str:
    """Where this process finds modules, in the same order, and where it found this package."""
    path = [os.path.abspath(entry) for entry in sys.path]
    root = str(
        Path(__file__).parents[2]
    )  # not in the path if the path names it as the working directory, and that has changed
    return os.pathsep.join(path if root in path else [root, *path])


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def measure(before: str, after: str, images: str, threads: str, known: str) -> dict[str, Any]:
    """The latency of the networks in two files on the images in a third."""
    if int(threads) != torch.get_num_threads():  # setting the number has side effects even if it is the same
        torch.set_num_threads(int(threads))
    batch = torch.load(images, weights_only=True)
    first, second = (checkpoint.load(path).to(batch) for path in (before, after))
    return at_speed(first, second, batch, float(known))


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
