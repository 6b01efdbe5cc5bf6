"""Values of items in, intervals out: how far a mean or a rank agreement could be off.

The items are drawn again with replacement many times and the statistic is taken each time; the interval lies between
percentiles of what came out. All draws come from the seed, so the same values give the same interval.

Trap: the bootstrap knows nothing but the items it is given. Of ten items that are all answered right it makes an
interval of width zero, and below about twenty items its intervals are too narrow. It also takes items for
independent; questions about one picture are not.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from datalloy.errors import DataError

BLOCK_DRAWS = 2_000_000  # indices held at a time: 16 MB


class Interval(NamedTuple):
    """The range that holds the true value with the stated confidence."""

    low: float
    high: float


def bootstrap_interval(values_V: np.ndarray, *, confidence: float, resamples: int, seed: int) -> Interval:
    """Percentile bootstrap of the mean over items, two-sided (Efron 1979). Raises DataError unless all are finite."""
    values_V = _finite(values_V, "values")
    means = [values_V[index_RV].mean(axis=1) for index_RV in _draws(len(values_V), resamples, seed)]
    return _percentiles(np.concatenate(means), confidence)


def paired_interval(a_V: np.ndarray, b_V: np.ndarray, *, confidence: float, resamples: int, seed: int) -> Interval:
    """Bootstrap interval of `mean(a - b)` where both were measured on the same items in the same order.

    Far narrower than the difference of two intervals, because what makes an item hard for both cancels.
    """
    a_V, b_V = _same_items(a_V, b_V)
    return bootstrap_interval(a_V - b_V, confidence=confidence, resamples=resamples, seed=seed)


def rank_agreement(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Spearman's rank correlation, in [-1, 1]; ties share their mean rank.

    Raises DataError where it is not defined: a value that is not finite, or all values of one side equal.
    """
    a_N, b_N = _same_items(a_N, b_N)
    for values_N in (a_N, b_N):
        if np.all(values_N == values_N[0]):
            raise DataError(
                f"rank agreement of {len(values_N)} samples is not defined: all have the value {values_N[0]:g}"
            )
    return float(_row_correlations(_ranks(a_N[None]), _ranks(b_N[None]))[0])


def rank_agreement_interval(
    a_N: np.ndarray, b_N: np.ndarray, *, seed: int, confidence: float = 0.95, resamples: int = 1000
) -> Interval:
    """Bootstrap interval of `rank_agreement` over samples, drawn in pairs.

    Resamples in which one side has no spread have no rank correlation and are left out. Raises DataError as
    `rank_agreement` does.
    """
    rank_agreement(a_N, b_N)
    a_N, b_N = _same_items(a_N, b_N)
    correlations = np.concatenate(
        [
            _row_correlations(_ranks(a_N[index_RN]), _ranks(b_N[index_RN]))
            for index_RN in _draws(len(a_N), resamples, seed)
        ]
    )
    return _percentiles(correlations[np.isfinite(correlations)], confidence)


def _draws(items: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of `resamples` resamples, one a row, in blocks of bounded size."""
    rng = np.random.default_rng(seed)
    rows = max(1, BLOCK_DRAWS // items)
    for start in range(0, resamples, rows):
        yield rng.integers(items, size=(min(rows, resamples - start), items))


def _ranks(values_RN: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values_RN, axis=1)


def _row_correlations(a_RN: np.ndarray, b_RN: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row of `a` with the same row of `b`; NaN where one has no spread."""
    a_RN = a_RN - a_RN.mean(axis=1, keepdims=True)
    b_RN = b_RN - b_RN.mean(axis=1, keepdims=True)
    spread_R = np.sqrt((a_RN**2).sum(axis=1) * (b_RN**2).sum(axis=1))
    return np.divide((a_RN * b_RN).sum(axis=1), spread_R, out=np.full(len(a_RN), np.nan), where=spread_R > 0)


def _percentiles(statistics: np.ndarray, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistics, (tail, 1 - tail))
    return Interval(float(low), float(high))


def _same_items(a_V: np.ndarray, b_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a_V, b_V = _finite(a_V, "first values"), _finite(b_V, "second values")
    if len(a_V) != len(b_V):
        raise DataError(f"paired values must be of the same items, found {len(a_V)} and {len(b_V)}")
    return a_V, b_V


def _finite(values_V: np.ndarray, what: str) -> np.ndarray:
    values_V = np.asarray(values_V, dtype=np.float64)
    if values_V.ndim != 1 or len(values_V) == 0:
        raise DataError(f"{what} must be one number an item, found an array of shape {values_V.shape}")
    if bad := np.flatnonzero(~np.isfinite(values_V)).tolist():
        raise DataError(
            f"{what}: {len(bad)} of {len(values_V)} are not finite, the first is item {bad[0]}; leave them out by name"
        )
    return values_V
