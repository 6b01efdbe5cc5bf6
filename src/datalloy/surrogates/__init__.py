"""The family of surrogates: whatever predicts the value of a mixture from mixtures that were really trained.

The regressions here are what data-mixture optimisation uses in place of merged models, and what merging has to beat:
each learns from N really trained runs, tunes itself on those alone, and predicts one value, higher is better. They
share one contract (tests/surrogate_contract.py). `mixmin.py` needs no runs but the experts' log-probabilities;
`proposals.py` makes each of them name one mixture.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from datalloy.surrogates.gaussian_process import GaussianProcess
from datalloy.surrogates.log_linear import LogLinear
from datalloy.surrogates.ridge import linear, ridge_sqrt, scheffe
from datalloy.surrogates.trees import RegMix, RegMixTuned

__all__ = ["SURROGATES", "Surrogate"]


class Surrogate(Protocol):
    """Predicts one value of a mixture from really trained mixtures.

    `fit` learns from `value_N`, higher is better, of the mixtures `weight_NK`; runs of one mixture may repeat. It tunes
    itself by cross-validation on these rows alone and gives the same bits for the same rows in any order and the same
    seed. Raises DataError on fewer than three different mixtures, on weights or values that are not finite.
    `predict` gives a finite value for each of M mixtures, each as if it were alone.
    """

    def fit(self, weight_NK: np.ndarray, value_N: np.ndarray, seed: int) -> None: ...

    def predict(self, weight_MK: np.ndarray) -> np.ndarray: ...


SURROGATES: dict[str, Callable[[], Surrogate]] = {
    "linear": linear,
    "ridge_sqrt": ridge_sqrt,
    "scheffe": scheffe,
    "log_linear": LogLinear,
    "gaussian_process": GaussianProcess,
    "regmix": RegMix,
    "regmix_tuned": RegMixTuned,
}
