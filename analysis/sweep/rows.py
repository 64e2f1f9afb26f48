"""The rows of a sweep: the network as given and one conversion for each budget, and which are on the Pareto front."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from analysis.allocation.pareto import undominated
from analysis.allocation.sensitivity import fingerprint
from analysis.conversion import convert as conversion
from analysis.conversion.job import final_stage, score
from analysis.conversion.planner import Planner
from analysis.conversion.report import ConversionReport
from analysis.conversion.request import Request
from analysis.conversion.splits import Splits
from analysis.latency.timing import machine
from gconv.system.errors import InputError
from gconv.training.datasets import Split
from gconv.training.device import environment

from .files import COLUMNS, Row, continued, output_paths, write_json, write_tables
from .units import BUDGETS, COSTS, ERRORS, checked_budgets, requested


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
        model: a trained network with layers of this package. It is not changed.
        budgets: each as :func:`analysis.convert` takes it: a fraction of what the network has, or an absolute value.
        unit: what the budgets limit: ``params``, ``macs`` (as executed) or ``latency``.
        form: as for :func:`analysis.convert`, like everything down to ``input_shape``.
        out: a folder for ``sweep.json``, ``sweep.csv`` and ``sweep.png``. The first is rewritten after every row. An
            interrupted sweep goes on from there when it is called again with the same arguments.
        force: start over and replace what is in ``out``.
        about: further entries of ``sweep.json``, as plain data.
        say: is called with a message if there are rows already.

    Returns:
        A row of plain data for the network as given (``requested`` is None), and one for each budget:

        * ``requested``, the budget;
        * ``out_of_reach``: None, or the reason why there is no such network; everything else is None then;
        * ``parameters``, ``macs_published``, ``macs_executed``, ``memory_bytes`` and ``equivariance_error`` of the
          converted network, as in :class:`analysis.ConversionReport`;
        * ``latency_ms_before`` and ``latency_ms_after`` of the original and this network, measured side by side, and
          ``latency_share``, their ratio. Rows are compared by the ratio, as the machine's speed drifts between them;
        * ``output_error``, ``validation_error`` and ``test_error``, with batch norm re-estimated. The last two are in
          per cent, and None without such images;
        * ``layers``: the form, rank and execution of each layer (the form of an unchanged layer is None);
        * ``seconds``: the time that the row took;
        * ``pareto``: for each of ``parameters``, ``macs_executed`` and ``latency_share`` whether no other row is as
          good in it and in the error, and better in one of them. The error is the first that was measured of
          ``validation_error``, ``test_error`` and ``output_error``.

    Raises:
        InputError: as :func:`analysis.convert`, except for a budget out of reach; or ``out`` has another sweep, or
            cannot be written.
    """
    asked = [requested(budget) for budget in checked_budgets(unit, budgets)]
    settings: dict[str, Any] = {
        "form": form, "allocation": allocation, "minimise": minimise, "execution": execution, "seed": seed,
    }  # fmt: skip
    splits = Splits.of(data, validation, test)
    # Checks everything that does not depend on the budget, before anything slow begins.
    first = checked_budgets(unit, budgets)[0]
    request = Request.checked(model, budget=first, splits=splits, input_shape=input_shape, **settings)
    settings["input_shape"] = list(request.size)
    paths = output_paths(out, force=force)
    new = {**(about or {}), **_new_document(request, {"unit": unit, "budgets": asked, **settings})}
    document = continued(paths, new, force=force)
    rows: list[Row] = document["rows"]
    done, total = len(rows), len(asked) + 1
    if done:
        say(f"{paths['sweep.json']} has {done} of {total} rows already, they are not computed again")
    with tqdm(total=total, initial=done, desc="sweeping", unit="row", disable=None, leave=False) as bar:
        for budget in [None, *asked][done:]:
            began = time.perf_counter()
            bar.set_postfix_str(f"{unit} {budget}")
            if budget is None:
                row = _original(request, document)
            else:
                row = _converted(model, unit, budget, splits, {"sensitivity": document["sensitivity"], **settings})
            rows.append({**row, "seconds": round(time.perf_counter() - began, 1)})
            document["error"] = mark_pareto(rows)
            write_json(paths, document)
            bar.update()
    write_tables(paths, document)
    return rows


def mark_pareto(rows: Sequence[Row]) -> str:
    """Enter into every row whether it is on the front, for each cost; returns the error that was compared."""
    error = next(name for name in ERRORS if rows[0][name] is not None)
    found = [row for row in rows if row["out_of_reach"] is None]
    for row in rows:
        row["pareto"] = dict.fromkeys(COSTS, False)
    for cost in COSTS:
        for row, good in zip(found, undominated([(row[cost], row[error]) for row in found]), strict=True):
            row["pareto"][cost] = good
    return error


def _new_document(request: Request, options: dict[str, Any]) -> dict[str, Any]:
    """The content of ``sweep.json`` before the first row."""
    device = next(request.before.parameters()).device
    names = ("data", "validation", "test")
    return {
        "network": fingerprint(request.before),
        "data": {
            name: None if split is None else _digest(split) for name, split in zip(names, request.splits, strict=True)
        },
        "options": options,
        "environment": {**environment(device), "machine": machine(device)},
        "error": None,
        "sensitivity": None,
        "rows": [],
    }


def _digest(split: Split) -> dict[str, Any]:
    digest = hashlib.sha256()
    for tensor in split:
        digest.update(str(tuple(tensor.shape)).encode() + tensor.cpu().contiguous().numpy().tobytes())
    return {"images": len(split.labels), "sha256": digest.hexdigest()}


def _original(request: Request, document: dict[str, Any]) -> Row:
    """The row of the network as given, from a report that compares it with itself; measures the sensitivity too."""
    report = ConversionReport(request.to_dict(), [])
    score(report, "before", request.before, request.splits)
    report.measure(request.before, request.before, request.size, request.seed)
    Planner(request, report).measured()
    document["sensitivity"] = report.sensitivity
    row = _row(report, None, "before")
    # The ratio of its two times is nothing but noise.
    return {**row, "latency_ms_after": row["latency_ms_before"], "latency_share": 1.0}


def _converted(model: nn.Module, unit: str, budget: float | str, splits: Splits, settings: dict[str, Any]) -> Row:
    """The row of a conversion, or of a budget out of reach."""
    images = dict(zip(("data", "validation", "test"), splits, strict=True))
    arguments: dict[str, Any] = {unit: budget, **settings, **images}
    try:
        _, report = conversion.convert(model, **arguments)
    except InputError as error:
        return {**dict.fromkeys(COLUMNS), "requested": budget, "out_of_reach": str(error)}
    return _row(report, budget, final_stage(splits, 0))


def _row(report: ConversionReport, budget: float | str | None, stage: str) -> Row:
    before, after = report.latency["milliseconds"]
    validation = report.accuracy.get("validation")
    return {
        "requested": budget,
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
