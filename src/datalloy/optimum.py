"""A surface of values over mixtures in, the feasible mixture that is best by the objective out.

A surface gives the G values of a mixture and their slopes; it is a quadratic, the mean of a posterior or a draw from
one. A linear objective without guard rails is a smooth climb on the simplex. The lowest target is not smooth, so it is
climbed as its epigraph: the largest t with `value_g >= t` for every target; guard rails are constraints of the same
kind. Trap: surfaces need not be concave, so what comes back is the best of the maxima reached from the starts.
"""

from collections.abc import Callable

import numpy as np
import scipy.optimize

from datalloy.objective import Objective
from datalloy.simplex import Simplex

Surface = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # a mixture [K] -> values [G], slopes [G, K]

RAIL_MARGIN = 1e-8  # inside the guard rails, so that the solver's rounding does not end beyond them


def best_mixture(simplex: Simplex, objective: Objective, surface: Surface, starts_NK: np.ndarray) -> np.ndarray:
    """[K] the best mixture reached by climbing from each of `starts_NK`, guard rails kept where that was possible.

    Where no climb meets them all, the mixture whose values fall through them by the least comes back; ask
    `objective.allowed`.
    """
    lowest_G = objective.lowest_G
    has_rails = bool(np.isfinite(lowest_G).any())
    weight_G = linear_weights(objective)
    if weight_G is not None and not has_rails:

        def scored(weight_K: np.ndarray) -> tuple[float, np.ndarray]:
            value_G, slope_GK = surface(weight_K)
            return float(weight_G @ value_G), weight_G @ slope_GK

        return simplex.maximise(scored, starts_NK)
    none_G, zero_G = np.full(len(lowest_G), -np.inf), np.zeros(len(lowest_G))
    ends = []
    for start_K in np.atleast_2d(starts_NK):
        weight_K = simplex.project(start_K)
        if not objective.allowed(surface(weight_K)[0]):
            weight_K = _climb(simplex, surface, weight_K, zero_G, lowest_G, none_G)
        ends.append(weight_K)
        if weight_G is None:
            ends.append(_climb(simplex, surface, weight_K, zero_G, zero_G, lowest_G + RAIL_MARGIN))
        else:
            ends.append(_climb(simplex, surface, weight_K, weight_G, none_G, lowest_G + RAIL_MARGIN))
    return max(ends, key=lambda weight_K: _merit(objective, surface(weight_K)[0]))


def linear_weights(objective: Objective) -> np.ndarray | None:
    """[G] of an objective that is a weighted mean; None for the lowest target."""
    if objective.kind == "worst":
        return None
    targets = len(objective.weight_G)
    return np.full(targets, 1 / targets) if objective.kind == "mean" else objective.weight_G


def _merit(objective: Objective, value_G: np.ndarray) -> tuple[bool, float]:
    """Allowed before not allowed; then by score, or by the least fall through a guard rail."""
    if objective.allowed(value_G):
        return True, float(objective.score(value_G))
    return False, float((value_G - objective.lowest_G).min())


def _climb(
    simplex: Simplex,
    surface: Surface,
    start_K: np.ndarray,
    weight_G: np.ndarray,
    level_G: np.ndarray,
    rail_G: np.ndarray,
) -> np.ndarray:
    """Maximise `weight_G @ value_G + t` with `value_G - t >= level_G` and `value_G >= rail_G`; -inf: no such limit.

    The variables are the weights and t, the last.
    """
    levelled, railed = np.flatnonzero(np.isfinite(level_G)), np.flatnonzero(np.isfinite(rail_G))
    one = float(len(levelled) > 0)
    seen: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def values(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key = x[:-1].tobytes()
        if key not in seen:
            seen.clear()  # the solver asks for goal and limits at one point in turn
            seen[key] = surface(x[:-1])
        return seen[key]

    def goal(x: np.ndarray) -> tuple[float, np.ndarray]:
        value_G, slope_GK = values(x)
        return -float(weight_G @ value_G + one * x[-1]), -np.append(weight_G @ slope_GK, one)

    def room(x: np.ndarray) -> np.ndarray:
        value_G, _ = values(x)
        return np.concatenate([value_G[levelled] - x[-1] - level_G[levelled], value_G[railed] - rail_G[railed]])

    def room_slopes(x: np.ndarray) -> np.ndarray:
        _, slope_GK = values(x)
        of_t = np.append(-np.ones(len(levelled)), np.zeros(len(railed)))
        return np.column_stack([slope_GK[np.append(levelled, railed)], of_t])

    gap_G = surface(start_K)[0] - level_G
    found = scipy.optimize.minimize(
        goal,
        np.append(start_K, gap_G[levelled].min() if one else 0.0),
        jac=True,
        method="SLSQP",
        bounds=[*zip(simplex.floor_K, simplex.cap_K, strict=True), (None, None) if one else (0, 0)],
        constraints=[*_limits(simplex), scipy.optimize.NonlinearConstraint(room, 0, np.inf, jac=room_slopes)],
        options={"maxiter": 300, "ftol": 1e-10},
    )
    return simplex.project(found.x[:-1])


def _limits(simplex: Simplex) -> list[scipy.optimize.LinearConstraint]:
    """Sum and group sums of the weights; the last variable has no part in them."""
    rows = [(simplex.names, 1.0, 1.0), *simplex.groups]
    return [
        scipy.optimize.LinearConstraint(np.array([[*(name in domains for name in simplex.names), 0]], float), low, high)
        for domains, low, high in rows
    ]
