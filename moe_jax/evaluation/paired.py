"""Statistics of runs that alternate: each turn has one run of every contender, so that drift of the machine cancels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from scipy.special import ndtr, stdtrit

T = TypeVar("T")
DRAWS = 4000


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """The order of a turn: each starts with another item, and every other one runs backwards, so that over many turns
    no item has the same neighbours or the same place."""
    start = turn // 2 % len(items)
    order = [*items[start:], *items[:start]]
    return order[::-1] if turn % 2 else order


def interval(statistic: Callable[[np.ndarray], float], turns: int) -> dict[str, float]:
    """A statistic of all turns, and its 95% bootstrap interval over turns.

    The percentiles are those farther out that give a mean of so few values its t-interval (Hesterberg, "What Teachers
    Should Know About the Bootstrap", The American Statistician 69(4), 2015, section 3.3). Less than about five turns
    cannot give a 95% interval: then it is the range of their resamples.

    Args:
      statistic: of the turns with these indices, int [N]; the same turn may be there more than once.
    """
    resampled = np.random.default_rng(0).integers(0, turns, (DRAWS, turns))
    tail = float(ndtr(stdtrit(turns - 1, 0.025) * (turns / (turns - 1)) ** 0.5)) if turns > 1 else 0.0
    low, high = np.percentile([statistic(draw) for draw in resampled], [100 * tail, 100 - 100 * tail])
    return {"value": statistic(np.arange(turns)), "low": float(low), "high": float(high)}


def ratio(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Geometric mean over turns of ours / theirs, with its interval."""
    logs = np.log(np.asarray(ours) / np.asarray(theirs))
    return interval(lambda turns: float(np.exp(logs[turns].mean())), len(logs))


def mean_of(rows: Sequence[dict[str, Any]], weights: Sequence[float], name: str) -> Any:
    """Weighted mean of a figure over runs, of nested dictionaries field by field; None where a run has none."""
    values = [row[name] for row in rows]
    if isinstance(values[0], dict):
        return {key: mean_of(values, weights, key) for key in values[0]}
    if any(value is None for value in values):
        return None
    return float(np.average(values, weights=weights))
