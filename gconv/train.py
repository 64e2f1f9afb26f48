"""``python -m gconv.train``: train a network from the command line. The work is in :mod:`gconv.training.loop`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gconv.system.cli import Parser, loading, main_args, number, run
from gconv.system.errors import InputError

if TYPE_CHECKING:
    from gconv.models.checkpoint import Checkpoint
    from gconv.models.networks import Model
    from gconv.training.datasets import Dataset
    from gconv.training.recipe import Recipe

PROG = "python -m gconv.train"
# As in gconv.MODELS, which would import torch (a test compares them).
_MODEL_NAMES = (
    "z2cnn, c-z2cnn, p4cnn, g-p4cnn-small, g-p4cnn, gc-p4cnn-small, gc-p4cnn, "
    "resnet44, p4m-resnet44, g-p4m-resnet44, gc-p4m-resnet44"
)
_NEW_RUN_OPTIONS = ("model", "group", "separable", "width")
_RECIPE_OPTIONS = ("recipe", "epochs", "seed", "batch_size", "lr", "weight_decay", "all_data", "snapshots", "precision")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Train a network on DATASET (rotdigits, rotmnist-regen, rotmnist) and save it with its record.\n\n"
        "The defaults are the published rotated-MNIST recipe: Adam, learning rate 1e-2, divided by ten after 4/5 of\n"
        "the epochs, weight decay 1e-5, batch 256, 50 epochs, no augmentation. The validation part of the training\n"
        "set is held out and scored after every epoch, unless --all-data is given; the test set is read once, at the\n"
        "end. The checkpoint is written after every epoch and when Ctrl-C or SIGTERM ends the run, which continues\n"
        "with --resume and ends with the same bits. Started by torchrun, its processes share every batch.",
        "  python -m gconv.train rotdigits --model p4cnn --epochs 10\n"
        "  python -m gconv.train rotmnist-regen --model p4cnn --all-data --out p4cnn.pt\n"
        "  python -m gconv.train rotmnist-regen --model p4cnn --recipe modern --seed 1\n"
        "  python -m gconv.train rotdigits --model p4cnn --group p4m --separable gc_in --width 8\n"
        "  torchrun --nproc-per-node 2 -m gconv.train rotmnist-regen --model gc-p4cnn\n"
        "  python -m gconv.train rotmnist-regen --resume p4cnn.pt              (continue a run that was stopped)\n"
        "  python -m gconv.train rotdigits --resume converted.pt --epochs 20   (retrain a converted network)",
    )
    p.add_argument("dataset", metavar="DATASET", help="name of the data set; GCONV_DATA=DIR is looked in first")
    p.add_argument("--model", metavar="NAME", help=f"one of {_MODEL_NAMES}")
    p.add_argument("--group", help="another group than the model's own: z2, p2, p4, pm, pmm, p4m")
    p.add_argument("--separable", metavar="FORM", help="separable layers: g, gc, gc_in, g_turned or gc_turned")
    p.add_argument("--width", type=number(int, 1), help="channels (of a ResNet's first stage), default as published")
    p.add_argument("--recipe", metavar="NAME", help="published (default) or modern; the options below change it")
    p.add_argument("--epochs", type=number(int, 0), help="default 50")
    p.add_argument("--seed", type=number(int, 0), help="of initialisation and data order, default 0")
    p.add_argument("--batch-size", type=number(int, 2), help="default 256, or all images if they are fewer")
    p.add_argument("--lr", type=number(float, 0, 1e3), help="learning rate, default 0.01")
    p.add_argument("--weight-decay", type=number(float, 0, 1e3), help="default 1e-5")
    p.add_argument("--all-data", action="store_true", default=None, help="train on the validation part too")
    p.add_argument("--snapshots", metavar="E,E,…", help="also keep the network after these epochs, in half precision")
    p.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    p.add_argument("--precision", help="of the passes: float32 (default) or bfloat16 (autocast)")
    p.add_argument("--compile", action="store_true", help="run the passes through torch.compile")
    p.add_argument("--history", metavar="FILE", help="also write the history there, one JSON object an epoch and line")
    p.add_argument("--tensorboard", metavar="DIR", help="also log there for TensorBoard (needs the package)")
    p.add_argument("--resume", metavar="CKPT", help="start from this checkpoint")
    p.add_argument("--out", metavar="FILE", help="default: MODEL-DATASET-seedS.pt (MODEL: or CKPT-retrained)")
    p.add_argument("--force", action="store_true", help="replace --out if it exists")
    p.add_argument("--json", action="store_true", help="print the record as JSON on stdout")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _command(args))


@dataclass
class _Run:
    """A training run, about to begin or to continue (``resume``): what is trained, how, and where it is written."""

    model: Model
    recipe: Recipe
    record: dict[str, Any]
    out: Path
    resume: dict[str, Any] | None = None
    logs: tuple[Callable[[list[dict[str, Any]]], None], ...] = ()

    def save(self, resume: dict[str, Any] | None = None) -> None:
        """Write the checkpoint; the weights are those of now."""
        from gconv.models.checkpoint import save
        from gconv.system.distributed import rank

        if rank() == 0:
            save(self.model, self.out, record=self.record, resume=resume)

    def snapshot(self, epoch: int) -> None:
        """Keep the network as it is now, if it was asked for after this epoch."""
        from gconv.models.checkpoint import save
        from gconv.system.distributed import rank

        if epoch in self.record["snapshots"] and rank() == 0:
            path = self.out.with_suffix("") / f"epoch-{epoch:03d}.pt"
            save(self.model, path, record={**self.record, "epoch": epoch}, half=True)

    def after_epoch(self, row: dict[str, Any], resume: dict[str, Any]) -> None:
        """Keep everything that a continuation needs."""
        self.record["history"].append(row)
        self.snapshot(row["epoch"])
        self.save(resume)
        for log in self.logs:
            log(self.record["history"])


def _command(args: argparse.Namespace) -> None:
    with loading():
        from gconv.system.distributed import joined

    with joined(args.device) as device:
        _train(args, device)


def _train(args: argparse.Namespace, device_name: str) -> None:
    from gconv.models.checkpoint import read
    from gconv.system.distributed import processes, rank
    from gconv.system.memory import reuse_freed_memory
    from gconv.training.datasets import load_dataset
    from gconv.training.evaluation import evaluate
    from gconv.training.loop import environment, fit, pick_device

    device = pick_device(device_name)
    if args.tensorboard is not None:
        _summary_writer()  # what is not installed is said before anything is read
    reuse_freed_memory()
    start = None if args.resume is None else read(args.resume)
    if start is not None and start.resume is not None:
        job = _continued(args, start, start.resume)
        data = load_dataset(args.dataset)
        if data.sha256 != job.record["dataset_sha256"]:
            raise InputError(f"{data.name} is not the data of the run in {args.resume}: its sha256 differs")
    else:
        out = _check_new(args)
        data = load_dataset(args.dataset)
        job = _begun(args, start, data, out)

    everything = job.record["trained_on"] != "train"
    split = data.train_and_validation if everything else data.train
    job.record |= {"train_images": len(split.labels), "environment": environment(device) | {"processes": processes()}}
    job.logs = _logs(args, job.record["history"]) if rank() == 0 else ()
    job.model.to(device)
    if job.resume is None:
        job.snapshot(0)
    name = job.model.spec.name
    try:
        fit(
            job.model,
            split,
            job.recipe,
            seed=job.record["seed"],
            validation=None if everything else data.validation,
            resume=job.resume,
            after_epoch=job.after_epoch,
            on_stop=job.save,
            label=f"{name} on {data.name}",
            precision=job.record.get("precision", "float32"),
            compiled=args.compile,
        )
        if rank() > 0:
            return
        test = evaluate(job.model, data.test, label="testing")
    except KeyboardInterrupt:
        if job.out.exists():
            print(f"\nto continue: {PROG} {data.name} --resume {job.out}", file=sys.stderr)
        raise
    job.record |= {"test_error": test.error, "test_loss": test.loss, "test_images": test.images}
    job.save()
    if args.json:
        json.dump({"file": str(job.out), **job.record}, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        result = f"test error {test.error:.2f} % on {test.images:,} images of {data.name}"
        print(f"{name}: {result}; saved to {job.out}")


def _continued(args: argparse.Namespace, start: Checkpoint, resume: dict[str, Any]) -> _Run:
    """The unfinished run in a checkpoint, which goes on as it began."""
    from gconv.system.files import check_output
    from gconv.training.recipe import Recipe

    given = [name for name in (*_NEW_RUN_OPTIONS, *_RECIPE_OPTIONS) if getattr(args, name) is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{args.resume} is an unfinished run and continues as it began; leave out {flags}")
    record = start.record
    missing = {"dataset", "dataset_sha256", "recipe", "seed", "history", "snapshots", "trained_on"} - record.keys()
    if missing:
        raise InputError(f"{args.resume} is inconsistent: its record has no {', '.join(sorted(missing))}")
    if args.dataset.lower() != record["dataset"]:
        raise InputError(f"{args.resume} was being trained on {record['dataset']!r}, not {args.dataset!r}")
    out = Path(args.resume) if args.out is None else check_output(args.out, force=args.force)
    if args.history is not None:
        check_output(args.history, force=True)  # of the part that is done, as a rule
    try:
        recipe = Recipe.from_dict(record["recipe"])
        steady = isinstance(resume["epochs_done"], int) and isinstance(resume["optimizer"], dict)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{args.resume} is inconsistent: its recipe or its state cannot be continued") from error
    if not steady:
        raise InputError(f"{args.resume} is inconsistent: its state cannot be continued")
    return _Run(start.model, recipe, record, out, resume)


def _check_new(args: argparse.Namespace) -> Path:
    """Where a new run is written. What is wrong with its options is said before its data is read."""
    from gconv.system.errors import one_of
    from gconv.system.files import check_output
    from gconv.training.loop import PRECISIONS

    if args.resume is not None:
        given = [f"--{name}" for name in _NEW_RUN_OPTIONS if getattr(args, name) is not None]
        if given:
            raise InputError(f"the network comes from {args.resume}; leave out {', '.join(given)}")
        default = Path(args.resume).stem + "-retrained"
    elif args.model is None:
        raise InputError(f"--model is missing; accepted: {_MODEL_NAMES} (or --resume CKPT)")
    else:
        default = _new_model(args).spec.name
    name = f"{default}-{args.dataset.lower()}-seed{args.seed or 0}.pt" if args.out is None else args.out
    out = check_output(name, force=args.force)
    if out.is_dir():
        raise InputError(f"cannot write {out}: it is a directory")
    if args.history is not None:
        check_output(args.history, force=args.force)
    if args.precision not in (None, *PRECISIONS):
        raise one_of("precision", args.precision, PRECISIONS)
    if _snapshot_epochs(args):
        if not out.suffix:
            raise InputError(f"--snapshots go to the folder named as --out without suffix; {out} has none to lose")
        check_output(out.with_suffix(""), force=args.force)
    return out


def _new_model(args: argparse.Namespace, **data: Any) -> Model:
    from gconv.models.zoo import create_model

    try:
        return create_model(args.model, group=args.group, width=args.width, separable=args.separable, **data)
    except RuntimeError as error:  # the allocator's
        raise InputError(f"there is no memory for {args.model} with --width {args.width}") from error


def _begun(args: argparse.Namespace, start: Checkpoint | None, data: Dataset, out: Path) -> _Run:
    """A new run: of a new network, or of the one in a finished or converted checkpoint."""
    import torch

    images = len(data.train.labels) + (len(data.validation.labels) if args.all_data else 0)
    named = _recipe(args)
    epochs = named.epochs if args.epochs is None else args.epochs
    recipe = replace(
        named,
        epochs=epochs,
        batch_size=args.batch_size or min(named.batch_size, images),
        learning_rate=named.learning_rate if args.lr is None else args.lr,
        weight_decay=named.weight_decay if args.weight_decay is None else args.weight_decay,
        decay_epoch=round(0.8 * epochs),
    )
    seed, channels = args.seed or 0, data.train.images.shape[1]
    torch.manual_seed(seed)
    model = _new_model(args, in_channels=channels, classes=data.classes) if start is None else start.model
    if (model.spec.in_channels, model.spec.classes) != (channels, data.classes):
        raise InputError(
            f"{model.spec.name} takes {model.spec.in_channels} channels and {model.spec.classes} classes; "
            f"{data.name} has {channels} and {data.classes}"
        )
    record: dict[str, Any] = {
        "dataset": data.name,
        "dataset_description": data.description,
        "dataset_sha256": data.sha256,
        "trained_on": "train and validation" if args.all_data else "train",
        "seed": seed,
        "recipe": recipe.to_dict(),
        "snapshots": _snapshot_epochs(args),
        "history": [],
    }
    if args.precision is not None:
        record["precision"] = args.precision
    if start is not None:
        record["started_from"] = start.record
    return _Run(model, recipe, record, out)


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that the options start from."""
    from gconv.system.errors import one_of
    from gconv.training.recipe import RECIPES

    if args.recipe is not None and args.recipe.lower() not in RECIPES:
        raise one_of("recipe", args.recipe, RECIPES)
    return RECIPES[(args.recipe or "published").lower()]


def _summary_writer() -> Callable[..., Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs a package: pip install tensorboard") from error
    return SummaryWriter


def _logs(args: argparse.Namespace, done: list[dict[str, Any]]) -> tuple[Callable[[list[dict[str, Any]]], None], ...]:
    """What writes the history where it was asked for, whole, after every epoch; the file also when a run goes on."""
    logs: list[Callable[[list[dict[str, Any]]], None]] = []
    if args.history is not None:

        def write_lines(history: list[dict[str, Any]]) -> None:
            from gconv.system.files import atomic_path

            with atomic_path(args.history) as path:
                path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in history), encoding="utf-8")

        logs.append(write_lines)
        if done:
            write_lines(done)
    if args.tensorboard is not None:
        writer = _summary_writer()
        writers: list[Any] = []

        def write_events(history: list[dict[str, Any]]) -> None:
            row = history[-1]
            if not writers:  # what a killed run logged after its last checkpoint is discarded
                writers.append(writer(args.tensorboard, purge_step=row["epoch"]))
            for key, value in row.items():
                if key != "epoch":
                    writers[0].add_scalar(key, value, row["epoch"])
            writers[0].flush()

        logs.append(write_events)
    return tuple(logs)


def _snapshot_epochs(args: argparse.Namespace) -> list[int]:
    text, epochs = args.snapshots, _recipe(args).epochs if args.epochs is None else args.epochs
    try:
        wanted = sorted({int(item) for item in text.split(",")}) if text else []
    except ValueError:
        wanted = [-1]
    if wanted and not (wanted[0] >= 0 and wanted[-1] <= epochs):
        raise InputError(f"--snapshots is {text!r}; accepted: epochs from 0 to {epochs} separated by commas")
    return wanted


if __name__ == "__main__":
    sys.exit(main())
