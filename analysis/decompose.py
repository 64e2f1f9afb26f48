"""``python -m analysis.decompose``: measure a checkpoint and convert it into a separable network."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gconv.system.cli import Parser, loading, main_args, number, run
from gconv.system.errors import InputError

if TYPE_CHECKING:
    from analysis.conversion.finetuning import Finetuning
    from analysis.conversion.report import ConversionReport
    from analysis.conversion.splits import Splits
    from gconv.models.networks import Model

PROG = "python -m analysis.decompose"
_ALLOCATORS = "uniform, energy, minmax, lagrangian, greedy, dynamic"


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Measure how separable the filters of a trained group-convolution network are, and convert it into the best\n"
        "separable network within a budget. With --data every layer is fitted to the output that it had, batch norm\n"
        "is re-estimated, and the error is reported at every stage. Without it every layer is fitted to its filter by\n"
        "SVD. Writes converted.pt, report.json and spectra.png. Give at most one budget, of --rank to --max-drop;\n"
        "without one every layer keeps 95 % of its energy.",
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
        help="g, gc, gc_in, g_turned or gc_turned for all layers, or auto (default): the best form for each layer",
    )
    _add_budgets(p)
    p.add_argument("--data", metavar="NAME", help="rotdigits, rotmnist-regen or rotmnist")
    _add_choices(p)
    p.add_argument("--finetune", type=number(int, 0), default=0, metavar="EPOCHS", help="epochs of training afterwards")
    p.add_argument(
        "--distill",
        default="scores",
        metavar="T",
        help="what fine-tuning learns from the original network: scores (default), layers (scores and layers), or none",
    )
    p.add_argument("--resume", action="store_true", help="continue the interrupted fine-tuning whose state is in --out")
    p.add_argument(
        "--seed", type=number(int, 0), default=0, help="of the choice of images and the fine-tuning, default 0"
    )
    p.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    p.add_argument("--out", metavar="DIR", help="where the results go (default: CKPT's name with -converted)")
    p.add_argument("--force", action="store_true", help="replace results that are already in --out")
    p.add_argument("--json", action="store_true", help="print the report as JSON on stdout, everything else on stderr")
    return p


def _add_budgets(p: argparse.ArgumentParser) -> None:
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--rank", type=number(int, 1), metavar="R", help="give every layer this rank")
    budget.add_argument(
        "--energy",
        type=number(float, 0, 1),
        metavar="E",
        help="give every layer the smallest rank that keeps this share of its energy (default 0.95)",
    )
    budget.add_argument("--params", metavar="P", help="parameters of the network: a fraction up to 1, or a number (9k)")
    budget.add_argument(
        "--macs",
        metavar="M",
        help="multiply-accumulates of an image as executed: a fraction up to 1, or a number (3.5M)",
    )
    budget.add_argument("--latency", metavar="L", help="time of a batch here: a fraction up to 1, or a time (3.5ms)")
    budget.add_argument(
        "--max-drop",
        metavar="D",
        help="points of validation accuracy that may be lost; of the networks tried the smallest one is taken",
    )


def _add_choices(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--allocation", default="auto", metavar="A", help=f"how a budget is shared out: auto (default), {_ALLOCATORS}"
    )
    p.add_argument("--minimise", default="auto", metavar="M", help="outputs, weights, or auto: outputs with --data")
    p.add_argument(
        "--execution", default="auto", metavar="X", help="dense, factorized, irrep, or auto (default): the fastest here"
    )
    p.add_argument("--sensitivity", metavar="FILE", help="a report.json of this network, to use its measurements again")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    _check_options(args)
    with loading():
        from analysis.conversion.splits import splits_for
        from gconv.models import checkpoint
        from gconv.training.device import environment, pick_device

    training = _training(args)
    device = pick_device(args.device)
    source = checkpoint.read(args.checkpoint)
    out = Path(args.out or f"{Path(args.checkpoint).stem}-converted")
    paths = _output_paths(out, args.force)
    unfinished = out / "finetuning.pt"
    training = replace(training, after_epoch=_keeper(unfinished), resume=_state(unfinished) if args.resume else None)
    sensitivity = None if args.sensitivity is None else _sensitivity(args.sensitivity)
    data, splits = splits_for(args.data, source)
    if args.max_drop is not None and splits.validation is None:
        what = "the network was trained on the validation images too, so they tell nothing about a drop"
        raise InputError(f"--max-drop: {what}. Give a network that was trained without --all-data.")
    network = source.model.to(device)
    size = None if data is None else data.train.images.shape[1:]
    converted, report = _convert(args, network, splits, training, sensitivity, size, unfinished)
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
    _print(report, document, paths, args.json)


def _check_options(args: argparse.Namespace) -> None:
    """Check what the user typed, before anything slow is imported or read.

    Raises:
        InputError: options do not fit together, or a budget is out of range.
    """
    from analysis.allocation.budget import Budget

    if args.energy == 0:
        raise InputError("--energy is 0. Give a share above 0 and up to 1.")
    kind = Budget.of(**_budget(args)).kind
    if args.finetune and not args.data:
        raise InputError("--finetune needs training images. Give --data NAME with it.")
    if kind == "max_drop" and not args.data:
        raise InputError("--max-drop needs validation images. Give --data NAME with it.")
    if args.resume and not args.finetune:
        raise InputError("--resume continues fine-tuning. Give the options of the interrupted command as they were.")


def _budget(args: argparse.Namespace) -> dict[str, Any]:
    from analysis.allocation.budget import BUDGETS

    return {kind: getattr(args, kind) for kind in BUDGETS}


def _training(args: argparse.Namespace) -> Finetuning:
    from analysis.conversion.finetuning import Finetuning
    from analysis.fitting.distillation import Distillation

    if args.distill == "none":
        return Finetuning(args.finetune, Distillation(weight=0))
    return Finetuning(args.finetune, Distillation(target=args.distill))


def _output_paths(out: Path, force: bool) -> dict[str, Path]:
    from gconv.system.files import check_output

    names = ("converted.pt", "report.json", "spectra.png")
    paths = {name: check_output(out / name, force=force) for name in names}
    for path in filter(Path.is_dir, paths.values()):
        raise InputError(f"cannot write {path}: it is a directory")
    return paths


def _convert(
    args: argparse.Namespace,
    network: Model,
    splits: Splits,
    training: Finetuning,
    sensitivity: Any,
    size: Sequence[int] | None,
    unfinished: Path,
) -> tuple[Model, ConversionReport]:
    """The converted network as it is loaded back from a file. Interrupted, it says how the command is continued."""
    from analysis.conversion.convert import convert
    from gconv.models import checkpoint

    device = next(network.parameters()).device
    with tempfile.TemporaryDirectory() as scratch:

        def saved(after: Model) -> Model:
            path = Path(scratch, "converted.pt")
            checkpoint.save(after, path)
            return checkpoint.read(path).model.to(device)

        try:
            return convert(
                network,
                args.form,
                **_budget(args),
                allocation=args.allocation,
                minimise=args.minimise,
                execution=args.execution,
                data=splits.train,
                validation=splits.validation,
                test=splits.test,
                finetune=training,
                sensitivity=sensitivity,
                seed=args.seed,
                input_shape=size,
                saved=saved,
            )
        except KeyboardInterrupt:
            if unfinished.exists():
                print(f"\nto continue: the same command with --resume (its state is in {unfinished})", file=sys.stderr)
            raise


def _keeper(path: Path) -> Callable[[dict[str, Any]], None]:
    """Keeps the state of a fine-tuning in a file."""
    import torch

    from gconv.system.files import atomic_path

    def keep(state: dict[str, Any]) -> None:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)

    return keep


def _state(path: Path) -> dict[str, Any]:
    """The state of an interrupted fine-tuning."""
    from gconv.system.tensor_files import read_plain

    advice = "Give the command without --resume."
    if not path.exists():
        raise InputError(f"{path} does not exist, so there is nothing to resume. {advice}")
    state = read_plain(path)
    if not isinstance(state, dict):
        raise InputError(f"{path} holds no interrupted fine-tuning. {advice}")
    return state


def _sensitivity(path: str) -> Any:
    """The measurements in a report."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8")).get("sensitivity")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a report. Give a report.json of this command.") from error
    if table is None:
        raise InputError(f"{path} has no measurements. Give the report of --params, --macs, --latency or --max-drop.")
    return table


def _write(paths: dict[str, Path], converted: Any, record: dict[str, Any], document: dict[str, Any]) -> None:
    """Write the three results, all or none. Make sure that the saved network is the one that the report is about."""
    import torch
    from matplotlib.figure import Figure

    from analysis.plots.spectra import draw_spectra
    from gconv.models import checkpoint
    from gconv.system.files import atomic_path

    figure = Figure()
    draw_spectra(figure, document["layers"])
    with ExitStack() as together:  # all three appear once all are written
        files = {name: together.enter_context(atomic_path(path)) for name, path in paths.items()}
        checkpoint.save(converted, files["converted.pt"], record=record)
        saved = checkpoint.read(files["converted.pt"]).model.state_dict()
        for name, tensor in converted.state_dict().items():
            if not torch.equal(saved[name], tensor.cpu()):
                raise RuntimeError(f"the saved network is not the converted one: {name} differs")
        files["report.json"].write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        figure.savefig(files["spectra.png"], dpi=150)


def _print(report: ConversionReport, document: dict[str, Any], paths: dict[str, Path], as_json: bool) -> None:
    from analysis.plots.console import print_report

    print_report(report, document, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        json.dump(document, sys.stdout, indent=2, allow_nan=False)
        print()
    else:
        print(f"written: {', '.join(str(path) for path in paths.values())}")


if __name__ == "__main__":
    sys.exit(main())
