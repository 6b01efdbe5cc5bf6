"""Really trained mixtures in, a data-mixing law out: error = floor + exp(slope . weights).

The law of Ye et al. (Data Mixing Laws, arXiv 2403.16952) for a loss; Olmix uses the same form. Our values are
higher-is-better, so the error is the negated value; for an accuracy it is one less than the error rate, and the
floor, which is free, takes up the difference. The exponential makes returns diminish: a domain's first share lowers
the error more than its last. With a floor far below all errors the law becomes linear.

The fit is robust (Huber) and not convex, so it starts from several floors; for each of them the slopes begin at the
ridge regression of log(error - floor), which lands closer than random starts do. The published form has no
shrinkage and needs more runs than domains; ours shrinks the slopes towards their mean, as strongly as
cross-validation on the rows of the fit says, which with few rows is strongly.

Traps: fit it to one benchmark at a time; a mean of exponentials is no exponential. Its strongest shrinkage is not
strong: of 20 runs of 12 domains whose values are noise alone it makes a surface as rough as the noise.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from datalloy.surrogates.rows import Rows, folds, mixtures, to_learn_from

HUBER = 0.5  # in standard deviations of the values; beyond it a miss counts linearly
STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
FLOORS = (0.6, 0.05, 4.0)  # starts: standard deviations below the lowest error
FLOOR_LIMITS = (1e-3, 30.0)


class Law(NamedTuple):
    """error = low - exp(log_depth) + exp(constant + weights @ slope_K), in standard deviations of the values."""

    log_depth: float
    constant: float
    slope_K: np.ndarray


class LogLinear:
    """The data-mixing law, shrunk and fitted robustly."""

    def fit(self, weight_NK: np.ndarray, value_N: np.ndarray, seed: int) -> None:
        rows = to_learn_from(weight_NK, value_N)
        self._spread = float(rows.value_N.std()) or 1.0
        self._low = float(-rows.value_N.max())
        error_N = (-rows.value_N - self._low) / self._spread  # the least error is zero
        rows = Rows(rows.weight_NK, error_N, rows.count_N)
        self._law = _best(rows, _chosen_strength(rows, seed), FLOORS)

    def predict(self, weight_MK: np.ndarray) -> np.ndarray:
        return -(self._low + self._spread * _errors(self._law, mixtures(weight_MK)))


def _errors(law: Law, weight_MK: np.ndarray) -> np.ndarray:
    return np.exp(law.constant + weight_MK @ law.slope_K) - np.exp(law.log_depth)


def _chosen_strength(rows: Rows, seed: int) -> float:
    misses = []
    for strength in STRENGTHS:
        total = 0.0
        for kept, left in folds(len(rows.value_N), seed):
            law = _best(Rows(*(part[kept] for part in rows)), strength, FLOORS[:1])
            miss = np.abs(_errors(law, rows.weight_NK[left]) - rows.value_N[left])
            total += float(rows.count_N[left] @ miss)
        misses.append(total)
    return STRENGTHS[int(np.argmin(misses))]


def _best(rows: Rows, strength: float, floors: Sequence[float]) -> Law:
    ends = [_descend(rows, strength, _start(rows, depth)) for depth in floors]
    return min(ends, key=lambda end: end[0])[1]


def _start(rows: Rows, depth: float) -> np.ndarray:
    """Slopes by ridge on log(error - floor), misses counted as they will be: by their size in error, not in its log."""
    height_N = rows.value_N - rows.value_N.min() + depth
    log_N, importance_N = np.log(height_N), rows.count_N * height_N**2
    centre_K = np.average(rows.weight_NK, axis=0, weights=importance_N)
    middle = float(np.average(log_N, weights=importance_N))
    away_NK = rows.weight_NK - centre_K
    gram_KK = (away_NK * importance_N[:, None]).T @ away_NK + 1e-2 * np.eye(len(centre_K)) * importance_N.sum()
    slope_K = np.linalg.solve(gram_KK, away_NK.T @ (importance_N * (log_N - middle)))
    return np.concatenate([[np.log(depth), middle - centre_K @ slope_K], slope_K])


def _descend(rows: Rows, strength: float, start: np.ndarray) -> tuple[float, Law]:
    from scipy.optimize import minimize

    share_N = rows.count_N / rows.count_N.sum()

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        law = Law(flat[0], flat[1], flat[2:])
        height_N = np.exp(np.clip(law.constant + rows.weight_NK @ law.slope_K, None, 50))
        miss_N = height_N - np.exp(law.log_depth) - rows.value_N
        small_N = np.clip(miss_N, -HUBER, HUBER)
        value = share_N @ (small_N * (miss_N - small_N / 2)) + strength / 2 * (law.slope_K @ law.slope_K)
        pull_N = share_N * small_N
        along_N = pull_N * height_N
        slope = np.concatenate(
            [
                [-pull_N.sum() * np.exp(law.log_depth), along_N.sum()],
                rows.weight_NK.T @ along_N + strength * law.slope_K,
            ]
        )
        return float(value), slope

    bounds = [(np.log(FLOOR_LIMITS[0]), np.log(FLOOR_LIMITS[1])), (-20, 20), *[(-50, 50)] * rows.weight_NK.shape[1]]
    options = {"maxiter": 200, "maxcor": 30}  # a memory of all slopes: half the steps of the default
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return float(found.fun), Law(found.x[0], found.x[1], found.x[2:])
