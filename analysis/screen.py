"""The report of a conversion as a table on the screen."""

from __future__ import annotations

from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gconv.separable import FORMS

from .report import ConversionReport, LayerReport

# A terminal tells its own width; in a file or a pipe the table must not be folded at 80 columns.
_WIDTH_ELSEWHERE = 140
_SHOWN_RANKS = 3


def print_report(report: ConversionReport, document: dict[str, Any], *, file: IO[str]) -> None:
    """Print the layers, the totals, the error at every stage, and what was not measured.

    Args:
        report: the report.
        document: the content of ``report.json``, for the name of the data.
        file: an open text stream.
    """
    console = Console(file=file, width=None if file.isatty() else _WIDTH_ELSEWHERE, highlight=False)
    console.print(_layer_table(report))
    console.print(
        f"[bold]whole network[/]  parameters {_change(*report.parameters)}, "
        f"MACs published {_change(*report.macs_published)}, as executed {_change(*report.macs_executed)}"
    )
    first, second = report.equivariance_error
    console.print(f"equivariance error in float64 {first:.1e} → {second:.1e}")
    console.print(f"relative error of the class scores, as converted: {report.output_error:.3g}")
    before, after = report.latency["milliseconds"]
    machine = f"{report.latency['machine']}, threads: {report.latency['threads']}"
    console.print(f"forward pass, batch {report.latency['batch']}: {before:.1f} → {after:.1f} ms ({machine})")
    if "before" in report.accuracy:
        images = f"{report.accuracy['test_images']:,} images of {document['data']['name']}"
        console.print(f"\n[bold]test error[/] on {images}")
        for stage in filter(report.accuracy.__contains__, _STAGES):
            epochs = report.accuracy.get("finetune_recipe", {}).get("epochs")
            text = _STAGES[stage].format(epochs=f"{epochs} epoch{'' if epochs == 1 else 's'}")
            console.print(f"  {text:<32}{report.accuracy[stage]:6.2f} %")
    for note in report.notes:
        console.print(f"[dim]note: {note}[/]")


_STAGES = {
    "before": "the network as given",
    "converted": "converted",
    "batch_norm": "batch norm re-estimated",
    "finetuned": "fine-tuned for {epochs}",
}


def _layer_table(report: ConversionReport) -> Table:
    table = Table(box=SIMPLE_HEAD, title="explained energy at rank 1, 2, 3 in each form", title_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("group")
    table.add_column("filter")
    for form in FORMS:
        table.add_column(form)
    table.add_column("converted to")
    for heading in ("parameters", "MACs as executed"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        table.add_row(*_cells(layer))
    return table


def _cells(layer: LayerReport) -> list[str]:
    energies = [" ".join(f"{kept:.2f}" for kept in layer.explained_energy[form][:_SHOWN_RANKS]) for form in FORMS]
    choice = f"{layer.form} rank {layer.rank}" if layer.form else f"unchanged ({layer.why})"
    shape = "x".join(map(str, layer.shape))
    return [
        layer.name,
        layer.group,
        shape,
        *energies,
        choice,
        f"{layer.parameters[0]:,} → {layer.parameters[1]:,}",
        f"{_short(layer.macs_executed[0])} → {_short(layer.macs_executed[1])}",
    ]


def _change(before: int, after: int) -> str:
    return f"{_short(before)} → {_short(after)} ({after / before:.0%})"


def _short(count: int) -> str:
    """At most four significant digits and a unit: 24.8k, 11.67M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return str(count)
