"""``python -m gconv.experiments``: whole experiments, one training run and one record at a time, and their tables.

A run is a model, a recipe, a number of training images and a seed. Its record is one JSON file; experiments that need
the same run share it, and what has a record is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import cli
from .cli import Parser, main_args, number
from .errors import InputError, one_of

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from .recipe import Recipe

PROG = "python -m gconv.experiments"
FOLDER = Path("checkpoints") / "records"
WORK = Path("out") / "experiments"


@dataclass(frozen=True)
class Run:
    """One training run on the train and validation images, as published, and its test error after the last epoch.

    Attributes:
        model: one of ``gconv.MODELS``, at its published width.
        seed: of initialisation and data order.
        data: name of the data set.
        recipe: one of ``gconv.RECIPES``.
        images: how many of the training images, the first ones; None for all.
        epochs: another number than the recipe's.
        held_out: whether the validation part is held out and scored, for choosing between recipes; the test set is
            then not read.
    """

    model: str
    seed: int
    data: str = "rotmnist-regen"
    recipe: str = "published"
    images: int | None = None
    epochs: int | None = None
    held_out: bool = False

    @property
    def name(self) -> str:
        """Its file name without suffix."""
        parts = [self.model, self.recipe]
        parts += [f"first{self.images}"] if self.images is not None else []
        parts += [f"{self.epochs}epochs"] if self.epochs is not None else []
        parts += ["heldout"] if self.held_out else []
        return "_".join([*parts, f"seed{self.seed}"])


TABLE = ("z2cnn", "c-z2cnn", "p4cnn", "g-p4cnn-small", "g-p4cnn", "gc-p4cnn-small", "gc-p4cnn")
INGREDIENTS = ("published", "cosine", "small-batch", "rotation", "affine", "averaged", "smoothed")  # gconv.INGREDIENTS
IMAGES = (120, 300, 600, 1200, 3000, 6000)
EXPERIMENTS: dict[str, Callable[[str, int], list[Run]]] = {
    "rotmnist": lambda data, seeds: [Run(model, seed, data) for seed in range(seeds) for model in TABLE],
    "data-efficiency": lambda data, seeds: [
        Run(model, seed, data, images=images)
        for seed in range(seeds)
        for images in (*IMAGES, None)
        for model in ("z2cnn", "p4cnn", "gc-p4cnn")
    ],
    "recipes": lambda data, seeds: [
        Run("p4cnn", seed, data, recipe=recipe, epochs=30, held_out=True)
        for seed in range(seeds)
        for recipe in INGREDIENTS
    ],
    "modern": lambda data, seeds: [
        Run(model, seed, data, recipe="modern") for seed in range(seeds) for model in ("p4cnn", "gc-p4cnn")
    ],
}
"""The experiments by name: what they run on a data set, with that many seeds; the first seeds come first."""


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        f"Run an experiment ({', '.join(EXPERIMENTS)}), or print its table.\n\n"
        "Every run is a training from its recipe on the train and validation images, and leaves one JSON record. What\n"
        "is recorded already is not run again, and a run that was stopped continues, so the command can be stopped\n"
        "with Ctrl-C at any time and given again. On a CPU there are as many runs at once as cores, one thread each.",
        "  python -m gconv.experiments rotmnist --data rotmnist-regen --seeds 5\n"
        "  python -m gconv.experiments rotmnist --models p4cnn,gc-p4cnn --seeds 3 --jobs 1\n"
        "  python -m gconv.experiments rotmnist table > table.md\n"
        "  python -m gconv.experiments data-efficiency table --csv",
    )
    p.add_argument("experiment", metavar="EXPERIMENT", help="one of " + ", ".join(EXPERIMENTS))
    p.add_argument("action", nargs="?", default="run", metavar="run | table", help="default run")
    p.add_argument("--data", default="rotmnist-regen", help="name of the data set, default rotmnist-regen")
    p.add_argument("--seeds", type=number(int, 1, 10**6), default=3, help="seeds 0, 1, … of every run, default 3")
    p.add_argument("--models", metavar="A,B,…", help="only these of its models")
    p.add_argument("--jobs", type=number(int, 1, 10**4), help="runs at once, default the cores (a GPU: 1)")
    p.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    p.add_argument("--records", metavar="DIR", default=str(FOLDER), help=f"where records are, default {FOLDER}")
    p.add_argument("--work", metavar="DIR", default=str(WORK), help=f"where the networks are kept, default {WORK}")
    p.add_argument("--csv", action="store_true", help="the table as CSV, not as Markdown")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return cli.run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    if args.experiment not in EXPERIMENTS:
        raise one_of("experiment", args.experiment, EXPERIMENTS)
    if args.action not in ("run", "table"):
        raise one_of("action", args.action, ("run", "table"))
    if args.action == "table":
        from .tables import as_csv, as_markdown, table

        rows = table(args.experiment, load_records(Path(args.records), args.data))
        print(as_csv(rows) if args.csv else as_markdown(rows))
        return
    runs = EXPERIMENTS[args.experiment](args.data, args.seeds)
    if args.models is not None:
        wanted, known = args.models.lower().split(","), {run.model for run in runs}
        for model in set(wanted) - known:
            raise one_of(f"model of {args.experiment}", model, sorted(known))
        runs = [run for run in runs if run.model in wanted]
    execute(runs, records=Path(args.records), work=Path(args.work), device=args.device, jobs=args.jobs)


def record_path(run: Run, records: Path) -> Path:
    """Where the record of a run is."""
    return records / run.data / f"{run.name}.json"


def load_records(folder: Path, data: str) -> list[dict[str, Any]]:
    """All records on a data set.

    Raises:
        InputError: there are none, or a file is not a record.
    """
    found = []
    for path in sorted((folder / data).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found.append({**record, "run": Run(**record["run"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} is not a record of {PROG}: {error}") from error
    if not found:
        raise InputError(f"there are no records in {folder / data}; {PROG} makes them")
    return found


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
    from multiprocessing import get_context
    from multiprocessing.connection import wait

    from tqdm import tqdm

    from .data import load_dataset
    from .training import pick_device

    on = pick_device(device)
    todo = deque(run for run in dict.fromkeys(runs) if not record_path(run, records).exists())
    for data in {run.data for run in todo}:
        load_dataset(data)  # once, so that it is downloaded and checked before several processes want it
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    jobs = jobs or (1 if on.type == "cuda" else cores)
    context = get_context("spawn")  # as forked processes share locks with the threads of PyTorch
    active: dict[Any, tuple[Run, Any]] = {}
    with tqdm(total=len(todo), desc="runs", unit="run", disable=None) as bar, _terminable():
        try:
            while todo or active:
                while todo and len(active) < jobs:
                    ours, theirs = context.Pipe(duplex=False)
                    run = todo.popleft()
                    arguments = theirs, run, records, work, on.type, jobs
                    process = context.Process(target=_in_process, args=arguments, daemon=True)
                    _start_deaf(process)
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


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start_deaf(process: Any) -> None:
    """Start a process that does not hear Ctrl-C, which a terminal sends to all: it is stopped by SIGTERM, and once."""
    if threading.current_thread() is not threading.main_thread():
        process.start()
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)


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
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(signal, "pthread_sigmask"):  # training listens to it otherwise
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        _begin(device, jobs)
        connection.send((True, _perform(run, records, work, device)))
    except InputError as error:
        connection.send((False, str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _begin(device: str, jobs: int) -> None:
    import torch

    from .memory import reuse_freed_memory

    if device == "cpu" and jobs > 1:
        torch.set_num_threads(1)
    reuse_freed_memory()


def _perform(run: Run, records: Path, work: Path, device: str) -> str:
    """Train (or continue to), score, and write the record. In one line, what came out."""
    import time

    import torch

    from . import checkpoint
    from .cost import cost
    from .data import Split, load_dataset
    from .files import atomic_path
    from .memory import training_memory
    from .models import create_model
    from .training import environment, evaluate, fit, steps_of_epoch

    data = load_dataset(run.data, progress=False)
    split = data.train if run.held_out else data.train_and_validation
    if run.images is not None:
        split = Split(*(part[: run.images] for part in split))
    recipe = recipe_of(run, len(split.labels))
    path = work / run.data / f"{run.name}.pt"
    history: list[dict[str, Any]] = []
    resume = None
    if path.exists():
        kept = checkpoint.read(path)
        if kept.record.get("dataset_sha256") != data.sha256 or kept.record.get("recipe") != recipe.to_dict():
            raise InputError(f"{path} is of other data or of another recipe; remove it, or take another --work")
        model, history, resume = kept.model, kept.record["history"], kept.resume
    else:
        torch.manual_seed(run.seed)
        model = create_model(run.model)
    model.to(device)
    facts: dict[str, Any] = {
        "dataset": data.name,
        "dataset_description": data.description,
        "dataset_sha256": data.sha256,
        "trained_on": "train" if run.held_out else "train and validation",
        "train_images": len(split.labels),
        "seed": run.seed,
        "recipe": recipe.to_dict(),
        "environment": environment(torch.device(device)),
    }

    def keep(state: dict[str, Any]) -> None:
        checkpoint.save(model, path, record={**facts, "history": history}, resume=state)

    def after_epoch(row: dict[str, Any], state: dict[str, Any]) -> None:
        history.append(row)
        keep(state)

    if len(history) < recipe.epochs:
        validation = data.validation if run.held_out else None
        fit(
            model, split, recipe, seed=run.seed, validation=validation, resume=resume,
            after_epoch=after_epoch, on_stop=keep, label=None,
        )  # fmt: skip
    began = time.perf_counter()
    if run.held_out:
        facts["validation_error"] = evaluate(model, data.validation).error
    else:
        score = evaluate(model, data.test)
        facts |= {"test_error": score.error, "test_loss": score.loss, "test_images": score.images}
    testing = time.perf_counter() - began
    checkpoint.save(model, path, record={**facts, "snapshots": [], "history": history})
    counted = cost(model, model.input_shape)
    facts |= {
        "run": run.__dict__,
        "steps": recipe.epochs * steps_of_epoch(len(split.labels), recipe.batch_size),
        "parameters": counted.parameters,
        "macs_published": counted.macs_published,
        "macs_executed": counted.macs_executed,
        "training_memory_batch_2": training_memory(model, data.train.images[:2].to(device)),
        "seconds": {"training": round(sum(row["seconds"] for row in history), 1), "testing": round(testing, 1)},
        "history": history,
    }
    target = record_path(run, records)
    with atomic_path(target) as temporary:
        temporary.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    what = "validation" if run.held_out else "test"
    return f"{what} error {facts[f'{what}_error']:.2f} % after {recipe.epochs} epochs"


def recipe_of(run: Run, images: int) -> Recipe:
    """The recipe of a run on that many images: a batch is never larger than the set."""
    from .recipe import RECIPES

    if run.recipe not in RECIPES:
        raise one_of("recipe", run.recipe, RECIPES)
    recipe = RECIPES[run.recipe]
    if run.epochs is not None:
        recipe = replace(recipe, epochs=run.epochs, decay_epoch=round(0.8 * run.epochs))
    return replace(recipe, batch_size=min(recipe.batch_size, images))


if __name__ == "__main__":
    sys.exit(main())
