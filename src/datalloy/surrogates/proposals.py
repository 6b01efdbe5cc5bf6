"""What a rival may know in, one feasible mixture out: every way of choosing a mixture that merging has to beat.

A rival sees the evidence that its method would have paid for and no more: real runs (which also hold the experts, as
the mixtures that are one domain), domain sizes, the experts' log-probabilities. `uniform` and `size_proportional` need
no run; `best_of_runs` is the merging paper's own way, the best of the mixtures that were evaluated; each surrogate
proposes where it predicts most; `mixmin` needs the experts' log-probabilities alone.

Where a surrogate is highest is looked for among the corners of the feasible set, the feasible runs and a dense
sample that favours corners and edges (where the optima of many domains lie and uniform draws never come), then by a
local climb from the best of these. Trees have no slopes to climb: as RegMix does, the mean of the best 128 in 100,000
draws is taken (RegMix draws around the sizes of the domains; here the draws cover the feasible set).

Trap: a surrogate is believed where it is highest, which is where it errs upwards most. With few runs that costs more
than its rank correlation tells.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from datalloy.errors import DataError
from datalloy.simplex import Simplex
from datalloy.surrogates import SURROGATES, Surrogate
from datalloy.surrogates.mixmin import MixMin
from datalloy.surrogates.rows import distinct

DRAWS = 10_000
TREE_DRAWS, TREE_BEST = 100_000, 128  # RegMix's
CLIMBS = 2  # starts of the local search
CORNER_TRIES = 4  # random directions a domain in which to look for corners, beside both ways along each
STEP = 1e-6  # of a difference quotient, towards a corner
WHOLE = 1 - 1e-9  # a weight that is all of the mixture

PIECEWISE_CONSTANT = {"regmix", "regmix_tuned"}


@dataclass(frozen=True)
class Evidence:
    """All that a rival may look at; there may be no runs at all.

    `value_N`: what really trained runs on the mixtures `weight_NK` reached, higher is better. `size_K`: samples each
    domain has. `log_prob_KT`: what each expert gives each item of the targets, in nats; `item_weight_T`: what the
    items count, default equal.
    """

    weight_NK: np.ndarray
    value_N: np.ndarray
    size_K: np.ndarray | None = None
    log_prob_KT: np.ndarray | None = None
    item_weight_T: np.ndarray | None = None


# One feasible mixture, [K]. The same evidence in any order and the same seed give the same mixture; raises DataError
# where the evidence lacks what the rival needs.
Rival = Callable[[Evidence, Simplex, int], np.ndarray]


def uniform(evidence: Evidence, feasible: Simplex, seed: int) -> np.ndarray:  # noqa: ARG001
    """The feasible mixture nearest to equal weights."""
    return feasible.uniform


def size_proportional(evidence: Evidence, feasible: Simplex, seed: int) -> np.ndarray:  # noqa: ARG001
    """The feasible mixture nearest to taking every sample once."""
    if evidence.size_K is None:
        raise DataError("size_proportional needs the number of samples of each domain")
    size_K = np.asarray(evidence.size_K, dtype=np.float64)
    return feasible.project(size_K / size_K.sum())


def best_expert(evidence: Evidence, feasible: Simplex, seed: int) -> np.ndarray:  # noqa: ARG001
    """All weight on the domain whose expert is best; where that is not feasible, the feasible mixture nearest to it."""
    rows = distinct(evidence.weight_NK, evidence.value_N)
    vertex_N = rows.weight_NK.max(axis=1, initial=0) >= WHOLE
    if not vertex_N.any():
        raise DataError(f"best_expert needs a run on one domain alone, found none among {len(vertex_N)} mixtures")
    return feasible.project(rows.weight_NK[np.argmax(np.where(vertex_N, rows.value_N, -np.inf))])


def best_of_runs(evidence: Evidence, feasible: Simplex, seed: int) -> np.ndarray:  # noqa: ARG001
    """The best of the feasible mixtures that were really trained."""
    rows = distinct(evidence.weight_NK, evidence.value_N)
    allowed_N = np.array([feasible.contains(weight_K) for weight_K in rows.weight_NK], dtype=bool)
    if not allowed_N.any():
        raise DataError(f"best_of_runs needs a run on a feasible mixture, found none among {len(allowed_N)}")
    return rows.weight_NK[np.argmax(np.where(allowed_N, rows.value_N, -np.inf))]


def by_surrogate(name: str, evidence: Evidence, feasible: Simplex, seed: int) -> np.ndarray:
    """Where the surrogate, fitted to all runs, predicts most."""
    surrogate = SURROGATES[name]()
    surrogate.fit(evidence.weight_NK, evidence.value_N, seed)
    if name in PIECEWISE_CONSTANT:
        return _mean_of_best(surrogate, _candidates(evidence, feasible, seed, TREE_DRAWS))
    return _climb(surrogate, _candidates(evidence, feasible, seed, DRAWS), feasible)


def mixmin(evidence: Evidence, feasible: Simplex, seed: int) -> np.ndarray:  # noqa: ARG001
    """The weights by which the experts' averaged predictions suit the target best."""
    if evidence.log_prob_KT is None:
        raise DataError("mixmin needs the experts' log-probabilities of the targets' items")
    return MixMin(evidence.log_prob_KT, evidence.item_weight_T).best(feasible)


RIVALS: dict[str, Rival] = {
    "uniform": uniform,
    "size_proportional": size_proportional,
    "best_expert": best_expert,
    "best_of_runs": best_of_runs,
    **{name: partial(by_surrogate, name) for name in SURROGATES},
    "mixmin": mixmin,
}


def _candidates(evidence: Evidence, feasible: Simplex, seed: int, draws: int) -> np.ndarray:
    """[M, K] feasible mixtures: corners, random means of corners, the nearest to uniform, and the feasible runs."""
    rng = np.random.default_rng(seed)
    corner_CK = _corners(feasible, rng)
    # Dirichlet's concentrations add up to between 1, which puts most of a draw on few corners, and C, which spreads it
    spread_M = np.exp(rng.uniform(0, np.log(len(corner_CK)), size=draws)) / len(corner_CK)
    share_MC = rng.standard_gamma(spread_M[:, None], size=(draws, len(corner_CK))) + np.finfo(float).tiny
    share_MC /= share_MC.sum(axis=1, keepdims=True)
    runs_NK = distinct(evidence.weight_NK, evidence.value_N).weight_NK
    runs_NK = runs_NK[[feasible.contains(weight_K) for weight_K in runs_NK]]
    return np.vstack([corner_CK, feasible.uniform, runs_NK, share_MC @ corner_CK])


def _corners(feasible: Simplex, rng: np.random.Generator) -> np.ndarray:
    """[C, K] corners of the feasible set: of a simplex without limits all, else those that directions lead to."""
    domains = len(feasible.names)
    directions = np.vstack([np.eye(domains), -np.eye(domains), rng.normal(size=(CORNER_TRIES * domains, domains))])
    corners = np.array([feasible.maximise_linear(direction_K) for direction_K in directions])
    _, first = np.unique(corners.round(9), axis=0, return_index=True)
    return corners[first]


def _mean_of_best(surrogate: Surrogate, candidate_MK: np.ndarray) -> np.ndarray:
    """The mean of the best candidates, with all that tie with the last of them: of a constant, the centre."""
    value_M = surrogate.predict(candidate_MK)
    least = np.partition(value_M, -TREE_BEST)[-TREE_BEST]
    return candidate_MK[value_M >= least].mean(axis=0)


def _climb(surrogate: Surrogate, candidate_MK: np.ndarray, feasible: Simplex) -> np.ndarray:
    best_M = np.argsort(-surrogate.predict(candidate_MK), kind="stable")[:CLIMBS]

    def value_and_slopes(weight_K: np.ndarray) -> tuple[float, np.ndarray]:
        """Slopes towards each pure domain. On the simplex they differ from partial derivatives by a constant alone."""
        steps_KK = (1 - STEP) * weight_K + STEP * np.eye(len(weight_K))
        here, *there = surrogate.predict(np.vstack([weight_K, steps_KK]))
        return float(here), (np.array(there) - here) / STEP

    return feasible.maximise(value_and_slopes, candidate_MK[best_M])
