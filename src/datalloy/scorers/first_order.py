"""Samples in, gradient dot products out: what the utility becomes when the step goes to zero.

`U(z) ~ step * <grad L_V, P grad l(z)>` (P: identity for sgd, one over the root second moments for adamw), without
the gradient of any single sample, in two ways:

- finite differences: `[l(z; theta + eps v) - l(z; theta)] / eps` along `v = P grad L_V`, one forward pass of the
  sample for each target and one for the loss, which all targets share and which is a baseline score for free.
  Central differences would be exact to the next order of eps at two passes for each target;
- taps (taps.py): exact, on the decoder's linear layers only, one forward and backward pass for all targets.

Kept for comparison and for very small steps. Training on the top 20 % of this score was far worse than random in
the prototype (DESIGN 2.3): never a default.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datalloy.encoding import length_batches
from datalloy.errors import ModelError, RecipeError
from datalloy.scorers.one_step import ScoreBlock
from datalloy.scorers.step import TINY, Steppable, StepRule, inner
from datalloy.scorers.taps import Taps
from datalloy.target_items import TargetItems
from datalloy.vision_features import VisionFeatures
from datalloy.vlm import VLM, Encoded

# Size of the probing displacement relative to the weights: large enough for rounding, small enough to be linear. Worst
# Spearman with the exact product over five pools on three small models: 0.967 at 1e-4, 0.996 at 3e-5 (where samples are
# garbled their loss is curved), 0.9996 at 1e-5. With cross entropies in float32 no size that was tried reaches 0.999.
RELATIVE_EPSILON = 1e-5


class FiniteDifferenceScorer:
    """Directional derivatives by forward passes alone: any attention kernel, no activations kept.

    With `share_vision` what the vision tower sees is computed once for the loss and all targets; nothing that
    `steppable` moves may be in the tower (`vision_stands_still`), or ModelError is raised. Price: the tower's outputs
    for the samples of one call of `score` are kept while it runs.
    """

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
        share_vision: bool = False,
        relative_epsilon: float = RELATIVE_EPSILON,
    ) -> None:
        if rule.name == "unit_norm":
            raise RecipeError(
                "score.step_rule unit_norm needs the norm of every sample's gradient, which forward passes do not "
                "give; use score.method first_order_hooks or exact"
            )
        # steps are written past the version counters that kept features are guarded by
        if share_vision and not vision_stands_still(vlm, steppable):
            raise ModelError(
                f"the step moves weights in the vision tower of {vlm.name}, so what it sees cannot be kept; use "
                "share_vision=False"
            )
        self.vlm, self.steppable, self.step, self.batch_size = vlm, steppable, step, batch_size
        self.share_vision, self.weight_G = share_vision, items.weight_G
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
        pool = _Pool(self.vlm, samples, self.batch_size, share_vision=self.share_vision)
        loss_N = pool.losses()
        slopes = []
        for direction, epsilon in zip(self._directions, self._epsilons, strict=True):
            with self.steppable.moved(direction, epsilon):
                slopes.append((pool.losses() - loss_N) / epsilon)
        utility_NG = self.step * np.array(slopes).T
        return block_without_errors(loss_N, utility_NG, self.weight_G)


class _Pool:
    """Samples laid out once for all passes, so that rounding is the same in each and cancels in differences."""

    def __init__(self, vlm: VLM, samples: Sequence[Encoded], batch_size: int, *, share_vision: bool) -> None:
        self.vlm = vlm
        batches = length_batches(samples, batch_size)
        self._batches = [vlm.collate([samples[i] for i in batch]) for batch in batches]
        self._restored = np.argsort(np.concatenate(batches))
        self._vision = VisionFeatures() if share_vision else None

    def losses(self) -> np.ndarray:
        """Loss of every sample under the model as it is now, [N], in the order given."""
        # most of what a small displacement drowns in is the rounding of cross entropies; MPS has no float64
        dtype = torch.float32 if self.vlm.device.type == "mps" else torch.float64
        losses = []
        with torch.no_grad():
            for batch in self._batches:
                with self.vlm.reusing(self._vision, batch):
                    losses.append(self.vlm.losses(batch, dtype=dtype).cpu().double().numpy())
        return np.concatenate(losses)[self._restored]


def vision_stands_still(vlm: VLM, steppable: Steppable) -> bool:
    """Whether nothing that `steppable` moves is in the vision tower, connectors inside of it included."""
    moved = {id(parameter) for parameter in steppable.parameters}
    return moved.isdisjoint(id(parameter) for parameter in vlm.vision_tower().parameters())


class TapScorer:
    """The same product, exact, from the inputs and output gradients of the decoder's linear layers."""

    signed = True

    def __init__(self, taps: Taps, items: TargetItems, *, rule: StepRule, step: float, batch_size: int) -> None:
        if rule.name == "adamw":
            raise RecipeError("score.method first_order_hooks knows the step rules sgd and unit_norm, not adamw")
        self.taps, self.rule, self.step, self.batch_size = taps, rule, step, batch_size
        self.weight_G = items.weight_G
        self._directions = [items.gradient(taps.vlm, taps.weights(), target=g) for g in range(len(items.names))]

    def score(self, samples: Sequence[Encoded]) -> ScoreBlock:
        measured = self.taps.measure_all(samples, self._directions, batch_size=self.batch_size)
        slope_NG = measured.slope_NG
        if self.rule.name == "unit_norm":
            slope_NG = slope_NG / np.maximum(np.sqrt(measured.squared_norm_N), TINY)[:, None]
        return block_without_errors(measured.loss_N, self.step * slope_NG, self.weight_G)


def block_without_errors(loss_N: np.ndarray, utility_NG: np.ndarray, weight_G: np.ndarray) -> ScoreBlock:
    return ScoreBlock(loss_N, utility_NG, utility_NG @ weight_G, np.full(len(loss_N), np.nan))
