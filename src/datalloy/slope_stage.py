"""Losses and slopes at a few mixtures in, one quadratic a target and the mixture that is best by them out.

A merged model is linear in the weights, so its answer loss is a smooth function of them: near the optimum a quadratic
(DESIGN 2.2). One backward pass gives all K slopes, so a call tells K numbers more than its loss, and the calls needed
hardly grow with K. Each round fits the quadratics to all calls so far, goes to their optimum under the limits and calls
there.

The fit is a Bayesian linear regression. Level and slopes are free. Curvature is one common bend, under a wide prior,
plus a symmetric part that is pulled to zero; so directions not looked into yet bend as much as the others on average.
Real losses are no quadratics: a call at distance d of the point of interest may be off by `c d^3 / 6` in its loss and
by `c d^2 / 2` in its slopes, Taylor's remainder, so that calls nearby decide. The scales of curvature and of c come
from the marginal likelihood, shared by the targets. A quadratic that the calls determine is recovered, up to rounding.

Only differences along the simplex are used: what slopes say about weights that do not sum to one drops out. Trap: the
slopes are means over the target items, and so the quadratics know nothing of which items those happened to be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.linalg

from datalloy.errors import ModelError
from datalloy.objective import Objective
from datalloy.optimum import best_mixture
from datalloy.simplex import Simplex

# All in units of the steepest slopes, per unit of weight
ROUNDING = 1e-5  # of measured losses and slopes: sums in float32
COMMON_BEND = 2.0  # expected common curvature: the first step then goes about half way out
BEND_DOUBT = 10.0  # its standard deviation
OTHER_BENDS = (1.0, 0.3, 0.1, 3.0, 10.0)  # scales tried for curvature beside the common bend, the first one on a tie
REMAINDERS = (0.0, 0.1, 1.0, 10.0)  # scales tried for third derivatives

Slopes = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # a mixture [K] -> loss [G], slopes [G, K]


@dataclass(frozen=True)
class SlopeCall:
    """What was measured at one mixture: answer loss of each target, nats per token, and its slopes."""

    weight_K: np.ndarray
    loss_G: np.ndarray
    slope_GK: np.ndarray
    predicted_G: np.ndarray | None  # the losses promised by the quadratics before this call; None for the first


@dataclass(frozen=True)
class Quadratics:
    """The loss of each target as a quadratic of the mixture, with what the calls leave open.

    In coordinates `z = (w - centre) @ basis`, K - 1 of them, the features are 1, z, z_i^2 / 2 and z_i z_j.
    """

    centre_K: np.ndarray
    basis_KZ: np.ndarray
    coefficient_GP: np.ndarray
    covariance_PP: np.ndarray  # of the coefficients of a target whose scale is one
    scale_G: np.ndarray  # nats per unit of weight

    def losses(self, weight_MK: np.ndarray) -> np.ndarray:
        """[M, G] expected losses of any mixtures."""
        return self._features(weight_MK) @ self.coefficient_GP.T

    def standard_errors(self, weight_MK: np.ndarray) -> np.ndarray:
        """[M, G] of `losses`: what the calls leave open."""
        feature_MP = self._features(weight_MK)
        variance_M = ((feature_MP @ self.covariance_PP) * feature_MP).sum(axis=1)
        return np.sqrt(np.clip(variance_M, 0, None))[:, None] * self.scale_G

    def at(self, weight_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses [G] at one mixture and their slopes [G, K], which sum to zero over the domains."""
        z_Z = (weight_K - self.centre_K) @ self.basis_KZ
        bent_GZ = self._bend_GZZ @ z_Z
        slope_GZ = self.coefficient_GP[:, 1 : len(z_Z) + 1]
        return self.coefficient_GP[:, 0] + (slope_GZ + bent_GZ / 2) @ z_Z, (slope_GZ + bent_GZ) @ self.basis_KZ.T

    def draw(self, count: int, seed: int) -> list["Quadratics"]:
        """Quadratics that agree with the calls as well as these."""
        root_PP = _root(self.covariance_PP)
        shape = (count, len(self.scale_G), len(root_PP))
        noise_SGP = np.random.default_rng(seed).standard_normal(shape) @ root_PP.T
        return [replace(self, coefficient_GP=self.coefficient_GP + self.scale_G[:, None] * n) for n in noise_SGP]

    @cached_property
    def _bend_GZZ(self) -> np.ndarray:
        coordinates = self.basis_KZ.shape[1]
        bend_GZZ = np.zeros((len(self.scale_G), coordinates, coordinates))
        left, right = _pairs(coordinates)
        bend_GZZ[:, left, right] = bend_GZZ[:, right, left] = self.coefficient_GP[:, coordinates + 1 :]
        return bend_GZZ

    def _features(self, weight_MK: np.ndarray) -> np.ndarray:
        return _value_features((np.atleast_2d(weight_MK) - self.centre_K) @ self.basis_KZ)


@dataclass(frozen=True)
class SlopeStage:
    """Where the slopes led: the calls in order, the quadratics through them, and the optimum.

    `error`: how far the last call's losses were from what was promised, relative to how far they were from those of
    the first call; None with one call. Near zero the quadratics can be trusted, near one they told nothing.
    """

    calls: tuple[SlopeCall, ...]
    quadratics: Quadratics
    weight_K: np.ndarray
    error: float | None


def follow_slopes(
    slopes: Slopes, simplex: Simplex, objective: Objective, *, calls: int, tolerance: float
) -> SlopeStage:
    """Call at the uniform mixture and then at the optimum of all calls so far, at most `calls` times.

    Ends early where the quadratics promise to gain less than `tolerance` of what was gained since the first call. The
    objective is taken of negated losses, guard rails too. Raises ModelError where a loss or slope is not finite.
    """
    done = [_call(slopes, simplex.uniform, None)]
    while True:
        best = max(done, key=lambda call: float(objective.score(-call.loss_G)))
        quadratics = fit_quadratics(done, best.weight_K)
        starts_NK = np.array([best.weight_K, done[-1].weight_K, simplex.uniform])
        weight_K = best_mixture(simplex, objective, _values(quadratics), starts_NK)
        promised_G = quadratics.at(weight_K)[0]
        first, now, then = (float(objective.score(-loss_G)) for loss_G in (done[0].loss_G, best.loss_G, promised_G))
        if len(done) >= calls or (len(done) > 1 and then - now <= tolerance * (then - first)):
            return SlopeStage(tuple(done), quadratics, weight_K, _last_error(done))
        done.append(_call(slopes, weight_K, promised_G))


def fit_quadratics(calls: Sequence[SlopeCall], focus_K: np.ndarray) -> Quadratics:
    """The quadratics that best explain the calls, those near `focus_K` most."""
    basis_KZ = scipy.linalg.null_space(np.ones((1, len(focus_K))))
    z_NZ = np.array([call.weight_K - focus_K for call in calls]) @ basis_KZ
    loss_NG = np.array([call.loss_G for call in calls])
    slope_NGZ = np.array([call.slope_GK @ basis_KZ for call in calls])
    steepest_G = np.linalg.norm(slope_NGZ, axis=2).max(axis=0)
    scale_G = np.where(steepest_G > 0, steepest_G, 1.0)  # flat everywhere: any scale is as good
    feature_RP = np.vstack([_value_features(z_NZ), *(_slope_features(z_Z) for z_Z in z_NZ)])
    told_RG = np.vstack([loss_NG, *slope_NGZ.transpose(0, 2, 1)]) / scale_G
    tries = [
        _Regression(feature_RP, told_RG, _row_sd(z_NZ, remainder), _Prior(z_NZ.shape[1], other_bend))
        for remainder in REMAINDERS
        for other_bend in OTHER_BENDS
    ]
    best = max(tries, key=lambda regression: regression.log_likelihood)
    coefficient_PG, covariance_PP = best.posterior()
    return Quadratics(focus_K, basis_KZ, coefficient_PG.T * scale_G[:, None], covariance_PP, scale_G)


class _Prior:
    """Of the curvature's coefficients: a common bend under a wide prior, other bends pulled to zero.

    Variances of `other_bend^2` on the diagonal and half of it beside make the prior blind to the choice of axes.
    """

    def __init__(self, coordinates: int, other_bend: float) -> None:
        left, right = _pairs(coordinates)
        self.diagonal_C = (left == right).astype(float)
        self.mean_C = COMMON_BEND * self.diagonal_C
        self.variance_C = other_bend**2 * (1 + self.diagonal_C) / 2

    def times(self, columns_CM: np.ndarray) -> np.ndarray:
        """The prior covariance times columns."""
        common_M = BEND_DOUBT**2 * (self.diagonal_C @ columns_CM)
        return self.variance_C[:, None] * columns_CM + np.outer(self.diagonal_C, common_M)


class _Regression:
    """Rows that were told, explained by free coefficients (level and slopes) and by curvature under a prior."""

    def __init__(self, feature_RP: np.ndarray, told_RG: np.ndarray, sd_R: np.ndarray, prior: _Prior) -> None:
        bends = len(prior.mean_C)
        self.free_RF, self.bend_RC, self.prior = feature_RP[:, :-bends], feature_RP[:, -bends:], prior
        self.spread_CR = prior.times(self.bend_RC.T)
        self.factor = scipy.linalg.cho_factor(self.bend_RC @ self.spread_CR + np.diag(sd_R**2), lower=True)
        rest_RG = told_RG - (self.bend_RC @ prior.mean_C)[:, None]
        self.whitened_RF = self._solve(self.free_RF)
        self.precision_FF = self.free_RF.T @ self.whitened_RF
        self.free_FG = scipy.linalg.solve(self.precision_FF, self.whitened_RF.T @ rest_RG, assume_a="pos")
        self.residual_RG = rest_RG - self.free_RF @ self.free_FG

    @property
    def log_likelihood(self) -> float:
        """Of all targets together, the free coefficients integrated out (restricted likelihood), up to a constant."""
        log_determinant = 2 * np.log(np.diag(self.factor[0])).sum() + np.linalg.slogdet(self.precision_FF)[1]
        misfit = float((self.residual_RG * self._solve(self.residual_RG)).sum())
        return -0.5 * (misfit + self.residual_RG.shape[1] * float(log_determinant))

    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """Means [P, G] and covariance [P, P] of all coefficients, free ones first."""
        bend_CG = self.prior.mean_C[:, None] + self.spread_CR @ self._solve(self.residual_RG)
        free_FF = np.linalg.inv(self.precision_FF)
        pulled_CF = self.spread_CR @ self.whitened_RF
        known_CC = self.spread_CR @ self._solve(self.spread_CR.T)
        bend_CC = self.prior.times(np.eye(len(bend_CG))) - known_CC + pulled_CF @ free_FF @ pulled_CF.T
        cross_CF = -pulled_CF @ free_FF
        return np.vstack([self.free_FG, bend_CG]), np.block([[free_FF, cross_CF.T], [cross_CF, bend_CC]])

    def _solve(self, right: np.ndarray) -> np.ndarray:
        return scipy.linalg.cho_solve(self.factor, right)


def _call(slopes: Slopes, weight_K: np.ndarray, promised_G: np.ndarray | None) -> SlopeCall:
    loss_G, slope_GK = (np.asarray(array, dtype=float) for array in slopes(weight_K))
    if not (np.isfinite(loss_G).all() and np.isfinite(slope_GK).all()):
        raise ModelError(
            f"the loss of a merged model or its slopes are not finite at the mixture {weight_K.round(4).tolist()}: "
            "an expert is broken or its training diverged; look at the experts' losses and lower train.learning_rate"
        )
    return SlopeCall(weight_K, loss_G, slope_GK, promised_G)


def _values(quadratics: Quadratics) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    def negated(weight_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        loss_G, slope_GK = quadratics.at(weight_K)
        return -loss_G, -slope_GK

    return negated


def _last_error(calls: Sequence[SlopeCall]) -> float | None:
    last = calls[-1]
    if last.predicted_G is None:
        return None
    moved = float(np.linalg.norm(last.loss_G - calls[0].loss_G))
    return float(np.linalg.norm(last.loss_G - last.predicted_G)) / moved if moved > 0 else 0.0


def _row_sd(z_NZ: np.ndarray, remainder: float) -> np.ndarray:
    """What a quadratic may miss of each row: the losses, then the slopes call by call."""
    distance_N = np.linalg.norm(z_NZ, axis=1)
    loss_N = ROUNDING + remainder * distance_N**3 / 6
    slope_N = ROUNDING + remainder * distance_N**2 / 2
    return np.concatenate([loss_N, np.repeat(slope_N, z_NZ.shape[1])])


def _pairs(coordinates: int) -> tuple[np.ndarray, np.ndarray]:
    return np.triu_indices(coordinates)


def _value_features(z_NZ: np.ndarray) -> np.ndarray:
    left, right = _pairs(z_NZ.shape[1])
    halves_C = np.where(left == right, 0.5, 1.0)
    return np.column_stack([np.ones(len(z_NZ)), z_NZ, halves_C * z_NZ[:, left] * z_NZ[:, right]])


def _slope_features(z_Z: np.ndarray) -> np.ndarray:
    """[Z, P] derivatives of the features by each coordinate."""
    coordinates = len(z_Z)
    left, right = _pairs(coordinates)
    products_ZC = np.zeros((coordinates, len(left)))
    column = np.arange(len(left))
    products_ZC[left, column] = z_Z[right]
    products_ZC[right, column] = z_Z[left]
    return np.column_stack([np.zeros(coordinates), np.eye(coordinates), products_ZC])


def _root(covariance_PP: np.ndarray) -> np.ndarray:
    value_P, vector_PP = np.linalg.eigh(covariance_PP)
    return vector_PP * np.sqrt(np.clip(value_P, 0, None))
