"""The files of a sweep: ``sweep.json``, from which an interrupted one goes on, and what is drawn from it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from matplotlib import pyplot as plt

from analysis.plots import pareto
from gconv.system.errors import InputError
from gconv.system.files import atomic_path, check_output

from .units import COSTS, FILES

Row = dict[str, Any]
COLUMNS = (
    "requested", "out_of_reach", "parameters", "macs_published", "macs_executed", "latency_ms_before",
    "latency_ms_after", "latency_share", "memory_bytes", "equivariance_error", "output_error", "validation_error",
    "test_error", "layers", "seconds",
)  # fmt: skip
"""The entries of a row, in order; ``pareto`` comes behind them."""


def output_paths(out: str | Path | None, *, force: bool) -> dict[str, Path]:
    """The paths of the results by name; none without ``out``.

    Raises:
        InputError: they cannot be written, or other files are there and ``force`` is not given.
    """
    if out is None:
        return {}
    paths = {name: Path(out, name) for name in FILES}
    # Beside a sweep.json the other files are taken to be its own. Whether it can be continued is checked later.
    own = check_output(paths["sweep.json"], force=True).is_file()
    for path in paths.values():
        check_output(path, force=force or own)
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a directory")
    return paths


def continued(paths: dict[str, Path], document: dict[str, Any], *, force: bool) -> dict[str, Any]:
    """The document of the sweep that was interrupted, if there is one, else the given new one.

    Raises:
        InputError: the file is that of another sweep, or of no sweep.
    """
    path = paths.get("sweep.json")
    if path is None or force or not path.exists():
        return document
    advice = "Give another --out, or --force to replace it."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        difference = _difference(found, document)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not the file of a sweep. {advice}") from error
    if difference:
        raise InputError(f"{path} is {difference}. {advice}")
    return {**document, **found}


def _difference(found: dict[str, Any], document: dict[str, Any]) -> str | None:
    """What a stored sweep is, if it is not the beginning of this one."""
    others = [
        f"{name} {_text(found[key].get(name))}, not {_text(value)}"
        for key in ("options", "environment")
        for name, value in document[key].items()
        if found[key].get(name) != value
    ]
    asked = [None, *found["options"]["budgets"]]
    whole = [row["requested"] for row in found["rows"]] == asked[: len(found["rows"]) or 1]
    found["sensitivity"]["layers"]  # a KeyError if there is none
    if not whole or not all(key in row for row in found["rows"] for key in (*COLUMNS, "pareto")):
        return "not the file of a sweep"
    if found["network"] != document["network"]:
        return "of another network"
    if found["data"] != document["data"]:
        return "of other images"
    return f"of a sweep with {others[0]}" if others else None


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def write_json(paths: dict[str, Path], document: dict[str, Any]) -> None:
    """Write ``sweep.json``; nothing without paths."""
    if paths:
        with atomic_path(paths["sweep.json"]) as path:
            path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_tables(paths: dict[str, Path], document: dict[str, Any]) -> None:
    """Write ``sweep.csv`` and ``sweep.png``, both or none; nothing without paths."""
    if not paths:
        return
    figure = pareto.plot_pareto(document["rows"], document["error"])
    with atomic_path(paths["sweep.csv"]) as table, atomic_path(paths["sweep.png"]) as picture:
        with table.open("w", encoding="utf-8", newline="") as file:
            _write_csv(document["rows"], file)
        figure.savefig(picture, dpi=150)
    plt.close(figure)


def _write_csv(rows: Sequence[Row], file: IO[str]) -> None:
    """One line for each row. An entry that is absent is an empty field, and the layers are in words."""
    writer = csv.DictWriter(file, [*COLUMNS, *(f"pareto_{cost}" for cost in COSTS)], extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        layers = "; ".join(f"{name} {_choice(layer)}" for name, layer in (row["layers"] or {}).items())
        writer.writerow({**row, "layers": layers, **{f"pareto_{cost}": row["pareto"][cost] for cost in COSTS}})


def _choice(layer: dict[str, Any]) -> str:
    return "unchanged" if layer["form"] is None else f"{layer['form']} {layer['rank']} {layer['execution']}"
