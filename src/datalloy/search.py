"""What merged models answer in, the mixture to train on out: slopes first, then a few evaluations, raced.

Three stages (DESIGN 2.2). A) Slopes of the answer loss in all weights, one backward pass a call, give a quadratic of
each target and its optimum under the limits: twenty domains cost no more calls than three (`slope_stage.py`). B) A
belief about the metric of every mixture, from the quadratics and a few evaluations, says which are worth evaluating
next: the optima of surfaces drawn from it, Thompson's way (`posterior.py`). C) Those are raced on blocks of items
against the best known, and what is ruled out is not evaluated to its end (`racing.py`).

Where the metric is the loss itself, A has measured it already; B and C shrink to confirming evaluations. Above
`MANY_DOMAINS` domains B searches the shares of groups of domains with alike slopes, the split inside a group being that
of A, and then the splits inside groups that got weight; where the first evaluations contradict the losses it searches
all domains at once. What is recommended is the best of the belief, not the luckiest evaluation: the best of many noisy
ones is inflated.

The search is deterministic given the answers, so a caller that keeps answers by the bytes of the weights can replay it.
Traps: with few evaluations for the domains the belief is the loss's; and it knows nothing but the items it was shown.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from datalloy.objective import Objective, pareto_front
from datalloy.optimum import best_mixture
from datalloy.posterior import Draws, Posterior
from datalloy.racing import Evaluations, Measured
from datalloy.simplex import Simplex
from datalloy.slope_stage import Quadratics, SlopeStage, follow_slopes

SLOPE_CALLS = 8
SLOPE_TOLERANCE = 0.01  # of the gain since the first call: less promised is not worth a call
MANY_DOMAINS = 12
GROUPS = 8  # of domains, where there are many
FIRST_SHARE = 0.4  # of the evaluations before the first belief
BATCH = 4  # proposals from one belief
DRAWS = 16  # surfaces climbed for each belief
POOL = 256  # mixtures looked at before the best are climbed from
STARTS = 2
NEAR = 1.5  # exponent of the pool's distances from the recommended mixture: above one, most are near
REGRET_TOLERANCE = 0.25  # of the standard error of the recommended mixture's own score
LEAST_TRUST = 0.5  # spreads of the values per spread of the losses, for the losses to say how groups are split
INNER_WEIGHT = 0.1  # a group with less is not split further
TAIL = 0.025  # of the maximisers, on either side of a weight's interval


class Candidates(Measured, Protocol):
    """What a search may measure; merged models stand behind it, or anything else."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def slopes(self, weight_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each target wants lowered, [G], such as its answer loss, and its slopes [G, K]."""
        ...


class Belief(Protocol):
    """What is thought of the values of all mixtures."""

    def predict(self, weight_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard errors, both [M, G]."""
        ...

    def draw(self, weight_MK: np.ndarray, count: int, seed: int) -> np.ndarray:
        """[count, M, G] values on drawn surfaces."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A mixture that was measured by merging: value of each target with its standard error over items, items used."""

    stage: str
    weight_K: np.ndarray
    value_G: np.ndarray
    se_G: np.ndarray
    items: int


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        interval_K2: where the best weight of each domain lies in 95 % of what may be true; holds `weight_K`.
        score: expected objective at `weight_K`; `regret`: what the best of all is expected to have above it.
        slope_error: how far the last slopes' losses were from those promised, see `SlopeStage`.
        front: rows of `rows` that no other beats for all targets.
        slope_calls, evaluations: what was spent; evaluations in units of all items.
        belief: what is thought of all other mixtures.
    """

    weight_K: np.ndarray
    interval_K2: np.ndarray
    score: float
    regret: float
    slope_error: float | None
    rows: tuple[Candidate, ...]
    front: tuple[int, ...]
    slope_calls: int
    evaluations: float
    belief: Belief

    def predict(self, weight_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.belief.predict(weight_MK)

    def draw(self, weight_MK: np.ndarray, count: int, seed: int) -> np.ndarray:
        return self.belief.draw(weight_MK, count, seed)


def search(
    candidates: Candidates,
    simplex: Simplex,
    objective: Objective,
    *,
    slopes_tell: bool,
    evaluations: Literal["auto"] | int,
    seed: int,
) -> Found:
    """Find the feasible mixture with the best expected objective.

    Args:
        slopes_tell: the values are the negated risks whose slopes are told; False where they are anything else.
        evaluations: of the metric, at most, in units of all items; auto: `auto_evaluations`.

    Raises ModelError where an answer is not finite.
    """
    wanted = objective if slopes_tell else _without_rails(objective)
    stage = follow_slopes(candidates.slopes, simplex, wanted, calls=SLOPE_CALLS, tolerance=SLOPE_TOLERANCE)
    told = Evaluations(candidates)
    if slopes_tell:
        return _confirm(candidates, told, simplex, objective, stage, seed)
    budget = auto_evaluations(len(simplex.names)) if evaluations == "auto" else evaluations
    hunt = _Hunt(told, simplex, objective, stage, budget, seed)
    hunt.begin()
    for share, spaces in _levels(simplex, stage, hunt):
        hunt.go_on(spaces, share * budget)
    return hunt.found(candidates)


def auto_evaluations(domains: int) -> int:
    """Evaluations where the recipe names no number: two a domain and a few for the surface's shape."""
    return 2 * domains + 5


# --- the metric is the loss ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LossBelief:
    """Values are negated losses; what is thought of them are the slope stage's quadratics."""

    quadratics: Quadratics

    def predict(self, weight_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return -self.quadratics.losses(weight_MK), self.quadratics.standard_errors(weight_MK)

    def draw(self, weight_MK: np.ndarray, count: int, seed: int) -> np.ndarray:
        return np.stack([-drawn.losses(weight_MK) for drawn in self.quadratics.draw(count, seed)])


def _confirm(
    candidates: Candidates, told: Evaluations, simplex: Simplex, objective: Objective, stage: SlopeStage, seed: int
) -> Found:
    belief = _LossBelief(stage.quadratics)
    told.evaluate_fully([simplex.uniform, stage.weight_K], "confirm")
    pool_NK = np.vstack([stage.weight_K, _pool(simplex, stage.weight_K, seed)])
    score_SN = objective.score(belief.draw(pool_NK, 16 * DRAWS, seed))
    best_NK = pool_NK[score_SN.argmax(axis=1)]
    regret = float((score_SN.max(axis=1) - score_SN[:, 0]).mean())
    return _found(candidates, told, objective, stage, belief, stage.weight_K, best_NK, regret)


# --- the metric is another -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Space:
    """Mixtures `base_K + parts_KU @ share_U`: only some shares are searched, as a simplex of their own."""

    simplex: Simplex
    base_K: np.ndarray
    parts_KU: np.ndarray

    def embed(self, share_NU: np.ndarray) -> np.ndarray:
        return self.base_K + share_NU @ self.parts_KU.T


class _Hunt:
    """Stages B and C: evaluate, believe, propose, race, until the budget is spent or the regret is small."""

    def __init__(
        self, told: Evaluations, simplex: Simplex, objective: Objective, stage: SlopeStage, budget: int, seed: int
    ) -> None:
        self.told, self.simplex, self.objective, self.stage = told, simplex, objective, stage
        self.budget, self.seed = budget, seed
        self.weight_K = stage.weight_K
        self._round = 0

    def begin(self) -> None:
        """Uniform shares, the slopes' optimum, corners where they are affordable, then what fills the space."""
        domains, first = len(self.simplex.names), max(2, int(FIRST_SHARE * self.budget))
        design = [self.simplex.uniform, self.stage.weight_K]
        if domains + 2 <= first:
            design += [self.simplex.maximise_linear(unit_K) for unit_K in np.eye(domains)]
        more = max(0, first - len(design))
        spread_NK = self.simplex.spread(more, self.seed, beside_NK=np.array(design))
        # halfway to the slopes' optimum: far corners of many domains tell little about the best mixture
        design += list((self.stage.weight_K + spread_NK) / 2)
        self.told.evaluate_fully(design[: self.budget], "design")

    def belief(self) -> Posterior:
        value_NG, noise_NG = self.told.means()
        return Posterior(self.told.weight_NK, value_NG, noise_NG, self.stage.quadratics)

    def go_on(self, spaces: Sequence[_Space], until: float) -> None:
        """Propose and race inside each space in turn until so many evaluations are spent."""
        while True:
            for space in spaces:
                belief = self.belief()
                self._round += 1
                self.weight_K, pool_NU = self._recommend(belief, space)
                tops_NK, regret = self._maximisers(belief, space, pool_NU)
                count = min(BATCH, int(min(self.budget, until) - self.told.spent))
                if count < 1 or self._is_settled(belief, regret):
                    return
                incumbent = self._incumbent(belief)
                self.told.race(tops_NK[:count], "race", incumbent, self.objective, self.seed + self._round)

    def _recommend(self, belief: Posterior, space: _Space) -> tuple[np.ndarray, np.ndarray]:
        near_U = space.simplex.project(np.linalg.lstsq(space.parts_KU, self.weight_K - space.base_K, rcond=None)[0])
        pool_NU = np.vstack([near_U, _pool(space.simplex, near_U, self.seed + self._round)])
        mean_NG = belief.predict(space.embed(pool_NU))[0]
        order = np.argsort(-self._merit(mean_NG), kind="stable")

        def surface(share_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            value_G, slope_GK = belief.mean(space.embed(share_U[None])[0])
            return value_G, slope_GK @ space.parts_KU

        best_U = best_mixture(space.simplex, self.objective, surface, pool_NU[order[: STARTS + 1]])
        return space.embed(best_U[None])[0], np.vstack([best_U, pool_NU])

    def _maximisers(self, belief: Posterior, space: _Space, pool_NU: np.ndarray) -> tuple[np.ndarray, float]:
        """The best mixtures of drawn surfaces, and by how much they are expected to beat the recommended one there."""
        draws = belief.surfaces(DRAWS, self.seed + 1000 + self._round)
        value_SNG = draws.values(space.embed(pool_NU))
        tops, regrets = [], []
        for s in range(DRAWS):
            order = np.argsort(-self._merit(value_SNG[s]), kind="stable")[:STARTS]
            surface = _drawn(draws, s, space)
            top_U = best_mixture(space.simplex, self._wish(s), surface, pool_NU[order])
            tops.append(space.embed(top_U[None])[0])
            best, own = (float(self.objective.score(draws.at(s, w)[0])) for w in (tops[-1], self.weight_K))
            regrets.append(max(0.0, best - own))
        return np.array(tops), float(np.mean(regrets))

    def _wish(self, draw: int) -> Objective:
        """The objective; for a Pareto front, another weighting for each draw, so that proposals cover the front."""
        if self.objective.kind != "pareto":
            return self.objective
        weight_G = np.random.default_rng((self.seed, self._round, draw)).dirichlet(
            np.ones(len(self.objective.weight_G))
        )
        return replace(self.objective, kind="weighted", weight_G=weight_G)

    def _merit(self, value_NG: np.ndarray) -> np.ndarray:
        return np.where(self.objective.allowed(value_NG), 0.0, -1e6) + self.objective.score(value_NG)

    def _is_settled(self, belief: Posterior, regret: float) -> bool:
        drawn_SG = belief.draw(self.weight_K, 4 * DRAWS, self.seed)[:, 0]
        return regret < REGRET_TOLERANCE * float(self.objective.score(drawn_SG).std())

    def _incumbent(self, belief: Posterior) -> int:
        is_full_N = np.isfinite(self.told.value_NV).all(axis=1)
        score_N = self.objective.score(belief.predict(self.told.weight_NK)[0])
        return int(np.argmax(np.where(is_full_N, score_N, -np.inf)))

    def found(self, candidates: Candidates) -> Found:
        """What is recommended, held against the best of all mixtures and not only of the spaces searched last."""
        belief, whole = self.belief(), _whole(self.simplex)
        pool_NK = np.vstack([self.weight_K, _pool(self.simplex, self.weight_K, self.seed)])
        best_NK, regret = self._maximisers(belief, whole, pool_NK)
        return _found(candidates, self.told, self.objective, self.stage, belief, self.weight_K, best_NK, regret)


def _drawn(draws: Draws, s: int, space: _Space) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    def surface(share_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value_G, slope_GK = draws.at(s, space.embed(share_U[None])[0])
        return value_G, slope_GK @ space.parts_KU

    return surface


# --- many domains ----------------------------------------------------------------------------------------------------


def _whole(simplex: Simplex) -> _Space:
    domains = len(simplex.names)
    return _Space(simplex, np.zeros(domains), np.eye(domains))


def _levels(simplex: Simplex, stage: SlopeStage, hunt: _Hunt) -> Iterator[tuple[float, list[_Space]]]:
    """Spaces to search one after another, each with the share of the budget by which it ends."""
    domains, whole = len(simplex.names), _whole(simplex)
    # the recipe's sums have no form in shares of our groups, and a loss that misleads would split them wrongly
    if domains <= MANY_DOMAINS or simplex.groups or hunt.belief().shape.trust < LEAST_TRUST:
        yield 1.0, [whole]
        return
    group_K = _group(stage)
    yield 0.8, [_between(simplex, stage.weight_K, group_K)]
    inner = [_inside(simplex, hunt.weight_K, group_K == g) for g in range(group_K.max() + 1)]
    worth = [space for space in inner if space is not None]
    yield 1.0, worth or [whole]


def _group(stage: SlopeStage) -> np.ndarray:
    """[K] group of each domain: those whose slopes pull the targets alike, at the last call."""
    from sklearn.cluster import AgglomerativeClustering

    slope_GK = stage.calls[-1].slope_GK
    profile_KG = (slope_GK - slope_GK.mean(axis=1, keepdims=True)).T
    return AgglomerativeClustering(n_clusters=GROUPS, linkage="ward").fit_predict(profile_KG)


def _between(simplex: Simplex, weight_K: np.ndarray, group_K: np.ndarray) -> _Space:
    """Shares of groups; inside a group as in `weight_K`, or evenly where that gives it nothing."""
    parts_KU = np.zeros((len(weight_K), int(group_K.max()) + 1))
    for g in range(parts_KU.shape[1]):
        inside_K = np.where(group_K == g, np.maximum(weight_K, simplex.floor_K), 0.0)
        inside_K = inside_K if inside_K.sum() > 0 else (group_K == g).astype(float)
        parts_KU[:, g] = inside_K / inside_K.sum()
    return _Space(_limits(simplex, np.zeros(len(weight_K)), parts_KU), np.zeros(len(weight_K)), parts_KU)


def _inside(simplex: Simplex, weight_K: np.ndarray, is_in_K: np.ndarray) -> _Space | None:
    """The split inside one group, all else as it is; None where the group is small or has one domain."""
    total = float(weight_K[is_in_K].sum())
    if total < INNER_WEIGHT or is_in_K.sum() < 2:
        return None
    parts_KU = total * np.eye(len(weight_K))[:, is_in_K]
    base_K = np.where(is_in_K, 0.0, weight_K)
    return _Space(_limits(simplex, base_K, parts_KU), base_K, parts_KU)


def _limits(simplex: Simplex, base_K: np.ndarray, parts_KU: np.ndarray) -> Simplex:
    """Floors and caps of shares from those of the domains they are spread over."""
    with np.errstate(divide="ignore", invalid="ignore"):
        floor_U = np.where(parts_KU > 0, (simplex.floor_K - base_K)[:, None] / parts_KU, 0.0).max(axis=0)
        cap_U = np.where(parts_KU > 0, (simplex.cap_K - base_K)[:, None] / parts_KU, np.inf).min(axis=0)
    names = tuple(f"share {u}" for u in range(parts_KU.shape[1]))
    return Simplex(names, floor_U, np.minimum(cap_U, 1.0))


# --- what all share --------------------------------------------------------------------------------------------------


def _pool(simplex: Simplex, around_K: np.ndarray, seed: int) -> np.ndarray:
    """Mixtures to look at: many near one, some anywhere."""
    far_NK = simplex.sample(POOL, seed)
    step_N1 = np.random.default_rng(seed).uniform(size=(POOL, 1)) ** NEAR
    return np.vstack([around_K + step_N1 * (far_NK - around_K), far_NK[: POOL // 4]])


def _without_rails(objective: Objective) -> Objective:
    """Guard rails are in the metric's unit; losses know nothing of them."""
    return replace(objective, max_fall_G=np.full(len(objective.base_G), np.inf))


def _found(
    candidates: Candidates,
    told: Evaluations,
    objective: Objective,
    stage: SlopeStage,
    belief: Belief,
    weight_K: np.ndarray,
    best_NK: np.ndarray,
    regret: float,
) -> Found:
    rows = (*_slope_rows(stage, len(candidates.target_V)), *_evaluated_rows(candidates, told))
    is_value_N = [row.stage != "slopes" for row in rows]
    value_NG = np.array([row.value_G for row in rows])
    is_front_N = np.zeros(len(rows), dtype=bool)
    is_front_N[is_value_N] = pareto_front(value_NG[is_value_N])
    low_K, high_K = np.quantile(best_NK, (TAIL, 1 - TAIL), axis=0)
    return Found(
        weight_K=weight_K,
        interval_K2=np.stack([np.minimum(low_K, weight_K), np.maximum(high_K, weight_K)], axis=1),
        score=float(objective.score(belief.predict(weight_K[None])[0])[0]),
        regret=regret,
        slope_error=stage.error,
        rows=rows,
        front=tuple(np.flatnonzero(is_front_N).tolist()),
        slope_calls=len(stage.calls),
        evaluations=told.spent,
        belief=belief,
    )


def _slope_rows(stage: SlopeStage, items: int) -> list[Candidate]:
    """Losses negated; a call tells means alone, so their errors are not known."""
    unknown_G = np.full(len(stage.calls[0].loss_G), np.nan)
    return [Candidate("slopes", call.weight_K, -call.loss_G, unknown_G, items) for call in stage.calls]


def _evaluated_rows(candidates: Candidates, told: Evaluations) -> list[Candidate]:
    rows = []
    for name, weight_K, value_V in zip(told.stages, told.weight_NK, told.value_NV, strict=True):
        seen_G = [value_V[(candidates.target_V == g) & np.isfinite(value_V)] for g in range(len(candidates.targets))]
        value_G = np.array([values.mean() for values in seen_G])
        se_G = np.array([v.std(ddof=1) / np.sqrt(len(v)) if len(v) > 1 else np.nan for v in seen_G])
        rows.append(Candidate(name, weight_K, value_G, se_G, sum(map(len, seen_G))))
    return rows
