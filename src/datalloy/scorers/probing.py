"""Probes in, a step size and what is known about it out.

The step size is the method's most important silent parameter. It is scanned on probes drawn from the pool, in
multiples of the Polyak step (the step that would bring the probes' own loss to zero to first order, median over
probes), which makes one grid fit all models and step rules. For every step the scan reports the share of negative
utilities, how far the ranking agrees between two halves of the target items, and how far it agrees with the
smallest step; the noise floor says what rounding alone moves.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datalloy.scorers.one_step import OneStepScorer
from datalloy.scorers.targets import TargetItems
from datalloy.uncertainty import rank_agreement
from datalloy.vlm import Encoded

# Multiples of the Polyak step that are tried, and the one that trains best in the project's evidence.
GRID = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
DEFAULT_MULTIPLE = 1 / 4


@dataclass(frozen=True)
class StepRow:
    """One step size of the scan. `multiple` is in Polyak steps; utilities are medians over probes, nats per token."""

    step: float
    multiple: float
    negative_fraction: float
    median_utility: float
    half_agreement: float
    smallest_step_agreement: float


@dataclass(frozen=True)
class StepScan:
    """The scan's rows, the step chosen, and the reason in words."""

    rows: tuple[StepRow, ...]
    chosen: float
    reason: str

    def as_metadata(self) -> dict[str, Any]:
        return asdict(self)


def scan_steps(scorer: OneStepScorer, probes: Sequence[Encoded], *, wanted: float | None, seed: int) -> StepScan:
    """Try every step of the grid on the probes; choose `wanted` if given, else the default multiple."""
    polyak = float(np.median([scorer.polyak_step(probe) for probe in probes]))
    multiples = [*GRID] if wanted is None else sorted({*GRID, wanted / polyak})
    steps = [multiple * polyak for multiple in multiples]
    fall_NSV = np.array([scorer.score_at_steps(probe, steps)[1] for probe in probes])
    utility_NS = fall_NSV @ scorer.items.item_weight_V
    halves = [fall_NSV @ weights for weights in _half_weights(scorer.items, seed)]
    rows = tuple(
        StepRow(
            step=step,
            multiple=multiple,
            negative_fraction=float((utility_NS[:, s] < 0).mean()),
            median_utility=float(np.median(utility_NS[:, s])),
            half_agreement=rank_agreement(halves[0][:, s], halves[1][:, s]),
            smallest_step_agreement=rank_agreement(utility_NS[:, s], utility_NS[:, 0]),
        )
        for s, (step, multiple) in enumerate(zip(steps, multiples, strict=True))
    )
    if wanted is not None:
        return StepScan(rows, wanted, "given in the recipe")
    return StepScan(rows, DEFAULT_MULTIPLE * polyak, f"{DEFAULT_MULTIPLE:g} of the Polyak step (median of {len(probes)} probes)")


def noise_floor(scorer: OneStepScorer, other: OneStepScorer, probes: Sequence[Encoded]) -> float:
    """Root mean square difference of utilities between two layouts of the same target items, nats per token.

    What batch layout and rounding alone do to a utility; differences below it mean nothing.
    """
    ours, theirs = scorer.score(probes).utility_N, other.score(probes).utility_N
    return float(np.sqrt(np.mean((ours - theirs) ** 2)))


def _half_weights(items: TargetItems, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Item weights of two random halves of every target."""
    generator = np.random.default_rng(seed)
    half_V = np.zeros(len(items.target_V), dtype=bool)
    for g in range(len(items.names)):
        positions = generator.permutation(np.flatnonzero(items.target_V == g))
        half_V[positions[: len(positions) // 2]] = True
    weights = []
    for mask in (half_V, ~half_V):
        weight_V = items.item_weight_V * mask
        weights.append(weight_V / weight_V.sum())
    return weights[0], weights[1]
