"""Arms in, the arm to train on out, decided by small measured runs: a race on the proxy.

No score is right everywhere: finite-step utility throws out harm but also hard samples that the target needs, low
loss keeps what is known already (DESIGN 2.3). So each arm (scorer x fraction x ranked within domains or globally)
is trained for a few steps at equal compute and judged on the target items, by what their metric asks for. Random and
the full pool are always among the arms, and "keep everything" is a possible answer. The base is measured beside them:
where every arm falls below it, the pool does harm, and that is said.

Judged by the mean loss alone the race went wrong: a few items with a confident wrong answer decide it, and arms that
make most answers better lose (docs/decisions.md).

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
    """How much better the winner does than another arm or the base, paired over items, in the unit of the values."""

    over: str
    mean: float
    interval: Interval


@dataclass(frozen=True)
class Result:
    """One run of the race: the weighted value of the target items after `steps` steps, higher is better."""

    arm: Arm
    round: int
    steps: int
    value: float


@dataclass(frozen=True)
class Outcome:
    winner: Arm
    margins: tuple[Margin, ...]
    over_base: Margin
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
    base_V: np.ndarray,
    weight_V: np.ndarray,
    budget_steps: int,
    longest_steps: int,
    seed: int,
) -> Outcome:
    """Race the arms within `budget_steps` training steps in all, no run longer than `longest_steps`.

    `run_arm(arm, steps, round)` trains the arm afresh and returns the value of every target item, [V], higher is
    better; `base_V` are those of the base, before any training. `weight_V` sums to one. Raises RecipeError when the
    budget is too small to tell arms apart, ModelError when the values after a run are not finite. The order of `arms`
    does not matter: ties go by name.
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
        margins=tuple(_margin(arm.name, final[arm], final[winner], weight_V, seed) for arm in others),
        over_base=_margin("the base", base_V, final[winner], weight_V, seed),
        results=tuple(
            Result(arm, number, length, float(value_V @ weight_V))
            for number, length, values in ((1, steps, first), (2, LAST_ROUND * steps, final))
            for arm, value_V in values.items()
        ),
        steps_spent=steps * len(first) + LAST_ROUND * steps * len(final),
    )


def _run_all(
    arms: Sequence[Arm], run_arm: Callable[[Arm, int, int], np.ndarray], steps: int, number: int
) -> dict[Arm, np.ndarray]:
    values: dict[Arm, np.ndarray] = {}
    for arm in arms:
        values[arm] = run_arm(arm, steps, number)
        if bad := int((~np.isfinite(values[arm])).sum()):
            raise ModelError(
                f"bake-off arm {arm.name!r}: {bad} of {len(values[arm])} target items have no finite value after "
                f"{steps} steps; lower train.learning_rate"
            )
    return values


def _ranked(values: dict[Arm, np.ndarray], weight_V: np.ndarray) -> list[Arm]:
    """Best first."""
    return sorted(values, key=lambda arm: (-float(values[arm] @ weight_V), arm.name))


def _not_ruled_out(values: dict[Arm, np.ndarray], weight_V: np.ndarray, seed: int) -> list[Arm]:
    """Arms, best first, whose paired value is not beyond its interval below that of the best arm."""
    ranked = _ranked(values, weight_V)
    best = values[ranked[0]]
    scale = weight_V * len(weight_V)
    return [
        arm
        for arm in ranked
        if paired_interval(
            best * scale, values[arm] * scale, confidence=RULED_OUT_CONFIDENCE, resamples=1000, seed=seed
        ).low
        <= 0
    ]


def _margin(over: str, value_V: np.ndarray, winner_V: np.ndarray, weight_V: np.ndarray, seed: int) -> Margin:
    scale = weight_V * len(weight_V)
    interval = paired_interval(winner_V * scale, value_V * scale, confidence=0.95, resamples=2000, seed=seed)
    return Margin(over, float((winner_V - value_V) @ weight_V), interval)
