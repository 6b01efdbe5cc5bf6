"""Samples in, predicted finite-step utilities out: cheap features fitted to a few exact probes.

One forward and backward pass a sample gives its loss, its slope along every target's gradient, the norm of its
gradient, plain and weighted by the targets' Fisher diagonal (the second-order term of a step), and its length. Where
asked for, also what no expansion around a point tells: the falls of a few target items' losses after a real step on the
decoder's linear layers (`Replay`); which items hardly matters, so they are the first of each target. Trees with random
splits are fitted to signed roots of the probes' exact utilities, one forest a target, and their mean is squared back.
Trees, because utility turns with the features in ways that no product of two tells, and because a mean of probes never
lies outside them; roots, because a few probes are many times worse than all others. Price: a sample whose feature lies
within rounding of a split may fall on either side of it, which moves it by its share of one tree of `TREES`.

It always says how well it agrees with exact on probes that it was not fitted to, and refuses below a threshold.
Agreement of ranks alone does not promise a good subset (DESIGN 2.3): the bake-off decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.model_selection import KFold, cross_val_predict

from datalloy.encoding import length_batches
from datalloy.errors import AgreementError
from datalloy.scorers.one_step import ScoreBlock
from datalloy.scorers.replay import Replay
from datalloy.scorers.step import StepRule
from datalloy.scorers.taps import Measured, Taps
from datalloy.target_items import TargetItems
from datalloy.uncertainty import Interval, rank_agreement, rank_agreement_interval
from datalloy.vlm import Encoded

FOLDS = 5
TREES = 300
LEAST_LEAF = 2  # probes in a leaf
MIN_PROBES = 24
FLOOR = (
    1e-30  # below any squared norm that matters: that under the Fisher metric falls with the model's size, 1e-9 at 1B
)


@dataclass(frozen=True)
class Agreement:
    """Spearman rank correlation with exact utility, its 95 % interval over probes, and how many probes."""

    spearman: float
    interval: Interval
    probes: int


class CalibratedScorer:
    """A regression from gradient features to exact utility, one for each target."""

    signed = True

    def __init__(
        self,
        taps: Taps,
        items: TargetItems,
        target_batches: Sequence[Sequence[Encoded]],
        probes: Sequence[Encoded],
        exact: ScoreBlock,
        *,
        replayed: TargetItems | None,
        rule: StepRule,
        step: float,
        batch_size: int,
        min_agreement: float,
        seed: int,
    ) -> None:
        self.taps, self.batch_size, self.weight_G = taps, batch_size, items.weight_G
        self._rule, self._step = rule, step
        self._replay = Replay(self.taps, replayed, probes[0]) if replayed else None
        self._directions = [items.gradient(taps.vlm, taps.weights(), target=g) for g in range(len(items.names))]
        self._metric = self.taps.mean_squared_gradient(target_batches)
        _, features = self._features(probes)
        finite = np.isfinite(features).all(1) & exact.finite_N
        if finite.sum() < MIN_PROBES:
            raise AgreementError(
                f"calibrated needs at least {MIN_PROBES} probes with finite losses and utilities, found "
                f"{finite.sum()} of {len(probes)}; raise score.probes or use score.method tail"
            )
        features, utility_NG, utility_N = features[finite], exact.utility_NG[finite], exact.utility_N[finite]
        folds = KFold(FOLDS, shuffle=True, random_state=seed)
        held_out_GN = [cross_val_predict(_regression(seed), features, u_N, cv=folds) for u_N in utility_NG.T]
        predicted_N = self.weight_G @ np.array(held_out_GN)
        self.agreement = Agreement(
            rank_agreement(predicted_N, utility_N),
            rank_agreement_interval(predicted_N, utility_N, seed=seed),
            len(utility_N),
        )
        if self.agreement.spearman < min_agreement:
            low, high = self.agreement.interval
            raise AgreementError(
                "calibrated utilities agree with exact ones on held-out probes by Spearman "
                f"{self.agreement.spearman:.2f} (95 % interval {low:.2f} to {high:.2f}, {len(utility_N)} probes); "
                f"score.min_agreement is {min_agreement}. Use score.method tail or exact, or more score.probes"
            )
        # what the regression misses, and what exact itself owes to the choice of target items
        self._error = float(np.sqrt(np.mean((predicted_N - utility_N) ** 2 + exact.error_N[finite] ** 2)))
        self._models = [_regression(seed).fit(features, u_N) for u_N in utility_NG.T]

    def score(self, samples: Sequence[Encoded]) -> ScoreBlock:
        loss_N, features = self._features(samples)
        finite = np.isfinite(features).all(1)
        utility_NG = np.full((len(samples), len(self._models)), np.nan)
        if finite.any():
            utility_NG[finite] = np.column_stack([model.predict(features[finite]) for model in self._models])
        return ScoreBlock(loss_N, utility_NG, utility_NG @ self.weight_G, np.full(len(samples), self._error))

    def _features(self, samples: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
        """Losses, [N], and features, one row a sample."""
        loss_N, rows = np.empty(len(samples)), [np.empty(0)] * len(samples)
        for batch in length_batches(samples, self.batch_size):
            encoded = [samples[i] for i in batch]
            reading = self.taps.read(encoded)
            measured = self.taps.measure(reading, self._directions, metric=self._metric)
            features = _feature_matrix(measured, encoded)
            if self._replay:
                fall_BV = self._replay.falls(reading, self._rule, (self._step,))[:, 0]
                features = np.column_stack([features, signed_root(fall_BV)])
            loss_N[batch] = measured.loss_N
            for i, row in zip(batch, features, strict=True):
                rows[i] = row
        return loss_N, np.array(rows)


def _feature_matrix(measured: Measured, samples: Sequence[Encoded]) -> np.ndarray:
    """Features [N, G + 5]. Roots and logarithms tame quantities that span decades over a pool."""
    with np.errstate(invalid="ignore"):
        return np.column_stack(
            [
                signed_root(measured.slope_NG),
                measured.loss_N,
                np.sqrt(measured.squared_norm_N),
                np.log(measured.squared_norm_N + FLOOR),
                np.log(measured.metric_norm_N + FLOOR),
                np.log([sample.supervised_tokens for sample in samples]),
            ]
        )


def signed_root(values: np.ndarray) -> np.ndarray:
    """The square root with the sign of what it was taken of."""
    return np.sign(values) * np.sqrt(np.abs(values))


def signed_square(values: np.ndarray) -> np.ndarray:
    """The square with the sign of what was squared: back from `signed_root`."""
    return np.sign(values) * values**2


def _regression(seed: int) -> TransformedTargetRegressor:
    trees = ExtraTreesRegressor(TREES, min_samples_leaf=LEAST_LEAF, random_state=seed)
    return TransformedTargetRegressor(trees, func=signed_root, inverse_func=signed_square, check_inverse=False)
