"""``python -m analysis.redundancy``: how redundant the filters of a network are, compared with chance."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

from gconv.system.cli import Parser, loading, main_args, number, run
from gconv.system.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from analysis.measures.table import Redundancy

PROG = "python -m analysis.redundancy"

# The measures on the screen: heading, measure, part, rank.
_SHOWN = (
    ("g", "explained_energy", "g", 1),
    ("gc", "explained_energy", "gc", 1),
    ("gc_in", "explained_energy", "gc_in", 1),
    ("effective rank\nof space", "effective_rank", "space", None),
    ("invariance\nas stored", "invariance", "average", None),
    ("invariance\ntransformed back", "invariance_turned", "average", None),
)
_TITLE = "explained energy at rank 1 in each form, and other measures"
# A file or a pipe has no width, and the table must not be folded there at 80 columns.
_WIDTH_ELSEWHERE = 160


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = Parser(
        PROG,
        "Measure how redundant the filters of a network are, along space, the group axis and the channels. For\n"
        "comparison the same measures are taken of two nulls: filters drawn from each layer's initialisation, and the\n"
        "trained entries in random order. FILE is a checkpoint of this project, or a state dict (.pt, .pth,\n"
        ".safetensors) of a plain, a GrouPy or an exported group network. Several FILEs must be snapshots of one\n"
        "training run; then the measures are shown for every epoch.",
        "  python -m analysis.redundancy checkpoints/p4cnn-rotmnist-regen.pt\n"
        "  python -m analysis.redundancy checkpoints/p4cnn-rotmnist-regen/epoch-*.pt --csv trace.csv\n"
        "  python -m analysis.redundancy weights.safetensors --group p4m --json > redundancy.json",
    )
    p.add_argument(
        "files", metavar="FILE", nargs="+", help="a checkpoint or a state dict, or several snapshots of a run"
    )
    p.add_argument("--group", metavar="G", help="the group of a network that does not say it: z2, p2, p4, pm, pmm, p4m")
    p.add_argument(
        "--draws", type=number(int, 0), default=20, metavar="D", help="draws of each null, default 20; 0 for no nulls"
    )
    p.add_argument("--seed", type=number(int, 0), default=0, metavar="S", help="seed of the nulls, default 0")
    p.add_argument("--csv", metavar="OUT", help="write the whole table to this file")
    p.add_argument("--force", action="store_true", help="replace OUT if it exists")
    p.add_argument(
        "--json", action="store_true", help="print the whole table as JSON on stdout, everything else on stderr"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (:func:`gconv.system.cli.run`)."""
    args = parser().parse_args(main_args(argv))
    return run(PROG, lambda: _command(args))


def _command(args: argparse.Namespace) -> None:
    # The arguments are checked before anything slow is imported or read.
    if args.draws == 1:
        raise InputError("--draws is 1; give at least 2, or 0 for no nulls")
    if args.group is not None and len(args.files) > 1:
        raise InputError("--group is for one FILE; leave it out for snapshots of a run, whose files say their group")

    with loading():
        from analysis.measures.table import redundancy, redundancy_over_epochs
        from gconv.system.files import check_output

    out = None if args.csv is None else check_output(args.csv, force=args.force)
    if len(args.files) > 1:
        table = redundancy_over_epochs(args.files, draws=args.draws, seed=args.seed)
    else:
        table = redundancy(args.files[0], group=args.group, draws=args.draws, seed=args.seed)
    if out is not None:
        table.to_csv(out)
    print_redundancy(table, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        json.dump({"files": args.files, **table.to_dict()}, sys.stdout, indent=2, allow_nan=False)
        print()
    elif out is not None:
        print(f"written: {out}")


def print_redundancy(table: Redundancy, *, file: IO[str]) -> None:
    """Print the main measures of each layer or of each epoch, and what was left out.

    Args:
        table: the table.
        file: an open text stream.
    """
    from rich.console import Console

    console = Console(file=file, width=None if file.isatty() else _WIDTH_ELSEWHERE, highlight=False, markup=False)
    for picture in _against_epoch(table) if table.rows and "epoch" in table.rows[0] else _per_layer(table):
        console.print(picture)
    if not table.rows:
        console.print("there is nothing to measure: the network has no convolution")
    elif table.draws:
        console.print(
            f"In brackets: the mean of {table.draws} filters drawn from the initialisation, and the distance of the "
            "value from that mean, in standard deviations of these filters."
        )
    for note in table.notes:
        console.print(f"note: {note}", style="dim")


def _per_layer(table: Redundancy) -> list[Table]:
    found = {(row["layer"], *_key(row)): row for row in table.rows}
    layers = {row["layer"]: row for row in table.rows}
    shown = [column for column in _SHOWN if any((layer, *column[1:]) in found for layer in layers)]
    picture = _picture(f"{_TITLE}, by layer", "layer", "filter", *(heading for heading, *_ in shown))
    for name, row in layers.items():
        cells = (_cell(found.get((name, *column[1:]))) for column in shown)
        picture.add_row(name, _filter(row), *cells)
    return [picture] if layers else []


def _against_epoch(table: Redundancy) -> list[Table]:
    """One picture with the whole network's measures by epoch, and one with the first measure by layer and epoch."""
    from analysis.measures.table import NETWORK

    found = {(row["epoch"], row["layer"], *_key(row)): row for row in table.rows}
    epochs = list(dict.fromkeys(row["epoch"] for row in table.rows))
    layers = {row["layer"]: row for row in table.rows}
    shown = [column for column in _SHOWN if any((epoch, NETWORK, *column[1:]) in found for epoch in epochs)]
    whole = _picture(f"{_TITLE}, of the whole network", "epoch", *(heading for heading, *_ in shown))
    for epoch in epochs:
        whole.add_row(str(epoch), *(_cell(found.get((epoch, NETWORK, *column[1:]))) for column in shown))
    pictures = [whole]
    for heading, *key in shown[:1]:
        picture = _picture(f"{heading}, by layer and epoch", "layer", "filter", *map(str, epochs))
        for name, row in layers.items():
            values = (found.get((epoch, name, *key)) for epoch in epochs)
            picture.add_row(name, _filter(row), *(_cell(value, with_null=False) for value in values))
        pictures.append(picture)
    return pictures


def _key(row: dict[str, Any]) -> tuple[str, str, int | None]:
    return row["measure"], row["part"], row["rank"]


def _picture(title: str, first: str, *headings: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    picture = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    picture.add_column(first, no_wrap=True)
    for heading in headings:
        picture.add_column(heading)
    return picture


def _filter(row: dict[str, Any]) -> str:
    if row["depth"] is None:
        return row["group"] or ""
    return f"{row['group']} {row['kind']} {row['out_channels']}x{row['in_channels']}, k={row['kernel_size']}"


def _cell(row: dict[str, Any] | None, *, with_null: bool = True) -> str:
    if row is None:
        return "-"
    mean, z = row["init_mean"], row["init_z"]
    known = with_null and not math.isnan(mean)
    null = "" if not known else f" ({mean:.2f})" if math.isnan(z) else f" ({mean:.2f}, {z:+.0f})"
    return f"{row['value']:.2f}{null}"


if __name__ == "__main__":
    sys.exit(main())
