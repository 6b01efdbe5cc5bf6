"""A few measured mixtures and the quadratics of their losses in, what is believed of every mixture's values out.

Of each target g, values and predicted losses both in units of their spread over the measured mixtures,

    value_g(w) = level_g + h_g(-loss_g(w)) + f_g(w),    h_g ~ GP(trust * x, link^2 RBF),    f_g ~ GP(0, height^2 RBF)

with the loss that the slope stage's quadratics predict. Where losses agree with the metric, h carries the surface to
mixtures that were never evaluated, also where the metric saturates or the quadratics are off far out; where they do
not, h goes flat and f learns from the evaluations alone. Every evaluation has a noise of its own, from its items.
Trust, link, and height and length of f are shared by the targets, because a few noisy evaluations of one target cannot
tell them; they come from the marginal likelihood of all targets on a grid, which cannot run away from its priors.

Draws are functions, not values: a draw from the prior plus an update by the data (Wilson et al., arXiv 2002.09309), so
a draw can be climbed, and the same draw asked twice answers alike. Traps: f is isotropic and knows no domain from
another; far from the evaluated mixtures the answer is the loss's opinion with a wide error.
"""

import itertools
from typing import NamedTuple

import numpy as np
import scipy.linalg
from scipy.spatial.distance import cdist

from datalloy.slope_stage import Quadratics

LEVEL_DOUBT = 10.0  # standard deviation of the level, in spreads of the values: nearly free
TRUSTS = (0.0, 0.35, 0.7, 1.0)  # spreads of the values per spread of the losses; at 1 losses explain all there is
LINKS = (0.1, 0.3, 1.0)  # in spreads of the values
LINK_LENGTH = 1.0  # in spreads of the losses
HEIGHTS = np.geomspace(0.02, 1.5, 7)  # in spreads of the values
LENGTHS = np.geomspace(0.2, 2.0, 4)  # in distance of mixtures; the simplex is 1.41 wide
HEIGHT_PRIOR = (np.log(0.3), 1.0)  # mean and standard deviation of the logarithm
LENGTH_PRIOR = (np.log(0.6), 0.7)
FEATURES = 128  # pairs of waves in a draw of f
LINK_FEATURES = 12  # pairs of waves in a draw of h: in one dimension a quadrature, and exact
JITTER = 1e-8  # of the spread's square, so that repeated noiseless evaluations can be inverted


class Shape(NamedTuple):
    """How the surfaces of all targets are thought to look; see the module."""

    trust: float
    link: float
    height: float
    length: float


class Posterior:
    """Belief about the values of G targets at any mixture, from N evaluated ones.

    `value_NG` are means over items, `noise_NG` their variances as far as they differ between mixtures: what all
    evaluations share, because they share their items, is in the level of the surface and in no error here.
    """

    def __init__(
        self, weight_NK: np.ndarray, value_NG: np.ndarray, noise_NG: np.ndarray, quadratics: Quadratics
    ) -> None:
        self._weight_NK, self._quadratics = weight_NK, quadratics
        self._level_G = value_NG.mean(axis=0)
        spread_G = np.maximum(value_NG.std(axis=0), np.sqrt(noise_NG.mean(axis=0)))
        self._spread_G = np.where(spread_G > 0, spread_G, 1.0)
        loss_NG = quadratics.losses(weight_NK)
        self._loss_level_G = loss_NG.mean(axis=0)
        loss_spread_G = loss_NG.std(axis=0)
        self._loss_spread_G = np.where(loss_spread_G > 0, loss_spread_G, np.inf)  # inf: the losses tell nothing apart
        self._told_GN = ((value_NG - self._level_G) / self._spread_G).T
        self._noise_GN = (noise_NG / self._spread_G**2).T + JITTER
        self._agree_GN = self._agreement(loss_NG)
        self.evidence, self.shape = self._best_shape()
        self._factor_GNN = np.linalg.cholesky(self._covariance(self.shape))
        self._pull_GN = self._solve((self._told_GN - self.shape.trust * self._agree_GN)[..., None])[..., 0]

    def predict(self, weight_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard errors of the values of M mixtures, both [M, G]."""
        weight_MK = np.atleast_2d(weight_MK)
        agree_GM = self._agreement(self._quadratics.losses(weight_MK))
        kernel_GMN = self._kernels(self.shape, weight_MK, agree_GM)
        known_GM = (kernel_GMN * self._solve(kernel_GMN.transpose(0, 2, 1)).transpose(0, 2, 1)).sum(axis=2)
        prior = LEVEL_DOUBT**2 + self.shape.link**2 + self.shape.height**2
        mean_GM = self.shape.trust * agree_GM + (kernel_GMN @ self._pull_GN[..., None])[..., 0]
        error_GM = np.sqrt(np.clip(prior - known_GM, 0, None))
        return self._level_G + self._spread_G * mean_GM.T, self._spread_G * error_GM.T

    def mean(self, weight_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Expected values [G] of one mixture and their slopes [G, K]."""
        agree_G, agree_slope_GK = self._agreement_at(weight_K)
        value_G, rise_G, slope_GK = self._pulled(weight_K, agree_G, self._pull_GN)
        value_G = value_G + self.shape.trust * agree_G
        return self._in_units(value_G, slope_GK + (rise_G + self.shape.trust)[:, None] * agree_slope_GK)

    def surfaces(self, count: int, seed: int) -> "Draws":
        """`count` surfaces of values, each as it may truly be."""
        return Draws(self, count, seed)

    def draw(self, weight_MK: np.ndarray, count: int, seed: int) -> np.ndarray:
        """[count, M, G] values of M mixtures on `count` drawn surfaces; the same surfaces for the same seed."""
        return self.surfaces(count, seed).values(np.atleast_2d(weight_MK))

    def _agreement(self, loss_MG: np.ndarray) -> np.ndarray:
        """[G, M] negated losses in units of their spread over the evaluated mixtures."""
        return ((self._loss_level_G - loss_MG) / self._loss_spread_G).T

    def _agreement_at(self, weight_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        loss_G, slope_GK = self._quadratics.at(weight_K)
        return (self._loss_level_G - loss_G) / self._loss_spread_G, -slope_GK / self._loss_spread_G[:, None]

    def _kernels(self, shape: Shape, weight_MK: np.ndarray, agree_GM: np.ndarray) -> np.ndarray:
        """[G, M, N] covariance of surfaces at M mixtures with those at the evaluated ones."""
        apart_GMN = agree_GM[:, :, None] - self._agree_GN[:, None]
        square_MN = cdist(weight_MK, self._weight_NK, "sqeuclidean")
        near_MN = shape.height**2 * np.exp(-square_MN / (2 * shape.length**2))
        return LEVEL_DOUBT**2 + shape.link**2 * np.exp(-(apart_GMN**2) / (2 * LINK_LENGTH**2)) + near_MN

    def _covariance(self, shape: Shape) -> np.ndarray:
        """[G, N, N] of the measured values."""
        noise_GNN = self._noise_GN[:, None] * np.eye(len(self._weight_NK))
        return self._kernels(shape, self._weight_NK, self._agree_GN) + noise_GNN

    def _best_shape(self) -> tuple[float, Shape]:
        tries = itertools.product(LINKS, HEIGHTS, LENGTHS)
        return max((found for attempt in tries for found in self._weigh(*attempt)), key=lambda found: found[0])

    def _weigh(self, link: float, height: float, length: float) -> list[tuple[float, Shape]]:
        """For each trust the log marginal likelihood of all targets and the log prior, up to a constant."""
        factor_GNN = np.linalg.cholesky(self._covariance(Shape(0.0, link, height, length)))
        missing_GNT = self._told_GN[..., None] - self._agree_GN[..., None] * np.array(TRUSTS)
        misfit_T = (np.linalg.solve(factor_GNN, missing_GNT) ** 2).sum(axis=(0, 1))
        doubts = ((height, HEIGHT_PRIOR), (length, LENGTH_PRIOR))
        misfit_T += sum(((np.log(value) - mean) / sd) ** 2 for value, (mean, sd) in doubts)
        evidence_T = -misfit_T / 2 - np.log(np.diagonal(factor_GNN, axis1=1, axis2=2)).sum()
        return [
            (float(e), Shape(t, link, float(height), float(length))) for e, t in zip(evidence_T, TRUSTS, strict=True)
        ]

    def _solve(self, right_GNM: np.ndarray) -> np.ndarray:
        pairs = zip(self._factor_GNN, right_GNM, strict=True)
        return np.stack([scipy.linalg.cho_solve((factor_NN, True), right_NM) for factor_NN, right_NM in pairs])

    def _pulled(
        self, weight_K: np.ndarray, agree_G: np.ndarray, pull_GN: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the evaluations make of one mixture: values [G], their rise with the agreement [G], slopes [G, K].

        All in spreads of the values, without the trust in the losses.
        """
        apart_GN = agree_G[:, None] - self._agree_GN
        link_GN = pull_GN * (self.shape.link**2 * np.exp(-(apart_GN**2) / (2 * LINK_LENGTH**2)))
        square_N = ((self._weight_NK - weight_K) ** 2).sum(axis=1)
        near_GN = pull_GN * (self.shape.height**2 * np.exp(-square_N / (2 * self.shape.length**2)))
        near_G = near_GN.sum(axis=1)
        value_G = LEVEL_DOUBT**2 * pull_GN.sum(axis=1) + link_GN.sum(axis=1) + near_G
        rise_G = -(link_GN * apart_GN).sum(axis=1) / LINK_LENGTH**2
        return value_G, rise_G, (near_GN @ self._weight_NK - near_G[:, None] * weight_K) / self.shape.length**2

    def _in_units(self, value_G: np.ndarray, slope_GK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._level_G + self._spread_G * value_G, self._spread_G[:, None] * slope_GK


class Draws:
    """S surfaces drawn from a posterior: draws from the prior, moved to agree with noisy copies of the data.

    A prior draw is a sum of waves. Waves come as cosine and sine, so that the variance is right at every mixture.
    """

    def __init__(self, posterior: Posterior, count: int, seed: int) -> None:
        self._of, shape = posterior, posterior.shape
        targets, mixtures = posterior._told_GN.shape
        rng = np.random.default_rng(seed)
        self._wave_DK = rng.standard_normal((FEATURES, posterior._weight_NK.shape[1])) / shape.length
        size = shape.height / np.sqrt(FEATURES)
        self._size_CSGD = size * rng.standard_normal((2, count, targets, FEATURES))
        node_L, part_L = np.polynomial.hermite_e.hermegauss(2 * LINK_FEATURES)
        self._link_wave_L = node_L[LINK_FEATURES:] / LINK_LENGTH
        part_L = part_L[LINK_FEATURES:] / part_L[LINK_FEATURES:].sum()
        self._link_size_CSGL = shape.link * np.sqrt(part_L) * rng.standard_normal((2, count, targets, LINK_FEATURES))
        self._level_SG = LEVEL_DOUBT * rng.standard_normal((count, targets))
        noise_SGN = rng.standard_normal((count, targets, mixtures)) * np.sqrt(posterior._noise_GN)
        missing_SGN = posterior._told_GN - noise_SGN - self._prior(posterior._weight_NK, posterior._agree_GN)
        self._pull_SGN = posterior._solve(missing_SGN.transpose(1, 2, 0)).transpose(2, 0, 1)

    def __len__(self) -> int:
        return len(self._level_SG)

    def values(self, weight_MK: np.ndarray) -> np.ndarray:
        """[S, M, G] values of M mixtures on every surface."""
        of = self._of
        agree_GM = of._agreement(of._quadratics.losses(weight_MK))
        kernel_GMN = of._kernels(of.shape, weight_MK, agree_GM)
        pulled_GMS = kernel_GMN @ self._pull_SGN.transpose(1, 2, 0)
        value_SGM = self._prior(weight_MK, agree_GM) + pulled_GMS.transpose(2, 0, 1)
        return of._level_G + of._spread_G * value_SGM.transpose(0, 2, 1)

    def at(self, s: int, weight_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values [G] of one mixture on surface s, and their slopes [G, K]."""
        of = self._of
        agree_G, agree_slope_GK = of._agreement_at(weight_K)
        value_G, rise_G, slope_GK = of._pulled(weight_K, agree_G, self._pull_SGN[s])
        angle_D = self._wave_DK @ weight_K
        cos_D, sin_D = np.cos(angle_D), np.sin(angle_D)
        even_GD, odd_GD = self._size_CSGD[:, s]
        link_angle_GL = agree_G[:, None] * self._link_wave_L
        link_cos_GL, link_sin_GL = np.cos(link_angle_GL), np.sin(link_angle_GL)
        even_GL, odd_GL = self._link_size_CSGL[:, s]
        value_G = value_G + self._level_SG[s] + of.shape.trust * agree_G
        value_G += even_GD @ cos_D + odd_GD @ sin_D + (even_GL * link_cos_GL + odd_GL * link_sin_GL).sum(axis=1)
        rise_G += of.shape.trust + (odd_GL * link_cos_GL - even_GL * link_sin_GL) @ self._link_wave_L
        slope_GK = slope_GK + (odd_GD * cos_D - even_GD * sin_D) @ self._wave_DK
        return of._in_units(value_G, slope_GK + rise_G[:, None] * agree_slope_GK)

    def _prior(self, weight_MK: np.ndarray, agree_GM: np.ndarray) -> np.ndarray:
        """[S, G, M] the surfaces before any data."""
        angle_DM = self._wave_DK @ weight_MK.T
        even_SGD, odd_SGD = self._size_CSGD
        f_SGM = even_SGD @ np.cos(angle_DM) + odd_SGD @ np.sin(angle_DM)
        link_angle_GLM = self._link_wave_L[:, None] * agree_GM[:, None]
        waves_CGLM = np.stack([np.cos(link_angle_GLM), np.sin(link_angle_GLM)])
        h_SGM = np.einsum("csgl,cglm->sgm", self._link_size_CSGL, waves_CGLM, optimize=True)
        return self._level_SG[..., None] + self._of.shape.trust * agree_GM + h_SGM + f_SGM
