"""Values of items in, intervals out: how far a mean, a rank agreement or the regret of a pick could be off.

The items are drawn again with replacement many times and the statistic is taken each time; the interval lies between
percentiles of what came out. All draws come from the seed, so the same values give the same interval.

Trap: the bootstrap knows nothing but the items it is given. Of ten items that are all answered right it makes an
interval of width zero, and below about twenty items its intervals are too narrow. It also takes items for
independent; questions about one picture are not.

Really trained mixtures are never twenty, and drawing five points again shows little but their own order: in simulations
with a true Spearman of 0.95 the bootstrap's 95 % interval held it in 67 % of the cases with five mixtures and in 50 %
with four. So over mixtures the interval comes from Fisher's z with the variances of Bonett and Wright (Psychometrika
2000), which held it in 92 to 100 % of the same simulations; with fewer than four (Kendall: five) it is [-1, 1].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np

from datalloy.errors import DataError

BLOCK_DRAWS = 2_000_000  # indices held at a time: 16 MB


class Interval(NamedTuple):
    """The range that holds the true value with the stated confidence."""

    low: float
    high: float


Coefficient = Literal["spearman", "kendall"]


@dataclass(frozen=True)
class RankAgreement:
    """How far two orders of the same mixtures agree.

    `value` is None where it is not defined, with fewer than two mixtures or one side all equal; the interval then says
    that nothing is known.
    """

    value: float | None
    interval: Interval
    mixtures: int


NOTHING_KNOWN = Interval(-1.0, 1.0)


def bootstrap_interval(values_V: np.ndarray, *, confidence: float, resamples: int, seed: int) -> Interval:
    """Percentile bootstrap of the mean over items, two-sided (Efron 1979). Raises DataError unless all are finite."""
    values_V = _finite(values_V, "values")
    means = [values_V[index_RV].mean(axis=1) for index_RV in _draws(len(values_V), resamples, seed)]
    return percentile_interval(np.concatenate(means), confidence)


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


def correlation_in_words(value: float | None) -> str:
    """Two decimals, or that it is not defined."""
    return "not defined" if value is None else f"{value:.2f}"


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
    return percentile_interval(correlations[np.isfinite(correlations)], confidence)


def mixture_agreement(
    a_N: np.ndarray,
    b_N: np.ndarray,
    coefficient: Coefficient,
    *,
    confidence: float,
    a_RN: np.ndarray | None = None,
    b_RN: np.ndarray | None = None,
) -> RankAgreement:
    """Spearman's rho or Kendall's tau-b between two values of N mixtures, with an interval honest for small N.

    Args:
        a_RN, b_RN: the same values for R draws of the items they are means over (`resampled_means`); the variance
            over items is then added to that over mixtures, on the scale of Fisher's z.

    The variance over mixtures holds some of the items' noise already, so the sum errs to the wide side. A perfect
    order counts as half a swap short of perfect: of few mixtures it is often luck.
    """
    mixtures = len(a_N)
    if mixtures < 2:
        return RankAgreement(None, NOTHING_KNOWN, mixtures)
    a_N, b_N = _same_items(a_N, b_N)
    value = float(_row_agreements(a_N[None], b_N[None], coefficient)[0])
    if not math.isfinite(value):
        return RankAgreement(None, NOTHING_KNOWN, mixtures)
    freedom = mixtures - (3 if coefficient == "spearman" else 4)
    if freedom < 1:
        return RankAgreement(value, NOTHING_KNOWN, mixtures)
    variance = (1 + value**2 / 2 if coefficient == "spearman" else 0.437) / freedom
    if a_RN is not None and b_RN is not None:
        drawn_R = _row_agreements(a_RN, b_RN, coefficient)
        variance += float(_fisher_z(drawn_R[np.isfinite(drawn_R)], mixtures, coefficient).var())
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    z = float(_fisher_z(np.array(value), mixtures, coefficient))
    return RankAgreement(value, Interval(min(math.tanh(z - half), value), max(math.tanh(z + half), value)), mixtures)


def target_means(value_NV: np.ndarray, target_V: np.ndarray) -> np.ndarray:
    """Means by target of N rows of values, [N, G]; `target_V` is the target of each item, none without items."""
    return np.stack([value_NV[:, target_V == target].mean(axis=1) for target in np.unique(target_V)], axis=1)


def resampled_means(value_NV: np.ndarray, target_V: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Means by target of N mixtures over items drawn again with replacement: [R, N, G].

    `target_V` is the target of each item, 0 to G - 1. Every mixture is measured on the same draw, so that differences
    between rows are paired; each target keeps its number of items.
    """
    value_NV = np.asarray(value_NV, dtype=np.float64)
    rng = np.random.default_rng(seed)
    mean_RNG = np.empty((resamples, len(value_NV), int(target_V.max()) + 1))
    for target in range(mean_RNG.shape[2]):
        value_NI = value_NV[:, target_V == target]
        items = value_NI.shape[1]
        rows = max(1, BLOCK_DRAWS // items)
        for start in range(0, resamples, rows):
            count_RI = rng.multinomial(items, np.full(items, 1 / items), size=min(rows, resamples - start))
            mean_RNG[start : start + rows, :, target] = count_RI @ value_NI.T / items
    return mean_RNG


def top_1_regret(surrogate_N: np.ndarray, true_N: np.ndarray) -> float:
    """What is lost by trusting the surrogate: the best true value minus the true value at its pick. Zero is none.

    In the unit of the values, higher being better. Where the surrogate has several best, their mean counts.
    """
    surrogate_N, true_N = _same_items(surrogate_N, true_N)
    return float(_row_regrets(surrogate_N[None], true_N[None])[0])


def top_1_regret_interval(
    surrogate_N: np.ndarray,
    true_N: np.ndarray,
    *,
    surrogate_RN: np.ndarray,
    true_RN: np.ndarray,
    confidence: float,
) -> Interval:
    """Interval of `top_1_regret` from values drawn again over items: both the best and the pick are chosen anew.

    Always holds the regret itself. It leans to the high side where several mixtures are about equally good, because
    the best of a draw is best partly by luck. It says nothing of mixtures that are not among the N.
    """
    regret = top_1_regret(surrogate_N, true_N)
    low, high = percentile_interval(_row_regrets(surrogate_RN, true_RN), confidence)
    return Interval(min(low, regret), max(high, regret))


def percentile_interval(statistics: np.ndarray, confidence: float) -> Interval:
    """The two-sided interval between percentiles of what came out of the draws."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistics, (tail, 1 - tail))
    return Interval(float(low), float(high))


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


def _row_agreements(a_RN: np.ndarray, b_RN: np.ndarray, coefficient: Coefficient) -> np.ndarray:
    """The coefficient of each row of `a` with the same row of `b`; NaN where one has no spread."""
    if coefficient == "spearman":
        return _row_correlations(_ranks(a_RN), _ranks(b_RN))
    left, right = np.triu_indices(a_RN.shape[1], 1)
    # tau-b is the correlation, about zero, of the signs of all pairs' differences
    a_RP, b_RP = (np.sign(x_RN[:, left] - x_RN[:, right]) for x_RN in (a_RN, b_RN))
    pairs_R = np.sqrt((a_RP**2).sum(axis=1) * (b_RP**2).sum(axis=1))
    return np.divide((a_RP * b_RP).sum(axis=1), pairs_R, out=np.full(len(a_RN), np.nan), where=pairs_R > 0)


def _fisher_z(value: np.ndarray, mixtures: int, coefficient: Coefficient) -> np.ndarray:
    """atanh, which is infinite at one: values are kept half a step away, the step being what one swap changes."""
    step = 12 / (mixtures * (mixtures**2 - 1)) if coefficient == "spearman" else 4 / (mixtures * (mixtures - 1))
    return np.arctanh(np.clip(value, step / 2 - 1, 1 - step / 2))


def _row_regrets(surrogate_RN: np.ndarray, true_RN: np.ndarray) -> np.ndarray:
    is_pick_RN = surrogate_RN == surrogate_RN.max(axis=1, keepdims=True)
    at_pick_R = np.where(is_pick_RN, true_RN, 0).sum(axis=1) / is_pick_RN.sum(axis=1)
    return true_RN.max(axis=1) - at_pick_R


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
