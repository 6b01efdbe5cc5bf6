"""Really trained mixtures in, boosted trees out: RegMix as published, and the same trees tuned for few runs.

RegMix (arXiv 2407.01492; the numbers are those of the notebook in sail-sg/regmix) fits LightGBM with a learning rate
of 0.01 and 1000 trees and leaves the rest to the library. One of those defaults, at least 20 rows in a leaf, means
that below 40 runs no tree can split and the prediction is a constant; it is kept so, since it is what one gets. Not
kept: the notebook stops boosting early by the error on the very runs it then reports, which nobody has who searches.

`regmix_tuned` lets leaves be small (2, 5 or 10 rows, and bins of one row), and chooses that and the number of trees
by cross-validation on the rows of the fit. With 2 rows a leaf, a split takes 4 runs: with 3 it is a constant too.

Trap: trees are piecewise constant, so their highest point is a region. Take its mean, not its first corner.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from datalloy.errors import EnvironmentFault
from datalloy.surrogates.rows import folds, mixtures, ordered, to_learn_from

if TYPE_CHECKING:
    from lightgbm import LGBMRegressor

PUBLISHED = {"n_estimators": 1000, "learning_rate": 0.01}
LEAF_ROWS = (2, 5, 10)
TUNED = {"n_estimators": 300, "learning_rate": 0.05, "min_data_in_bin": 1, "num_leaves": 15}
TREE_COUNTS = (10, 20, 40, 80, 150, 300)


class RegMix:
    """LightGBM with the hyper-parameters that RegMix published."""

    def fit(self, weight_NK: np.ndarray, value_N: np.ndarray, seed: int) -> None:
        to_learn_from(weight_NK, value_N)
        weight_NK, value_N = ordered(weight_NK, value_N)
        self._model = _trees(seed, PUBLISHED).fit(weight_NK, value_N)

    def predict(self, weight_MK: np.ndarray) -> np.ndarray:
        return _predicted(self._model, mixtures(weight_MK), PUBLISHED["n_estimators"])


class RegMixTuned:
    """LightGBM with small leaves; their size and the number of trees by cross-validation."""

    def fit(self, weight_NK: np.ndarray, value_N: np.ndarray, seed: int) -> None:
        weight_NK, value_N, count_N = to_learn_from(weight_NK, value_N)
        error_LC = np.zeros((len(LEAF_ROWS), len(TREE_COUNTS)))
        for kept, left in folds(len(value_N), seed):
            for row, leaf_rows in enumerate(LEAF_ROWS):
                model = _trees(seed, TUNED | {"min_child_samples": leaf_rows})
                model.fit(weight_NK[kept], value_N[kept], sample_weight=count_N[kept])
                for column, trees in enumerate(TREE_COUNTS):
                    miss = _predicted(model, weight_NK[left], trees) - value_N[left]
                    error_LC[row, column] += count_N[left] @ miss**2
        best_row, best_column = np.unravel_index(np.argmin(error_LC), error_LC.shape)
        self._tree_count = TREE_COUNTS[best_column]
        self._model = _trees(seed, TUNED | {"min_child_samples": LEAF_ROWS[best_row]})
        self._model.fit(weight_NK, value_N, sample_weight=count_N)

    def predict(self, weight_MK: np.ndarray) -> np.ndarray:
        return _predicted(self._model, mixtures(weight_MK), self._tree_count)


def _trees(seed: int, settings: Mapping[str, float]) -> "LGBMRegressor":
    try:
        from lightgbm import LGBMRegressor
    except ImportError as error:
        raise EnvironmentFault(
            "the surrogates regmix and regmix_tuned need LightGBM, which is not installed: "
            "pip install 'datalloy[regmix]', or choose another surrogate"
        ) from error
    model = LGBMRegressor(random_state=seed, n_jobs=1, deterministic=True, force_row_wise=True, verbosity=-1)
    model.set_params(**settings)
    return model


def _predicted(model: "LGBMRegressor", weight_MK: np.ndarray, trees: float) -> np.ndarray:
    """By the first so many trees. The booster itself is asked: its wrapper takes ten times as long for few rows."""
    return np.asarray(model.booster_.predict(weight_MK, num_iteration=int(trees), num_threads=1))
