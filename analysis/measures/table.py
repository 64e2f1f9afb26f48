"""The redundancy table: every measure of every layer and of the whole network, with its nulls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analysis.filters.banks import FilterBank, FilterBanks, filter_banks
from analysis.filters.layers import Skipped, notes_of
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


@dataclass(frozen=True, repr=False)
class Redundancy:
    """A tidy table: one row for each layer, measure, part and rank.

    Columns:
        ``epoch`` (only from :func:`redundancy_over_epochs`), ``layer``, ``depth`` (from 0), ``group``, ``kind``,
        ``out_channels``, ``in_channels``, ``kernel_size``, ``residual`` (of the generator, :class:`.FilterBank`);
        ``measure``; ``part``, the form, unfolding, irreducible representation or group element to which the measure
        belongs; ``rank``, if the measure is a spectrum; ``value``; and for each null, ``init`` and ``shuffled``, the
        columns ``_mean``, ``_low`` and ``_high`` (the 95 % interval of a draw) and ``_z``
        (:mod:`analysis.measures.null_models`). The rows of the layer ``(network)`` are pooled over the layers
        (:func:`analysis.measures.measures.pool`).

    Measures:
        ``explained_energy``, ``pca_explained_variance`` (parts: forms) and ``hosvd_energy`` (parts: unfoldings), each
        cumulative in the rank; ``effective_rank``, ``stable_rank``, ``rank_90``, ``rank_95``, ``rank_99`` (of forms and
        unfoldings); ``cosine``, ``invariance`` (parts: the group ``average`` and each element) and ``irrep_energy``.
        The last three are also given with the suffix ``_turned``, for kernels transformed back by their element.

    Attributes:
        rows: the table. Undefined values are NaN; entries that do not apply are None.
        skipped: the layers that gave no filter bank, with the reasons.
        inferred: the group that was inferred and from what, if the source does not say its group; else None.
        residual: the largest residual of the layers whose generator was recovered from an expanded filter; None if
            there is no such layer.
        draws: the number of filters that each null drew; 0 without nulls.
        seed: the seed of the nulls.
        assumptions: what the source does not say and was assumed (:class:`.FilterBanks`).
    """

    rows: list[dict[str, Any]]
    skipped: list[Skipped] = field(default_factory=list)
    inferred: str | None = None
    residual: float | None = None
    draws: int = DRAWS
    seed: int = 0
    assumptions: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What a reader must know beside the numbers: an inferred group, assumptions, the residual, skipped layers."""
        notes = [] if self.inferred is None else [f"group inferred: {self.inferred}"]
        notes += self.assumptions
        if self.residual is not None:
            notes.append(
                f"generators recovered from expanded filters, relative residual up to {self.residual:.1e}; the null "
                "init draws unconstrained filters, so what a band-limited basis such as escnn's imposes counts as "
                "learned"
            )
        return notes + notes_of(self.skipped)

    def _summary(self) -> str:
        layers = len({row["layer"] for row in self.rows} - {NETWORK})
        nulls = f"{self.draws} draws per null, seed {self.seed}" if self.draws else "without nulls"
        return f"{layers} layer{'' if layers == 1 else 's'}, {len(self.rows):,} rows, {nulls}"

    def __repr__(self) -> str:
        return "\n".join([f"Redundancy: {self._summary()}; to_frame() gives the table", *self.notes])

    def _repr_html_(self) -> str:
        """The summary, the notes and the table, shortened by pandas, for notebooks."""
        texts = "".join(f"<p>{escape(text)}</p>" for text in (self._summary(), *self.notes))
        return texts + self.to_frame().to_html(max_rows=10, show_dimensions=True)

    def to_frame(self) -> pd.DataFrame:
        """The table as a pandas frame. Whole numbers that may be absent have pandas' nullable type."""
        columns = COLUMNS if not self.rows or "epoch" not in self.rows[0] else ("epoch", *COLUMNS)
        frame = pd.DataFrame(self.rows, columns=columns)
        return frame.astype({name: "Int64" for name in _WHOLE if name in columns})

    def to_csv(self, path: str | Path) -> None:
        """Write the table, completely or not at all. Absent and undefined entries are empty fields.

        Raises:
            InputError: the path cannot be written.
        """
        with atomic_path(path) as temporary:
            self.to_frame().to_csv(temporary, index=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Absent and undefined entries are None."""
        # NaN is the one number that differs from itself.
        rows = [{name: entry if entry == entry else None for name, entry in row.items()} for row in self.rows]
        skipped = [asdict(layer) for layer in self.skipped]
        about = {
            name: getattr(self, name) for name in ("draws", "seed", "inferred", "assumptions", "residual", "notes")
        }
        return {**about, "skipped": skipped, "rows": rows}


def redundancy(
    source: nn.Module | Mapping[str, Tensor] | str | Path | list[FilterBank],
    *,
    group: str | Group | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Redundancy:
    """Measure how redundant the filters of a network are, and how much of that is chance.

    The same source, draws and seed give the same table.

    Args:
        source: a network, a state dict or a file of weights, as :func:`analysis.filter_banks` takes it; or a list of
            filter banks.
        group: the group of a network that does not say it.
        draws: the number of filters that each null draws for every layer; 0 for no nulls.
        seed: the seed of the nulls.

    Returns:
        The table. It has no rows if the network has no convolution.

    Raises:
        InputError: draws is 1 or negative, the seed is negative, a filter is not finite, the source cannot be read, or
            it has convolutions and none of them can be read.
    """
    if not isinstance(draws, int) or draws < 0 or draws == 1:
        raise InputError(f"draws is {draws!r}; give a whole number of at least 2, or 0 for no nulls")
    if not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}; give a whole number of at least 0")
    if isinstance(source, list):
        banks = source if isinstance(source, FilterBanks) else FilterBanks(source)
        check_finite({bank.name: bank.weight for bank in banks}, "the list of filter banks")
    else:
        banks = filter_banks(source, group=group)
    if banks.skipped and not banks:
        raise InputError(f"none of the convolutions can be measured: {'; '.join(notes_of(banks.skipped))}")
    with _side_by_side() as workers:
        jobs = workers.map(lambda depth: _layer(banks[depth], depth, draws, seed), range(len(banks)))
        layers = list(tqdm(jobs, "measuring", len(banks), leave=False, disable=None, delay=1))
    residual = max((bank.residual for bank in banks if bank.taken_back), default=None)
    rows = [row for depth, bank in enumerate(banks) for row in _rows(_describe(bank, depth), layers[depth])]
    rows += _network_rows(banks, layers)
    return Redundancy(rows, banks.skipped, banks.inferred, residual, draws, seed, banks.assumptions)


def redundancy_over_epochs(paths: Iterable[str | Path], *, draws: int = DRAWS, seed: int = 0) -> Redundancy:
    """The tables of several snapshots of one training run as one table, with a column ``epoch``.

    Args:
        paths: checkpoints written by ``gconv.train``: snapshots, or the finished network.
        draws: as in :func:`redundancy`.
        seed: as in :func:`redundancy`. All epochs use the same seed, so their nulls are the same.

    Returns:
        One table, sorted by epoch.

    Raises:
        InputError: a file is not a checkpoint, its record has no epoch, two files are of the same epoch, or the
            networks differ.
    """
    snapshots: dict[int, tuple[str | Path, FilterBanks]] = {}
    for path in paths:
        read = checkpoint.read(path)
        epoch = read.record.get("epoch", len(read.record.get("history", [])) or None)
        if epoch is None:
            raise InputError(f"the record of {path} has no epoch; give snapshots or networks written by gconv.train")
        if epoch in snapshots:
            raise InputError(f"{path} and {snapshots[epoch][0]} are both of epoch {epoch}; give one of them")
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
    """The measures of each single block of one layer, without nulls: which of its filters are redundant.

    Returns:
        A tidy frame with the columns ``measure``, ``part``, ``rank``, ``block``, ``value``. A block is one of the form
        in ``part``: the channel pair ``o I + i`` for ``g``, the output channel o for ``gc``, the input channel i for
        ``gc_in``. For the measures of the group axis, a block is a channel pair.
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


# What `spectra` gives for the trained filters and for the draws of each null.
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
    """The rows pooled over the layers. Layers of zeros are left out, because their shares are undefined."""
    used = [number for number, bank in enumerate(banks) if bank.weight.any()]
    weights = [banks[number].weight.numel() for number in used]
    if not used:
        return []
    pooled = {kind: pool([layers[number][kind] for number in used], weights) for kind in layers[0]}
    groups = {banks[number].group.name for number in used}
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
    """A pool with as many workers as PyTorch has threads, one thread each: one matrix is too small for several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)
