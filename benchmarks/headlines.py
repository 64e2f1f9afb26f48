"""The few numbers that README.md leads with, from the records: ``python -m benchmarks.headlines``."""

from __future__ import annotations

from pathlib import Path

from gconv.experiments import runs, tables

from . import conversion, speed, speed_report

RECORDS = Path(__file__).parents[1] / "checkpoints" / "records"
CONVERTED = ("P4CNN", "ours", 8_743)
"""The conversion that is shown: the original, the method, and the parameters that it has on average."""
SPEED = (
    ("p4cnn", "training", 128, "gconv", speed_report.DENSE),
    ("p4cnn", "inference", 128, "gconv, fused", speed_report.DENSE),
    ("p4m-resnet44", "training", 32, "gconv", speed_report.PEERS),
    ("p4m-resnet44", "inference", 32, "gconv, fused", speed_report.DEPLOYED),
)
"""The claims of :mod:`benchmarks.speed_report` that are shown."""


def table() -> str:
    """What was measured, and what it is compared with, as Markdown."""
    return tables.as_markdown([*_training(), *_conversion(), *_speed()])


def _row(what: str, measured: str, compared: str) -> dict[str, str]:
    return {"what": what, "measured": measured, "to compare": compared}


def _training() -> tables.Rows:
    """Test errors of networks that are trained by the published and by the modern recipe."""
    records = runs.load_records(RECORDS, "rotmnist-regen")
    rows = []
    for row in tables.rotmnist(records):
        if row["model"] in ("p4cnn", "gc-p4cnn"):
            what = f"{row['model']}, {row['parameters']} parameters, published recipe: test error"
            rows.append(_row(what, row["test error"], f"published: {row['published']}"))
    for row in tables.modern(records):
        if (row["model"], row["recipe"]) == ("gc-p4cnn", "modern"):
            seeds = f"{row['seeds']} seed{'s' if row['seeds'] != '1' else ''}"
            what = f"gc-p4cnn, {row['parameters']} parameters, modern recipe: test error"
            rows.append(_row(what, row["test error"], seeds))
    return rows


def _conversion() -> tables.Rows:
    """Test errors and equivariance error of one conversion, beside its original and a generic method."""
    found = conversion.rows()
    (ours,) = (row for row in found if (row.network, row.method, row.parameters) == CONVERTED)
    generic = min(row.equivariance for row in found if row.method.startswith(("Tucker", "CP")) and row.equivariance)
    original = f"original: {tables.spread(ours.errors['original'])}"
    size = f"p4cnn converted to {ours.parameters:,} parameters"
    return [
        _row(f"{size}, without training: test error", tables.spread(ours.errors["converted"]), original),
        _row(
            f"{size}, fine-tuned for {ours.epochs} epochs: test error",
            tables.spread(ours.errors["finetuned"]),
            original,
        ),
        _row(
            f"{size}: relative equivariance error, float64", f"{ours.equivariance:.0e}", f"Tucker-2, CP: {generic:.0e}"
        ),
    ]


def _speed() -> tables.Rows:
    """Times on a CPU as shares of the fastest other way."""
    measured = speed_report.on_cpu(speed_report.load(speed.RESULTS))
    rows = []
    for claim in speed_report.CLAIMS:
        found = speed_report.ratio(measured, claim)
        if claim[:5] in SPEED and found is not None:
            share, other = found
            beside = "ordinary convolutions of the expanded width" if other in speed_report.DENSE else other
            what = f"{claim.subject}, {claim.direction}, batch {claim.batch}: time on a CPU"
            rows.append(_row(what, f"{share:.2f}", f"of the time of {beside}"))
    return rows


if __name__ == "__main__":
    print(table())
