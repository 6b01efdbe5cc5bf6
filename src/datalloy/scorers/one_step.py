"""Samples in, finite-step utilities out: the definition of utility, and the referee of every other scorer.

For each sample: take one training step on it alone, measure the loss of the targets again, put the weights back
(OST, sec. 3; DESIGN 2.1). `U(z) = L_V(theta) - L_V(theta - step * d(z))`, so positive helps.

The step is finite on purpose. At a step that matters, curvature rules as much as alignment, and the gradient dot
product that this becomes for tiny steps agrees with it hardly at all (DESIGN 2.3).

Price of `exact`: one forward and backward pass of the sample and one forward pass of every target item. `tail`
(tail.py) pays only the last decoder layers of the latter, for many samples at once. Departs from the paper: weights
are restored from memory bit for bit, and the fall of every target item is kept, for standard errors.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.nn import Parameter

from datalloy.errors import ModelError
from datalloy.scorers.step import Steppable, StepRule, loss_and_gradient, polyak_step
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


class OneStepScorer(ABC):
    """Takes the step for real, and measures the targets after it. Subclasses say what moves and what is run again."""

    signed = True

    def __init__(self, vlm: VLM, items: TargetItems, before_V: np.ndarray, *, rule: StepRule, step: float) -> None:
        self.vlm, self.items, self.before_V, self.rule, self.step = vlm, items, before_V, rule, step
        if bad := int((~np.isfinite(before_V)).sum()):
            raise ModelError(
                f"{bad} of {len(before_V)} target items have no finite loss under {vlm.name} before any step, so "
                "no utility can be measured; use another proxy or a lower train.learning_rate in the warm-up"
            )

    @abstractmethod
    def falls(self, samples: Sequence[Encoded], steps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Losses of the samples, [N], and the fall of every target item after a step of each size, [N, steps, V]."""

    @property
    @abstractmethod
    def parameters(self) -> Sequence[Parameter]:
        """What a step moves."""

    @abstractmethod
    def polyak_steps(self, samples: Sequence[Encoded]) -> np.ndarray:
        """The step that, to first order, would bring each sample's own loss to zero: `l / <g, d>`, [N].

        A scale for steps that does not depend on the model's size or on the step rule; used by the step scan.
        Infinite where a sample has no gradient.
        """

    def score(self, samples: Sequence[Encoded]) -> ScoreBlock:
        loss_N, fall_NSV = self.falls(samples, (self.step,))
        return ScoreBlock(loss_N=loss_N, **_utilities(self.items, fall_NSV[:, 0]))

    def clean_utilities(self, items: Sequence[Encoded]) -> np.ndarray:
        """Utility of stepping on each target item itself, measured on all the others, [V], nats per token.

        What a sample does that is known to be clean and wanted. At a step of useful size nearly every single sample
        moves the model too far and has a utility below zero, these included; harm is what does worse than they do.
        `items` are the encoded items in the order of V.
        """
        _, fall_VSV = self.falls(items, (self.step,))
        weight_VV = np.where(np.eye(len(items), dtype=bool), 0.0, self.items.item_weight_V)
        return (fall_VSV[:, 0] * weight_VV).sum(axis=1) / weight_VV.sum(axis=1)


class ExactScorer(OneStepScorer):
    """The definition: the whole model is evaluated on every target item after every step, one sample at a time."""

    def __init__(self, vlm: VLM, items: TargetItems, steppable: Steppable, *, rule: StepRule, step: float) -> None:
        super().__init__(vlm, items, items.losses(vlm), rule=rule, step=step)
        self.steppable = steppable

    @property
    def parameters(self) -> Sequence[Parameter]:
        return self.steppable.parameters

    def falls(self, samples: Sequence[Encoded], steps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        loss_N, fall_NSV = np.empty(len(samples)), np.empty((len(samples), len(steps), len(self.before_V)))
        for n, sample in enumerate(samples):
            loss_N[n], gradient = loss_and_gradient(self.vlm, [sample], self.steppable.parameters)
            direction = self.rule.direction(gradient)
            for s, step in enumerate(steps):
                with self.steppable.moved(direction, -step):
                    fall_NSV[n, s] = self.before_V - self.items.losses(self.vlm)
        return loss_N, fall_NSV

    def polyak_steps(self, samples: Sequence[Encoded]) -> np.ndarray:
        parameters = self.steppable.parameters
        return np.array([polyak_step(self.vlm, [sample], parameters, self.rule) for sample in samples])


def _utilities(items: TargetItems, fall_NV: np.ndarray) -> dict[str, np.ndarray]:
    utilities = [items.utility(fall_V) for fall_V in fall_NV]
    return {
        "utility_NG": np.array([u.by_target_G for u in utilities]),
        "utility_N": np.array([u.total for u in utilities]),
        "error_N": np.array([u.standard_error for u in utilities]),
        "fall_NV": fall_NV,
    }
