"""``python -m analysis.decompose``: measure a checkpoint and convert it into a separable network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gconv.cli import Parser, main_args, number, run
from gconv.errors import InputError

if TYPE_CHECKING:
    from gconv.checkpoint import Checkpoint
    from gconv.data import Dataset, Split

PROG = "python -m analysis.decompose"


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Measure how separable the filters of a trained group-convolution network are, and convert it into a\n"
        "separable network: the best factors of each layer by SVD; where --data is given, batch norm is\n"
        "re-estimated and the error reported at every stage. Writes converted.pt, report.json and spectra.png.",
        "  python -m analysis.decompose checkpoints/p4cnn-rotdigits.pt\n"
        "  python -m analysis.decompose checkpoints/p4cnn-rotdigits.pt --rank 2 --data rotdigits --finetune 10\n"
        "  python -m analysis.decompose net.pt --energy 0.9 --data rotmnist-regen --out small\n"
        "  python -m analysis.decompose small/converted.pt --form gc --rank 1 --json    (convert again)\n"
        "  python -m gconv.train rotdigits --resume small/converted.pt --epochs 20      (retrain)",
    )
    p.add_argument("checkpoint", metavar="CKPT", help="a network saved by gconv.save, gconv.train or this command")
    p.add_argument(
        "--form",
        default="auto",
        metavar="FORM",
        help="g, gc, gc_in for all layers, or auto (default): per layer what saves most for what it loses, if any does",
    )
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--rank", type=number(int, 1), metavar="R", help="give every layer this rank")
    budget.add_argument(
        "--energy",
        type=number(float, 0, 1),
        metavar="E",
        help="give every layer the smallest rank that keeps this share of its energy (default 0.95)",
    )
    p.add_argument("--data", metavar="NAME", help="rotdigits, rotmnist-regen or rotmnist")
    p.add_argument("--finetune", type=number(int, 0), default=0, metavar="EPOCHS", help="train this long afterwards")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the fine-tuning, default 0")
    p.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    p.add_argument("--out", metavar="DIR", help="where the results go (default: CKPT's name with -converted)")
    p.add_argument("--force", action="store_true", help="replace results that are already in --out")
    p.add_argument("--json", action="store_true", help="print the report as JSON on stdout, everything else on stderr")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    # What the user typed is checked before anything slow is imported or read.
    if args.energy == 0:
        raise InputError("--energy is 0; accepted: a share above 0 and up to 1")
    if args.finetune and not args.data:
        raise InputError("--finetune needs training images; accepted: --data NAME with it")

    from gconv import checkpoint
    from gconv.files import check_output
    from gconv.training import environment, pick_device

    from .allocation import forms_named

    forms_named(args.form)
    device = pick_device(args.device)
    source = checkpoint.read(args.checkpoint)
    out = Path(args.out or f"{Path(args.checkpoint).stem}-converted")
    names = ("converted.pt", "report.json", "spectra.png")
    paths = {name: check_output(out / name, force=args.force) for name in names}
    for path in filter(Path.is_dir, paths.values()):
        raise InputError(f"cannot write {path}: it is a directory")
    data, train, test = _data(args.data, source)

    from .conversion import convert

    converted, report = convert(
        source.model.to(device),
        args.form,
        rank=args.rank,
        energy=args.energy,
        data=train,
        test=test,
        finetune=args.finetune,
        seed=args.seed,
        input_shape=None if data is None else data.train.images.shape[1:],
    )
    document = {
        "checkpoint": str(args.checkpoint),
        "data": None if data is None else {"name": data.name, "description": data.description, "sha256": data.sha256},
        "seed": args.seed,
        "environment": environment(device),
        **report.to_dict(),
    }
    conversion = {key: document[key] for key in ("data", "seed", "request", "accuracy", "environment")}
    record = {"trained_on": source.record.get("trained_on"), "conversion": conversion, "converted_from": source.record}
    _write(paths, converted, record, document)

    from .screen import print_report

    print_report(report, document, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        json.dump(document, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        print(f"written: {', '.join(str(path) for path in paths.values())}")


def _data(name: str | None, source: Checkpoint) -> tuple[Dataset | None, Split | None, Split | None]:
    """The data set, the images that this network was trained on, and the test images."""
    if name is None:
        return None, None, None
    from gconv.data import load_dataset

    data = load_dataset(name)
    spec = source.model.spec
    if (spec.in_channels, spec.classes) != (data.train.images.shape[1], data.classes):
        raise InputError(
            f"the network takes {spec.in_channels} channels and {spec.classes} classes; "
            f"{data.name} has {data.train.images.shape[1]} and {data.classes}"
        )
    everything = source.record.get("trained_on") == "train and validation"
    return data, data.train_and_validation if everything else data.train, data.test


def _write(paths: dict[str, Path], converted: Any, record: dict[str, Any], document: dict[str, Any]) -> None:
    """Write the three results, all or none, and make sure that the saved network is the one reported."""
    import matplotlib

    matplotlib.use("agg")

    import torch
    from matplotlib import pyplot as plt

    from gconv import checkpoint
    from gconv.files import atomic_path

    from .plots import plot_spectra

    figure = plot_spectra(document["layers"])
    with ExitStack() as together:  # all three take their places once all are written, or none does
        files = {name: together.enter_context(atomic_path(path)) for name, path in paths.items()}
        checkpoint.save(converted, files["converted.pt"], record=record)
        saved = checkpoint.read(files["converted.pt"]).model.state_dict()
        for name, tensor in converted.state_dict().items():
            if not torch.equal(saved[name], tensor.cpu()):
                raise RuntimeError(f"the saved network is not the converted one: {name} differs")
        files["report.json"].write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        figure.savefig(files["spectra.png"], dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
