"""``python -m analysis.sweep``: error against parameters, multiply-accumulates and latency, over several budgets."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gconv.system.cli import Parser, loading, main_args, number, run
from gconv.system.errors import InputError, one_of

if TYPE_CHECKING:
    from torch import nn

    from analysis.allocation.budget import Budget
    from analysis.conversion.report import ConversionReport
    from gconv.training.datasets import Split

PROG = "python -m analysis.sweep"
UNITS = ("params", "macs", "latency")
BUDGETS = (0.15, 0.2, 0.3, 0.4, 0.6)
COSTS = ("parameters", "macs_executed", "latency_share")
ERRORS = ("validation_error", "test_error", "output_error")
FILES = ("sweep.json", "sweep.csv", "sweep.png")
_COLUMNS = (
    "requested", "out_of_reach", "parameters", "macs_published", "macs_executed", "latency_ms_before",
    "latency_ms_after", "latency_share", "memory_bytes", "equivariance_error", "output_error", "validation_error",
    "test_error", "layers", "seconds",
)  # fmt: skip
_WIDTH_ELSEWHERE = 160  # columns where there is no terminal
_WIDE = 150  # columns from which the whole table is shown

Row = dict[str, Any]


def sweep(
    model: nn.Module,
    budgets: Sequence[float | str] = BUDGETS,
    unit: str = "params",
    form: str = "auto",
    *,
    allocation: str = "auto",
    minimise: str = "auto",
    execution: str = "auto",
    data: Split | None = None,
    validation: Split | None = None,
    test: Split | None = None,
    seed: int = 0,
    input_shape: Sequence[int] | None = None,
    out: str | Path | None = None,
    force: bool = False,
    about: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Convert a network to several budgets, and find what is on the Pareto front of error against cost.

    Args:
        model: a trained network with layers of this package; it is not changed.
        budgets: each as :func:`analysis.convert` takes it: a fraction of what the network has, or an absolute value.
        unit: what they are of: ``params``, ``macs`` (as executed) or ``latency``.
        form: as for :func:`analysis.convert`, like everything down to ``input_shape``.
        out: a folder for ``sweep.json``, ``sweep.csv`` and ``sweep.png``. The first is rewritten after every row, and
            an interrupted sweep goes on from there when it is called again with the same arguments.
        force: start over and replace what is in ``out``.
        about: further entries of ``sweep.json``, as plain data.
        say: is told what rows are there already.

    Returns:
        A row of plain data for the network as given (``requested`` is None), and one for each budget:

        * ``requested``; ``out_of_reach``, why there is no such network, else None, and then the rest is None;
        * ``parameters``, ``macs_published``, ``macs_executed``, ``memory_bytes``, ``equivariance_error`` of the
          converted network, as in :class:`analysis.ConversionReport`;
        * ``latency_ms_before`` and ``latency_ms_after``, of the original and this network measured side by side, and
          ``latency_share``, their ratio: what rows are compared by, as the machine's speed drifts between them;
        * ``output_error``, ``validation_error`` and ``test_error``, the last two in per cent, with batch norm
          re-estimated, and None without such images;
        * ``layers``, the form and rank of each (None: unchanged) and its execution; ``seconds``, the time it took;
        * ``pareto``: for each of ``parameters``, ``macs_executed`` and ``latency_share`` whether no other row is as
          good in it and in the error and better in one of them. The error is the first that was measured of
          ``validation_error``, ``test_error`` and ``output_error``.

    Raises:
        InputError: as :func:`analysis.convert`, except for a budget out of reach; ``out`` has another sweep or cannot
            be written.
    """
    wanted = _budgets(unit, budgets)
    requested = [_requested(budget) for budget in wanted]

    from analysis.allocation.sensitivity import fingerprint
    from analysis.conversion.convert import convert, final_stage, score
    from analysis.conversion.planner import Planner
    from analysis.conversion.report import ConversionReport
    from analysis.conversion.request import Request
    from analysis.latency.timing import machine
    from gconv.training.loop import environment

    settings: dict[str, Any] = {
        "form": form, "allocation": allocation, "minimise": minimise, "execution": execution, "seed": seed,
    }  # fmt: skip
    splits: dict[str, Any] = {"data": data, "validation": validation, "test": test}
    # Checks everything that does not depend on the budget, before anything slow.
    request = Request.checked(model, budget=wanted[0], sensitivity=None, input_shape=input_shape, **settings, **splits)
    settings["input_shape"] = list(request.size)
    device = next(model.parameters()).device
    document: dict[str, Any] = {
        **(about or {}),
        "network": fingerprint(request.before),
        "data": {name: None if split is None else _digest(split) for name, split in splits.items()},
        "options": {"unit": unit, "budgets": requested, **settings},
        "environment": {**environment(device), "machine": machine(device)},
        "error": None,
        "sensitivity": None,
        "rows": [],
    }
    paths = _paths(out, force=force)
    document = _started(paths, document, force=force)
    rows: list[Row] = document["rows"]
    done = len(rows)
    if done:
        say(f"{paths['sweep.json']} has {done} of {len(requested) + 1} rows already, they are not computed again")

    from tqdm import tqdm

    with tqdm(total=len(requested) + 1, initial=done, desc="sweeping", unit="row", disable=None, leave=False) as bar:

        def add(row: Row, began: float) -> None:
            rows.append({**row, "seconds": round(time.perf_counter() - began, 1)})
            document["error"] = mark_pareto(rows)
            _write_json(paths, document)
            bar.update()

        if not rows:
            began = time.perf_counter()
            report = ConversionReport(request.to_dict(), [])
            score(report, "before", request.before, validation, test)
            report.measure(request.before, request.before, request.size, seed)
            Planner(request, report).measured()
            document["sensitivity"] = report.sensitivity
            add(_original(report), began)
        for budget in requested[len(rows) - 1 :]:
            began = time.perf_counter()
            bar.set_postfix_str(f"{unit} {budget}")
            arguments = {unit: budget, "sensitivity": document["sensitivity"], **settings, **splits}
            try:
                _, report = convert(model, **arguments)
            except InputError as error:
                row: Row = {**dict.fromkeys(_COLUMNS), "requested": budget, "out_of_reach": str(error)}
            else:
                row = _row(report, budget, final_stage(data, 0))
            add(row, began)
    _write_tables(paths, document)
    return rows


def mark_pareto(rows: Sequence[Row]) -> str:
    """Enter into every row whether it is on the front; returns which error was compared."""
    error = next(name for name in ERRORS if rows[0][name] is not None)
    found = [row for row in rows if row["out_of_reach"] is None]
    for row in rows:
        row["pareto"] = {
            cost: row["out_of_reach"] is None and not any(_better(other, row, cost, error) for other in found)
            for cost in COSTS
        }
    return error


def _better(one: Row, other: Row, *keys: str) -> bool:
    """Whether one is nowhere worse and somewhere better."""
    first, second = ([row[key] for key in keys] for row in (one, other))
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def _budgets(unit: str, values: Sequence[float | str]) -> list[Budget]:
    """The budgets, checked; one that is given twice counts once."""
    from analysis.allocation.budget import Budget

    if unit not in UNITS:
        raise one_of("unit", unit, UNITS)
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise InputError(f"budgets is {values!r}; accepted: a list of at least one, such as {list(BUDGETS)}")
    return list(dict.fromkeys(Budget.of(**{unit: value}) for value in values))


def _requested(budget: Budget) -> float | str:
    """The budget as :func:`analysis.convert` takes it."""
    return budget.value if budget.fraction or budget.kind != "latency" else f"{budget.value:.12g}ms"


def _digest(split: Split) -> dict[str, Any]:
    digest = hashlib.sha256()
    for tensor in split:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().contiguous().numpy().tobytes())
    return {"images": len(split.labels), "sha256": digest.hexdigest()}


def _original(report: ConversionReport) -> Row:
    """The row of the network as given, from a report that compares it with itself."""
    row = _row(report, None, "before")
    # The ratio of its two times is nothing but noise.
    return {**row, "latency_ms_after": row["latency_ms_before"], "latency_share": 1.0}


def _row(report: ConversionReport, requested: float | str | None, stage: str) -> Row:
    before, after = report.latency["milliseconds"]
    validation = report.accuracy.get("validation")
    return {
        "requested": requested,
        "out_of_reach": None,
        "parameters": report.parameters[1],
        "macs_published": report.macs_published[1],
        "macs_executed": report.macs_executed[1],
        "latency_ms_before": before,
        "latency_ms_after": after,
        "latency_share": after / before,
        "memory_bytes": report.memory[1],
        "equivariance_error": report.equivariance_error[1],
        "output_error": report.output_error,
        "validation_error": None if validation is None else validation[stage],
        "test_error": report.accuracy.get(stage),
        "layers": {
            layer.name: {"form": layer.form, "rank": layer.rank, "execution": layer.execution}
            for layer in report.layers
        },
    }


# --- files


def _paths(out: str | Path | None, *, force: bool) -> dict[str, Path]:
    """Where the results go, if they may; nowhere without ``out``."""
    if out is None:
        return {}
    from gconv.system.files import check_output

    paths = {name: Path(out, name) for name in FILES}
    # With sweep.json there, the others are its own; whether it is to be continued is checked afterwards.
    own = check_output(paths["sweep.json"], force=True).is_file()
    for path in paths.values():
        check_output(path, force=force or own)
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a directory")
    return paths


def _started(paths: dict[str, Path], document: dict[str, Any], *, force: bool) -> dict[str, Any]:
    """The document of the sweep that was interrupted, or this new one.

    Raises:
        InputError: it is another sweep.
    """
    path = paths.get("sweep.json")
    if path is None or force or not path.exists():
        return document
    accepted = "accepted: another --out, or --force to replace it"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same_network = found["network"] == document["network"]
        same_images = found["data"] == document["data"]
        others = [
            f"{name} {_text(found[key].get(name))}, not {_text(value)}"
            for key in ("options", "environment")
            for name, value in document[key].items()
            if found[key].get(name) != value
        ]
        asked = [None, *found["options"]["budgets"]]
        whole = [row["requested"] for row in found["rows"]] == asked[: len(found["rows"]) or 1] and all(
            key in row for row in found["rows"] for key in (*_COLUMNS, "pareto")
        )
        found["sensitivity"]["layers"]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not the file of a sweep; {accepted}") from error
    if not whole:
        raise InputError(f"{path} is not the file of a sweep; {accepted}")
    if not same_network:
        raise InputError(f"{path} is of another network; {accepted}")
    if not same_images:
        raise InputError(f"{path} is of other images; {accepted}")
    if others:
        raise InputError(f"{path} is of a sweep with {others[0]}; {accepted}")
    return {**document, **found}


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _write_json(paths: dict[str, Path], document: dict[str, Any]) -> None:
    from gconv.system.files import atomic_path

    if paths:
        with atomic_path(paths["sweep.json"]) as path:
            path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _write_tables(paths: dict[str, Path], document: dict[str, Any]) -> None:
    """Write what is drawn from sweep.json, both or none."""
    if not paths:
        return
    from matplotlib import pyplot as plt

    from analysis.plots.pareto import plot_pareto
    from gconv.system.files import atomic_path

    figure = plot_pareto(document["rows"], document["error"])
    with atomic_path(paths["sweep.csv"]) as table, atomic_path(paths["sweep.png"]) as picture:
        with table.open("w", encoding="utf-8", newline="") as file:
            _write_csv(document["rows"], file)
        figure.savefig(picture, dpi=150)
    plt.close(figure)


def _write_csv(rows: Sequence[Row], file: IO[str]) -> None:
    """One line a row; what is absent is an empty field, and the layers are in words."""
    writer = csv.DictWriter(file, [*_COLUMNS, *(f"pareto_{cost}" for cost in COSTS)], extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        layers = "; ".join(f"{name} {_choice(layer)}" for name, layer in (row["layers"] or {}).items())
        writer.writerow({**row, "layers": layers, **{f"pareto_{cost}": row["pareto"][cost] for cost in COSTS}})


def _choice(layer: dict[str, Any]) -> str:
    return "unchanged" if layer["form"] is None else f"{layer['form']} {layer['rank']} {layer['execution']}"


# --- command


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Convert a network to several budgets, and show its error against parameters, multiply-accumulates and\n"
        "latency, and which of the converted networks are on the Pareto front. With --data every layer is fitted to\n"
        "the output that it had and batch norm is re-estimated. Writes sweep.json, sweep.csv and sweep.png; an\n"
        "interrupted sweep goes on when the same command is given again.",
        "  python -m analysis.sweep checkpoints/p4cnn-rotdigits.pt --data rotdigits\n"
        "  python -m analysis.sweep net.pt --data rotmnist-regen --params 0.2,0.3,9k --out front\n"
        "  python -m analysis.sweep net.pt --data rotmnist-regen --macs 0.3,0.5 --form gc_in --json > front.json\n"
        "  python -m analysis.sweep net.pt --data rotmnist-regen --latency 0.8,3.5ms --out fast --force",
    )
    p.add_argument("checkpoint", metavar="CKPT", help="a network saved by gconv.save, gconv.train or decompose")
    p.add_argument("--data", metavar="NAME", help="rotdigits, rotmnist-regen or rotmnist")
    budget = p.add_mutually_exclusive_group()
    default = ",".join(map(str, BUDGETS))
    budget.add_argument(
        "--params", metavar="P,…", help=f"parameters: fractions up to 1, or numbers (9k); default {default}"
    )
    budget.add_argument("--macs", metavar="M,…", help="multiply-accumulates of an image as executed: likewise (3.5M)")
    budget.add_argument("--latency", metavar="L,…", help="time of a batch here: fractions up to 1, or times (3.5ms)")
    p.add_argument(
        "--form",
        default="auto",
        metavar="FORM",
        help="g, gc, gc_in, g_turned or gc_turned for all layers, or auto (default): the best for each",
    )
    p.add_argument("--minimise", default="auto", metavar="M", help="outputs, weights, or auto: outputs with --data")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the choice of images, default 0")
    p.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    p.add_argument("--out", metavar="DIR", help="where the results go (default: CKPT's name with -sweep)")
    p.add_argument("--force", action="store_true", help="start over and replace the results that are in --out")
    p.add_argument("--json", action="store_true", help="print sweep.json on stdout, everything else on stderr")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    # What the user typed is checked before anything slow is imported or read.
    unit = next((unit for unit in UNITS if getattr(args, unit) is not None), "params")
    given = getattr(args, unit)
    budgets: Sequence[float | str] = BUDGETS if given is None else given.split(",")
    _budgets(unit, budgets)

    with loading():
        import matplotlib

        from gconv.models import checkpoint
        from gconv.training.loop import pick_device

        from .decompose import _data

    matplotlib.use("agg")
    device = pick_device(args.device)
    source = checkpoint.read(args.checkpoint)
    out = Path(args.out or f"{Path(args.checkpoint).stem}-sweep")
    dataset, train, validation, test = _data(args.data, source)
    about: dict[str, Any] = {"checkpoint": str(args.checkpoint), "dataset": None}
    if dataset is not None:
        about["dataset"] = {key: getattr(dataset, key) for key in ("name", "description", "sha256")}
    try:
        rows = sweep(
            source.model.to(device),
            budgets,
            unit,
            args.form,
            minimise=args.minimise,
            data=train,
            validation=validation,
            test=test,
            seed=args.seed,
            input_shape=None if dataset is None else dataset.train.images.shape[1:],
            out=out,
            force=args.force,
            about=about,
            say=lambda text: print(text, file=sys.stderr),
        )
    except KeyboardInterrupt:
        if Path(out, "sweep.json").exists():
            again = "the same command without --force" if args.force else "the same command"
            print(f"\nto continue: {again} (what was done is in {out / 'sweep.json'})", file=sys.stderr)
        raise
    print_sweep(rows, unit, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        sys.stdout.write(Path(out, "sweep.json").read_text(encoding="utf-8"))
    else:
        print(f"written: {', '.join(str(out / name) for name in FILES)}")


def print_sweep(rows: Sequence[Row], unit: str, *, file: IO[str]) -> None:
    """Print a line for each row, and what is out of reach; all columns only where there is room for them.

    Args:
        rows: of :func:`sweep`.
        unit: of their budgets.
        file: an open text stream.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, width=None if file.isatty() else _WIDTH_ELSEWHERE, highlight=False, markup=False)
    errors = [name for name in ERRORS if rows[0][name] is not None]
    cells = [_cells(row, rows[0], errors, wide=console.width >= _WIDE) for row in rows]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    table.add_column(unit)
    for heading in cells[0]:
        table.add_column(heading, justify="left" if heading == "layers" else "right")
    for row, shown in zip(rows, cells, strict=True):
        table.add_row("original" if row["requested"] is None else str(row["requested"]), *shown.values())
    console.print(table)
    console.print(f"\n*: on the Pareto front of {errors[0].replace('_', ' ')} against this")
    for row in rows:
        if row["out_of_reach"] is not None:
            console.print(f"{unit} {row['requested']}: {row['out_of_reach']}")


def _cells(row: Row, original: Row, errors: Sequence[str], *, wide: bool) -> dict[str, str]:
    """What is shown of a row, by heading."""
    if row["out_of_reach"] is not None:
        return {"parameters": "out of reach"}
    from analysis.plots.console import _short

    def cost(name: str, text: str) -> str:
        return f"{text} {row[name] / original[name]:.0%}{'*' if row['pareto'][name] else ' '}"

    cells = {
        "parameters": cost("parameters", _short(row["parameters"])),
        "MACs\nexecuted": cost("macs_executed", _short(row["macs_executed"])),
        "ms": cost("latency_share", f"{row['latency_ms_after']:.4g}"),
        **{
            name.replace("_", "\n"): f"{row[name]:.3g}" if name == "output_error" else f"{row[name]:.2f} %"
            for name in errors
        },
    }
    if wide:
        forms = Counter(layer["form"] or "unchanged" for layer in row["layers"].values())
        cells |= {
            "MACs\npublished": _short(row["macs_published"]),
            "memory": f"{row['memory_bytes'] / 2**20:.2f} MiB",
            "equivariance\nerror": f"{row['equivariance_error']:.0e}",
            "layers": ", ".join(f"{count} {form}" for form, count in forms.most_common()),
        }
    return cells


if __name__ == "__main__":
    sys.exit(main())
