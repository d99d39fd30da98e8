"""Intervals of paired differences: how far two arms are apart, and how sure that is.

Two arms are paired by seed, and where every seed is judged on the same items, by item too. Then both are drawn anew, seeds
and items each by themselves, as a new seed would meet all items and a new item all seeds: the pigeonhole bootstrap (Owen
2007, "The pigeonhole bootstrap", section 2).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

_RESAMPLES = 4999


@dataclass(frozen=True)
class Interval:
    """A mean difference with the ends of its interval; `by` says what was drawn anew: "seed and item", "seed" or "item"."""

    mean: float
    low: float
    high: float
    by: str

    @property
    def tells_apart(self) -> bool:
        """Whether 0 is outside."""
        return self.low > 0 or self.high < 0


def paired_interval(
    differences: Sequence[np.ndarray], *, same_items: bool, level: float = 0.95, seed: int = 0
) -> Interval | None:
    """The interval of the mean of `differences`, one array `(n_items,)` or `(1,)` a seed; `None` where one number is all.

    With `same_items` row `i` is the same item for every seed, and items are drawn anew besides seeds. Few seeds give an
    interval that is somewhat too short: the bootstrap of `k` numbers is narrower by the factor `sqrt((k - 1) / k)`.
    """
    n_seeds, n_items = len(differences), len(differences[0])
    if same_items and n_items > 1:
        table = np.stack(differences)
        if n_seeds == 1:
            low, high = _bootstrap((table[0],), lambda d, axis: d.mean(axis), level, seed)
            return Interval(float(table.mean()), low, high, "item")

        def mean(rows: np.ndarray, columns: np.ndarray, axis: int) -> np.ndarray:
            return table[rows[..., :, None], columns[..., None, :]].mean((-2, -1))

        low, high = _bootstrap((np.arange(n_seeds), np.arange(n_items)), mean, level, seed)
        return Interval(float(table.mean()), low, high, "seed and item")
    means = np.array([d.mean() for d in differences])
    if n_seeds == 1:
        return None
    low, high = _bootstrap((means,), lambda d, axis: d.mean(axis), level, seed)
    return Interval(float(means.mean()), low, high, "seed")


def _bootstrap(data: tuple, statistic, level: float, seed: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # arms that agree everywhere: the interval is a point
        found = bootstrap(
            data,
            statistic,
            n_resamples=_RESAMPLES,
            batch=64,
            vectorized=True,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(found.low), float(found.high)
