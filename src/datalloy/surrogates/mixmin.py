"""Experts' log-probabilities of the target's items in, weights out, without one trained or merged mixture.

MixMin (Thudi et al., ICML 2025): the model that is best for a mixture of sources is the mixture of the sources' best
models, so the weights whose averaged predictions suit the target best can be found on outputs alone. Minimise
`-sum_t u_t log sum_k w_k p_k(item_t)`: convex, and one pass of each expert over the target gives all that it needs.
An item is whatever the caller took the log-probability of. Whole answers are what the theory speaks of; but a few
nats an answer decide between experts, so it comes close to counting which expert wins how often. Single tokens forget
which expert explained the tokens before them, and tell apart less sharply.

The authors' release takes whole sequences, divides the log of each average by the sequence's length (here: item
weights of one by the length) and makes at most 100 steps of exponentiated gradient at rate 1 from uniform. Slopes are
of the order of one by the length, so for sequences of a thousand tokens that ends near uniform; and they do
not vanish at the optimum (they are equal there), so its test for small slopes tells length, not convergence. Here
the same convex problem is solved to the end, within the limits that the feasible set has.

All sums are of logarithms: an expert that gives an item 1000 nats less than another is no zero.
"""

import numpy as np

from datalloy.errors import DataError
from datalloy.simplex import Simplex
from datalloy.surrogates.rows import mixtures

STEEPEST = 300.0  # nats; a slope of e^300 is as good as infinite, and e^1000 is no float
OPTIMAL = 1e-6  # nats: no feasible mixture can be better by more than this, since the problem is convex
MOST_RESTARTS = 20


class MixMin:
    """`log_prob_KT`: each expert's log-probability of each item, in nats. `weight_T`: what items count, default equal.

    Raises DataError on numbers that are not finite, on negative item weights and on item weights that are all zero.
    """

    def __init__(self, log_prob_KT: np.ndarray, weight_T: np.ndarray | None = None) -> None:
        self._log_prob_KT = np.asarray(log_prob_KT, dtype=np.float64)
        if self._log_prob_KT.ndim != 2 or self._log_prob_KT.size == 0:
            raise DataError(
                f"log-probabilities must be [experts, items], found an array of shape {self._log_prob_KT.shape}"
            )
        if bad := int((~np.isfinite(self._log_prob_KT)).sum()):
            raise DataError(f"{bad} of the experts' {self._log_prob_KT.size} log-probabilities are not finite")
        items = self._log_prob_KT.shape[1]
        weight_T = np.ones(items) if weight_T is None else np.asarray(weight_T, dtype=np.float64)
        if weight_T.shape != (items,) or not (np.isfinite(weight_T) & (weight_T >= 0)).all() or not weight_T.any():
            raise DataError(f"item weights must be {items} numbers, none negative, not all zero")
        self._weight_T = weight_T / weight_T.sum()

    def predict(self, weight_MK: np.ndarray) -> np.ndarray:
        """[M] weighted mean log-probability of the items under the averaged experts: nats, higher is better."""
        return np.array([float(self._weight_T @ self._mixed_T(weight_K)) for weight_K in mixtures(weight_MK)])

    def slopes(self, weight_K: np.ndarray) -> np.ndarray:
        """[K] slopes of `predict` at one mixture. Times the weights they add up to one; best where none exceeds one."""
        return np.exp(np.minimum(self._log_prob_KT - self._mixed_T(weight_K), STEEPEST)) @ self._weight_T

    def best(self, feasible: Simplex) -> np.ndarray:
        """[K] the feasible mixture with the highest `predict`, to within OPTIMAL nats where the solver gets that far.

        The solver stops early where an expert is the only one for a few items in ten thousand; it goes on when it is
        started again where it stopped.
        """
        weight_K = feasible.uniform
        for _ in range(MOST_RESTARTS):
            weight_K = feasible.maximise(self._value_and_slopes, weight_K)
            slope_K = self.slopes(weight_K)
            if slope_K @ (feasible.maximise_linear(slope_K) - weight_K) <= OPTIMAL:
                break
        return weight_K

    def _value_and_slopes(self, weight_K: np.ndarray) -> tuple[float, np.ndarray]:
        return float(self.predict(weight_K[None])[0]), self.slopes(weight_K)

    def _mixed_T(self, weight_K: np.ndarray) -> np.ndarray:
        from scipy.special import logsumexp

        return logsumexp(self._log_prob_KT, b=np.asarray(weight_K)[:, None], axis=0)
