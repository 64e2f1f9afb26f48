"""Latency as a process has it that only loads two saved networks and runs them in turn, as their users will.

A process that has just converted one has memory and caches with a history. So where a budget of time is to be kept,
``python -m analysis.latency.isolated`` measures, on the same device with the same threads and the same environment.

A machine may run at several speeds, each for many seconds: because of its clock, or of what its other tenants do. So
what is reported can be measured at a speed that was seen before, see :func:`at_speed`.
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

_NEAR = 1.03  # more than this and it is another speed; medians of one speed differ by less
_PATIENCE = 30.0
_PAUSE = 1.0


def fresh_latency(
    before: nn.Module, after: nn.Module, images: Tensor, note: Callable[[str], None], *, known: float = math.inf
) -> dict[str, Any]:
    """Latency of two networks in eval mode, many rounds of it, measured :func:`at_speed` in a new process.

    Where that cannot be it is measured in this one: a network has no checkpoint, or the process fails.

    Args:
        before: a network.
        after: another one.
        images: a batch ``[N, C, H, W]``; the networks are run on its device and with its type.
        note: is told in one line if it was this process, and why.
        known: milliseconds of the first network, as measured before; infinite if they were not.

    Returns:
        The latency, and as ``process`` which one measured it: ``new`` or ``converting``.
    """
    try:
        return {**_in_new_process(before, after, images, known), "process": "new"}
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())
        note(f"latency was measured in the converting process, which may take longer than a new one: {why}")
        return {**at_speed(before, after, images, known), "process": "converting"}


def at_speed(before: nn.Module, after: nn.Module, images: Tensor, known: float) -> dict[str, Any]:
    """:func:`analysis.latency.timing.latency` when the first network takes no longer than known.

    For that it is measured again each second; after half a minute the time in which both together took least is it.
    """
    began = time.perf_counter()
    best = latency(before, after, images, rounds=BUDGET_ROUNDS)
    while best["milliseconds"][0] > _NEAR * known and time.perf_counter() - began < _PATIENCE:
        time.sleep(_PAUSE)
        again = latency(before, after, images, rounds=BUDGET_ROUNDS)
        best = min(best, again, key=lambda found: sum(found["milliseconds"]))
    return best


def _in_new_process(before: nn.Module, after: nn.Module, images: Tensor, known: float) -> dict[str, Any]:
    """The latency that this module prints when it is run.

    Raises:
        ValueError: a network has no checkpoint, or what was printed is no latency.
        OSError: no files can be written, or the process does not start or fails.
    """
    with tempfile.TemporaryDirectory(prefix="gconv-") as folder:
        for name, network in (("before.pt", before), ("after.pt", after)):
            checkpoint.save(cast(Model, network), Path(folder, name))  # which refuses what is none
        batch = io.BytesIO()
        torch.save(images, batch)
        Path(folder, "images.pt").write_bytes(batch.getbuffer())
        command = [sys.executable, "-P", "-m", "analysis.latency.isolated", "before.pt", "after.pt", "images.pt"]
        done = subprocess.run(  # which kills it on Ctrl-C
            [*command, str(torch.get_num_threads()), str(known)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": _import_path()},
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


def _import_path() -> str:
    """Where this process finds its modules, in the same order, and this package wherever it was found."""
    path = [os.path.abspath(entry) for entry in sys.path]
    root = str(Path(__file__).parents[2])  # no longer there if the path has it as the working directory at that time
    return os.pathsep.join(path if root in path else [root, *path])


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _measure(before: str, after: str, images: str, threads: str, known: str) -> dict[str, Any]:
    """The latency of the networks in two files on the images in a third."""
    if int(threads) != torch.get_num_threads():  # as setting a number changes more than the number
        torch.set_num_threads(int(threads))
    batch = torch.load(images, weights_only=True)
    first, second = (checkpoint.load(path).to(batch) for path in (before, after))
    return at_speed(first, second, batch, float(known))


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
