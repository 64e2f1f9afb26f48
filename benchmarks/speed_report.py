"""The table and the figure that README.md shows, from the records of :mod:`benchmarks.speed`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gconv.system.errors import InputError

FIGURE = "speed.png"
Rows = list[dict[str, Any]]


class Bar(NamedTuple):
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
BARS = (
    Bar("p4cnn", "training", 128, "gconv", DENSE, 1.0),
    Bar("p4cnn", "training", 128, "gconv", PEERS, 1 / 1.2),
    Bar("p4cnn", "inference", 128, "gconv, fused", DENSE, 0.85),
    Bar("p4cnn", "inference", 128, "gconv, fused", DEPLOYED, 1 / 1.6),
    Bar("p4cnn", "inference", 1, "gconv, fused", DENSE, 1.0),
    Bar("p4cnn", "inference", 128, "gconv, exported", DENSE, 0.85),
    Bar("p4cnn", "inference", 128, "gconv, exported", DEPLOYED, 1 / 1.6),
    Bar("p4cnn", "inference", 1, "gconv, exported", DENSE, 1.0),
    Bar("p4m-resnet44", "training", 32, "gconv", PEERS, 1 / 1.1),
    Bar("p4m-resnet44", "inference", 32, "gconv, fused", DEPLOYED, 1 / 1.25),
    # The network of 3.08 G multiply-accumulates is the limit; our full one takes fewer.
    Bar("p4m-resnet44", "training", 32, "gconv, gc", DENSE, 1 / 1.8),
    Bar("p4m-resnet44", "inference", 32, "gconv, gc, fused", DENSE, 1 / 2.5),
    Bar("p4m-resnet44", "training", 32, "gconv, gc", ("gconv",), 1 / 1.8),
    Bar("p4m-resnet44", "inference", 32, "gconv, gc, fused", ("gconv, fused",), 1 / 2.5),
)
LAYER_BARS = {("p4", 10): 0.25, ("p4", 64): 0.15, ("p4m", 28): 0.15, ("p4m", 64): 0.11, ("p4m", 128): 0.09}
"""What ``gc`` and ``gc_in`` layers take of the dense limit, forward; with backward 1.2 times that."""
BACKWARD = 1.2


def load(folder: Path) -> dict[str, Rows]:
    """The rows of each section that has a record, each row with its section: only rows of one were measured in turns.

    Raises:
        InputError: there is none.
    """
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise InputError(f"no records in {folder}; `python -m benchmarks.speed` makes them")
    return {record["section"]: [{**row, "section": record["section"]} for row in record["rows"]] for record in records}


def table(folder: Path, *, every: bool = False) -> str:
    """As Markdown what was claimed, and the layers; with ``every`` all networks too."""
    sections = load(folder)
    rows = _on_cpu(sections)
    parts = [
        _bars(rows),
        _layer_bars(rows),
        _conversions(sections),
        _start_up(sections),
        _networks(rows) if every else "",
        _layers(rows),
        _gpu(sections),
    ]
    return "\n\n".join(part for part in parts if part)


def _on_cpu(sections: dict[str, Rows]) -> Rows:
    return [row for name, of_section in sections.items() if name != "gpu" for row in of_section]


def networks(rows: Rows) -> dict[tuple[str, str, str, int], dict[str, dict[str, Any]]]:
    """The rows of networks by section, subject, direction and batch, and then by variant: what can be compared."""
    found: dict[tuple[str, str, str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row.get("direction") in ("training", "inference") and "request" not in row:
            key = row["section"], row["subject"], row["direction"], row["batch"]
            found.setdefault(key, {})[row["variant"]] = row
    return found


def ratio(rows: Rows, bar: Bar) -> tuple[float, str] | None:
    """The time of ours over that of the fastest of the others, and which that is; None without records of both."""
    for (_, *key), variants in networks(rows).items():
        others = [name for name in bar.others if name in variants]
        if key == [bar.subject, bar.direction, bar.batch] and bar.ours in variants and others:
            best = min(others, key=lambda name: variants[name]["median_ms"])
            return variants[bar.ours]["median_ms"] / variants[best]["median_ms"], best
    return None


def _bars(rows: Rows) -> str:
    found = [(bar, ratio(rows, bar)) for bar in BARS]
    return _markdown(
        ("network", "", "batch", "what", "against the fastest of", "takes at most", "measured", "holds"),
        (
            (
                bar.subject,
                bar.direction,
                str(bar.batch),
                bar.ours,
                " / ".join(bar.others),
                f"{bar.limit:.2f}",
                f"{value[0]:.2f}" + (f" ({value[1]})" if len(bar.others) > 1 else ""),
                "yes" if value[0] <= bar.limit else "no",
            )
            for bar, value in found
            if value is not None
        ),
    )


def _networks(rows: Rows) -> str:
    """Times of the networks, with the fastest dense limit at 1."""

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
    """Each layer's row, its time and its MACs as shares of the dense limit's in its faster memory format."""
    layers = [row for row in rows if "side" in row]
    for row in layers:
        same = [other for other in layers if all(other[key] == row[key] for key in ("subject", "direction", "batch"))]
        limit = min((other for other in same if other["variant"] in DENSE), key=lambda other: other["median_ms"])
        yield row, row["median_ms"] / limit["median_ms"], row["macs"] / limit["macs"]


def _layer_bars(rows: Rows) -> str:
    def lines() -> Iterator[tuple[str, ...]]:
        for row, share, _ in layer_shares(rows):
            limit = LAYER_BARS.get((row.get("group"), row.get("width")))
            if row["variant"] in ("gc", "gc_in") and limit is not None:
                limit *= 1 if row["direction"] == "forward" else BACKWARD
                holds = "yes" if share <= limit else "no"
                yield row["subject"], row["direction"], row["variant"], f"{limit:.3g}", f"{share:.3f}", holds

    return _markdown(("3x3 layer", "", "form", "takes at most, of the dense limit", "measured", "holds"), lines())


def _layers(rows: Rows) -> str:
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
    """Time of each converted network, or of the copy of each original, over its original's."""
    times: dict[str, dict[str, float]] = {}
    for row in sections.get("conversions", []):
        times.setdefault(row["subject"], {})[row["variant"]] = row["median_ms"]
    return [own[variant] / own["original"] for own in times.values()]


def _conversions(sections: dict[str, Rows]) -> str:
    found = sorted(conversion_ratios(sections))
    if not found:
        return ""
    copies = sorted(conversion_ratios(sections, "copy"))
    slower = sum(value > 1 for value in found)
    beyond = sum(value > copies[-1] for value in found)
    text = (
        f"Of {len(found)} random conversions {slower} came out slower than the original, {beyond} of them by more than"
    )
    text = f"{text} copies of the originals differ from them ({copies[0]:.2f} to {copies[-1]:.2f} of its time)"
    return f"{text}; they take {found[0]:.2f} to {found[-1]:.2f}, half of them {found[len(found) // 2]:.2f} or less."


def _start_up(sections: dict[str, Rows]) -> str:
    times = {row["variant"]: row["median_ms"] / 1000 for row in sections.get("start-up", [])}
    if not times:
        return ""
    allowed = 1.3 * times["import torch"] + 1
    text = f"`analysis.decompose` of a P4CNN takes {times['decompose']:.1f} s as a whole process"
    return f"{text}, importing PyTorch alone {times['import torch']:.1f} s (at most {allowed:.1f} s asked)."


GRAPH = ", CUDA graph"


def gpu_shares(rows: Rows) -> Iterator[tuple[tuple[str, str, str], float, dict[str, tuple[float, float]]]]:
    """For each network, direction and precision: milliseconds of the dense limit as a graph, and shares of the limit.

    The shares, by variant, are of a recorded graph against the limit as one, and of operations that are launched one by
    one against the limit's.
    """
    times: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        times.setdefault((row["subject"], row["direction"], row["precision"]), {})[row["variant"]] = row["median_ms"]
    for key, own in times.items():
        limits = [min(own[name + mode] for name in DENSE) for mode in (GRAPH, "")]
        variants = [name for name in own if not name.endswith(GRAPH) and name not in DENSE]
        yield key, limits[0], {name: (own[name + GRAPH] / limits[0], own[name] / limits[1]) for name in variants}


def _gpu(sections: dict[str, Rows]) -> str:
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


def draw(folder: Path) -> Path:
    """Write the figure: layers against their MACs, and the networks beside the others."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import seaborn as sns
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    rows = _on_cpu(load(folder))
    colors = sns.color_palette("colorblind")
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", width_ratios=[1.1, 1, 1])
    axis = axes[0]
    shares = [
        (row, share, macs) for row, share, macs in layer_shares(rows) if row["variant"] not in (*DENSE, "lifting")
    ]
    kinds = list(dict.fromkeys(row["variant"] for row, _, _ in shares))
    for number, kind in enumerate(kinds):
        for direction in ("forward", "forward and backward"):
            own = [
                (macs, share) for row, share, macs in shares if (row["variant"], row["direction"]) == (kind, direction)
            ]
            filled = direction == "forward"
            color = colors[number]
            axis.plot(
                *zip(*own, strict=True),
                "o^svDP"[number % 6],
                color=color,
                mfc=color if filled else "none",
                ls="none",
                label=kind if filled else None,
            )
    axis.plot([0.05, 1.2], [0.05, 1.2], color="0.4", lw=0.8, ls=":")
    ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
    axis.set(xscale="log", yscale="log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_locator(FixedLocator(ticks))
        scale.set_minor_locator(NullLocator())
        scale.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set(xlabel="MACs / those of the dense limit", ylabel="time / that of the dense limit", title="3x3 layers")
    title = "open: with backward"
    axis.legend(frameon=False, loc="lower right", title=title, fontsize="small", title_fontsize="small")
    for axis, direction in zip(axes[1:], ("training", "inference"), strict=True):
        _network_bars(axis, rows, direction, colors)
    path = folder / FIGURE
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _network_bars(axis: Any, rows: Rows, direction: str, colors: Any) -> None:
    variants = ("gconv", "gconv, fused", *DENSE, "lists", "escnn", "escnn, exported", "gconv, gc", "gconv, gc, fused")
    position = 0
    ticks, labels = [], []
    for subject, batch in (("p4cnn", 128), ("p4m-resnet44", 32)):
        key = [subject, direction, batch]
        found = [own for (_, *of), own in networks(rows).items() if of == key and any(name in own for name in DENSE)]
        if not found:
            continue
        own = found[0]
        limit = min(own[name]["median_ms"] for name in DENSE if name in own)
        for name in (name for name in variants if name in own):
            ours = name.startswith("gconv")
            low, high = (value / limit for value in own[name]["quartiles_ms"])
            share = own[name]["median_ms"] / limit
            axis.barh(
                position, share, color=colors[0 if ours else 7], xerr=[[share - low], [high - share]], ecolor="0.3"
            )
            ticks.append(position)
            labels.append(f"{subject}  {name}" if name == "gconv" else name)
            position += 1
        position += 1
    axis.axvline(1, color="0.4", lw=0.8, ls=":")
    axis.set_yticks(ticks, labels, fontsize="small")
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set(xlabel="time / that of the dense limit", title=direction)
