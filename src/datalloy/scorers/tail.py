"""Samples in, finite-step utilities of a step on the last decoder layers out.

A step that touches only the last layers leaves everything below them as it was: the targets' hidden states at the
entrance of the tail are computed once, each sample pays the tail alone, and many samples are measured at once
(`Replay`). In the prototype the tail step kept nearly all of the exact ranking (DESIGN 2.3); on pools with hard clean
samples it does not (docs/results.md).
"""

from collections.abc import Sequence

import numpy as np
from torch.nn import Parameter

from datalloy.encoding import length_batches
from datalloy.scorers.one_step import OneStepScorer
from datalloy.scorers.replay import Replay
from datalloy.scorers.step import StepRule
from datalloy.scorers.taps import Taps
from datalloy.target_items import TargetItems
from datalloy.vlm import VLM, Encoded


class TailScorer(OneStepScorer):
    """Steps on the linear layers of the last `depth` decoder layers."""

    def __init__(
        self,
        vlm: VLM,
        items: TargetItems,
        taps: Taps,
        *,
        check: Encoded,
        rule: StepRule,
        step: float,
        batch_size: int,
    ) -> None:
        """`check` is any sample, on which the replay is compared with a step taken for real."""
        self.taps, self.replay, self.batch_size = taps, Replay(taps, items, check), batch_size
        super().__init__(vlm, items, self.replay.before_V, rule=rule, step=step)

    @property
    def parameters(self) -> Sequence[Parameter]:
        return self.taps.weights()

    def falls(self, samples: Sequence[Encoded], steps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        loss_N, fall_NSV = np.empty(len(samples)), np.empty((len(samples), len(steps), len(self.before_V)))
        for batch in length_batches(samples, self.batch_size):
            reading = self.taps.read([samples[i] for i in batch])
            loss_N[batch] = reading.loss_B.double().cpu().numpy()
            fall_NSV[batch] = self.replay.falls(reading, self.rule, steps)
        return loss_N, fall_NSV

    def polyak_steps(self, samples: Sequence[Encoded]) -> np.ndarray:
        roots = self.rule.root_second_moments
        metric = None if roots is None else [1 / root for root in roots]
        found = self.taps.measure_all(samples, (), batch_size=self.batch_size, metric=metric)
        slope_N = found.squared_norm_N if metric is None else found.metric_norm_N
        if self.rule.name == "unit_norm":
            slope_N = np.sqrt(slope_N)
        with np.errstate(divide="ignore"):
            return np.where(slope_N > 0, found.loss_N / slope_N, np.inf)
