"""Runs as they come in, rows that a regression may be fitted to out: checked, in a fixed order, replicates merged.

Three things every surrogate needs and none should do on its own:

- an order of rows that depends on their contents alone, so that a fit has the same bits however the runs were listed
  (folds are drawn by row, and sums of floats depend on their order);
- one row a mixture. Runs of one mixture under several seeds would otherwise sit on both sides of a fold, and
  leave-one-out would choose the surrogate that memorises;
- folds: one row each while there are few, then five random parts.
"""

from typing import NamedTuple

import numpy as np

from datalloy.errors import DataError

MIN_MIXTURES = 3  # fewer leave nothing to choose a strength of shrinkage by
MOST_FOLDS = 5
ROUNDING = 1e-9
SUM_ROUNDING = 0.01  # published tables round every weight, and their sums are off by up to 0.004


class Rows(NamedTuple):
    """`value_N` is the mean of the `count_N` runs of mixture `weight_NK[n]`; rows in lexicographic order."""

    weight_NK: np.ndarray
    value_N: np.ndarray
    count_N: np.ndarray


def mixtures(weight_MK: np.ndarray) -> np.ndarray:
    """`weight_MK` as floats, [M, K]. Raises DataError on a row that is no mixture.

    A mixture has weights that are finite, not negative and add up to one within SUM_ROUNDING.
    """
    weight_MK = np.asarray(weight_MK, dtype=np.float64)
    if weight_MK.ndim != 2:
        raise DataError(f"mixtures must be one row of weights each, found an array of shape {weight_MK.shape}")
    good_M = (weight_MK >= -ROUNDING).all(axis=1) & (np.abs(weight_MK.sum(axis=1) - 1) <= SUM_ROUNDING)
    if not good_M.all():
        first = int(np.argmin(good_M))
        raise DataError(
            f"{int((~good_M).sum())} of {len(good_M)} rows are no mixtures: weights must be finite, not negative and "
            f"add up to one; the first is row {first}: {weight_MK[first].tolist()}"
        )
    return np.clip(weight_MK, 0, None)


def ordered(weight_NK: np.ndarray, value_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The runs sorted by weights, then value, replicates kept. Raises DataError on runs that cannot be learnt from."""
    weight_NK, value_N = mixtures(weight_NK), np.asarray(value_N, dtype=np.float64)
    if value_N.shape != (len(weight_NK),):
        raise DataError(f"{len(weight_NK)} mixtures need one value each, found values of shape {value_N.shape}")
    if bad := np.flatnonzero(~np.isfinite(value_N)).tolist():
        raise DataError(f"{len(bad)} of {len(value_N)} runs have no finite value, the first is row {bad[0]}")
    order_N = np.lexsort((value_N, *weight_NK.T[::-1]))
    return weight_NK[order_N], value_N[order_N]


def distinct(weight_NK: np.ndarray, value_N: np.ndarray) -> Rows:
    """One row a mixture, replicates averaged. Raises DataError as `ordered` does."""
    weight_NK, value_N = ordered(weight_NK, value_N)
    unique_NK, place_N, count_N = np.unique(weight_NK, axis=0, return_inverse=True, return_counts=True)
    return Rows(unique_NK, np.bincount(place_N.ravel(), value_N) / count_N, count_N)


def to_learn_from(weight_NK: np.ndarray, value_N: np.ndarray) -> Rows:
    """`distinct` rows, refused with DataError where there are fewer than MIN_MIXTURES."""
    rows = distinct(weight_NK, value_N)
    if len(rows.value_N) < MIN_MIXTURES:
        raise DataError(
            f"a surrogate learns from runs of at least {MIN_MIXTURES} different mixtures, found {len(rows.value_N)}; "
            "train more mixtures"
        )
    return rows


def folds(rows: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(kept, left out) indices for each fold: leave-one-out up to MOST_FOLDS rows, else that many random parts."""
    order_N = np.random.default_rng(seed).permutation(rows)
    parts = np.array_split(order_N, min(rows, MOST_FOLDS))
    return [(np.setdiff1d(order_N, part), np.sort(part)) for part in parts]
