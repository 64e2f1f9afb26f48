"""The tables that the documentation shows, from the records of :mod:`benchmarks.speed`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gconv.system.errors import InputError

Rows = list[dict[str, Any]]


class Claim(NamedTuple):
    """A claim: ``ours`` takes at most ``limit`` of the time of the best of ``others``."""

    subject: str
    direction: str
    batch: int
    ours: str
    others: tuple[str, ...]
    limit: float


DENSE = ("dense", "dense, channels-last")
PEERS = ("escnn", "lists")
DEPLOYED = (*PEERS, "escnn, exported")
CLAIMS = (
    Claim("p4cnn", "training", 128, "gconv", DENSE, 1.0),
    Claim("p4cnn", "training", 128, "gconv", PEERS, 1 / 1.2),
    Claim("p4cnn", "inference", 128, "gconv, fused", DENSE, 0.85),
    Claim("p4cnn", "inference", 128, "gconv, fused", DEPLOYED, 1 / 1.6),
    Claim("p4cnn", "inference", 1, "gconv, fused", DENSE, 1.0),
    Claim("p4cnn", "inference", 128, "gconv, exported", DENSE, 0.85),
    Claim("p4cnn", "inference", 128, "gconv, exported", DEPLOYED, 1 / 1.6),
    Claim("p4cnn", "inference", 1, "gconv, exported", DENSE, 1.0),
    Claim("p4m-resnet44", "training", 32, "gconv", PEERS, 1 / 1.1),
    Claim("p4m-resnet44", "inference", 32, "gconv, fused", DEPLOYED, 1 / 1.25),
    # The network of 3.08 G multiply-accumulates is the limit; our full one takes fewer.
    Claim("p4m-resnet44", "training", 32, "gconv, gc", DENSE, 1 / 1.8),
    Claim("p4m-resnet44", "inference", 32, "gconv, gc, fused", DENSE, 1 / 2.5),
    Claim("p4m-resnet44", "training", 32, "gconv, gc", ("gconv",), 1 / 1.8),
    Claim("p4m-resnet44", "inference", 32, "gconv, gc, fused", ("gconv, fused",), 1 / 2.5),
)
LAYER_CLAIMS = {("p4", 10): 0.25, ("p4", 64): 0.15, ("p4m", 28): 0.15, ("p4m", 64): 0.11, ("p4m", 128): 0.09}
"""By group and width: the most that ``gc`` and ``gc_in`` layers take of the dense limit's time, forward."""
BACKWARD = 1.2
"""With the backward pass they take at most so many times that share."""


def load(folder: Path) -> dict[str, Rows]:
    """The rows of each section that has a record.

    Each row keeps the name of its section, because only rows of one section took turns and can be compared.

    Raises:
        InputError: there is no record.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise InputError(f"no records in {folder}; run `python -m benchmarks.speed` first")
    return {record["section"]: [{**row, "section": record["section"]} for row in record["rows"]] for record in records}


def table(folder: Path, *, every: bool = False) -> str:
    """What was asked, beside what was measured, and all layers, as Markdown; with ``every`` all networks too."""
    sections = load(folder)
    rows = on_cpu(sections)
    parts = [
        _claims(rows),
        _layer_claims(rows),
        _missed(rows),
        _conversions(sections),
        _start_up(sections),
        _networks(rows) if every else "",
        _layers(rows),
        _gpu(sections),
    ]
    return "\n\n".join(part for part in parts if part)


def on_cpu(sections: dict[str, Rows]) -> Rows:
    """The rows of all sections that were measured on a CPU."""
    return [row for name, of_section in sections.items() if name != "gpu" for row in of_section]


def networks(rows: Rows) -> dict[tuple[str, str, str, int], dict[str, dict[str, Any]]]:
    """The rows of networks that can be compared: by section, subject, direction and batch, and then by variant."""
    found: dict[tuple[str, str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row.get("direction") in ("training", "inference") and "request" not in row:
            key = row["section"], row["subject"], row["direction"], row["batch"]
            found.setdefault(key, {})[row["variant"]] = row
    return found


def ratio(rows: Rows, claim: Claim) -> tuple[float, str] | None:
    """Our time over that of the fastest of the others, and its name; None without records of both."""
    for (_, *key), variants in networks(rows).items():
        others = [name for name in claim.others if name in variants]
        if key == [claim.subject, claim.direction, claim.batch] and claim.ours in variants and others:
            best = min(others, key=lambda name: variants[name]["median_ms"])
            return variants[claim.ours]["median_ms"] / variants[best]["median_ms"], best
    return None


def _claims(rows: Rows) -> str:
    """What was asked of the networks, and what was measured."""
    found = [(claim, ratio(rows, claim)) for claim in CLAIMS]
    return _markdown(
        ("network", "", "batch", "what", "against the fastest of", "takes at most", "measured", "holds"),
        (
            (
                claim.subject,
                claim.direction,
                str(claim.batch),
                claim.ours,
                " / ".join(claim.others),
                f"{claim.limit:.2f}",
                f"{value[0]:.2f}" + (f" ({value[1]})" if len(claim.others) > 1 else ""),
                "yes" if value[0] <= claim.limit else "no",
            )
            for claim, value in found
            if value is not None
        ),
    )


def _networks(rows: Rows) -> str:
    """Times of the networks, also as shares of the faster dense limit's."""

    def lines() -> Iterator[tuple[str, ...]]:
        for (_, subject, direction, batch), variants in networks(rows).items():
            dense = [variants[name] for name in DENSE if name in variants]
            limit = min(dense, key=lambda row: row["median_ms"]) if dense else None
            for name, row in variants.items():
                low, high = row["quartiles_ms"]
                share = row["median_ms"] / limit["median_ms"] if limit else None
                macs = row["macs"] / limit["macs"] if limit and row["macs"] else None
                yield (
                    subject,
                    direction,
                    str(batch),
                    name,
                    f"{row['median_ms']:.4g} ms",
                    f"{low:.4g}–{high:.4g}",
                    f"{row['macs'] / 1e6:,.1f} M" if row["macs"] else "",
                    "" if share is None else f"{share:.2f}",
                    "" if share is None or macs is None else f"{share / macs:.2f}",
                )

    heads = ("network", "", "batch", "as", "median", "quartiles", "MACs", "time / limit", "time / MACs")
    return _markdown(heads, lines())


def layer_shares(rows: Rows) -> Iterator[tuple[dict[str, Any], float, float]]:
    """Each layer's row, and its time and MACs as shares of those of the dense limit in its faster memory format."""
    layers = [row for row in rows if "side" in row]
    for row in layers:
        same = [other for other in layers if all(other[key] == row[key] for key in ("subject", "direction", "batch"))]
        limit = min((other for other in same if other["variant"] in DENSE), key=lambda other: other["median_ms"])
        yield row, row["median_ms"] / limit["median_ms"], row["macs"] / limit["macs"]


def _layer_claims(rows: Rows) -> str:
    """What was asked of the separable layers, and what was measured."""
    heads = ("3x3 layer", "", "form", "takes at most, of the dense limit", "measured", "holds")
    return _markdown(heads, _layer_lines(rows))


def _layer_lines(rows: Rows) -> Iterator[tuple[str, ...]]:
    for row, share, _ in layer_shares(rows):
        layer = row.get("group"), row.get("width")
        if row["variant"] in ("gc", "gc_in") and layer in LAYER_CLAIMS:
            limit = LAYER_CLAIMS[layer] * (1 if row["direction"] == "forward" else BACKWARD)
            holds = "yes" if share <= limit else "no"
            yield row["subject"], row["direction"], row["variant"], f"{limit:.3g}", f"{share:.3f}", holds


def _missed(rows: Rows) -> str:
    """Which of the two tables' targets are missed, in words."""
    shares = [(claim, ratio(rows, claim)) for claim in CLAIMS]
    networks = [(claim, share[0] <= claim.limit) for claim, share in shares if share is not None]
    layers = [line[-1] == "yes" for line in _layer_lines(rows)]
    missed = [f"{c.subject}, {c.direction}, batch {c.batch}, {c.ours}" for c, holds in networks if not holds]
    said = f"Of {len(networks)} targets for networks {len(missed)} are missed" + (
        f": {'; '.join(missed)}." if missed else "."
    )
    return f"{said} Of {len(layers)} targets for layers {layers.count(False)} are missed."


def _layers(rows: Rows) -> str:
    """Time, and MACs, of every kind of layer as shares of the dense limit's."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    kinds: dict[str, None] = {}
    for row, share, macs in layer_shares(rows):
        if row["variant"] not in DENSE:
            kinds[row["variant"]] = None
            cells.setdefault((row["subject"], row["direction"]), {})[row["variant"]] = f"{share:.2f} ({macs:.2f})"
    return _markdown(
        ("3x3 layer: time (MACs) / limit", "", *kinds),
        ((*key, *(of_kind.get(kind, "") for kind in kinds)) for key, of_kind in cells.items()),
    )


def conversion_ratios(sections: dict[str, Rows], variant: str = "converted") -> list[float]:
    """The time of each converted network, or of a copy of each original, over that of its original."""
    times: dict[str, dict[str, float]] = {}
    for row in sections.get("conversions", []):
        times.setdefault(row["subject"], {})[row["variant"]] = row["median_ms"]
    return [own[variant] / own["original"] for own in times.values()]


def _conversions(sections: dict[str, Rows]) -> str:
    """How many converted networks are slower than their originals, in words."""
    found = sorted(conversion_ratios(sections))
    if not found:
        return ""
    copies = sorted(conversion_ratios(sections, "copy"))
    slower = sum(value > 1 for value in found)
    beyond = sum(value > copies[-1] for value in found)
    return (
        f"Of {len(found)} random conversions {slower} came out slower than the original, {beyond} of them by more than "
        f"copies of the originals differ from them ({copies[0]:.2f} to {copies[-1]:.2f} of its time). They take "
        f"{found[0]:.2f} to {found[-1]:.2f} of the original's time, half of them {found[len(found) // 2]:.2f} or less."
    )


def _start_up(sections: dict[str, Rows]) -> str:
    """The seconds that a conversion takes as a whole process, in words."""
    times = {row["variant"]: row["median_ms"] / 1000 for row in sections.get("start-up", [])}
    if not times:
        return ""
    allowed = 1.3 * times["import torch"] + 1
    return (
        f"`analysis.decompose` converts a P4CNN in {times['decompose']:.1f} s, the start of the process included (at "
        f"most {allowed:.1f} s asked). Importing PyTorch alone takes {times['import torch']:.1f} s."
    )


GRAPH = ", CUDA graph"


def gpu_shares(rows: Rows) -> Iterator[tuple[tuple[str, str, str], float, dict[str, tuple[float, float]]]]:
    """Each network, direction and precision, the milliseconds of its dense limit as a CUDA graph, and shares of it.

    There are two shares for each variant: its time as a CUDA graph over that of the limit as a CUDA graph, and its time
    with operations launched one by one over that of the limit with operations launched one by one.
    """
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        times.setdefault((row["subject"], row["direction"], row["precision"]), {})[row["variant"]] = row["median_ms"]
    for key, own in times.items():
        limits = [min(own[name + mode] for name in DENSE) for mode in (GRAPH, "")]
        variants = [name for name in own if not name.endswith(GRAPH) and name not in DENSE]
        yield key, limits[0], {name: (own[name + GRAPH] / limits[0], own[name] / limits[1]) for name in variants}


def _gpu(sections: dict[str, Rows]) -> str:
    """Networks on a GPU as shares of the dense limit."""
    rows = sections.get("gpu", [])
    if not rows:
        return ""
    variants = ("gconv", "gconv, fused", "gconv, exported")

    def lines() -> Iterator[tuple[str, ...]]:
        for (subject, direction, precision), limit, shares in gpu_shares(rows):
            cells = (f"{shares[name][0]:.2f} ({shares[name][1]:.2f})" if name in shares else "" for name in variants)
            yield subject, direction, precision, f"{limit:.2f} ms", *cells

    heads = (f"{rows[0]['device']}: graph (launched) / limit", "", "", "limit, graph", *variants)
    return _markdown(heads, lines())


def _markdown(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *lines]) if lines else ""
