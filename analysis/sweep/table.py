"""A sweep as a table on the screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import IO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from analysis.plots.console import short_count

from .files import Row
from .units import ERRORS

_WIDTH_ELSEWHERE = 160  # columns where there is no terminal
_WIDE = 150  # columns from which the whole table is shown


def print_sweep(rows: Sequence[Row], unit: str, *, file: IO[str]) -> None:
    """Print a line for each row, and what is out of reach. A narrow terminal gets fewer columns.

    Args:
        rows: of :func:`analysis.sweep`.
        unit: of their budgets.
        file: an open text stream.
    """
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

    def cost(name: str, text: str) -> str:
        return f"{text} {row[name] / original[name]:.0%}{'*' if row['pareto'][name] else ' '}"

    cells = {
        "parameters": cost("parameters", short_count(row["parameters"])),
        "MACs\nexecuted": cost("macs_executed", short_count(row["macs_executed"])),
        "ms": cost("latency_share", f"{row['latency_ms_after']:.4g}"),
        **{
            name.replace("_", "\n"): f"{row[name]:.3g}" if name == "output_error" else f"{row[name]:.2f} %"
            for name in errors
        },
    }
    if wide:
        forms = Counter(layer["form"] or "unchanged" for layer in row["layers"].values())
        cells |= {
            "MACs\npublished": short_count(row["macs_published"]),
            "memory": f"{row['memory_bytes'] / 2**20:.2f} MiB",
            "equivariance\nerror": f"{row['equivariance_error']:.0e}",
            "layers": ", ".join(f"{count} {form}" for form, count in forms.most_common()),
        }
    return cells
