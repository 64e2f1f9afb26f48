"""The report of a conversion as a table on the screen."""

from __future__ import annotations

from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from analysis.conversion.report import ConversionReport, LayerReport
from analysis.measures.measures import MEASURED_FORMS

# A file or a pipe has no width, and the table must not be folded there at 80 columns.
_WIDTH_ELSEWHERE = 140
_SHOWN_RANKS = 3


def print_report(report: ConversionReport, document: dict[str, Any], *, file: IO[str]) -> None:
    """Print the layers, the totals, the error at every stage, and what was not measured.

    Args:
        report: the report.
        document: the content of ``report.json``, which has the name of the data.
        file: an open text stream.
    """
    console = Console(file=file, width=None if file.isatty() else _WIDTH_ELSEWHERE, highlight=False)
    console.print(_layer_table(report))
    for reason in dict.fromkeys(layer.why for layer in report.layers if layer.form is None):
        names = ", ".join(layer.name for layer in report.layers if layer.form is None and layer.why == reason)
        console.print(f"unchanged: {names} ({reason})")
    console.print(
        f"[bold]whole network[/]  parameters {change(*report.parameters)}, "
        f"MACs published {change(*report.macs_published)}, as executed {change(*report.macs_executed)}"
    )
    first, second = report.equivariance_error
    console.print(f"equivariance error in float64 {first:.1e} → {second:.1e}")
    console.print(f"relative error of the class scores, as converted: {report.output_error:.3g}")
    before, after = report.latency["milliseconds"]
    machine = f"{report.latency['machine']}, threads: {report.latency['threads']}"
    memory = " → ".join(f"{size / 2**20:.1f}" for size in report.memory)
    batch = report.latency["batch"]
    console.print(f"forward pass, batch {batch}: {before:.1f} → {after:.1f} ms ({machine})")
    if original := report.latency.get("original"):
        console.print(f"while converting, the original was measured at {min(original):.1f} to {max(original):.1f} ms")
    console.print(f"peak memory of one image: {memory} MiB")
    if "allocation_why" in report.request:
        console.print(f"allocation: {report.request['allocation_why']}")
        console.print(f"options were compared by: {report.request.get('compared_by', 'not recorded')}")
    if "before" in report.accuracy:
        _print_accuracy(console, report, document["data"]["name"])
    for note in report.notes:
        console.print(f"[dim]note: {note}[/]")


def _print_accuracy(console: Console, report: ConversionReport, data: str) -> None:
    """The error at every stage on test images and, if the network was not trained on them, on validation images."""
    validation = report.accuracy.get("validation")
    images = f"{report.accuracy['test_images']:,} images of {data}"
    console.print(f"\n[bold]test error[/] on {images}" + ("; validation error beside it" if validation else ""))
    epochs = (report.finetuning or {}).get("epochs")
    for stage in filter(report.accuracy.__contains__, _STAGES):
        text = _STAGES[stage].format(epochs=f"{epochs} epoch{'' if epochs == 1 else 's'}")
        beside = f"{validation[stage]:8.2f} %" if validation else ""
        console.print(f"  {text:<32}{report.accuracy[stage]:6.2f} %{beside}")


_STAGES = {
    "before": "the network as given",
    "converted": "converted",
    "batch_norm": "batch norm re-estimated",
    "finetuned": "fine-tuned for {epochs}",
}


def _layer_table(report: ConversionReport) -> Table:
    title = "explained energy at rank 1, 2, 3 in three forms; parameters and MACs as executed"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", collapse_padding=True, pad_edge=False)
    for heading in ("layer", "filter", *MEASURED_FORMS, "converted to"):
        table.add_column(heading)
    for heading in ("parameters", "MACs"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        table.add_row(*_cells(layer))
    return table


def _cells(layer: LayerReport) -> list[str]:
    energies = [" ".join(map(_share, layer.explained_energy[form][:_SHOWN_RANKS])) for form in MEASURED_FORMS]
    choice = f"{layer.form} rank {layer.rank}" if layer.form else "unchanged"
    sizes = [" → ".join(short_count(count, 3) for count in pair) for pair in (layer.parameters, layer.macs_executed)]
    return [layer.name, f"{layer.group} {'x'.join(map(str, layer.shape))}", *energies, choice, *sizes]


def _share(kept: float) -> str:
    """Two decimals without a leading zero: .68, or 1.0."""
    return "1.0" if kept >= 0.995 else f"{kept:.2f}"[1:]


def change(before: int, after: int) -> str:
    return f"{short_count(before)} → {short_count(after)} ({after / before:.0%})"


def short_count(count: int, digits: int = 4) -> str:
    """At most so many significant digits and a unit: 24.81k, 11.67M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.{digits}g}{unit}"
    return str(count)
