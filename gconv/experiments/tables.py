"""The tables of the experiments, made from their records, beside the published numbers."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gconv.models.cost import cost
from gconv.models.zoo import create_model
from gconv.system.errors import InputError
from gconv.training.recipe import INGREDIENTS

from .definitions import TABLE

Record = dict[str, Any]
Rows = list[dict[str, str]]


class Published(NamedTuple):
    """A row of table 1 of Lengyel & van Gemert (ICIP 2021), measured on the official rotated MNIST archive.

    Attributes:
        error: mean test error in per cent.
        deviation: standard deviation of the test error over seeds.
        parameters: parameters of the network.
        macs: multiply-accumulates per image, in millions.
        memory: memory of a forward and a backward pass on two images, in MB.
    """

    error: float
    deviation: float
    parameters: int
    macs: float
    memory: float


PUBLISHED = {
    "z2cnn": Published(5.20, 0.110, 25_210, 2.98, 0.84),
    "c-z2cnn": Published(4.64, 0.126, 25_603, 4.14, 2.60),
    "p4cnn": Published(2.23, 0.061, 24_810, 11.67, 2.03),
    "g-p4cnn-small": Published(2.60, 0.098, 8_910, 4.37, 5.23),
    "g-p4cnn": Published(1.97, 0.044, 25_255, 12.34, 13.84),
    "gc-p4cnn-small": Published(2.88, 0.169, 3_420, 1.80, 1.88),
    "gc-p4cnn": Published(1.74, 0.070, 24_640, 13.01, 5.83),
}
_EXECUTED = {"MACs as executed, without the kernel": "none", "with the AVX-512 kernel": "avx512"}
_MB = 10**6


def rotmnist(records: Sequence[Record]) -> Rows:
    """The published table 1: a row for each model, also for one without records."""
    rows = []
    for model, published in PUBLISHED.items():
        own = [record for record in records if is_published(record, model)]
        errors = [record["test_error"] for record in own]
        on_cpu = [record for record in own if record["environment"]["device"] == "cpu"]
        on_gpu = f" ({len(own) - len(on_cpu)} on a GPU)" if len(on_cpu) < len(own) else ""
        row = {
            "model": model,
            "seeds": f"{len(own)}{on_gpu}",
            "test error": spread(errors),
            "published": f"{published.error:.2f} ± {published.deviation:.2f} %",
            "within 3 deviations, or better": "",
            "parameters": "",
            "MACs (published)": "",
            **dict.fromkeys(_EXECUTED, ""),
            "memory, batch 2 (published)": "",
            "CPU minutes a run": "",
        }
        if own:
            good = statistics.mean(errors) <= published.error + 3 * published.deviation
            memory = own[0]["training_memory_batch_2"] / _MB
            row |= {
                "within 3 deviations, or better": "yes" if good else "no",
                "parameters": f"{own[0]['parameters']:,}",
                "MACs (published)": f"{own[0]['macs_published'] / 1e6:.2f} M ({published.macs:.2f} M)",
                **_executed(model),
                "memory, batch 2 (published)": f"{memory:.2f} MB ({published.memory:.2f} MB)",
            }
        if on_cpu:
            minutes = statistics.median(record["seconds"]["training"] for record in on_cpu) / 60
            row["CPU minutes a run"] = f"{minutes:.0f}"
        rows.append(row)
    return rows


def _executed(model: str) -> dict[str, str]:
    """MACs as executed, counted anew for two classes of machines: a record has those of the machine that it ran on."""
    net = create_model(model)
    counts = {name: cost(net, net.input_shape, kernel=kernel).macs_executed for name, kernel in _EXECUTED.items()}
    return {name: f"{count / 1e6:.2f} M" for name, count in counts.items()}


def data_efficiency(records: Sequence[Record]) -> Rows:
    """Test errors, with a row for each number of training images."""
    points = efficiency(records)
    models = [model for model in TABLE if any(model in by_model for by_model in points.values())]
    rows = []
    for images, by_model in points.items():
        one = next(iter(by_model.values()))[0]
        row = {"images": f"{images:,}", "epochs": str(one["recipe"]["epochs"]), "steps": f"{one['steps']:,}"}
        for model in models:
            own = by_model.get(model, [])
            row[model] = spread([record["test_error"] for record in own]) + (f" ({seeds(own)})" if own else "")
        rows.append(row)
    return rows


def efficiency(records: Sequence[Record]) -> dict[int, dict[str, list[Record]]]:
    """The records of the data-efficiency experiment, by number of images and by model."""
    models = {model for model in TABLE if any(r["run"].images is not None for r in records if r["run"].model == model)}
    points: dict[int, dict[str, list[Record]]] = {}
    for record in sorted(records, key=lambda record: record["train_images"]):
        run = record["run"]
        if run.model in models and is_published(record, run.model, run.images):
            points.setdefault(record["train_images"], {}).setdefault(run.model, []).append(record)
    return points


def is_published(record: Record, model: str, images: int | None = None) -> bool:
    """Whether a record is of this model, the published recipe and this number of images (None: all of them)."""
    run = record["run"]
    alike = (run.model, run.recipe, run.images, run.epochs, run.held_out)
    return alike == (model, "published", images, None, False)


def recipes(records: Sequence[Record]) -> Rows:
    """Validation errors of P4CNN, with a row for each recipe: what each ingredient brings."""
    return [
        {
            "recipe": recipe,
            "epochs": str(own[0]["recipe"]["epochs"]),
            "seeds": str(len(own)),
            "validation error": spread([record["validation_error"] for record in own]),
            "training error, last epoch": spread([record["history"][-1]["train_error"] for record in own]),
        }
        for recipe, own in by_recipe(records).items()
    ]


def by_recipe(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of the recipes experiment, by recipe, in the order of ``INGREDIENTS``."""
    own = [record for record in records if record["run"].held_out and record["run"].model == "p4cnn"]
    found = {recipe: [record for record in own if record["run"].recipe == recipe] for recipe in INGREDIENTS}
    return {recipe: some for recipe, some in found.items() if some}


def modern(records: Sequence[Record]) -> Rows:
    """Test errors with the published and with the modern recipe."""
    rows = []
    for model in ("p4cnn", "gc-p4cnn"):
        for recipe in ("published", "modern"):
            alike = (recipe, None, None, False)
            own = [
                record
                for record in records
                if (run := record["run"]).model == model and (run.recipe, run.images, run.epochs, run.held_out) == alike
            ]
            if own:
                rows.append(
                    {
                        "model": model,
                        "recipe": recipe,
                        "parameters": f"{own[0]['parameters']:,}",
                        "epochs": str(own[0]["recipe"]["epochs"]),
                        "seeds": str(len(own)),
                        "test error": spread([record["test_error"] for record in own]),
                    }
                )
    return rows


TABLES: dict[str, Callable[[Sequence[Record]], Rows]] = {
    "rotmnist": rotmnist,
    "data-efficiency": data_efficiency,
    "recipes": recipes,
    "modern": modern,
}


def table(experiment: str, records: Sequence[Record]) -> Rows:
    """The rows of the table of an experiment.

    Args:
        experiment: a name of ``TABLES``.
        records: all records on one data set.

    Raises:
        InputError: none of the records belongs to the experiment.
    """
    rows = TABLES[experiment](records)
    if not rows:
        raise InputError(f"there are records, but none of {experiment}")
    return rows


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, as text in per cent; empty without values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} %"


def seeds(*groups: Sequence[Record]) -> str:
    """The number of records in each of these groups, as ``1 seed``, ``3 seeds`` or ``1 to 3 seeds``."""
    counts = sorted({len(group) for group in groups})
    span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{span} seed" + ("" if counts == [1] else "s")


def as_markdown(rows: Rows) -> str:
    """Rows with the same keys as a Markdown table; without rows, a line that says so."""
    if not rows:
        return "*There are no records of this yet.*"
    lines = [tuple(rows[0]), ("---",) * len(rows[0]), *(tuple(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_csv(rows: Rows) -> str:
    """Rows with the same keys as comma-separated values with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")
