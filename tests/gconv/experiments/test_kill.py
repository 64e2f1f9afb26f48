"""A training run that is killed, or told to stop, at any moment continues to the bit.

The runs are of the command, in processes that are forked by one that has everything loaded: this file as a program.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

KILLS = 50
RECIPES = {
    "plain": {"epochs": 3, "batch_size": 20},
    "averaged": {"epochs": 3, "batch_size": 20, "averaging": 0.9, "augmentation": "affine", "schedule": "cosine"},
}
LINES = {"plain": 2200, "averaged": 5700}  # that a run executes of the modules that train and write, about
STEPS = 4  # of an epoch of 70 images
SIGNALS = [
    (name, number, step)
    for name in RECIPES
    for number, step in (("SIGINT", 2), ("SIGTERM", 5), ("SIGTERM", 7), ("SIGINT", 11), ("SIGTERM", 8), ("SIGINT", 12))
]


# --- the program


def program(folder: Path) -> None:
    """All runs; what was found goes to stdout as JSON."""
    import torch

    from gconv.system import memory
    from gconv.training import recipe
    from gconv.training import run as training
    from gconv.training.datasets import Split, load_dataset

    os.chdir(folder)
    digits = load_dataset("rotdigits")
    few = {name: Split(*(part[:n] for part in getattr(digits, name))) for name, n in SIZES.items()}
    training.load_dataset = lambda name: replace(digits, **few)
    memory.reuse_freed_memory = lambda: None
    recipe.RECIPES |= {name: recipe.Recipe(**options) for name, options in RECIPES.items()}
    assert torch.get_num_threads() == 1
    whole = {name: undisturbed(name) for name in RECIPES}
    result = {"kills": killed(whole), "signals": [stopped(whole, *case) for case in SIGNALS]}
    print(json.dumps(result))


SIZES = {"train": 70, "validation": 10, "test": 20}


def command(folder: str, name: str) -> list[str]:
    """What begins the run in a folder, or continues it."""
    out = f"{folder}/net.pt"
    resume = ["--resume", out] if Path(out).exists() else ["--model", "p4cnn", "--width", "2", "--recipe", name]
    return ["rotdigits", *resume, "--out", out, "--force", "--history", f"{folder}/history"]


def child(argv: list[str], before: Callable[[], None] = lambda: None) -> int:
    """Fork a process that runs the command; its id."""
    from tqdm import tqdm

    from gconv import train

    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            tqdm.set_lock(threading.RLock())  # its own is shared with other forks, of which one may be killed with it
            before()
            code = train.main(argv)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def undisturbed(name: str) -> dict[str, Any]:
    """A run from beginning to end, and what its checkpoint was after each epoch."""
    from gconv import train
    from gconv.models import checkpoint
    from gconv.training import run as training

    kept, save = {}, training.save

    def noted(model: Any, path: Any, **options: Any) -> None:
        save(model, path, **options)
        read = checkpoint.read(path)
        kept[str(read.resume and read.resume["epochs_done"])] = content(read)

    Path(name).mkdir()
    training.save = noted
    try:
        assert train.main(command(name, name)) == 0
    finally:
        training.save = save
    assert list(kept) == ["1", "2", "3", "None"]
    return kept


def content(read: Any) -> Any:
    """All that is in a checkpoint and does not depend on the clock or the process."""

    def plain(item: Any) -> Any:
        import torch

        if isinstance(item, dict):
            return {str(k): plain(v) for k, v in item.items() if k not in ("seconds", "environment")}
        if isinstance(item, (list, tuple)):
            return [plain(value) for value in item]
        return item.numpy().tobytes() if isinstance(item, torch.Tensor) else item

    return plain({"weights": read.model.state_dict(), "record": read.record, "resume": read.resume})


def lines(folder: str) -> list[Any]:
    """The history that was written, less the clock."""
    path = Path(folder, "history")
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def killed(whole: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that are killed again and again: from outside after some time, or as they reach some line of the package."""
    from gconv.models import checkpoint

    chance = random.Random(0)
    found: list[dict[str, Any]] = []
    began, runs, kills = time.perf_counter(), 0, 0
    wait_for(child(command("timed", "plain")))
    seconds = time.perf_counter() - began
    while kills < KILLS:
        name = list(RECIPES)[runs % 2]
        folder = f"killed{runs}"
        runs += 1
        while True:
            path = Path(folder, "net.pt")
            existed = path.exists()
            if kills == KILLS:
                status = wait_for(child(command(folder, name)))
            elif chance.random() < 0.5:
                pid = child(command(folder, name))
                time.sleep(chance.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)
                status = wait_for(pid)
            else:
                at = chance.randrange(1, chance.choice((600, LINES[name])))  # as many early as late
                status = wait_for(child(command(folder, name), lambda at=at: kill_at_line(at)))
            if os.WIFSIGNALED(status):
                kills += 1
                if path.exists():
                    read = checkpoint.read(path)
                    after = str(read.resume and read.resume["epochs_done"])
                    same = content(read) == whole[name][after]
                else:
                    after, same = "0", not existed
                found.append({"signal": os.WTERMSIG(status), "after": after, "same": same})
                if after == "None":  # it had ended but for its exit; to resume that would be another run
                    path.unlink()
                    Path(folder, "history").unlink()
            else:
                break
        log = Path("log").read_text()
        done = {"code": os.WEXITSTATUS(status), "log": log, "same": False, "finished": True}
        if done["code"] == 0:
            done["same"] = content(checkpoint.read(path)) == whole[name]["None"]
            done["history"] = lines(folder) == lines(name)
        found.append(done)
    return found


def wait_for(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def kill_at_line(number: int) -> None:
    """This process dies at the ``number``th line that it executes of the modules that train and write."""
    left = number
    import gconv

    package = Path(gconv.__file__).parent
    modules = {str(path) for path in (package / "training").glob("*.py")}
    modules |= {
        str(package / name) for name in ("train.py", "models/checkpoint.py", "system/files.py", "system/signals.py")
    }

    def line(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame: Any, event: str, arg: Any) -> Any:
        return line if frame.f_code.co_filename in modules else None

    sys.settrace(call)


def stopped(whole: dict[str, dict[str, Any]], name: str, number: str, step: int) -> dict[str, Any]:
    """A run that gets a signal in the middle of this step, counted from the first, and is continued."""
    from torch.optim import Adam

    from gconv.models import checkpoint

    folder = f"{name}-{number}-{step}"
    original, steps = Adam.step, 0

    def signalled(self: Any, *args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), getattr(signal, number))
        original(self, *args)

    def patch() -> None:
        Adam.step = signalled

    status = wait_for(child(command(folder, name), patch))
    found = {"code": os.waitstatus_to_exitcode(status), "log": Path("log").read_text()}
    read = checkpoint.read(f"{folder}/net.pt")
    found["done"] = read.resume["epochs_done"], read.resume.get("partial_epoch", {}).get("step", 0)
    found["left"] = sorted(os.listdir(folder))
    found["again"] = wait_for(child(command(folder, name)))
    found["same"] = content(checkpoint.read(f"{folder}/net.pt")) == whole[name]["None"]
    found["history"] = lines(folder) == lines(name)
    return found


# --- the tests


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, __file__, str(tmp_path_factory.mktemp("runs"))]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_after_every_kill_the_checkpoint_is_that_of_the_last_epoch(found):
    kills = [kill for kill in found["kills"] if "finished" not in kill]
    assert len(kills) == KILLS
    assert {kill["signal"] for kill in kills} == {signal.SIGKILL}
    assert all(kill["same"] for kill in kills)
    assert {"0", "1", "2"} <= {kill["after"] for kill in kills}


def test_every_killed_run_ends_with_the_bits_of_the_undisturbed_one(found):
    runs = [run for run in found["kills"] if "finished" in run]
    assert len(runs) >= 2
    for run in runs:
        assert run["code"] == 0, run["log"]
        assert run["same"]
        assert run["history"]


@pytest.mark.parametrize("case", range(len(SIGNALS)), ids=["-".join(map(str, case)) for case in SIGNALS])
def test_a_signal_ends_the_run_after_its_step_and_it_continues_to_the_bit(found, case):
    (_, _, step), run = SIGNALS[case], found["signals"][case]
    assert run["code"] == 130, run["log"]
    assert run["done"] == list(divmod(step, STEPS))
    assert "Traceback" not in run["log"]
    assert "to continue: python -m gconv.train rotdigits --resume" in run["log"]
    assert run["left"] == (["history", "net.pt"] if step >= STEPS else ["net.pt"])
    assert run["again"] == 0
    assert run["same"]
    assert run["history"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_the_command_is_stopped_from_outside(tmp_path, number):
    paths = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    argv = [
        "-m",
        "gconv.train",
        "rotdigits",
        "--model",
        "p4cnn",
        "--width",
        "2",
        "--batch-size",
        "8",
        "--epochs",
        "500",
        "--out",
        "net.pt",
    ]
    with subprocess.Popen(
        [sys.executable, *argv], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr.readline().startswith("p4cnn on rotdigits: epoch 1/500, ")
        time.sleep(0.3)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "python -m gconv.train: interrupted" in err
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["net.pt"]
    from gconv.models import checkpoint

    read = checkpoint.read(tmp_path / "net.pt")
    assert read.resume["epochs_done"] >= 1
    partial = read.resume.get("partial_epoch")  # there is none if the signal came while an epoch was being saved
    assert partial is None or partial["step"] >= 1


if __name__ == "__main__":
    program(Path(sys.argv[1]))
