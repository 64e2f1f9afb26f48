"""Pareto fronts: what no other choice beats, where every objective is to be small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether ``one`` is nowhere worse than ``other``, and somewhere better."""
    return tuple(one) != tuple(other) and all(a <= b for a, b in zip(one, other, strict=True))


def undominated(points: Sequence[Sequence[float]]) -> list[bool]:
    """For each point whether no other one dominates it. Equal points do not dominate each other."""
    return [not any(dominates(other, point) for other in points) for point in points]


def front(cost: npt.NDArray[np.float64], error: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The indices of the front of two objectives, in order: costs rise and errors fall, both strictly.

    Of equal points the first one is taken. Sorting makes this fit for very many points.
    """
    order = np.lexsort((error, cost))
    sorted_errors = error[order]
    lower = np.ones(order.size, dtype=bool)
    lower[1:] = sorted_errors[1:] < np.minimum.accumulate(sorted_errors)[:-1]
    return order[lower]
