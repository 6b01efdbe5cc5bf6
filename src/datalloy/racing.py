"""Mixtures to be evaluated in, their values item by item out, at no more cost than their worth.

All mixtures are evaluated on the same items, so what makes an item hard for all of them cancels in every comparison.
Two uses of that:

- A race goes block by block of items. After each block the values seen so far are compared with the incumbent's on the
  same items, drawn again with replacement; a mixture whose score is then below the incumbent's beyond doubt is dropped.
  What it showed is kept.
- The mean of a mixture is its items' values less what those items usually give, plus what all items usually give. So
  few items tell nearly as much as many where the mixtures differ little, and a dropped mixture is not punished for the
  block it met. Its variance is that of what is left, which two mixtures do not share.

Traps: an item of which each mixture makes something else is noise here, although a part of it is the mixture's doing;
and of blocks with few items of a target the bootstrap is too sure, so no block is judged below `LEAST_ITEMS` items.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from datalloy.errors import ModelError
from datalloy.objective import Objective
from datalloy.uncertainty import resampled_means

RULED_OUT = 0.95  # of the draws in which a mixture must be worse than the incumbent
RESAMPLES = 200
LEAST_ITEMS = 20  # seen of each mixture before it may be ruled out
POOLED_ITEMS = 20  # with so many items a mixture's own variance counts as much as that of all mixtures


class Measured(Protocol):
    """What mixtures can be raced on: items of targets, dealt to blocks that hold items of every target."""

    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def target_V(self) -> np.ndarray: ...
    @property
    def block_V(self) -> np.ndarray: ...

    def values(self, weight_K: np.ndarray, block: int) -> np.ndarray:
        """Metric of the block's items, in the order of V; higher is better, a loss negated."""
        ...

    def foresee(self, weights: Sequence[np.ndarray], blocks: Sequence[int]) -> None:
        """These values are asked for next; who can measure them side by side does it now."""
        ...


class Evaluations:
    """Every mixture evaluated so far and its values by item; NaN where an item was not asked."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured
        self._target_V, self._block_V = np.asarray(measured.target_V), np.asarray(measured.block_V)
        self.blocks = [int(block) for block in np.unique(self._block_V)]
        self.stages: list[str] = []
        self._weights: list[np.ndarray] = []
        self._values: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._weights)

    @property
    def weight_NK(self) -> np.ndarray:
        return np.array(self._weights)

    @property
    def value_NV(self) -> np.ndarray:
        return np.array(self._values)

    @property
    def spent(self) -> float:
        """Items evaluated, in full evaluations."""
        return float(np.isfinite(self.value_NV).sum()) / len(self._target_V) if self._values else 0.0

    def add(self, weight_K: np.ndarray, stage: str) -> int:
        """Register a mixture without evaluating it; its row."""
        self.stages.append(stage)
        self._weights.append(weight_K)
        self._values.append(np.full(len(self._target_V), np.nan))
        return len(self._weights) - 1

    def evaluate(self, row: int, block: int) -> None:
        """Ask for the values of a block's items. Raises ModelError where they are not finite or not as many."""
        is_here_V = self._block_V == block
        value_V = np.asarray(self._measured.values(self._weights[row], block), dtype=float)
        where = f"the mixture {self._weights[row].round(4).tolist()}, block {block}"
        if value_V.shape != (is_here_V.sum(),):
            raise ModelError(f"{where}: found values of shape {value_V.shape}, the block has {is_here_V.sum()} items")
        if not np.isfinite(value_V).all():
            raise ModelError(
                f"{where}: {(~np.isfinite(value_V)).sum()} of {len(value_V)} values are not finite; "
                "an expert is broken or its training diverged"
            )
        self._values[row][is_here_V] = value_V

    def evaluate_fully(self, weights: Sequence[np.ndarray], stage: str) -> list[int]:
        """Evaluate mixtures on all items; their rows."""
        self._measured.foresee(weights, self.blocks)
        rows = [self.add(weight_K, stage) for weight_K in weights]
        for row in rows:
            for block in self.blocks:
                self.evaluate(row, block)
        return rows

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Values of the mixtures by target and the variances that they do not share, both [N, G].

        At least two mixtures must have been evaluated fully: what an item usually gives is their mean.
        """
        value_NV = self.value_NV
        seen_NV = np.isfinite(value_NV)
        full_N = seen_NV.all(axis=1)
        is_of_GV = self._target_V == np.arange(len(self._measured.targets))[:, None]
        usual_V = value_NV[full_N].mean(axis=0)
        usual_V = usual_V - ((is_of_GV @ usual_V) / is_of_GV.sum(axis=1))[self._target_V]
        count_NG = seen_NV.astype(float) @ is_of_GV.T
        own_NV = np.where(seen_NV, value_NV - usual_V, 0.0)
        mean_NG = (own_NV @ is_of_GV.T) / count_NG
        left_NV = np.where(seen_NV, own_NV - mean_NG[:, self._target_V], 0.0)
        # of F full rows each is a part of what is usual, which hides 1 / F of its own variance
        shown_N = np.where(full_N, 1 - 1 / full_N.sum(), 1.0)
        square_NG = (left_NV**2 @ is_of_GV.T) / shown_N[:, None]
        pooled_G = square_NG.sum(axis=0) / count_NG.sum(axis=0)
        variance_NG = (square_NG + POOLED_ITEMS * pooled_G) / (count_NG + POOLED_ITEMS)
        return mean_NG, variance_NG / count_NG

    def race(self, weight_NK: np.ndarray, stage: str, incumbent: int, objective: Objective, seed: int) -> None:
        """Evaluate mixtures block by block, dropping those that are ruled out against a fully evaluated incumbent.

        With `pareto` nobody is dropped: what is worse by any one score may still be the best for someone.
        """
        running = [self.add(weight_K, stage) for weight_K in weight_NK]
        for number, block in enumerate(self.blocks):
            self._measured.foresee([self._weights[row] for row in running], [block])
            for row in running:
                self.evaluate(row, block)
            if objective.kind != "pareto":
                running = self._not_ruled_out(running, incumbent, objective, seed + number)

    def _not_ruled_out(self, rows: Sequence[int], incumbent: int, objective: Objective, seed: int) -> list[int]:
        if not rows:
            return []
        is_seen_V = np.isfinite(self._values[rows[0]])
        count_G = np.bincount(self._target_V[is_seen_V], minlength=len(self._measured.targets))
        if count_G.min() == 0 or count_G.sum() < LEAST_ITEMS:
            return list(rows)
        value_NV = np.array([self._values[row][is_seen_V] for row in (incumbent, *rows)])
        drawn_RNG = resampled_means(value_NV, self._target_V[is_seen_V], resamples=RESAMPLES, seed=seed)
        score_RN = objective.score(drawn_RNG)
        is_worse_N = (score_RN[:, 1:] < score_RN[:, :1]).mean(axis=0) >= RULED_OUT
        return [row for row, worse in zip(rows, is_worse_N, strict=True) if not worse]
