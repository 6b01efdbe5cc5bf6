"""A calibrated search in, the numbers that a picture of it needs out: `mixture/surface.json`.

The search's belief lives in memory and takes models to rebuild; what a person wants to see of it is small: the surface
at points all over the simplex with its uncertainty, and the mixtures that were really trained with their merges beside
them. Two domains are a line, three a triangle; of more, the pairs of the domains with the largest shares, each pair
trading its own share while all others stay at the pick.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datalloy.calibration import Calibration, TrainedMixtures
from datalloy.objective import Objective
from datalloy.simplex import Simplex, grid
from datalloy.uncertainty import Interval, percentile_interval, resampled_means

SCHEMA_VERSION = 1
LINE_STEPS, TRIANGLE_STEPS, PAIR_STEPS = 40, 12, 20
PAIRED_DOMAINS = 4  # of more than three: six pictures
DRAWS, RESAMPLES = 400, 1000
FEASIBLE = 1e-7  # rounding of solvers, in weights


@dataclass(frozen=True)
class Point:
    """One mixture of the picture. `merged`, `value`: by target, before and after calibration, higher is better.

    `score`, `interval`: the objective of the calibrated surface. `pair`: the domains that trade their share here, by
    name; empty where the whole simplex is shown. `allowed`: within the recipe's limits.
    """

    weights: list[float]
    pair: tuple[str, ...]
    merged: list[float]
    value: list[float]
    score: float
    interval: Interval
    allowed: bool


@dataclass(frozen=True)
class TrainedPoint:
    """One mixture that was really trained, and the merged model at the same weights, on the same items.

    `merged_score`, `score`: the objective of both; `gap`: interval of `score - merged_score`, paired over items.
    """

    weights: list[float]
    merged: list[float]
    value: list[float]
    merged_score: float
    score: float
    gap: Interval


def describe_surface(
    calibration: Calibration,
    trained: TrainedMixtures,
    objective: Objective,
    simplex: Simplex,
    pick_K: np.ndarray,
    *,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Plain data for `mixture/surface.json`: names, targets, `points` and `trained`."""
    weight_MK, pairs = _points(simplex.names, pick_K)
    points: list[Point] = []
    if len(weight_MK):
        merged_MG = calibration.predict_merged(weight_MK)[0]
        value_MG = calibration.predict(weight_MK)[0]
        score_RM = objective.score(calibration.draw(weight_MK, DRAWS, seed))
        score_M = objective.score(value_MG)
        points = [
            Point(
                weight_MK[m].tolist(),
                pairs[m],
                merged_MG[m].tolist(),
                value_MG[m].tolist(),
                float(score_M[m]),
                percentile_interval(score_RM[:, m], confidence),
                simplex.contains(weight_MK[m], FEASIBLE),
            )
            for m in range(len(weight_MK))
        ]
    return {
        "schema_version": SCHEMA_VERSION,
        "names": list(simplex.names),
        "targets": list(trained.targets),
        "confidence": confidence,
        "points": [asdict(point) for point in points],
        "trained": [asdict(point) for point in _trained(trained, objective, confidence, seed)],
    }


def _points(names: Sequence[str], pick_K: np.ndarray) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Weights of the points, [M, K], and which pair of domains each of them is for."""
    domains = len(names)
    if domains < 2:
        return np.empty((0, domains)), []
    if domains <= 3:
        weight_MK = grid(domains, LINE_STEPS if domains == 2 else TRIANGLE_STEPS)
        return weight_MK, [() for _ in weight_MK]
    largest = np.sort(np.argsort(-pick_K, kind="stable")[:PAIRED_DOMAINS])
    rows: list[np.ndarray] = []
    pairs: list[tuple[str, ...]] = []
    for first, second in itertools.combinations(largest.tolist(), 2):
        together = pick_K[first] + pick_K[second]
        for share in np.linspace(0, 1, PAIR_STEPS + 1):
            weight_K = pick_K.copy()
            weight_K[[first, second]] = share * together, (1 - share) * together
            rows.append(weight_K)
            pairs.append((names[first], names[second]))
    return np.array(rows), pairs


def _trained(trained: TrainedMixtures, objective: Objective, confidence: float, seed: int) -> Sequence[TrainedPoint]:
    drawn_RNG, merged_RNG = (
        resampled_means(value_NV, trained.target_V, resamples=RESAMPLES, seed=seed)
        for value_NV in (trained.true_NV, trained.merged_NV)
    )
    gap_RN = objective.score(drawn_RNG) - objective.score(merged_RNG)
    score_N, merged_N = objective.score(trained.true_NG), objective.score(trained.merged_NG)
    return [
        TrainedPoint(
            weight_K.tolist(),
            trained.merged_NG[n].tolist(),
            trained.true_NG[n].tolist(),
            float(merged_N[n]),
            float(score_N[n]),
            percentile_interval(gap_RN[:, n], confidence),
        )
        for n, weight_K in enumerate(trained.weight_NK)
    ]
