"""Runs of experiments in worker processes, several at once."""

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

from .runs import Run, record_path

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnContext


def execute(runs: Iterable[Run], *, records: Path, work: Path, device: str = "auto", jobs: int | None = None) -> None:
    """Do every run that has no record yet, ``jobs`` at a time, each in its own process.

    On a CPU with several jobs, each process has one thread.

    Args:
        runs: started in this order, as soon as a process is free.
        records: the folder of the records, which has a folder for each data set.
        work: the folder of the networks. Unfinished ones are continued.
        device: ``auto``, ``cpu`` or ``cuda``.
        jobs: how many runs at once; by default one for each core, or 1 on a GPU.

    Raises:
        InputError: a data set or a device does not exist, or a run cannot be done. The other runs under way are then
            saved and stopped.
        KeyboardInterrupt: SIGINT or SIGTERM came. The runs under way are saved and stopped.
    """
    from multiprocessing import get_context, resource_tracker
    from multiprocessing.connection import wait

    from tqdm import tqdm

    from gconv.training.datasets import load_dataset
    from gconv.training.device import pick_device

    kind = pick_device(device).type
    todo = deque(run for run in dict.fromkeys(runs) if not record_path(run, records).exists())
    for data in {run.data for run in todo}:
        load_dataset(data)  # downloads and checks it before several processes need it
    jobs = jobs or (1 if kind == "cuda" else _cores())
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # otherwise a worker's start would start it, and that unblocks SIGINT
    context = get_context("spawn")  # a forked process would share locks with the threads of PyTorch
    active: dict[Any, tuple[Run, Any]] = {}
    with tqdm(total=len(todo), desc="runs", unit="run", disable=None) as bar, sigterm_interrupts():
        try:
            while todo or active:
                while todo and len(active) < jobs:
                    run = todo.popleft()
                    connection, process = _start(context, run, records, work, kind, jobs)
                    active[connection] = run, process
                for ready in wait(list(active)):
                    result = _result(ready, *active[ready])
                    run, _ = active.pop(ready)
                    bar.update()
                    bar.write(f"{run.name}: {result}", file=sys.stderr)
        finally:
            for _, process in active.values():
                process.terminate()
            for _, process in active.values():
                process.join()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _start(context: SpawnContext, run: Run, records: Path, work: Path, device: str, jobs: int) -> tuple[Any, Any]:
    """Start a worker; the connection on which it tells its result, and the process."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(theirs, run, records, work, device, jobs), daemon=True)
    with sigint_blocked():  # a terminal sends Ctrl-C to all processes; workers are stopped by SIGTERM, and only once
        process.start()
    theirs.close()  # so that reading ends when the worker ends
    return ours, process


def _result(connection: Any, run: Run, process: Any) -> str:
    """What a worker says when it ends."""
    try:
        good, said = connection.recv()
    except EOFError:
        process.join()
        if process.exitcode == 1:  # a fault of this project, whose traceback is on stderr
            raise RuntimeError(f"{run.name} failed") from None
        stopped = f"its process was stopped (exit code {process.exitcode})"
        raise InputError(f"{run.name}: {stopped}; give the command again to continue") from None
    process.join()
    if not good:
        raise InputError(f"{run.name}: {said}")
    return str(said)


def _worker(connection: Connection, run: Run, records: Path, work: Path, device: str, jobs: int) -> None:
    signal.signal(signal.SIGTERM, interrupt)
    if hasattr(signal, "pthread_sigmask"):  # training would otherwise receive SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        import torch

        from gconv.system.memory import reuse_freed_memory

        from .perform import perform

        if device == "cpu" and jobs > 1:
            torch.set_num_threads(1)
        reuse_freed_memory()
        connection.send((True, perform(run, records, work, device)))
    except InputError as error:
        connection.send((False, str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
