"""``python -m gconv.train``: train a network from the command line. The work is in :mod:`gconv.training`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cli import Parser, main_args, number, run
from .errors import InputError

PROG = "python -m gconv.train"
_NEW_RUN_OPTIONS = ("model", "group", "separable", "width")
_RECIPE_OPTIONS = ("epochs", "seed", "batch_size", "lr", "weight_decay", "all_data", "snapshots")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Train a network on DATASET (rotdigits, rotmnist-regen, rotmnist) and save it with its record.\n\n"
        "The defaults are the published rotated-MNIST recipe: Adam, learning rate 1e-2, divided by ten after 4/5 of\n"
        "the epochs, weight decay 1e-5, batch 256, 50 epochs, no augmentation. The validation part of the training\n"
        "set is held out and scored after every epoch, unless --all-data is given; the test set is read once, at the\n"
        "end. The checkpoint is written after every epoch, so that a run that was stopped continues with --resume.",
        "  python -m gconv.train rotdigits --model p4cnn --epochs 10\n"
        "  python -m gconv.train rotmnist-regen --model p4cnn --all-data --out p4cnn.pt\n"
        "  python -m gconv.train rotdigits --model p4cnn --group p4m --separable gc_in --width 8\n"
        "  python -m gconv.train rotmnist-regen --resume p4cnn.pt              (continue a run that was stopped)\n"
        "  python -m gconv.train rotdigits --resume converted.pt --epochs 20   (retrain a converted network)",
    )
    p.add_argument("dataset", metavar="DATASET", help="name of the data set; GCONV_DATA=DIR is looked in first")
    p.add_argument("--model", metavar="NAME", help="p4cnn, gc-p4cnn, p4m-resnet44, …; a wrong name lists all")
    p.add_argument("--group", help="another group than the model's own: z2, p2, p4, pm, pmm, p4m")
    p.add_argument("--separable", metavar="FORM", help="separable layers of this form: g, gc, gc_in")
    p.add_argument("--width", type=number(int, 1), help="channels (of a ResNet's first stage), default as published")
    p.add_argument("--epochs", type=number(int, 0), help="default 50")
    p.add_argument("--seed", type=number(int, 0, 10**9), help="of initialisation and data order, default 0")
    p.add_argument("--batch-size", type=number(int, 1), help="default 256")
    p.add_argument("--lr", type=number(float, 0), help="learning rate, default 0.01")
    p.add_argument("--weight-decay", type=number(float, 0), help="default 1e-5")
    p.add_argument("--all-data", action="store_true", default=None, help="train on the validation part too")
    p.add_argument("--snapshots", metavar="E,E,…", help="also keep the network after these epochs, in half precision")
    p.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    p.add_argument("--resume", metavar="CKPT", help="start from this checkpoint")
    p.add_argument("--out", metavar="FILE", help="default: MODEL-DATASET-seedS.pt, or the file that continues")
    p.add_argument("--force", action="store_true", help="replace --out if it exists")
    p.add_argument("--json", action="store_true", help="print the record as JSON on stdout")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    import torch

    from . import checkpoint
    from .data import load_dataset
    from .files import check_output
    from .training import Recipe, environment, evaluate, fit, pick_device

    device = pick_device(args.device)
    start = checkpoint.read(args.resume) if args.resume else None
    if start is not None and start.resume is not None:
        given = [name for name in (*_NEW_RUN_OPTIONS, *_RECIPE_OPTIONS) if getattr(args, name) is not None]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise InputError(f"{args.resume} is an unfinished run and continues as it began; leave out {flags}")
        record, model, resume = start.record, start.model, start.resume
        if args.dataset.lower() != record["dataset"]:
            raise InputError(f"{args.resume} was being trained on {record['dataset']!r}, not {args.dataset!r}")
        out = Path(args.resume) if args.out is None else check_output(args.out, force=args.force)
        recipe = Recipe.from_dict(record["recipe"])
    else:
        epochs = 50 if args.epochs is None else args.epochs
        recipe = Recipe(
            epochs=epochs,
            batch_size=args.batch_size or Recipe.batch_size,
            learning_rate=Recipe.learning_rate if args.lr is None else args.lr,
            weight_decay=Recipe.weight_decay if args.weight_decay is None else args.weight_decay,
            decay_epoch=round(0.8 * epochs),
        )
        seed, resume = args.seed or 0, None
        record = {"dataset": args.dataset.lower(), "seed": seed, "recipe": recipe.to_dict(), "history": []}
        torch.manual_seed(seed)
        model = _new_model(args) if start is None else _from_start(args, start, record)
        default = Path(args.resume).stem + "-retrained" if args.resume else model.spec.name
        out = check_output(args.out or f"{default}-{record['dataset']}-seed{seed}.pt", force=args.force)
        record["snapshots"] = _snapshot_epochs(args.snapshots, epochs)
        if record["snapshots"]:
            if not out.suffix:
                raise InputError(f"--snapshots go to the folder named as --out without suffix; {out} has none to lose")
            check_output(out.with_suffix(""), force=args.force)
        record["trained_on"] = "train and validation" if args.all_data else "train"

    if out.is_dir():
        raise InputError(f"cannot write {out}: it is a directory")
    data = load_dataset(args.dataset)
    if model.spec.in_channels != data.train.images.shape[1] or model.spec.classes != data.classes:
        raise InputError(
            f"{model.spec.name} takes {model.spec.in_channels} channels and {model.spec.classes} classes; "
            f"{data.name} has {data.train.images.shape[1]} and {data.classes}"
        )
    if resume is not None and data.sha256 != record["dataset_sha256"]:
        raise InputError(f"{data.name} is not the data that {args.resume} was being trained on (its sha256 differs)")
    all_data = record["trained_on"] != "train"
    split = data.train_and_validation if all_data else data.train
    record |= {"dataset": data.name, "dataset_description": data.description, "dataset_sha256": data.sha256}
    record |= {"train_images": len(split.labels), "environment": environment(device)}
    model.to(device)

    def snapshot(epoch: int) -> None:
        if epoch in record["snapshots"]:
            path = out.with_suffix("") / f"epoch-{epoch:03d}.pt"
            checkpoint.save(model, path, record={**record, "epoch": epoch}, half=True)

    def after_epoch(row: dict[str, Any], state: dict[str, Any]) -> None:
        record["history"].append(row)
        snapshot(row["epoch"])
        checkpoint.save(model, out, record=record, resume=state)

    if resume is None:
        snapshot(0)
    fit(
        model,
        split,
        recipe,
        seed=record["seed"],
        validation=None if all_data else data.validation,
        resume=resume,
        after_epoch=after_epoch,
        label=f"{model.spec.name} on {data.name}",
    )
    test = evaluate(model, data.test, label="testing")
    record |= {"test_error": test.error, "test_loss": test.loss, "test_images": test.images}
    checkpoint.save(model, out, record=record)
    if args.json:
        json.dump({"file": str(out), **record}, sys.stdout, indent=2)
        print()
    else:
        result = f"test error {test.error:.2f} % on {test.images:,} images of {data.name}"
        print(f"{model.spec.name}: {result}; saved to {out}")


def _new_model(args: argparse.Namespace) -> Any:
    from .models import MODELS, create_model

    if args.model is None:
        raise InputError(f"--model is missing; accepted: {', '.join(MODELS)} (or --resume CKPT)")
    return create_model(args.model, group=args.group, width=args.width, separable=args.separable)


def _from_start(args: argparse.Namespace, start: Any, record: dict[str, Any]) -> Any:
    """The network of a finished or converted checkpoint, to be trained further as a new run."""
    given = [f"--{name}" for name in _NEW_RUN_OPTIONS if getattr(args, name) is not None]
    if given:
        raise InputError(f"the network comes from {args.resume}; leave out {', '.join(given)}")
    record["started_from"] = start.record
    return start.model


def _snapshot_epochs(text: str | None, epochs: int) -> list[int]:
    try:
        wanted = sorted({int(item) for item in text.split(",")}) if text else []
    except ValueError:
        wanted = [-1]
    if wanted and not (wanted[0] >= 0 and wanted[-1] <= epochs):
        raise InputError(f"--snapshots is {text!r}; accepted: epochs from 0 to {epochs} separated by commas")
    return wanted


if __name__ == "__main__":
    sys.exit(main())
