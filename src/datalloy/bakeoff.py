"""Arms in, the arm to train on out, decided by small measured runs: a race on the proxy.

No score is right everywhere: finite-step utility throws out harm but also hard samples that the target needs, low
loss keeps what is known already (DESIGN 2.3). So each arm (scorer x fraction) is trained for a few steps at equal
compute and judged on the target items. Random and the full pool are always among the arms, and "keep everything" is a
possible answer: also where random leads, for then no score has shown that it helps. The base is measured beside them:
where every arm falls below it, the pool does harm, and that is said.

What the values are is the caller's: judged by the mean loss alone the race went wrong, because a few items with a
confident wrong answer decide it; by the probability of the right answer alone, because easy samples seen often make a
model sure (docs/decisions.md).

Two rounds: all arms run briefly; the finalists run again, from the start, three times as long. Finalists are the
best three, the full pool, and the next larger selection by the best score. Long runs are what the decision needs: a
small clean selection leads at first and is overtaken when it has been repeated often, and wrong answers do their harm
late. So no arm is ruled out by how sure a short run is of it, and the best meets its own next larger selection at full
length. A third, still shorter round before these told nothing: after four steps all arms are alike. Where the budget
does not allow runs as long as the final training, a run has to see as much smaller a part of what its arm keeps, which
is then repeated as often as it will be: `run_arm` sees to that.

Of finalists that are nearly tied the one that keeps most wins: throwing data out has to show that it helps. Where no
run takes half of the final training's steps, all count as tied whose difference is within its interval.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from datalloy.errors import ModelError, RecipeError
from datalloy.uncertainty import Interval, paired_interval

log = logging.getLogger(__name__)

BEST = 3  # arms of the first round go on to the second
FINALISTS = BEST + 2  # at most: the full pool and the next larger selection by the best score with them
LONGER = 3  # times the steps of the first round
NEARLY_TIED = 0.5  # standard errors of the paired difference to the best
EARLY = 0.5  # of the final training's steps: where no run takes as many, what leads is not said to lead to the end
EARLY_TIED = 2.0  # standard errors there: only what is beyond its interval may throw samples out
JUDGING_ITEMS = 400  # of a target, at most: the standard error of a share of right answers is .025 by then
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
    caution: str | None  # what this race cannot tell, and what to do


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

    `run_arm(arm, steps, round)` trains afresh on a part of what the arm keeps, in proportion to the steps, and returns
    the value of every target item, [V], higher is better; `base_V` are those of the base, before any training.
    `weight_V` sums to one. Raises RecipeError when the budget is too small to tell arms apart, ModelError when the
    values after a run are not finite. The order of `arms` does not matter: ties go by name.
    """
    short, long = _plan(arms, budget_steps, longest_steps)
    first = _run_all(arms, run_arm, short, 1)
    ranked = _ranked(first, weight_V)
    log.info("bake-off: best after %d steps: %s", short, ", ".join(arm.name for arm in ranked[:FINALISTS]))
    last = _run_all(_finalists(ranked), run_arm, long, 2)
    ends_early = long < EARLY * longest_steps
    winner = _winner(last, weight_V, EARLY_TIED if ends_early else NEARLY_TIED)
    return Outcome(
        winner=winner,
        margins=_margins(winner, first, last, weight_V, seed),
        over_base=_margin("the base", base_V, last[winner], weight_V, seed),
        results=tuple(
            Result(arm, number, length, float(value_V @ weight_V))
            for number, length, values in ((1, short, first), (2, long, last))
            for arm, value_V in values.items()
        ),
        steps_spent=short * len(first) + long * len(last),
        caution=_caution(long, longest_steps) if ends_early and winner != FULL else None,
    )


def _caution(steps: int, final_steps: int) -> str:
    """Said where a part of the pool wins by runs that end early: small selections lead first and are overtaken."""
    return (
        f"the longest runs of the bake-off took {steps} of the final training's {final_steps} steps; a small selection "
        "that leads early is often overtaken, also by the full pool. To be sure, raise select.bakeoff_epochs "
        f"{final_steps / steps:.1f} times, or train on the full pool too and compare"
    )


def _plan(arms: Sequence[Arm], budget_steps: int, longest_steps: int) -> tuple[int, int]:
    """Steps of a run in the first and in the last round. Raises RecipeError."""
    units = len(arms) + LONGER * min(FINALISTS, len(arms))
    steps = min(budget_steps // units, longest_steps // LONGER)
    if steps < MIN_STEPS:
        raise RecipeError(
            f"the bake-off of {len(arms)} arms needs {MIN_STEPS * units} training steps in all, select.bakeoff_epochs "
            f"allows {budget_steps}; it needs a final training of {MIN_STEPS * LONGER} steps, train.samples or "
            f"train.epochs give {longest_steps}. Raise what is too low, give fewer select.bakeoff_arms or "
            "select.bakeoff_fractions, or set score.method and select.keep_fraction"
        )
    return steps, steps * LONGER


def _finalists(ranked: Sequence[Arm]) -> list[Arm]:
    """Of all arms, best first."""
    full = [arm for arm in ranked if arm.scorer == "full"]
    larger: list[Arm] = []
    if scored := [arm for arm in ranked if not is_reference(arm)]:
        best = scored[0]
        alike = [a for a in scored if (a.scorer, a.within) == (best.scorer, best.within) and a.fraction > best.fraction]
        larger = sorted(alike, key=lambda arm: arm.fraction)[:1]
    return list(dict.fromkeys([*ranked[:BEST], *full, *larger]))


def _winner(values: dict[Arm, np.ndarray], weight_V: np.ndarray, nearly_tied: float) -> Arm:
    """The arm that keeps most of those nearly tied with the best; the full pool where that is random.

    `nearly_tied`: by so many standard errors of the paired difference.
    """
    best, *others = _ranked(values, weight_V)
    if best.scorer == "random" and FULL in values:
        return FULL
    winner = best
    for arm in others:
        difference_V = (values[best] - values[arm]) * weight_V * len(weight_V)
        error = difference_V.std(ddof=1) / np.sqrt(len(difference_V))
        if arm.scorer != "random" and arm.fraction > winner.fraction and difference_V.mean() <= nearly_tied * error:
            winner = arm
    return winner


def _margins(
    winner: Arm, first: dict[Arm, np.ndarray], last: dict[Arm, np.ndarray], weight_V: np.ndarray, seed: int
) -> tuple[Margin, ...]:
    """The winner over the other finalists, and over random samples by the longest run of both; smallest first."""
    rivals = [arm for arm in first if arm != winner and (arm in last or arm.scorer == "random")]
    pairs = ((arm, last if arm in last else first) for arm in rivals)
    margins = (_margin(arm.name, values[arm], values[winner], weight_V, seed) for arm, values in pairs)
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
