"""A disk that is full, or a file that may not grow: one line, and what was there stays.

The runs are done by this file as a program, as a process cannot take back some of what is done to it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

RUN = "rotdigits --model p4cnn --width 2 --epochs 2 --batch-size 10 --snapshots 1 --out net.pt"
LIMITS = (100, 5_000, 50_000)


def program(folder: Path, kind: str) -> None:
    """A run that is stopped, finds no room, and then finds room; what was found goes to stdout as JSON."""
    import torch

    from gconv import train
    from gconv.models import checkpoint
    from gconv.training import run as training
    from gconv.training.datasets import Split, load_dataset

    os.chdir(folder)
    digits = load_dataset("rotdigits")
    few = {name: Split(*(part[:20] for part in getattr(digits, name))) for name in ("train", "validation", "test")}
    training.load_dataset = lambda name: replace(digits, **few)
    print(tuple(torch.ones(1)), file=sys.stderr)  # all is imported before there is no room
    step = torch.optim.Adam.step

    def stopping(self: Any, *args: Any) -> None:
        step(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    torch.optim.Adam.step = stopping
    assert train.main(RUN.split()) == 130
    torch.optim.Adam.step = step
    before, found = Path("net.pt").read_bytes(), []
    for how in full(kind):
        error = io.StringIO()
        with how, redirect_stderr(error):
            code = train.main(["rotdigits", "--resume", "net.pt"])
        left = sorted(name for name in os.listdir() if name != "filling")
        found.append({"code": code, "error": error.getvalue(), "left": left})
        assert Path("net.pt").read_bytes() == before
        assert checkpoint.read("net.pt").resume["partial_epoch"]["step"] == 1
    shutil.rmtree("net", ignore_errors=True)
    again = train.main(["rotdigits", "--resume", "net.pt"])
    with limited(1_000), redirect_stderr(error := io.StringIO()):
        assert train.main(["rotdigits", "--resume", "net.pt", "--out", "new.pt", "--epochs", "1"]) == 2
    print(json.dumps({"tries": found, "again": again, "new": error.getvalue(), "left": sorted(os.listdir())}))


def full(kind: str) -> Iterator[Any]:
    if kind == "limit":
        yield from map(limited, LIMITS)
    else:
        yield filled(0)
        yield filled(10_000)


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file can become larger."""
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@contextmanager
def filled(free: int) -> Iterator[None]:
    """A file takes all of the disk but this."""
    disk = os.statvfs(".")
    Path("filling").write_bytes(bytes(max(disk.f_bavail * disk.f_bsize - free, 0)))
    try:
        yield
    finally:
        Path("filling").unlink()


def run(folder: Path, kind: str, *before: str) -> dict[str, Any]:
    paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    argv = [*before, sys.executable, __file__, str(folder), kind]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def holds(found: dict[str, Any], reason: str) -> None:
    for attempt in found["tries"]:
        lines = [line for line in attempt["error"].splitlines() if not line.startswith("p4cnn on rotdigits: epoch ")]
        assert attempt["code"] == 2
        (line,) = lines
        assert line.startswith("python -m gconv.train: error: cannot write net")
        assert line.endswith(reason)
        assert set(attempt["left"]) <= {"net", "net.pt"}  # the folder of snapshots may have been made, or filled
    assert found["again"] == 0
    assert "error: cannot write new.pt: File too large" in found["new"]
    assert found["left"] == ["net", "net.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="this system has no such limit")
def test_a_file_that_may_not_grow(tmp_path):
    found = run(tmp_path, "limit")
    assert len(found["tries"]) == len(LIMITS)
    holds(found, ": File too large")


def test_a_full_disk(tmp_path):
    mount = 'mount -t tmpfs -o size=200k tmpfs "$0"'  # in a namespace of its own, so that it goes with the process
    tried = ["unshare", "--mount", "sh", "-c", mount, str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(tried, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted")
    found = run(tmp_path, "disk", "unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', str(tmp_path))
    assert len(found["tries"]) == 2
    holds(found, ": No space left on device")
    assert os.listdir(tmp_path) == []  # it was another disk


if __name__ == "__main__":
    program(Path(sys.argv[1]), sys.argv[2])
