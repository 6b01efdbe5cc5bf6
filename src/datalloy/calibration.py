"""A few really trained mixtures in, a corrected surface over all mixtures out.

A merged model stands in for the model that would be trained on a mixture. At the vertices the two are one and the same
expert. In between they part at second order by `sum_{k<j} w_k w_j (H_k - H_j)(g_k - g_j)` (from MergeMix,
arXiv 2601.17858, Eqs. 1 and 2): an interaction that merging misses, and that makes it favour corners. So of each target

    true(w) = merged(w) + sum_{k<j} b_kj w_k w_j,    b_kj = b + delta_kj

with a Gaussian `b` around zero and smaller Gaussian `delta_kj` around that, linear regression with a prior. What is
trained responds more steeply to the first few samples of a domain than any such form, so `b` may also drift with `w`,
smoothly in `sqrt(w)`. All this is one Gaussian process on `true - merged`, zero at the vertices. Without the drift,
more runs made picks worse: in made-up worlds of quadratic domains trained by gradient descent (three domains, long
training, mean of ten worlds) the regret rose from 0.06 after two runs to 0.32 after eight; with it, from 0.04 to 0.05.

The process's scale is not chosen but averaged over, by marginal likelihood and a wide log-normal around the spread of
the merged values. So one run already corrects what can be seen from it, no run leaves merged values with wide errors,
and the noise of the items says how far a run is to be believed.

Trap: predictions far from all runs. Of mixtures all over the simplex, 95 % intervals held 59 to 100 % of true values
in such worlds, fewest where experts were trained to the end. What the pick is worth is not for this surface to say but
for runs that it has not seen (`verdict.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from datalloy.errors import DataError, RecipeError
from datalloy.objective import Objective
from datalloy.optimum import best_mixture
from datalloy.simplex import Simplex
from datalloy.uncertainty import target_means

# mixtures [M, K] to means and standard errors, [M, G] each
Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

PAIR_FRACTION = 0.5  # scale of delta_kj as a fraction of b's
DRIFT_FRACTION = 1.0  # the same of b's drift with w
DRIFT_LENGTH = 0.5  # of that drift, as a distance of sqrt(w); from a vertex to uniform weights of three it is 0.9
SCALE_DOUBT = 1.0  # standard deviation of the logarithm of b's scale: a factor of 7 each way at 95 %
SCALE_NODES = np.linspace(-3, 3, 25)  # where the scale is integrated, in standard deviations
JITTER = 1e-9  # of the variance, so that repeated runs without noise can be inverted
POOL = 128  # mixtures looked at before the best are refined
STARTS = 8
INTERVAL_POOL, DRAWS = 256, 400  # mixtures and draws of the surface from which the intervals of weights are read
SLOPE_STEP = 1e-5  # for slopes by differences of the posterior mean
DISTINCT = 0.05  # share of samples by which two planned runs must differ
APART = 0.15  # the same for the promising ones, where there is room: near ones tell little that is new
SAME_MIXTURE = 1e-6  # largest difference of weights between two records of one mixture


@dataclass(frozen=True)
class TrainedMixtures:
    """N really trained mixtures and the merged models at the same weights, all measured on the same V items.

    The experts belong here too, as vertices. `true_NV` and `merged_NV` are values, higher is better (a loss negated),
    `target_V` the target of each item, 0 to G - 1. `seed_sd_G`: standard deviation of a target's mean between
    trainings that differ by their seed alone, where it was measured; zero where it was not. `has_items`: false where
    only means and standard errors are known and V are stand-ins for the items behind them.

    Raises DataError for arrays that do not fit each other, values that are not finite, weights that are no mixture,
    and targets with fewer than two items, whose noise cannot be told.
    """

    targets: tuple[str, ...]
    weight_NK: np.ndarray
    true_NV: np.ndarray
    merged_NV: np.ndarray
    target_V: np.ndarray
    seed_sd_G: np.ndarray
    has_items: bool = True

    def __post_init__(self) -> None:
        mixtures, items = len(self.weight_NK), len(self.target_V)
        for name, value_NV in (("true_NV", self.true_NV), ("merged_NV", self.merged_NV)):
            if value_NV.shape != (mixtures, items):
                raise DataError(f"{name} of {mixtures} mixtures and {items} items has the shape {value_NV.shape}")
            if not np.isfinite(value_NV).all():
                row, item = np.argwhere(~np.isfinite(value_NV))[0]
                raise DataError(f"{name} is not finite for mixture {row} on item {item}; measure that model again")
        off_N = np.abs(self.weight_NK.sum(axis=1) - 1)
        if not (self.weight_NK >= -SAME_MIXTURE).all() or not (off_N <= SAME_MIXTURE).all():
            raise DataError(f"weights of trained mixtures must be shares that add up to one, found {self.weight_NK}")
        count_G = np.bincount(self.target_V, minlength=len(self.targets))
        if len(count_G) > len(self.targets) or self.seed_sd_G.shape != (len(self.targets),):
            raise DataError(f"items or seed_sd_G are of other targets than {self.targets}")
        if (count_G < 2).any():
            name = self.targets[int(np.argmin(count_G))]
            raise DataError(f"target {name} has {count_G.min()} items; at least 2 are needed to tell their noise")

    @property
    def true_NG(self) -> np.ndarray:
        return target_means(self.true_NV, self.target_V)

    @property
    def merged_NG(self) -> np.ndarray:
        return target_means(self.merged_NV, self.target_V)

    @property
    def is_vertex_N(self) -> np.ndarray:
        """Rows that are experts: trained and merged are one model."""
        return self.weight_NK.max(axis=1, initial=0) >= 1 - SAME_MIXTURE

    def take(self, rows_N: np.ndarray) -> "TrainedMixtures":
        """Those of the mixtures."""
        return TrainedMixtures(
            self.targets,
            self.weight_NK[rows_N],
            self.true_NV[rows_N],
            self.merged_NV[rows_N],
            self.target_V,
            self.seed_sd_G,
            self.has_items,
        )

    def find(self, weight_K: np.ndarray) -> int | None:
        """The row of a mixture, or None where it was not trained."""
        rows = np.flatnonzero((np.abs(self.weight_NK - weight_K) <= SAME_MIXTURE).all(axis=1))
        return int(rows[0]) if len(rows) else None

    def noise(self) -> np.ndarray:
        """Covariance of the mean differences `true - merged` between mixtures, over items and seeds: [G, N, N].

        Items are shared by all mixtures, so what is odd about an item errs in all of them alike; the covariance over
        items is kept whole, shrunk as far as few items ask for (Ledoit and Wolf 2004).
        """
        from sklearn.covariance import ledoit_wolf

        mixtures = len(self.weight_NK)
        noise_GNN = np.zeros((len(self.targets), mixtures, mixtures))
        if mixtures:
            for target in range(len(self.targets)):
                difference_NI = (self.true_NV - self.merged_NV)[:, self.target_V == target]
                items = difference_NI.shape[1]
                noise_GNN[target] = ledoit_wolf(difference_NI.T)[0] / (items - 1)
        return noise_GNN + self.seed_sd_G[:, None, None] ** 2 * np.eye(mixtures)


def interaction_scale(merged_NG: np.ndarray) -> np.ndarray:
    """The usual size of `b` before any run, by target: the spread of merged values over the searched mixtures, [G].

    Half way between two domains the merge may then be off by a quarter of what the search sees. In the worlds of the
    module's docstring `b` was 0.2 to 2.7 times this. A target on which all merges are alike gets a tenth of the widest.
    """
    spread_G = np.ptp(merged_NG, axis=0)
    return np.maximum(spread_G, 0.1 * spread_G.max())


@dataclass(frozen=True)
class Calibration:
    """What training on a mixture would give, as far as is known: the posterior that `calibrate` finds from N runs.

    S nodes stand for the scales that the interaction may have, each with its probability given the runs.
    """

    targets: tuple[str, ...]
    predict_merged: Predict
    weight_NK: np.ndarray
    scale_GS: np.ndarray
    probability_GS: np.ndarray
    precision_GSNN: np.ndarray  # inverse covariance of the runs' differences
    pull_GSN: np.ndarray  # precision @ difference

    def predict(self, weight_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard error of the true values of M mixtures, two [M, G]."""
        merged_MG, merged_se_MG = self.predict_merged(weight_MK)
        mean_GSM, cross_MN = self._means_by_scale(weight_MK), _kernel(weight_MK, self.weight_NK)
        known_GSM = np.einsum("mn,gsnl,ml->gsm", cross_MN, self.precision_GSNN, cross_MN)
        variance_GSM = self.scale_GS[..., None] ** 2 * _kernel_diagonal(weight_MK)
        variance_GSM -= self.scale_GS[..., None] ** 4 * known_GSM
        mean_GM = self._average(mean_GSM)
        variance_GM = self._average(np.clip(variance_GSM, 0, None) + (mean_GSM - mean_GM[:, None]) ** 2)
        return merged_MG + mean_GM.T, np.sqrt(merged_se_MG**2 + variance_GM.T)

    def covariance(self, weight_MK: np.ndarray) -> np.ndarray:
        """Covariance of the true values between M mixtures by target, [G, M, M].

        The errors of the merged surface are taken as independent between mixtures, since only their size is known:
        that of a difference is then stated too large rather than too small.
        """
        _, merged_se_MG = self.predict_merged(weight_MK)
        mean_GSM = self._means_by_scale(weight_MK)
        off_GSM = mean_GSM - self._average(mean_GSM)[:, None]
        total_GMM = merged_se_MG.T[:, :, None] ** 2 * np.eye(len(weight_MK))
        for target, node in np.ndindex(*self.scale_GS.shape):
            off_M = off_GSM[target, node]
            spread_MM = self._covariance_at(weight_MK, target, node) + np.outer(off_M, off_M)
            total_GMM[target] += self.probability_GS[target, node] * spread_MM
        return total_GMM

    def draw(self, weight_MK: np.ndarray, count: int, seed: int) -> np.ndarray:
        """`count` draws of the true values of M mixtures together, [count, M, G]."""
        rng = np.random.default_rng(seed)
        merged_MG, merged_se_MG = self.predict_merged(weight_MK)
        value_CMG = merged_MG + merged_se_MG * rng.standard_normal((count, *merged_MG.shape))
        mean_GSM = self._means_by_scale(weight_MK)
        for target, probability_S in enumerate(self.probability_GS):
            node_C = rng.choice(len(probability_S), size=count, p=probability_S)
            for node, times in zip(*np.unique(node_C, return_counts=True), strict=True):
                value_CMG[node_C == node, :, target] += rng.multivariate_normal(
                    mean_GSM[target, node],
                    self._covariance_at(weight_MK, target, node),
                    size=times,
                    check_valid="ignore",  # positive up to rounding, which the factorisation by eigenvalues bears
                    method="eigh",
                )
        return value_CMG

    def interactions(self) -> np.ndarray:
        """Posterior mean of `b_kj` by target, [G, K, K], symmetric, zero on the diagonal.

        Positive where two domains trained together do better than their merge. Leans to zero: what may as well be
        drift of `b` is not counted.
        """
        together_NKK = PAIR_FRACTION**2 * np.einsum("nk,nj->nkj", self.weight_NK, self.weight_NK)
        together_NKK += _pair_sum(self.weight_NK)[:, None, None]
        pull_GN = np.einsum("gs,gsn->gn", self.probability_GS * self.scale_GS**2, self.pull_GSN)
        return np.einsum("gn,nkj->gkj", pull_GN, together_NKK) * (1 - np.eye(self.weight_NK.shape[1]))

    def _means_by_scale(self, weight_MK: np.ndarray) -> np.ndarray:
        """Means of the interaction, [G, S, M]."""
        return self.scale_GS[..., None] ** 2 * (self.pull_GSN @ _kernel(self.weight_NK, weight_MK))

    def _covariance_at(self, weight_MK: np.ndarray, target: int, node: int) -> np.ndarray:
        variance, cross_MN = self.scale_GS[target, node] ** 2, _kernel(weight_MK, self.weight_NK)
        known_MM = cross_MN @ self.precision_GSNN[target, node] @ cross_MN.T
        return variance * (_kernel(weight_MK, weight_MK) - variance * known_MM)

    def _average(self, value_GSM: np.ndarray) -> np.ndarray:
        return np.einsum("gs,gsm->gm", self.probability_GS, value_GSM)


def calibrate(
    predict_merged: Predict, trained: TrainedMixtures, scale_G: np.ndarray, *, doubt: float = SCALE_DOUBT
) -> Calibration:
    """The posterior of the true values given the trained mixtures; with none of them, the prior.

    Args:
        predict_merged: the search's surface: mixtures [M, K] to means and standard errors of merged values, [M, G].
        scale_G: the size that `b` is expected to have before any run (`interaction_scale`), in each target's unit.
        doubt: standard deviation of the logarithm of that size; 0 takes it as known.
    """
    inner = trained.take(~trained.is_vertex_N)
    difference_GN = (inner.true_NG - inner.merged_NG).T
    mixtures = len(inner.weight_NK)
    scale_GS = scale_G[:, None] * np.exp(doubt * SCALE_NODES)
    covariance_GSNN = scale_GS[..., None, None] ** 2 * _kernel(inner.weight_NK, inner.weight_NK)
    covariance_GSNN = covariance_GSNN + inner.noise()[:, None]
    total_GS = np.trace(covariance_GSNN, axis1=2, axis2=3)
    covariance_GSNN += (JITTER * total_GS + np.finfo(float).tiny)[..., None, None] * np.eye(mixtures)
    precision_GSNN = np.linalg.inv(covariance_GSNN)
    pull_GSN = np.einsum("gsnl,gl->gsn", precision_GSNN, difference_GN)
    misfit_GS = np.einsum("gsn,gn->gs", pull_GSN, difference_GN)
    evidence_GS = -(misfit_GS + np.linalg.slogdet(covariance_GSNN)[1] + SCALE_NODES**2) / 2
    probability_GS = np.exp(evidence_GS - evidence_GS.max(axis=1, keepdims=True))
    probability_GS /= probability_GS.sum(axis=1, keepdims=True)
    return Calibration(
        trained.targets, predict_merged, inner.weight_NK, scale_GS, probability_GS, precision_GSNN, pull_GSN
    )


def _kernel(weight_MK: np.ndarray, weight_NK: np.ndarray) -> np.ndarray:
    """Prior covariance of the interaction between mixtures, [M, N], where the scale is one."""
    distance_MN = 2 - 2 * np.sqrt(np.clip(weight_MK, 0, 1)) @ np.sqrt(np.clip(weight_NK, 0, 1)).T  # squared
    drift_MN = DRIFT_FRACTION**2 * np.exp(-distance_MN / (2 * DRIFT_LENGTH**2))
    pairs_MN = ((weight_MK @ weight_NK.T) ** 2 - weight_MK**2 @ (weight_NK**2).T) / 2  # sum of v_k v_j w_k w_j
    return np.outer(_pair_sum(weight_MK), _pair_sum(weight_NK)) * (1 + drift_MN) + PAIR_FRACTION**2 * pairs_MN


def _kernel_diagonal(weight_MK: np.ndarray) -> np.ndarray:
    pairs_M = ((weight_MK**2).sum(axis=1) ** 2 - (weight_MK**4).sum(axis=1)) / 2
    return _pair_sum(weight_MK) ** 2 * (1 + DRIFT_FRACTION**2) + PAIR_FRACTION**2 * pairs_M


def _pair_sum(weight_MK: np.ndarray) -> np.ndarray:
    """`sum_{k<j} w_k w_j` of weights that add up to one: zero at the vertices, largest at uniform weights."""
    return (1 - (weight_MK**2).sum(axis=1)) / 2


# --- which mixture, which runs ---------------------------------------------------------------------------------------


class Surface(Protocol):
    """What is thought of the true values of all mixtures: a calibration, or anything else that was fitted."""

    @property
    def targets(self) -> tuple[str, ...]: ...

    def predict(self, weight_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard errors, both [M, G]."""
        ...

    def draw(self, weight_MK: np.ndarray, count: int, seed: int) -> np.ndarray:
        """`count` draws of the values of M mixtures together, [count, M, G]."""
        ...


def weight_intervals(
    surface: Surface,
    simplex: Simplex,
    objective: Objective,
    pick_K: np.ndarray,
    *,
    confidence: float,
    seed: int,
) -> np.ndarray:
    """For each weight, where the best mixture lies in most draws of the surface, [K, 2]; the pick is inside."""
    pool_NK = np.vstack([pick_K, simplex.sample(INTERVAL_POOL, seed)])
    best_R = objective.score(surface.draw(pool_NK, DRAWS, seed)).argmax(axis=1)
    tail = (1 - confidence) / 2
    low_K, high_K = np.quantile(pool_NK[best_R], (tail, 1 - tail), axis=0)
    return np.stack([np.minimum(low_K, pick_K), np.maximum(high_K, pick_K)], axis=1)


def recommend(calibration: Surface, simplex: Simplex, objective: Objective, *, seed: int) -> np.ndarray:
    """The feasible mixture with the best objective of expected values, [K], guard rails kept by the expected values.

    A pool of mixtures drawn from `seed` is predicted, and the best are refined. Raises RecipeError where no mixture
    is expected to keep the guard rails.
    """
    corners = [simplex.maximise_linear(unit_K) for unit_K in np.eye(len(simplex.names))]
    pool_MK = np.vstack([simplex.uniform, *corners, simplex.sample(POOL, seed)])
    value_MG = calibration.predict(pool_MK)[0]
    order = np.lexsort([-objective.score(value_MG), ~objective.allowed(value_MG)])

    def surface(weight_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # one-sided differences towards the vertices stay on the simplex; what they lack is the same for all domains
        toward_KK = weight_K + SLOPE_STEP * (np.eye(len(weight_K)) - weight_K)
        here_G, *there_KG = calibration.predict(np.vstack([weight_K, toward_KK]))[0]
        return here_G, (np.array(there_KG) - here_G).T / SLOPE_STEP

    found_K = best_mixture(simplex, objective, surface, pool_MK[order[:STARTS]])
    value_G = calibration.predict(found_K[None])[0][0]
    if not objective.allowed(value_G):
        short_G = objective.lowest_G - value_G
        raise RecipeError(
            f"no mixture is expected to keep the guard rails: at the best one, {calibration.targets[short_G.argmax()]} "
            f"falls by {short_G.max():.4g} more than mixture.guard_rails allows; loosen that or drop a domain"
        )
    return found_K


@dataclass(frozen=True)
class PlannedRun:
    """A mixture to be really trained, and why."""

    role: Literal["pick", "uniform", "size_proportional", "promising"]
    weight_K: np.ndarray


def plan_runs(
    calibration: Surface,
    simplex: Simplex,
    objective: Objective,
    *,
    pick_K: np.ndarray,
    size_K: np.ndarray,
    count: int,
    seed: int,
    trained_NK: np.ndarray | None = None,
) -> tuple[PlannedRun, ...]:
    """Up to `count` mixtures worth a real training, the most needed first; a shorter plan is the start of a longer one.

    The pick, uniform weights and the shares of the domains' sizes `size_K` (both brought into the feasible set), then
    the most promising others by the calibration so far: the objective of expected values one standard error up. None
    is planned that nearly is one planned before, one of `trained_NK` or an expert; fewer than `count` come out where
    the feasible set has no room for more.
    """
    vertices_KK = np.eye(len(simplex.names))
    known_NK = vertices_KK if trained_NK is None else np.vstack([vertices_KK, trained_NK])
    planned: list[PlannedRun] = []
    for run in (
        PlannedRun("pick", pick_K),
        PlannedRun("uniform", simplex.uniform),
        PlannedRun("size_proportional", simplex.project(size_K)),
    ):
        # a pick near an expert is still what the user would train on; only the expert itself need not be trained again
        if _distances(run.weight_K[None], known_NK)[0] > (SAME_MIXTURE if run.role == "pick" else DISTINCT):
            planned.append(run)
            known_NK = np.vstack([known_NK, run.weight_K])
    pool_MK = simplex.sample(POOL, seed)
    mean_MG, se_MG = calibration.predict(pool_MK)
    hope_M = objective.score(mean_MG + se_MG)
    hope_M[~objective.allowed(mean_MG + se_MG)] = -np.inf
    while len(planned) < count:
        far_M = _distances(pool_MK, known_NK)
        room = APART if far_M.max() > APART else DISTINCT
        if far_M.max() <= room:
            break
        open_MK = pool_MK[far_M > room]
        weight_K = open_MK[int(np.argmax(hope_M[far_M > room]))]
        planned.append(PlannedRun("promising", weight_K))
        known_NK = np.vstack([known_NK, weight_K])
    return tuple(planned[:count])


def _distances(weight_MK: np.ndarray, known_NK: np.ndarray) -> np.ndarray:
    """Total variation to the nearest known mixture: the share of samples that would have to be exchanged."""
    return np.abs(weight_MK[:, None] - known_NK[None]).sum(axis=2).min(axis=1) / 2
