"""``python -m analysis.decompose``: measure a checkpoint and convert it into a separable network."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gconv.system.cli import Parser, loading, main_args, number, run
from gconv.system.errors import InputError

if TYPE_CHECKING:
    from gconv.models.checkpoint import Checkpoint
    from gconv.training.datasets import Dataset, Split

PROG = "python -m analysis.decompose"
_ALLOCATORS = "uniform, energy, minmax, lagrangian, greedy, dynamic"


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Measure how separable the filters of a trained group-convolution network are, and convert it into the best\n"
        "separable network within a budget. With --data every layer is fitted to the output that it had (else to its\n"
        "filter, by SVD), batch norm is re-estimated, and the error reported at every stage. Writes converted.pt,\n"
        "report.json and spectra.png. Exactly one budget; without one every layer keeps 95 % of its energy.",
        "  python -m analysis.decompose checkpoints/p4cnn-rotdigits.pt\n"
        "  python -m analysis.decompose checkpoints/p4cnn-rotdigits.pt --rank 2 --data rotdigits --finetune 10\n"
        "  python -m analysis.decompose net.pt --params 0.3 --data rotmnist-regen --out small\n"
        "  python -m analysis.decompose net.pt --macs 3M --data rotmnist-regen --finetune 5 --out quick\n"
        "  python -m analysis.decompose net.pt --max-drop 0.5 --data rotmnist-regen --out safe\n"
        "  python -m analysis.decompose small/converted.pt --form gc --rank 1 --json    (convert again)\n"
        "  python -m gconv.train rotdigits --resume small/converted.pt --epochs 20      (retrain)",
    )
    p.add_argument("checkpoint", metavar="CKPT", help="a network saved by gconv.save, gconv.train or this command")
    p.add_argument(
        "--form",
        default="auto",
        metavar="FORM",
        help="g, gc, gc_in, g_turned or gc_turned for all layers, or auto (default): the best for each",
    )
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--rank", type=number(int, 1), metavar="R", help="give every layer this rank")
    budget.add_argument(
        "--energy",
        type=number(float, 0, 1),
        metavar="E",
        help="give every layer the smallest rank that keeps this share of its energy (default 0.95)",
    )
    budget.add_argument("--params", metavar="P", help="parameters of the network: a fraction up to 1, or a number (9k)")
    budget.add_argument("--macs", metavar="M", help="multiply-accumulates of an image as executed: likewise (3.5M)")
    budget.add_argument("--latency", metavar="L", help="time of a batch here: a fraction up to 1, or a time (3.5ms)")
    budget.add_argument(
        "--max-drop", metavar="D", help="points of validation accuracy that may be lost; the smallest one tried wins"
    )
    p.add_argument("--data", metavar="NAME", help="rotdigits, rotmnist-regen or rotmnist")
    p.add_argument(
        "--allocation", default="auto", metavar="A", help=f"how a budget is shared out: auto (default), {_ALLOCATORS}"
    )
    p.add_argument("--minimise", default="auto", metavar="M", help="outputs, weights, or auto: outputs with --data")
    p.add_argument(
        "--execution", default="auto", metavar="X", help="dense, factorized, irrep, or auto (default): the fastest here"
    )
    p.add_argument("--sensitivity", metavar="FILE", help="a report.json of this network, whose measurements are reused")
    p.add_argument("--finetune", type=number(int, 0), default=0, metavar="EPOCHS", help="train this long afterwards")
    p.add_argument(
        "--distill",
        default="scores",
        metavar="T",
        help="what fine-tuning learns from the original network: scores (default), layers (these too), or none",
    )
    p.add_argument("--resume", action="store_true", help="continue the fine-tuning that was interrupted in --out")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the choice of images and the fine-tuning")
    p.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    p.add_argument("--out", metavar="DIR", help="where the results go (default: CKPT's name with -converted)")
    p.add_argument("--force", action="store_true", help="replace results that are already in --out")
    p.add_argument("--json", action="store_true", help="print the report as JSON on stdout, everything else on stderr")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    # What the user typed is checked before anything slow is imported or read.
    from analysis.allocation.budget import BUDGETS, Budget

    if args.energy == 0:
        raise InputError("--energy is 0; accepted: a share above 0 and up to 1")
    budget = {kind: getattr(args, kind) for kind in BUDGETS}
    kind = Budget.of(**budget).kind
    if args.finetune and not args.data:
        raise InputError("--finetune needs training images; accepted: --data NAME with it")
    if kind == "max_drop" and not args.data:
        raise InputError("--max-drop needs validation images; accepted: --data NAME with it")
    if args.resume and not args.finetune:
        raise InputError("--resume continues fine-tuning; accepted: the options of the interrupted call, as they were")

    with loading():
        import torch

        from analysis.conversion.convert import convert
        from analysis.fitting.distillation import Distillation
        from gconv.models import checkpoint
        from gconv.system.files import atomic_path, check_output
        from gconv.training.loop import environment, pick_device

    distillation = Distillation(weight=0) if args.distill == "none" else Distillation(target=args.distill)
    device = pick_device(args.device)
    source = checkpoint.read(args.checkpoint)
    out = Path(args.out or f"{Path(args.checkpoint).stem}-converted")
    names = ("converted.pt", "report.json", "spectra.png")
    paths = {name: check_output(out / name, force=args.force) for name in names}
    for path in filter(Path.is_dir, paths.values()):
        raise InputError(f"cannot write {path}: it is a directory")
    unfinished = out / "finetuning.pt"
    resume = _resume(args.resume, unfinished)
    sensitivity = None if args.sensitivity is None else _sensitivity(args.sensitivity)
    data, train, validation, test = _data(args.data, source)
    if kind == "max_drop" and validation is None:
        what = "the network was trained on the validation images too, so nothing can be read off them"
        raise InputError(f"--max-drop: {what}; accepted: a network trained without --all-data")

    def keep(state: dict[str, Any]) -> None:
        with atomic_path(unfinished) as path, path.open("wb") as file:
            torch.save(state, file)

    with tempfile.TemporaryDirectory() as scratch:

        def saved(network: Any) -> Any:
            path = Path(scratch, "converted.pt")
            checkpoint.save(network, path)
            return checkpoint.read(path).model.to(device)

        try:
            converted, report = convert(
                source.model.to(device),
                args.form,
                **budget,
                allocation=args.allocation,
                minimise=args.minimise,
                execution=args.execution,
                data=train,
                validation=validation,
                test=test,
                finetune=args.finetune,
                distillation=distillation,
                sensitivity=sensitivity,
                seed=args.seed,
                input_shape=None if data is None else data.train.images.shape[1:],
                saved=saved,
                after_epoch=keep,
                resume=resume,
            )
        except KeyboardInterrupt:
            if unfinished.exists():
                print(f"\nto continue: the same command with --resume (its state is in {unfinished})", file=sys.stderr)
            raise
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
    unfinished.unlink(missing_ok=True)

    from analysis.plots.console import print_report

    print_report(report, document, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        json.dump(document, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        print(f"written: {', '.join(str(path) for path in paths.values())}")


def _resume(wanted: bool, path: Path) -> dict[str, Any] | None:
    """The state of an interrupted fine-tuning."""
    from gconv.system.tensor_files import read_plain

    if not wanted:
        return None
    if not path.exists():
        raise InputError(f"{path} does not exist, there is nothing to resume; accepted: the call without --resume")
    state = read_plain(path)
    if not isinstance(state, dict):
        raise InputError(f"{path} holds no interrupted fine-tuning; accepted: the call without --resume")
    return state


def _sensitivity(path: str) -> Any:
    """The measurements in a report."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8")).get("sensitivity")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a report; accepted: a report.json of this command") from error
    if table is None:
        raise InputError(f"{path} has no measurements; accepted: the report of --params, --macs, --latency, --max-drop")
    return table


def _data(name: str | None, source: Checkpoint) -> tuple[Dataset | None, Split | None, Split | None, Split | None]:
    """The data set, the images that this network was trained on, validation images that it was not, and test images."""
    if name is None:
        return None, None, None, None
    from gconv.training.datasets import load_dataset

    data = load_dataset(name)
    spec = source.model.spec
    if (spec.in_channels, spec.classes) != (data.train.images.shape[1], data.classes):
        raise InputError(
            f"the network takes {spec.in_channels} channels and {spec.classes} classes; "
            f"{data.name} has {data.train.images.shape[1]} and {data.classes}"
        )
    everything = source.record.get("trained_on") == "train and validation"
    if everything:
        return data, data.train_and_validation, None, data.test
    return data, data.train, data.validation, data.test


def _write(paths: dict[str, Path], converted: Any, record: dict[str, Any], document: dict[str, Any]) -> None:
    """Write the three results, all or none, and make sure that the saved network is the one reported."""
    import torch
    from matplotlib.figure import Figure

    from analysis.plots.spectra import draw_spectra
    from gconv.models import checkpoint
    from gconv.system.files import atomic_path

    figure = Figure()
    draw_spectra(figure, document["layers"])
    with ExitStack() as together:  # all three take their places once all are written, or none does
        files = {name: together.enter_context(atomic_path(path)) for name, path in paths.items()}
        checkpoint.save(converted, files["converted.pt"], record=record)
        saved = checkpoint.read(files["converted.pt"]).model.state_dict()
        for name, tensor in converted.state_dict().items():
            if not torch.equal(saved[name], tensor.cpu()):
                raise RuntimeError(f"the saved network is not the converted one: {name} differs")
        files["report.json"].write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        figure.savefig(files["spectra.png"], dpi=150)


if __name__ == "__main__":
    sys.exit(main())
