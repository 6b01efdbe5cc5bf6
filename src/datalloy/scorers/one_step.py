"""Samples in, finite-step utilities out: the definition of utility, and the referee of every other scorer.

For each sample: take one training step on it alone, measure the loss of the targets again, put the weights back
(OST, sec. 3; DESIGN 2.1). `U(z) = L_V(theta) - L_V(theta - step * d(z))`, so positive helps.

The step is finite on purpose. At a step that matters, curvature rules as much as alignment, and the gradient dot
product that this becomes for tiny steps agrees with it hardly at all (DESIGN 2.3).

Price of `exact`: one forward and backward pass of the sample and one forward pass of every target item. `tail`
(tail.py) pays only the last decoder layers of the latter. Departs from the paper: weights are restored from
memory bit for bit, and the fall of every target item is kept, for standard errors.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from datalloy.errors import ModelError
from datalloy.scorers.step import Steppable, StepRule, inner, loss_and_gradient
from datalloy.target_items import TargetItems
from datalloy.vlm import VLM, Encoded


@dataclass(frozen=True)
class ScoreBlock:
    """Scores of n samples, in the order they were given.

    loss_N: nats per token. utility_NG: per target. utility_N, error_N: weighted over targets, with its standard
    error. fall_NV: fall of every target item's loss, or None where a scorer cannot tell.
    """

    loss_N: np.ndarray
    utility_NG: np.ndarray
    utility_N: np.ndarray
    error_N: np.ndarray
    fall_NV: np.ndarray | None = None

    def to_bytes(self) -> bytes:
        """The arrays as an .npz file in memory; `from_bytes` gives an equal block back."""
        buffer = io.BytesIO()
        np.savez(buffer, **{name: array for name, array in vars(self).items() if array is not None})
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "ScoreBlock":
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return cls(**arrays)

    @property
    def finite_N(self) -> np.ndarray:
        return np.isfinite(self.loss_N) & np.isfinite(self.utility_N)


class OneStepScorer:
    """Takes the step for real. `target_losses` is what differs between exact (whole model) and tail (last layers)."""

    signed = True

    def __init__(
        self,
        vlm: VLM,
        items: TargetItems,
        steppable: Steppable,
        target_losses: Callable[[], np.ndarray],
        *,
        rule: StepRule,
        step: float,
    ) -> None:
        self.vlm, self.items, self.rule, self.step = vlm, items, rule, step
        self.steppable = steppable
        self.target_losses = target_losses
        self.before_V = target_losses()
        if bad := int((~np.isfinite(self.before_V)).sum()):
            raise ModelError(
                f"{bad} of {len(self.before_V)} target items have no finite loss under {vlm.name} before any step, so "
                "no utility can be measured; use another proxy or a lower train.learning_rate in the warm-up"
            )

    def score(self, samples: Sequence[Encoded]) -> ScoreBlock:
        blocks = [self.score_at_steps(sample, (self.step,)) for sample in samples]
        return ScoreBlock(
            loss_N=np.array([loss for loss, _ in blocks]),
            **_utilities(self.items, np.array([falls[0] for _, falls in blocks])),
        )

    def score_at_steps(self, sample: Encoded, steps: Sequence[float]) -> tuple[float, np.ndarray]:
        """Loss of one sample and the fall of every target item after a step of each size, [len(steps), V]."""
        loss, gradient = loss_and_gradient(self.vlm, sample, self.steppable.parameters)
        direction = self.rule.direction(gradient)
        falls = []
        for step in steps:
            with self.steppable.moved(direction, -step):
                falls.append(self.before_V - self.target_losses())
        return loss, np.array(falls)

    def clean_utilities(self, items: Sequence[Encoded]) -> np.ndarray:
        """Utility of stepping on each target item itself, measured on all the others, [V], nats per token.

        What a sample does that is known to be clean and wanted. At a step of useful size nearly every single sample
        moves the model too far and has a utility below zero, these included; harm is what does worse than they do.
        `items` are the encoded items in the order of V.
        """
        utilities = []
        for v, item in enumerate(items):
            _, falls = self.score_at_steps(item, (self.step,))
            weight_V = self.items.item_weight_V.copy()
            weight_V[v] = 0.0
            utilities.append(float(falls[0] @ weight_V / weight_V.sum()))
        return np.array(utilities)

    def polyak_step(self, sample: Encoded) -> float:
        """The step that, to first order, would bring the sample's own loss to zero: `l / <g, d>`.

        A scale for steps that does not depend on the model's size or on the step rule; used by the step scan.
        Infinite where the sample has no gradient.
        """
        loss, gradient = loss_and_gradient(self.vlm, sample, self.steppable.parameters)
        slope = inner(gradient, self.rule.direction(gradient))
        return loss / slope if slope else math.inf


def exact_scorer(vlm: VLM, items: TargetItems, steppable: Steppable, *, rule: StepRule, step: float) -> OneStepScorer:
    """The definition: the whole model is evaluated on every target item after every step."""
    return OneStepScorer(vlm, items, steppable, lambda: items.losses(vlm), rule=rule, step=step)


def _utilities(items: TargetItems, fall_NV: np.ndarray) -> dict[str, np.ndarray]:
    utilities = [items.utility(fall_V) for fall_V in fall_NV]
    return {
        "utility_NG": np.array([u.by_target_G for u in utilities]),
        "utility_N": np.array([u.total for u in utilities]),
        "error_N": np.array([u.standard_error for u in utilities]),
        "fall_NV": fall_NV,
    }
