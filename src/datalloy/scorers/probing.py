"""Probes in, a step size and what is known about it out.

The step size is the method's most important silent parameter. Where one utility selects alone the default is a sample's
part in the step of a training batch (`step.batch_share`); what is kept by it trains best. The scan shows what other
sizes would do, and chooses where scorers race, or the recipe asks for it: a visible effect, the step at which the
median probe changes the targets' loss by `VISIBLE_EFFECT` times that loss. Both are one rule for all models, scopes and
step rules, where a learning rate is not, nor a multiple of the Polyak step of a sample (which grows without bound as
the proxy learns). At a visible effect nearly every single sample has a utility below zero, so harm is judged against
clean samples at the same step (`OneStepScorer.clean_utilities`), not against zero. Evidence: docs/evidence.md,
docs/results.md, docs/decisions.md.

The scan tries multiples of the Polyak step (the step that would bring the probes' own loss to zero to first order,
median over probes). For every step it reports the share of negative utilities, how far the ranking agrees between
two halves of the target items, and how far it agrees with the smallest step; the noise floor says what rounding
alone moves.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from datalloy.errors import ModelError
from datalloy.scorers.one_step import OneStepScorer
from datalloy.target_items import TargetItems
from datalloy.uncertainty import rank_agreement
from datalloy.vlm import Encoded

GRID = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)  # multiples of the Polyak step
VISIBLE_EFFECT = 2.0  # median change of the targets' loss by one step, relative to that loss


@dataclass(frozen=True)
class StepRow:
    """One step size of the scan. `multiple` is in Polyak steps; utilities are medians over probes, nats per token.

    `effect` is the median absolute utility relative to the targets' loss. Agreements are Spearman's, 0 where it is not
    defined: a target with one item has no halves.
    """

    step: float
    multiple: float
    negative_fraction: float
    median_utility: float
    effect: float
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


def scan_steps(
    scorer: OneStepScorer,
    probes: Sequence[Encoded],
    *,
    wanted: float | None,
    seed: int,
    why: str = "given in the recipe",
) -> StepScan:
    """Try every step of the grid on the probes; choose `wanted` if given, and say why, else the step of visible effect.

    The latter is interpolated between the rows on logarithmic scales, and never outside the grid.

    Probes without a finite loss or without a gradient have no Polyak step and are left out; so is the row of a step
    after which no utility is finite.
    """
    polyak_N = scorer.polyak_steps(probes)
    usable = np.isfinite(polyak_N)
    if not usable.any():
        raise ModelError(
            f"none of the {len(probes)} probes has a finite loss and a gradient under {scorer.vlm.name}, so no step "
            "size can be chosen; use another proxy or look at the data"
        )
    polyak = float(np.median(polyak_N[usable]))
    multiples = [*GRID] if wanted is None else sorted({*GRID, wanted / polyak})
    steps = [multiple * polyak for multiple in multiples]
    _, fall_NSV = scorer.falls([probe for probe, ok in zip(probes, usable, strict=True) if ok], steps)
    utility_NS = fall_NSV @ scorer.items.item_weight_V
    target_loss = float(scorer.before_V @ scorer.items.item_weight_V)
    halves = [fall_NSV @ weights for weights in _half_weights(scorer.items, seed)]
    rows = tuple(
        StepRow(
            step=step,
            multiple=multiple,
            negative_fraction=float((finite_N < 0).mean()),
            median_utility=float(np.median(finite_N)),
            effect=float(np.median(np.abs(finite_N)) / target_loss),
            half_agreement=_agreement(halves[0][:, s], halves[1][:, s]),
            smallest_step_agreement=_agreement(utility_NS[:, s], utility_NS[:, 0]),
        )
        for s, (step, multiple) in enumerate(zip(steps, multiples, strict=True))
        if len(finite_N := utility_NS[np.isfinite(utility_NS[:, s]), s])
    )
    if wanted is not None:
        return StepScan(rows, wanted, why)
    chosen = step_of_effect(rows, VISIBLE_EFFECT)
    return StepScan(
        rows, chosen, f"the median of {usable.sum()} probes changes the targets' loss by {VISIBLE_EFFECT:.0%}"
    )


def step_of_effect(rows: Sequence[StepRow], effect: float) -> float:
    """The step with a given effect: between rows on logarithmic scales, at the nearest end where none reaches it."""
    reached = next((i for i, row in enumerate(rows) if row.effect >= effect), len(rows))
    if reached == 0:
        return rows[0].step
    if reached == len(rows):
        return rows[-1].step
    below, above = rows[reached - 1], rows[reached]
    if below.effect == 0:
        return above.step
    share = np.log(effect / below.effect) / np.log(above.effect / below.effect)
    return float(below.step * (above.step / below.step) ** share)


def noise_floor(scorer: OneStepScorer, other: OneStepScorer, probes: Sequence[Encoded]) -> float:
    """Root mean square difference of utilities between two layouts of the same target items, nats per token.

    What batch layout and rounding alone do to a utility; differences below it mean nothing.
    """
    ours, theirs = scorer.score(probes).utility_N, other.score(probes).utility_N
    return float(np.sqrt(np.mean((ours - theirs) ** 2)))


def _agreement(a_N: np.ndarray, b_N: np.ndarray) -> float:
    both = np.isfinite(a_N) & np.isfinite(b_N)
    if len(set(a_N[both])) < 2 or len(set(b_N[both])) < 2:
        return 0.0
    return rank_agreement(a_N[both], b_N[both])


def _half_weights(items: TargetItems, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Item weights of two random halves of every target; all zero where no target has two items."""
    generator = np.random.default_rng(seed)
    half_V = np.zeros(len(items.target_V), dtype=bool)
    for g in range(len(items.names)):
        positions = generator.permutation(np.flatnonzero(items.target_V == g))
        half_V[positions[: len(positions) // 2]] = True
    return items.item_weight_V * half_V, items.item_weight_V * ~half_V
