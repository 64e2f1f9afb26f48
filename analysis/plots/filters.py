"""The filters of one layer as images: the channel pairs that are most and least redundant along the group axis."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.filters.banks import FilterBank
from analysis.measures.spectra import fold
from analysis.measures.table import block_redundancy
from gconv.system.errors import InputError, one_of

from .redundancy import canvas

# The measures that rank the pairs and that are printed beside them: measure and part.
ORDERS = {"invariance": "average", "invariance_turned": "average", "explained_energy": "g"}

# In widths of a kernel: the distance of two kernels, the space for a number, and the gap between the most and the least
# redundant pairs.
_STEP, _NUMBER, _GAP = 1.12, 1.7, 0.4


def plot_filters(bank: FilterBank, *, by: str = "invariance", pairs: int = 3, ax: Axes | None = None) -> Axes:
    """The kernels along the group axis, for a layer's most and least redundant channel pairs; a row for each pair.

    On the left the kernels are as stored: they are equal if all elements share one spatial kernel. On the right each is
    transformed back by its element: they are equal if the filter is invariant, so that it makes the same map for every
    element. Beside each block is the invariance, the energy share of the mean kernel (1: all are equal; about
    ``1 / |H|``: unrelated). The last number is the energy that one spatial kernel explains if it has a factor, possibly
    negative, for each element (form ``g`` at rank 1). The colours of a row are scaled to its largest entry; the middle
    of the scale is 0.

    Args:
        bank: the filters of one layer.
        by: the measure that ranks the pairs: ``invariance``, ``invariance_turned`` or ``explained_energy`` (at rank 1
            of ``g``).
        pairs: the number of most redundant pairs, and of least redundant ones.
        ax: where to draw; None for a new figure.

    Raises:
        InputError: the layer has no group axis or not this measure, or an argument is not one of the above.
    """
    if by not in ORDERS:
        raise one_of("order of filters", by, tuple(ORDERS))
    if pairs < 1:
        raise InputError(f"pairs is {pairs}; give at least 1")
    measured = _of_pairs(bank)
    if by not in measured:
        raise InputError(f"the filters of {bank.name} have no {by} along a group axis; give a group-to-group layer")
    ranked = measured.sort_values(by, ascending=False)
    shown = pd.concat([ranked[:pairs], ranked[pairs:][-pairs:]])
    o, i, s, k, _ = bank.weight.shape
    stored = fold(bank.weight, "g", bank.group).view(o * i, s, k, k).numpy()
    turned = fold(bank.weight, "gc_in", bank.group).view(i, o, s, k, k).transpose(0, 1).reshape(stored.shape).numpy()
    half, end = s * _STEP + _NUMBER, 2 * (s * _STEP + _NUMBER)
    rows = [row * _STEP + (_GAP if row >= pairs else 0) for row in range(len(shown))]
    ax = canvas(ax, 0.5 * (end + _NUMBER) + 1.3, 0.5 * (rows[-1] + 1) + 1.1)
    for y, (pair, numbers) in zip(rows, shown.iterrows(), strict=True):
        scale = np.abs(stored[pair]).max() or 1.0
        for start, kernels in ((0.0, stored[pair]), (half, turned[pair])):
            for x, kernel in zip(start + _STEP * np.arange(s), kernels, strict=True):
                ax.imshow(kernel, "cividis", vmin=-scale, vmax=scale, extent=(x, x + 1, y + 1, y), interpolation="none")
        for x, measure in ((half, "invariance"), (end, "invariance_turned"), (end + _NUMBER, "explained_energy")):
            if measure in numbers:
                ax.text(x - _NUMBER / 2 - 0.1, y + 0.5, f"{numbers[measure]:.2f}", ha="center", va="center", size=9)
    for x, heading in ((half, "invariance"), (end, "invariance"), (end + _NUMBER, "energy at\nrank 1")):
        ax.text(x - _NUMBER / 2 - 0.1, -0.2, heading, ha="center", va="bottom", size=8)
    for start, heading in ((0.0, "as stored"), (half, "transformed back")):
        ax.text(start + (s * _STEP - 0.12) / 2, -0.8, heading, ha="center", va="bottom", size=10)
        for x, element in zip(start + _STEP * np.arange(s), bank.group.element_names, strict=True):
            ax.text(x + 0.5, -0.2, element, ha="center", va="bottom", size=9)
    ax.set(xlim=(-0.1, end + _NUMBER), ylim=(rows[-1] + 1.1, -1.5), xticks=[], title=bank.name)
    ax.set_yticks([y + 0.5 for y in rows], [f"out {pair // i}, in {pair % i}" for pair in shown.index], size=9)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return ax


def _of_pairs(bank: FilterBank) -> pd.DataFrame:
    """The measures in ``ORDERS`` that the layer has, with one row for each channel pair ``o I + i``."""
    frame = block_redundancy(bank)
    wanted = frame["part"].eq(frame["measure"].map(ORDERS)) & (frame["rank"].isna() | frame["rank"].eq(1))
    return frame[wanted].pivot(index="block", columns="measure", values="value")
