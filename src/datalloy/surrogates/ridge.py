"""Really trained mixtures in, a linear surface over some features of the weights out: three shapes, one ridge.

- `linear`: the weights themselves. It always points at a corner, and is kept because it is what people try first.
- `ridge_sqrt`: their square roots. A trained model answers steeply to the first few samples of a domain and hardly
  to the last; on the runs that RegMix published no other shape does better with 24 to 36 runs.
- `scheffe`: the quadratic of mixture experiments (Scheffe 1958), weights and their products. Worth it once there are
  about as many runs as terms, K (K + 1) / 2. The linear terms, which are the values at the corners, are shrunk less
  than the products; how much less is chosen too.

How strongly to shrink is chosen by exact leave-one-out error, in closed form, on the rows of the fit alone. With very
few rows that choice is a strong shrinkage, and the surface keeps little but the direction in which values rise.
The constant is never shrunk. Features are not scaled to equal spread: a domain that had little weight in all runs
cannot have shown much, and scaling it up makes its slope noise.
"""

from collections.abc import Callable, Sequence

import numpy as np

from datalloy.surrogates.rows import mixtures, to_learn_from

STRENGTHS = np.logspace(-5, 3, 33)
CORNER_FREEDOM = (1.0, 10.0, 100.0)  # how many times less than the products the linear terms are shrunk

Features = Callable[[np.ndarray], np.ndarray]


class Ridge:
    """The best of several feature maps by leave-one-out, each with its best strength of shrinkage."""

    def __init__(self, features: Sequence[Features]) -> None:
        self._choices = tuple(features)

    def fit(self, weight_NK: np.ndarray, value_N: np.ndarray, seed: int) -> None:  # noqa: ARG002 nothing is drawn
        from sklearn.linear_model import RidgeCV

        rows = to_learn_from(weight_NK, value_N)
        models = [
            RidgeCV(STRENGTHS).fit(features(rows.weight_NK), rows.value_N, sample_weight=rows.count_N)
            for features in self._choices
        ]
        best = int(np.argmax([model.best_score_ for model in models]))
        self._model, self._features = models[best], self._choices[best]

    def predict(self, weight_MK: np.ndarray) -> np.ndarray:
        return self._model.predict(self._features(mixtures(weight_MK)))


def _weights(weight_MK: np.ndarray) -> np.ndarray:
    return weight_MK


def scheffe_features(freedom: float) -> Features:
    """Weights and products, both of unit size: the product of two weights of one half is scaled to one."""

    def features(weight_MK: np.ndarray) -> np.ndarray:
        left, right = np.triu_indices(weight_MK.shape[1], k=1)
        return np.hstack([np.sqrt(freedom) * weight_MK, 4 * weight_MK[:, left] * weight_MK[:, right]])

    return features


def linear() -> Ridge:
    return Ridge([_weights])


def ridge_sqrt() -> Ridge:
    return Ridge([np.sqrt])


def scheffe() -> Ridge:
    return Ridge([scheffe_features(freedom) for freedom in CORNER_FREEDOM])
