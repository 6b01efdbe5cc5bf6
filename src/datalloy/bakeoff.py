"""Arms in, the arm to train on out, decided by small measured runs: a race on the proxy.

No score is right everywhere: finite-step utility throws out harm but also hard samples that the target needs, low
loss keeps what is known already (DESIGN 2.3). So each arm (scorer x fraction) is trained for a few steps at equal
compute and judged on the target items. Random and the full pool are always among the arms, and "keep everything" is a
possible answer. The base is measured beside them: where every arm falls below it, the pool does harm, and that is said.

What the values are is the caller's: judged by the mean loss alone the race went wrong, because a few items with a
confident wrong answer decide it; by the probability of the right answer alone, because easy samples seen often make a
model sure (docs/decisions.md).

Three rounds: all arms run briefly; the best four and the two reference arms run again, from the start, three times as
long, so that the winner's margin over each is measured at equal compute; the best two of these three times as long
again. Long runs are what the decision needs: a small clean selection leads at first and is overtaken when it has been
repeated often, and wrong answers do their harm late. So no arm is ruled out by how sure a short run is of it, and the
leader meets its own next larger selection in the last round, and the full pool. Where the budget is too small for three
rounds there are two.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from datalloy.errors import ModelError, RecipeError
from datalloy.uncertainty import Interval, paired_interval

log = logging.getLogger(__name__)

SECOND_ROUND = 4  # arms beside the reference arms
LAST_ROUND = 4  # arms: the best two, the leader's scorer at its next larger fraction, and the full pool
LONGER = 3  # times the steps of the round before
MIN_STEPS = 4  # of the first round; fewer tell nothing


@dataclass(frozen=True)
class Arm:
    """One way to select: which score, what share of the pool, ranked `within` each domain or over the pool."""

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


def make_arms(scorers: Sequence[str], fractions: Sequence[float], within: str = "domain") -> list[Arm]:
    """All combinations, and the two references: the full pool, and a random draw at the middle fraction."""
    arms = [Arm(s, f, within) for s in scorers if s != "random" for f in fractions if f < 1]
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
    lengths = _plan(arms, budget_steps, longest_steps)
    rounds: list[dict[Arm, np.ndarray]] = []
    ranked: list[Arm] = []
    for number, (length, choose) in enumerate(zip(lengths, (_all, _second_round, _last_round), strict=False), start=1):
        rounds.append(_run_all(choose(ranked, arms), run_arm, length, number))
        ranked = _ranked(rounds[-1], weight_V)
        log.info("bake-off: best after %d steps: %s", length, ", ".join(arm.name for arm in ranked[:SECOND_ROUND]))
    winner = ranked[0]
    return Outcome(
        winner=winner,
        margins=_margins(winner, rounds[1:], weight_V, seed),
        over_base=_margin("the base", base_V, rounds[-1][winner], weight_V, seed),
        results=tuple(
            Result(arm, number, length, float(value_V @ weight_V))
            for number, (length, values) in enumerate(zip(lengths, rounds, strict=True), start=1)
            for arm, value_V in values.items()
        ),
        steps_spent=sum(length * len(values) for length, values in zip(lengths, rounds, strict=True)),
    )


def _plan(arms: Sequence[Arm], budget_steps: int, longest_steps: int) -> list[int]:
    """Steps of a run in each round: three rounds where they are affordable, else two. Raises RecipeError."""
    sizes = (len(arms), min(sum(map(is_reference, arms)) + SECOND_ROUND, len(arms)), min(LAST_ROUND, len(arms)))
    for rounds in (3, 2):
        longer = [LONGER**i for i in range(rounds)]
        units = sum(size * length for size, length in zip(sizes, longer, strict=False))
        steps = min(budget_steps // units, longest_steps // longer[-1])
        if steps >= MIN_STEPS:
            return [steps * length for length in longer]
    raise RecipeError(
        f"the bake-off of {len(arms)} arms needs {MIN_STEPS * units} training steps in all, select.bakeoff_epochs "
        f"allows {budget_steps}; it needs a final training of {MIN_STEPS * LONGER} steps, train.samples or "
        f"train.epochs give {longest_steps}. Raise what is too low, give fewer select.bakeoff_arms or "
        "select.bakeoff_fractions, or set score.method and select.keep_fraction"
    )


def _all(_: Sequence[Arm], arms: Sequence[Arm]) -> list[Arm]:
    return list(arms)


def _second_round(ranked: Sequence[Arm], arms: Sequence[Arm]) -> list[Arm]:
    best = [arm for arm in ranked if not is_reference(arm)][:SECOND_ROUND]
    return [*filter(is_reference, arms), *best]


def _last_round(ranked: Sequence[Arm], arms: Sequence[Arm]) -> list[Arm]:
    leader, runner_up = ranked[:2]
    larger = [
        a for a in arms if (a.scorer, a.within) == (leader.scorer, leader.within) and a.fraction > leader.fraction
    ]
    full = [arm for arm in arms if arm.scorer == "full"]
    return list(dict.fromkeys([leader, runner_up, *sorted(larger, key=lambda arm: arm.fraction)[:1], *full]))


def _margins(
    winner: Arm, rounds: Sequence[dict[Arm, np.ndarray]], weight_V: np.ndarray, seed: int
) -> tuple[Margin, ...]:
    """The winner over every arm that ran beside it in these rounds, by the longest run of both; smallest first."""
    latest = {arm: values for values in rounds for arm in values if arm != winner}
    margins = (_margin(arm.name, values[arm], values[winner], weight_V, seed) for arm, values in latest.items())
    return tuple(sorted(margins, key=lambda margin: (margin.mean, margin.over)))


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


def _margin(over: str, value_V: np.ndarray, winner_V: np.ndarray, weight_V: np.ndarray, seed: int) -> Margin:
    scale = weight_V * len(weight_V)
    interval = paired_interval(winner_V * scale, value_V * scale, confidence=0.95, resamples=2000, seed=seed)
    return Margin(over, float((winner_V - value_V) @ weight_V), interval)
