"""Really trained mixtures in, a smooth surface without a fixed shape out: a Gaussian process on the simplex.

One length scale for all domains, a noise term, and scikit-learn's fit of both by marginal likelihood; tried on the
weights and on their square roots (distances between square roots are Hellinger's), of which the likelier is kept:
both describe the same values, so their likelihoods compare. Far from all runs it falls back to the mean of the runs,
which makes it safe with few rows, and blunt with many domains.

Price: cubic in the number of runs; a second or so at 250.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from datalloy.surrogates.ridge import Features
from datalloy.surrogates.rows import mixtures, ordered, to_learn_from

if TYPE_CHECKING:
    from sklearn.gaussian_process import GaussianProcessRegressor

RESTARTS = 2  # of the search for scales, beside the one from the middle
LENGTHS = (0.05, 100.0)
NOISES = (1e-5, 10.0)  # as shares of the variance of the values
SIZES = (1e-2, 1e3)


class GaussianProcess:
    """A Gaussian process in whichever of `coordinates` makes the runs likelier."""

    def __init__(self, coordinates: Sequence[Features] = (np.asarray, np.sqrt)) -> None:
        self._choices = tuple(coordinates)

    def fit(self, weight_NK: np.ndarray, value_N: np.ndarray, seed: int) -> None:
        to_learn_from(weight_NK, value_N)
        weight_NK, value_N = ordered(weight_NK, value_N)  # replicates tell it the noise
        models = [_fitted(coordinates(weight_NK), value_N, seed) for coordinates in self._choices]
        best = int(np.argmax([model.log_marginal_likelihood_value_ for model in models]))
        self._model, self._coordinates = models[best], self._choices[best]

    def predict(self, weight_MK: np.ndarray) -> np.ndarray:
        return self._model.predict(self._coordinates(mixtures(weight_MK)))


def _fitted(feature_NF: np.ndarray, value_N: np.ndarray, seed: int) -> "GaussianProcessRegressor":
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    kernel = ConstantKernel(1.0, SIZES) * RBF(1.0, LENGTHS) + WhiteKernel(0.1, NOISES)
    model = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=RESTARTS, random_state=seed)
    with warnings.catch_warnings():  # a scale at its limit is an answer: no noise, or no effect
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(feature_NF, value_N)
