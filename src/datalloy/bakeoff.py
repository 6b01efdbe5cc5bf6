"""Arms in, the arm to train on out, decided by small measured runs: a race on the proxy.

No score is right everywhere: finite-step utility throws out harm but also hard samples that the target needs, low
loss keeps what is known already (DESIGN 2.3). So each arm (scorer x fraction x ranked within domains or globally)
is trained for a few steps at equal compute and judged by the loss of the target items. Random and the full pool are
always among the arms, and "keep everything" is a possible answer.

Two rounds: all arms run briefly; those that paired statistics do not rule out run again, from the start, three
times as long. The two reference arms always reach the last round, so that the winner's margin over each is measured.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from datalloy.errors import ModelError, RecipeError
from datalloy.uncertainty import Interval, paired_interval

log = logging.getLogger(__name__)

FINALISTS = 3  # beside the reference arms
LAST_ROUND = 3  # times as long as the first
MIN_STEPS = 4  # of the first round; fewer tell nothing
RULED_OUT_CONFIDENCE = 0.9


@dataclass(frozen=True)
class Arm:
    """One way to select: which score, what share of the pool, ranked within domains or over the whole pool."""

    scorer: str
    fraction: float
    within: str

    @property
    def name(self) -> str:
        return "full" if self.fraction == 1 else f"{self.scorer} {100 * self.fraction:g}% {self.within}"


@dataclass(frozen=True)
class Margin:
    """How much lower the winner's target loss is than another arm's, paired over items, nats per token."""

    over: str
    mean: float
    interval: Interval


@dataclass(frozen=True)
class Result:
    """One run of the race: weighted target loss after `steps` steps."""

    arm: Arm
    round: int
    steps: int
    loss: float


@dataclass(frozen=True)
class Outcome:
    winner: Arm
    margins: tuple[Margin, ...]
    results: tuple[Result, ...]
    steps_spent: int


FULL = Arm("full", 1.0, "domain")


def make_arms(scorers: Sequence[str], fractions: Sequence[float], withins: Sequence[str]) -> list[Arm]:
    """All combinations, and the two references: the full pool, and a random draw at the middle fraction."""
    arms = [Arm(s, f, w) for s in scorers if s != "random" for f in fractions if f < 1 for w in withins]
    middle = sorted(fractions)[len(fractions) // 2]
    return [FULL, Arm("random", middle if middle < 1 else 0.5, "domain"), *arms]


def is_reference(arm: Arm) -> bool:
    return arm.scorer in ("full", "random")


def race(
    arms: Sequence[Arm],
    run_arm: Callable[[Arm, int, int], np.ndarray],
    *,
    weight_V: np.ndarray,
    budget_steps: int,
    longest_steps: int,
    seed: int,
) -> Outcome:
    """Race the arms within `budget_steps` training steps in all, no run longer than `longest_steps`.

    `run_arm(arm, steps, round)` trains the arm afresh and returns the loss of every target item, [V]. `weight_V`
    sums to one. Raises RecipeError when the budget is too small to tell arms apart, ModelError when the losses after
    a run are not finite. The order of `arms` does not matter: ties go by name.
    """
    references = [arm for arm in arms if is_reference(arm)]
    runs = len(arms) + LAST_ROUND * min(len(references) + FINALISTS, len(arms))  # in units of the first round's steps
    steps = min(budget_steps // runs, longest_steps // LAST_ROUND)
    if steps < MIN_STEPS:
        raise RecipeError(
            f"the bake-off of {len(arms)} arms needs {MIN_STEPS * runs} training steps in all, select.bakeoff_epochs "
            f"allows {budget_steps}; it needs a final training of {MIN_STEPS * LAST_ROUND} steps, train.samples or "
            f"train.epochs give {longest_steps}. Raise what is too low, give fewer select.bakeoff_arms or "
            "select.bakeoff_fractions, or set score.method and select.keep_fraction"
        )
    first = _run_all(arms, run_arm, steps, 1)
    contenders = _not_ruled_out(first, weight_V, seed)
    finalists = references + [arm for arm in contenders if not is_reference(arm)][:FINALISTS]
    log.info("bake-off: %d of %d arms go on: %s", len(finalists), len(arms), ", ".join(a.name for a in finalists))
    final = _run_all(finalists, run_arm, LAST_ROUND * steps, 2)
    winner, *others = _ranked(final, weight_V)
    return Outcome(
        winner=winner,
        margins=tuple(_margin(arm, final[arm], final[winner], weight_V, seed) for arm in others),
        results=tuple(
            Result(arm, number, length, float(loss_V @ weight_V))
            for number, length, losses in ((1, steps, first), (2, LAST_ROUND * steps, final))
            for arm, loss_V in losses.items()
        ),
        steps_spent=steps * len(first) + LAST_ROUND * steps * len(final),
    )


def _run_all(
    arms: Sequence[Arm], run_arm: Callable[[Arm, int, int], np.ndarray], steps: int, number: int
) -> dict[Arm, np.ndarray]:
    losses: dict[Arm, np.ndarray] = {}
    for arm in arms:
        losses[arm] = run_arm(arm, steps, number)
        if bad := int((~np.isfinite(losses[arm])).sum()):
            raise ModelError(
                f"bake-off arm {arm.name!r}: {bad} of {len(losses[arm])} target items have no finite loss after "
                f"{steps} steps; lower train.learning_rate"
            )
    return losses


def _ranked(losses: dict[Arm, np.ndarray], weight_V: np.ndarray) -> list[Arm]:
    """Best first."""
    return sorted(losses, key=lambda arm: (float(losses[arm] @ weight_V), arm.name))


def _not_ruled_out(losses: dict[Arm, np.ndarray], weight_V: np.ndarray, seed: int) -> list[Arm]:
    """Arms, best first, whose paired loss is not beyond its interval above that of the best arm."""
    ranked = _ranked(losses, weight_V)
    best = losses[ranked[0]]
    scale = weight_V * len(weight_V)
    return [
        arm
        for arm in ranked
        if paired_interval(
            losses[arm] * scale, best * scale, confidence=RULED_OUT_CONFIDENCE, resamples=1000, seed=seed
        ).low
        <= 0
    ]


def _margin(arm: Arm, loss_V: np.ndarray, winner_V: np.ndarray, weight_V: np.ndarray, seed: int) -> Margin:
    scale = weight_V * len(weight_V)
    interval = paired_interval(loss_V * scale, winner_V * scale, confidence=0.95, resamples=2000, seed=seed)
    return Margin(arm.name, float((loss_V - winner_V) @ weight_V), interval)
