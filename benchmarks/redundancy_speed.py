"""The time of the redundancy table, compared with a loop over blocks: ``python -m benchmarks.redundancy_speed``.

The whole table with its default nulls is made for p4m-resnet44. With fewer draws, the same measures are also computed
in the simplest way, by a Python loop over the blocks with NumPy's SVD. All take turns in one process and may use all
cores, and their medians are compared. Table and loop must give the same values.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gconv
from analysis import filter_banks, redundancy
from analysis.filters.banks import FilterBank
from analysis.measures.null_models import NULLS, null_filters
from gconv.groups.irreps import irreps
from gconv.system.cli import Parser, number
from gconv.system.files import atomic_path, check_output

PROG = "python -m benchmarks.redundancy_speed"
BUDGET_SECONDS = 15
BUDGET_RATIO = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and record; returns 0 if both budgets hold, else 1."""
    p = Parser(PROG, __doc__ or "", f"  {PROG} --json out/speed.json")
    p.add_argument("--rounds", type=number(int, 1), default=3, help="how often each is measured, default 3")
    p.add_argument("--draws", type=number(int, 2), default=5, help="draws of each null in the comparison, default 5")
    p.add_argument("--json", metavar="OUT", help="also write the record here")
    args = p.parse_args(argv)
    if args.json:
        check_output(args.json, force=True)
    record = measure(args.rounds, args.draws)
    show(record)
    if args.json:
        with atomic_path(args.json) as temporary:
            Path(temporary).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    in_time = record["median_seconds"]["whole table"] < BUDGET_SECONDS and record["ratio"] >= BUDGET_RATIO
    return 0 if in_time and record["largest_difference"] < 1e-9 else 1


def measure(rounds: int, draws: int) -> dict[str, Any]:
    """The record: seconds of the whole table, of a table with these draws, and of the loop, which take turns."""
    torch.manual_seed(0)
    banks = filter_banks(gconv.create_model("p4m-resnet44"))
    redundancy(banks[:3], draws=2)  # so that nothing is imported while time is measured
    runs: dict[str, Callable[[], Any]] = {
        "whole table": lambda: redundancy(banks),
        "table": lambda: redundancy(banks, draws=draws),
        "loop": lambda: [block_by_block(bank, depth, draws) for depth, bank in enumerate(banks)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results = {}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "network": "p4m-resnet44",
        "layers": len(banks),
        "entries": sum(bank.weight.numel() for bank in banks),
        "threads": torch.get_num_threads(),
        "draws_whole_table": results["whole table"].draws,
        "draws_compared": draws,
        "seconds": seconds,
        "median_seconds": median,
        "ratio": median["loop"] / median["table"],
        "largest_difference": largest_difference(results["table"].rows, results["loop"], [bank.name for bank in banks]),
    }


def show(record: dict[str, Any]) -> None:
    """Print a record."""
    layers, entries, draws = record["layers"], record["entries"], record["draws_compared"]
    print(f"{record['network']}: {layers} layers, {entries:,} filter entries, {record['threads']} threads")
    print(f"{'':<44}{'median':>9}  runs")
    for name, label in (
        ("whole table", f"whole table, {record['draws_whole_table']} draws of each null"),
        ("table", f"table, {draws} draws of each null"),
        ("loop", f"loop over blocks and numpy.linalg.svd, {draws}"),
    ):
        times = " ".join(f"{value:.2f}" for value in record["seconds"][name])
        print(f"{label:<44}{record['median_seconds'][name]:>7.2f} s  {times}")
    print(
        f"The loop takes {record['ratio']:.1f} times as long as the table (at least {BUDGET_RATIO} asked). "
        f"Their values agree to {record['largest_difference']:.1e}."
    )


def block_by_block(bank: FilterBank, depth: int, draws: int) -> dict[tuple[str, str, int], list[float]]:
    """The table's measures of one layer, by (measure, part, rank): the trained filter's value, then each draw's."""
    filters = [bank.weight.numpy()]
    for null_number, null in enumerate(NULLS):
        rng = np.random.default_rng([0, depth, null_number])
        filters += [one for batch in null_filters(bank, null, draws, rng) for one in batch.numpy()]
    found: dict[tuple[str, str, int], list[float]] = {}
    for weight in filters:
        for key, value in _measures(weight, bank.group).items():
            found.setdefault(key, []).append(value)
    return found


def _measures(weight: np.ndarray, group: gconv.Group) -> dict[tuple[str, str, int], float]:
    o, i, s, k, _ = weight.shape
    stored = weight.reshape(o, i, s, k * k)
    turned = stored
    if s > 1:
        back = group.pixel_table(k)[group.inverse]
        turned = np.stack([stored[:, :, t, back[t]] for t in range(s)], axis=2)
    found: dict[tuple[str, str, int], float] = {}

    if s > 1:
        forms = {
            "g": [stored[a, b] for a in range(o) for b in range(i)],
            "gc": [stored[a].reshape(i * s, k * k) for a in range(o)],
            "gc_in": [turned[:, b].reshape(o * s, k * k) for b in range(i)],
        }
        for form, blocks in forms.items():
            if k > 1:
                _ranked(found, "explained_energy", form, np.sum([_svd(block) for block in blocks], axis=0))
                centred = np.sum([_svd(block - block.mean(0)) for block in blocks], axis=0)
                _ranked(found, "pca_explained_variance", form, centred[: min(len(blocks[0]) - 1, k * k)])
        for frame, kernels in (("", stored), ("_turned", turned)):
            cosines, gram = 0.0, np.zeros((s, s))
            for a in range(o):
                for b in range(i):
                    products = kernels[a, b] @ kernels[a, b].T
                    norms = np.sqrt(np.diagonal(products))
                    cosines += ((products / np.outer(norms, norms)).sum() - s) / (s * (s - 1))
                    gram += products
            energy = np.trace(gram)
            found[f"cosine{frame}", "mean", 0] = cosines / (o * i)
            found[f"invariance{frame}", "average", 0] = gram.mean() * s / energy
            for irrep in irreps(group):
                found[f"irrep_energy{frame}", irrep.name, 0] = (irrep.projector * gram).sum() / energy
    for axis, along in enumerate(("out", "in", "group", "space")):
        unfolded = np.moveaxis(stored, axis, 0).reshape(stored.shape[axis], -1)
        if min(unfolded.shape) > 1:
            _ranked(found, "hosvd_energy", along, _svd(unfolded))
    return found


def _svd(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False) ** 2


def _ranked(found: dict[tuple[str, str, int], float], measure: str, part: str, energies: np.ndarray) -> None:
    shares = energies / energies.sum()
    kept = shares.cumsum()
    found |= {(measure, part, rank): value for rank, value in enumerate(kept, start=1)}
    if measure != "pca_explained_variance":
        found["effective_rank", part, 0] = np.exp(-(shares * np.log(np.maximum(shares, 1e-300))).sum())
        found["stable_rank", part, 0] = 1 / shares[0]
        for target in (90, 95, 99):
            found[f"rank_{target}", part, 0] = 1.0 + (kept[:-1] < target / 100 - 1e-12).sum()


def largest_difference(rows: list[dict[str, Any]], loop: list[dict[Any, list[float]]], names: list[str]) -> float:
    """The largest difference between table and loop, over the trained values and the means of the nulls."""
    table = {(row["layer"], row["measure"], row["part"], row["rank"] or 0): row for row in rows}
    differences = []
    for name, found in zip(names, loop, strict=True):
        for key, (trained, *drawn) in found.items():
            row = table[name, *key]
            half = len(drawn) // 2
            for column, value in (
                ("value", trained),
                ("init_mean", np.mean(drawn[:half])),
                ("shuffled_mean", np.mean(drawn[half:])),
            ):
                differences.append(abs(row[column] - value))
    return float(max(differences))


if __name__ == "__main__":
    sys.exit(main())
