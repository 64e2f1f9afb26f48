"""The redundancy table: every measure of every layer and of the whole network, beside its nulls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analysis.filters.banks import FilterBank, FilterBanks, Skipped, filter_banks
from gconv.groups.point_groups import Group
from gconv.models import checkpoint
from gconv.system.errors import InputError
from gconv.system.files import atomic_path
from gconv.system.tensor_files import check_finite

from .measures import MEASURED_FORMS, RANKED, Key, pool, spectra, values
from .null_models import NULLS, Band, band, null_filters
from .spectra import UNFOLDINGS

DRAWS = 20
NETWORK = "(network)"
_LAYER_COLUMNS = ("layer", "depth", "group", "kind", "out_channels", "in_channels", "kernel_size", "residual")
_NULL_COLUMNS = tuple(f"{null}_{statistic}" for null in NULLS for statistic in Band._fields)
COLUMNS = (*_LAYER_COLUMNS, "measure", "part", "rank", "value", *_NULL_COLUMNS)
_WHOLE = ("epoch", "depth", "out_channels", "in_channels", "kernel_size", "rank")


@dataclass(frozen=True)
class Redundancy:
    """A tidy table: one row for each layer, measure, part and rank.

    Columns:
        ``epoch`` (only from :func:`redundancy_over_epochs`), ``layer``, ``depth`` (from 0), ``group``, ``kind``,
        ``out_channels``, ``in_channels``, ``kernel_size``, ``residual`` (of the generator, :class:`.FilterBank`);
        ``measure``; ``part``, the form, unfolding, irrep or group element that it is taken of; ``rank``, where it is
        one of a spectrum; ``value``; and for the nulls ``init`` and ``shuffled`` each ``_mean``, ``_low`` and
        ``_high`` (the 95 % interval of a draw) and ``_z`` (:mod:`analysis.measures.null_models`). The rows of the layer
        ``(network)``
        are pooled (:func:`analysis.measures.measures.pool`).

    Measures:
        ``explained_energy``, ``pca_explained_variance`` (parts: forms) and ``hosvd_energy`` (parts: unfoldings), each
        cumulative in the rank; ``effective_rank``, ``stable_rank``, ``rank_90``, ``rank_95``, ``rank_99`` (of forms and
        unfoldings); ``cosine``, ``invariance`` (parts: the group ``average`` and each element) and ``irrep_energy``,
        and the same three with ``_turned``, of kernels turned back by their element.

    Attributes:
        rows: the table; values that are not defined are NaN, entries that do not apply None.
        skipped: layers that gave no filter bank, each with its name and the reason.
        inferred: where the source does not say its group, which one was taken and from what; else None.
        residual: the largest of the layers whose generator was taken back from an expanded filter; None if none was.
        draws: how many filters each null drew; 0 if there are none.
        seed: of the nulls.
    """

    rows: list[dict[str, Any]]
    skipped: list[Skipped] = field(default_factory=list)
    inferred: str | None = None
    residual: float | None = None
    draws: int = DRAWS
    seed: int = 0

    @property
    def notes(self) -> list[str]:
        """What a reader has to know beside the numbers: an inferred group, the residual, what was skipped."""
        notes = [] if self.inferred is None else [self.inferred]
        if self.residual is not None:
            notes.append(
                f"generators taken back from expanded filters, relative residual up to {self.residual:.1e}; the null "
                "init draws free filters, so what a band-limited basis such as escnn's imposes passes for learned"
            )
        return notes + [f"skipped {layer.name}: {layer.reason}" for layer in self.skipped]

    def to_frame(self) -> pd.DataFrame:
        """The table for pandas; whole numbers that may be absent have its nullable type."""
        columns = COLUMNS if not self.rows or "epoch" not in self.rows[0] else ("epoch", *COLUMNS)
        frame = pd.DataFrame(self.rows, columns=columns)
        return frame.astype({name: "Int64" for name in _WHOLE if name in columns})

    def to_csv(self, path: str | Path) -> None:
        """Write the table, whole or not at all; what is absent or not defined is an empty field.

        Raises:
            InputError: the path cannot be written.
        """
        with atomic_path(path) as temporary:
            self.to_frame().to_csv(temporary, index=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is absent or not defined is None."""
        # NaN is the one number that differs from itself.
        rows = [{name: entry if entry == entry else None for name, entry in row.items()} for row in self.rows]
        skipped = [asdict(layer) for layer in self.skipped]
        about = {name: getattr(self, name) for name in ("draws", "seed", "inferred", "residual", "notes")}
        return {**about, "skipped": skipped, "rows": rows}


def redundancy(
    source: nn.Module | Mapping[str, Tensor] | str | Path | list[FilterBank],
    *,
    group: str | Group | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Redundancy:
    """Measure how redundant the filters of a network are, and how much of that is chance.

    Args:
        source: a network, a state dict or a file of weights, as :func:`analysis.filter_banks` takes it; or a list of
            filter banks.
        group: the group of a network that does not say it.
        draws: filters that each null draws for every layer; 0 for no nulls. The same source, draws and seed give the
            same table.
        seed: of the nulls.

    Raises:
        InputError: draws is 1 or negative, the seed is negative, a filter is not finite, or the source cannot be read.
    """
    if not isinstance(draws, int) or draws < 0 or draws == 1:
        raise InputError(f"draws is {draws!r}; accepted: a whole number of at least 2, or 0 for no nulls")
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}; accepted: a whole number of at least 0")
    if isinstance(source, list):
        banks = source if isinstance(source, FilterBanks) else FilterBanks(source)
        check_finite({bank.name: bank.weight for bank in banks}, "the list of filter banks")
    else:
        banks = filter_banks(source, group=group)
    with _side_by_side() as workers:
        jobs = workers.map(lambda depth: _layer(banks[depth], depth, draws, seed), range(len(banks)))
        layers = list(tqdm(jobs, "measuring", len(banks), leave=False, disable=None, delay=1))
    residual = max((bank.residual for bank in banks if bank.taken_back), default=None)
    rows = [row for depth, bank in enumerate(banks) for row in _rows(_describe(bank, depth), layers[depth])]
    return Redundancy(rows + _network_rows(banks, layers), banks.skipped, banks.inferred, residual, draws, seed)


def redundancy_over_epochs(paths: Iterable[str | Path], *, draws: int = DRAWS, seed: int = 0) -> Redundancy:
    """The tables of several snapshots of one training run as one, with a column ``epoch``.

    Args:
        paths: checkpoints that ``gconv.train`` wrote: its snapshots, or the finished network.
        draws: as :func:`redundancy`.
        seed: as :func:`redundancy`; the same for all, so that the nulls of an epoch are those of the others.

    Returns:
        Ordered by epoch.

    Raises:
        InputError: a file is no checkpoint or its record tells no epoch, two are of the same one, or the networks
            differ.
    """
    snapshots: dict[int, tuple[str | Path, FilterBanks]] = {}
    for path in paths:
        read = checkpoint.read(path)
        epoch = read.record.get("epoch", len(read.record.get("history", [])) or None)
        if epoch is None:
            raise InputError(f"{path} does not tell its epoch; accepted: snapshots and networks of gconv.train")
        if epoch in snapshots:
            raise InputError(f"{path} and {snapshots[epoch][0]} are both of epoch {epoch}; accepted: one of each")
        snapshots[epoch] = path, filter_banks(read.model)
    ordered = sorted(snapshots.items())
    shapes = [[(bank.name, bank.group, bank.weight.shape) for bank in banks] for _, (_, banks) in ordered]
    for (_, (path, _)), shape in zip(ordered, shapes, strict=True):
        if shape != shapes[0]:
            raise InputError(f"{path} is not a snapshot of the network in {ordered[0][1][0]}: their layers differ")
    tables = [(epoch, redundancy(banks, draws=draws, seed=seed)) for epoch, (_, banks) in ordered]
    rows = [{"epoch": epoch, **row} for epoch, table in tables for row in table.rows]
    return Redundancy(rows, ordered[0][1][1].skipped if ordered else [], None, None, draws, seed)


def block_redundancy(bank: FilterBank) -> pd.DataFrame:
    """The measures of each block of one layer by itself, without nulls: which filters are redundant, and which are not.

    Returns:
        A tidy frame with columns ``measure``, ``part``, ``rank``, ``block``, ``value``. Blocks are those of the form in
        ``part``: channel pair ``o I + i`` for ``g``, o for ``gc``, i for ``gc_in``. Measures of the group axis are of
        channel pairs.
    """
    weight = bank.weight
    # A block is a layer with fewer channels, and leading axes are independent layers.
    layers = {
        "g": weight.flatten(0, 1)[:, None, None],
        "gc": weight[:, None],
        "gc_in": weight.transpose(0, 1)[:, :, None],
    }
    rows = [
        (measure, part, rank if measure in RANKED else None, block, value)
        for form, blocks in layers.items()
        for (measure, part), found in values(_spectra(bank, blocks)).items()
        if part == form or (form == "g" and part not in (*MEASURED_FORMS, *UNFOLDINGS))
        for block, spectrum in enumerate(found.tolist())
        for rank, value in enumerate(spectrum, start=1)
    ]
    return pd.DataFrame(rows, columns=["measure", "part", "rank", "block", "value"]).astype({"rank": "Int64"})


# For the filters themselves, and for those of each null, what `spectra` gives.
_Layer = dict[str, dict[Key, Tensor]]


def _layer(bank: FilterBank, depth: int, draws: int, seed: int) -> _Layer:
    found = {"trained": _spectra(bank, bank.weight.unsqueeze(0))}
    for number, null in enumerate(NULLS if draws else ()):
        rng = np.random.default_rng([seed, depth, number])
        batches = [_spectra(bank, batch) for batch in null_filters(bank, null, draws, rng)]
        found[null] = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    return found


def _spectra(bank: FilterBank, filters: Tensor) -> dict[Key, Tensor]:
    return spectra(filters, bank.group, shared_inputs=bank.channel_groups == 1)


def _network_rows(banks: Sequence[FilterBank], layers: Sequence[_Layer]) -> list[dict[str, Any]]:
    """The pooled rows. A layer of zeros has nothing to say in them."""
    said = [number for number, bank in enumerate(banks) if bank.weight.any()]
    weights = [banks[number].weight.numel() for number in said]
    if not said:
        return []
    pooled = {kind: pool([layers[number][kind] for number in said], weights) for kind in layers[0]}
    groups = {banks[number].group.name for number in said}
    about = (NETWORK, None, groups.pop() if len(groups) == 1 else None, "network", None, None, None, None)
    return _rows(dict(zip(_LAYER_COLUMNS, about, strict=True)), pooled)


def _describe(bank: FilterBank, depth: int) -> dict[str, Any]:
    o, i, _, k, _ = bank.weight.shape
    about = (bank.name, depth, bank.group.name, bank.kind, o, i, k, bank.residual)
    return dict(zip(_LAYER_COLUMNS, about, strict=True))


def _rows(about: dict[str, Any], layer: _Layer) -> list[dict[str, Any]]:
    seen = {kind: values(found) for kind, found in layer.items()}
    rows = []
    for (measure, part), value in seen["trained"].items():
        columns = {"value": value[0].tolist()}
        for null in (null for null in NULLS if null in seen):
            limits = band(value[0], seen[null][measure, part])
            columns |= {f"{null}_{name}": numbers.tolist() for name, numbers in limits._asdict().items()}
        for r in range(value.shape[-1]):
            numbers = {name: columns[name][r] if name in columns else math.nan for name in ("value", *_NULL_COLUMNS)}
            rank = r + 1 if measure in RANKED else None
            rows.append({**about, "measure": measure, "part": part, "rank": rank, **numbers})
    return rows


@contextmanager
def _side_by_side() -> Iterator[ThreadPoolExecutor]:
    """As many workers as PyTorch has threads, with one thread each: the matrices are too small to be split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)
