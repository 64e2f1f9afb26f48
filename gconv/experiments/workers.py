"""Runs of experiments in processes of their own, several at once."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gconv.system.errors import InputError
from gconv.system.signals import interrupt, sigint_blocked, sigterm_interrupts

from .runs import Run, perform, record_path

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


def execute(runs: Iterable[Run], *, records: Path, work: Path, device: str = "auto", jobs: int | None = None) -> None:
    """Do every run that has no record yet, ``jobs`` at a time, each in a process of its own with one thread.

    Args:
        runs: in this order, as far as there are free processes.
        records: folder of the records, by data set.
        work: folder of the networks; the unfinished ones continue.
        device: ``auto``, ``cpu`` or ``cuda``.
        jobs: by default as many as there are cores, or 1 on a GPU.

    Raises:
        InputError: a data set or a device that does not exist; or a run that cannot be done. The others under way are
            saved and stopped then, as when SIGINT or SIGTERM comes, which raise KeyboardInterrupt.
    """
    from multiprocessing import get_context, resource_tracker
    from multiprocessing.connection import wait

    from tqdm import tqdm

    from gconv.training.datasets import load_dataset
    from gconv.training.loop import pick_device

    on = pick_device(device)
    todo = deque(run for run in dict.fromkeys(runs) if not record_path(run, records).exists())
    for data in {run.data for run in todo}:
        load_dataset(data)  # once, so that it is downloaded and checked before several processes want it
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    jobs = jobs or (1 if on.type == "cuda" else cores)
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # or it would be started later, and let SIGINT in
    context = get_context("spawn")  # as forked processes share locks with the threads of PyTorch
    active: dict[Any, tuple[Run, Any]] = {}
    with tqdm(total=len(todo), desc="runs", unit="run", disable=None) as bar, sigterm_interrupts():
        try:
            while todo or active:
                while todo and len(active) < jobs:
                    ours, theirs = context.Pipe(duplex=False)
                    run = todo.popleft()
                    arguments = theirs, run, records, work, on.type, jobs
                    process = context.Process(target=_in_process, args=arguments, daemon=True)
                    with sigint_blocked():  # a terminal sends Ctrl-C to all; they are stopped by SIGTERM, and once
                        process.start()
                    theirs.close()  # so that there is an end of file when the process is gone
                    active[ours] = run, process
                for ready in wait(list(active)):
                    run, process = active[ready]
                    result = _result(ready, run, process)
                    del active[ready]
                    bar.update()
                    bar.write(f"{run.name}: {result}", file=sys.stderr)
        finally:
            for _, process in active.values():
                process.terminate()
            for _, process in active.values():
                process.join()


def _result(connection: Any, run: Run, process: Any) -> str:
    """What a process says of its run, which is over or failed."""
    try:
        good, said = connection.recv()
    except EOFError:
        process.join()
        if process.exitcode == 1:  # our own failure, with its traceback on stderr
            raise RuntimeError(f"{run.name} failed") from None
        raise InputError(f"{run.name}: its process was stopped ({process.exitcode}); it continues next time") from None
    process.join()
    if not good:
        raise InputError(f"{run.name}: {said}")
    return str(said)


def _in_process(connection: Connection, run: Run, records: Path, work: Path, device: str, jobs: int) -> None:
    signal.signal(signal.SIGTERM, interrupt)
    if hasattr(signal, "pthread_sigmask"):  # training listens to it otherwise
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        _begin(device, jobs)
        connection.send((True, perform(run, records, work, device)))
    except InputError as error:
        connection.send((False, str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _begin(device: str, jobs: int) -> None:
    import torch

    from gconv.system.memory import reuse_freed_memory

    if device == "cpu" and jobs > 1:
        torch.set_num_threads(1)
    reuse_freed_memory()
