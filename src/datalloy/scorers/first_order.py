"""Samples in, gradient dot products out: what the utility becomes when the step goes to zero.

`U(z) ~ step * <grad L_V, P grad l(z)>` (P: identity for sgd, one over the root second moments for adamw), without
the gradient of any single sample, in two ways:

- finite differences: `[l(z; theta + eps v) - l(z; theta)] / eps` along `v = P grad L_V`, one forward pass of the
  sample for each target and one for the loss, which comes for free as a baseline score;
- taps (taps.py): exact, on the decoder's linear layers only, one forward and backward pass for all targets.

Kept for comparison and for very small steps. Training on the top 20 % of this score was far worse than random in
the prototype (DESIGN 2.3): never a default.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datalloy.errors import RecipeError
from datalloy.scorers.one_step import ScoreBlock
from datalloy.scorers.step import TINY, Steppable, StepRule, inner
from datalloy.scorers.taps import Taps
from datalloy.target_items import TargetItems
from datalloy.vlm import VLM, Encoded

# Size of the probing displacement relative to the weights: large enough for float32, small enough to be linear. On the
# embedded model's architecture Spearman with the exact product is 0.95 at 1e-3, 0.999 at 1e-4, 1.000 at 3e-5; at 1e-5
# rounding begins to show.
RELATIVE_EPSILON = 3e-5


class FiniteDifferenceScorer:
    """Directional derivatives by forward passes alone: any attention kernel, no activations kept."""

    signed = True

    def __init__(
        self,
        vlm: VLM,
        items: TargetItems,
        steppable: Steppable,
        *,
        rule: StepRule,
        step: float,
        batch_size: int,
        relative_epsilon: float = RELATIVE_EPSILON,
    ) -> None:
        if rule.name == "unit_norm":
            raise RecipeError(
                "score.step_rule unit_norm needs the norm of every sample's gradient, which forward passes do not "
                "give; use score.method first_order_hooks or exact"
            )
        self.vlm, self.steppable, self.step, self.batch_size = vlm, steppable, step, batch_size
        self.weight_G = items.weight_G
        parameters = steppable.parameters
        weights_norm = math.sqrt(inner(parameters, parameters))
        self._directions: list[list[Tensor]] = []
        self._epsilons: list[float] = []
        for g in range(len(items.names)):
            direction = rule.direction(items.gradient(vlm, parameters, target=g))
            norm = max(math.sqrt(inner(direction, direction)), TINY)
            self._directions.append(direction)
            self._epsilons.append(relative_epsilon * weights_norm / norm)

    def score(self, samples: Sequence[Encoded]) -> ScoreBlock:
        batches = [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]
        loss_N = self._losses(batches)
        slopes = []
        for direction, epsilon in zip(self._directions, self._epsilons, strict=True):
            with self.steppable.moved(direction, epsilon):
                slopes.append((self._losses(batches) - loss_N) / epsilon)
        utility_NG = self.step * np.array(slopes).T
        return _block(loss_N, utility_NG, self.weight_G)

    def _losses(self, batches: Sequence[Sequence[Encoded]]) -> np.ndarray:
        with torch.no_grad():
            return np.concatenate([self.vlm.losses(self.vlm.collate(b)).cpu().double().numpy() for b in batches])


class TapScorer:
    """The same product, exact, from the inputs and output gradients of the decoder's linear layers."""

    signed = True

    def __init__(self, vlm: VLM, items: TargetItems, *, rule: StepRule, step: float, batch_size: int) -> None:
        if rule.name == "adamw":
            raise RecipeError("score.method first_order_hooks knows the step rules sgd and unit_norm, not adamw")
        self.taps, self.rule, self.step, self.batch_size = Taps(vlm), rule, step, batch_size
        self.weight_G = items.weight_G
        self._directions = [items.gradient(vlm, self.taps.weights(), target=g) for g in range(len(items.names))]

    def score(self, samples: Sequence[Encoded]) -> ScoreBlock:
        measured = self.taps.measure_all(samples, self._directions, batch_size=self.batch_size)
        slope_NG = measured.slope_NG
        if self.rule.name == "unit_norm":
            slope_NG = slope_NG / np.maximum(np.sqrt(measured.squared_norm_N), TINY)[:, None]
        return _block(measured.loss_N, self.step * slope_NG, self.weight_G)


def _block(loss_N: np.ndarray, utility_NG: np.ndarray, weight_G: np.ndarray) -> ScoreBlock:
    return ScoreBlock(loss_N, utility_NG, utility_NG @ weight_G, np.full(len(loss_N), np.nan))
