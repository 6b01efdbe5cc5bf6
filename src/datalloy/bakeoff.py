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
length. A third, still shorter round before these told nothing: after four steps all arms are alike. A run that is
shorter than the final training has to see as much smaller a part of what its arm keeps, which is then repeated as often
as it will be: `run_arm` sees to that.

Where the budget is too small for two rounds whose longest runs take half of the final training's steps, fewer arms run,
once, and not shorter: the full pool, then the largest selection by the first scorer, its next smaller one, and so on.

Throwing data out has to show that it helps. Of finalists that are nearly tied the one that keeps most wins. In the one
round of fewer arms, whose runs end early, a selection has to lead the full pool beyond its interval, and of those that
do the surest lead wins.
"""

import logging
import math
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
ENOUGH = 0.5  # of the final training's steps, at least, for the longest runs; leads of shorter ones tell nothing
SURE = 2.0  # standard errors by which a selection has to lead the full pool in the one round
JUDGING_ITEMS = 400  # of a target, at most: the standard error of a share of right answers is .025 by then
MIN_STEPS = 4  # of a run; fewer tell nothing


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
    values after a run are not finite. The order of `arms` matters only where the budget is too small for all of them.
    """
    plan = plan_race(arms, budget_steps, longest_steps)
    first = _run_all(plan.arms, run_arm, plan.steps, 1)
    rounds = [(1, plan.steps, first)]
    if plan.has_finals:
        ranked = _ranked(first, weight_V)
        log.info("bake-off: best after %d steps: %s", plan.steps, ", ".join(arm.name for arm in ranked[:FINALISTS]))
        last = _run_all(_finalists(ranked), run_arm, LONGER * plan.steps, 2)
        rounds.append((2, LONGER * plan.steps, last))
        winner = _winner(last, weight_V)
    else:
        last, winner = first, _surest(first, weight_V)
    return Outcome(
        winner=winner,
        margins=_margins(winner, first, last, weight_V, seed),
        over_base=_margin("the base", base_V, last[winner], weight_V, seed),
        results=tuple(
            Result(arm, number, steps, float(value_V @ weight_V))
            for number, steps, values in rounds
            for arm, value_V in values.items()
        ),
        steps_spent=sum(steps * len(values) for _, steps, values in rounds),
        caution=_caution(plan, [arm for arm in arms if arm not in plan.arms], longest_steps),
    )


@dataclass(frozen=True)
class Plan:
    """What a budget allows: these arms run for so many steps, and finalists LONGER times as long after them."""

    arms: tuple[Arm, ...]
    steps: int
    has_finals: bool

    @property
    def runs(self) -> int:
        """Trainings, at most."""
        return len(self.arms) + (min(FINALISTS, len(self.arms)) if self.has_finals else 0)


def plan_race(arms: Sequence[Arm], budget_steps: int, longest_steps: int) -> Plan:
    """Two rounds of all arms, or one of fewer where the longest runs would not tell. Raises RecipeError."""
    units = len(arms) + LONGER * min(FINALISTS, len(arms))
    steps = min(budget_steps // units, longest_steps // LONGER)
    enough = math.ceil(ENOUGH * longest_steps)
    if steps >= MIN_STEPS and LONGER * steps >= enough:
        return Plan(tuple(arms), steps, has_finals=True)
    fewer = _by_risk(arms)[: max(2, budget_steps // max(1, enough))]
    steps = min(budget_steps // len(fewer), longest_steps)
    if steps < MIN_STEPS:
        raise RecipeError(
            f"the bake-off needs runs of {MIN_STEPS} steps at least; select.bakeoff_epochs allows {budget_steps} steps "
            f"for {len(fewer)} of its arms, train.samples or train.epochs give the final training {longest_steps}. "
            "Raise what is too low, or set score.method and select.keep_fraction"
        )
    return Plan(tuple(fewer), steps, has_finals=False)


def _by_risk(arms: Sequence[Arm]) -> list[Arm]:
    """The full pool, then of each scorer in the order given the larger selections first; random samples last."""
    scorers = list(dict.fromkeys(arm.scorer for arm in arms))
    kinds = {"full": -1, "random": 1}
    return sorted(arms, key=lambda arm: (kinds.get(arm.scorer, 0), scorers.index(arm.scorer), -arm.fraction))


def _caution(plan: Plan, untried: Sequence[Arm], final_steps: int) -> str | None:
    """Said where the budget allowed only some of the arms, or runs too short to tell."""
    if plan.has_finals:
        return None
    enough = math.ceil(ENOUGH * final_steps)
    said = []
    if plan.steps < enough:
        said.append(
            f"the runs of the bake-off took {plan.steps} of the final training's {final_steps} steps; a selection that "
            "leads early is often overtaken, also by the full pool"
        )
    if untried:
        said.append(f"the bake-off's budget was too small to try {', '.join(arm.name for arm in untried)}")
    if not said:
        return None
    arms = len(plan.arms) + len(untried)
    times = enough * arms / (plan.steps * len(plan.arms))
    return f"{'; '.join(said)}. To mend it, raise select.bakeoff_epochs {times:.1f} times"


def _finalists(ranked: Sequence[Arm]) -> list[Arm]:
    """Of all arms, best first."""
    full = [arm for arm in ranked if arm.scorer == "full"]
    larger: list[Arm] = []
    if scored := [arm for arm in ranked if not is_reference(arm)]:
        best = scored[0]
        alike = [a for a in scored if (a.scorer, a.within) == (best.scorer, best.within) and a.fraction > best.fraction]
        larger = sorted(alike, key=lambda arm: arm.fraction)[:1]
    return list(dict.fromkeys([*ranked[:BEST], *full, *larger]))


def _winner(values: dict[Arm, np.ndarray], weight_V: np.ndarray) -> Arm:
    """The arm that keeps most of those nearly tied with the best; the full pool where that is random."""
    best, *others = _ranked(values, weight_V)
    if best.scorer == "random" and FULL in values:
        return FULL
    winner = best
    for arm in others:
        lead, error = _lead(values[best], values[arm], weight_V)
        if arm.scorer != "random" and arm.fraction > winner.fraction and lead <= NEARLY_TIED * error:
            winner = arm
    return winner


def _surest(values: dict[Arm, np.ndarray], weight_V: np.ndarray) -> Arm:
    """The selection whose lead over the full pool has the highest lower end; the full pool where none is above zero."""
    winner, surest = FULL, 0.0
    for arm in _ranked(values, weight_V):
        lead, error = _lead(values[arm], values[FULL], weight_V)
        if not is_reference(arm) and lead - SURE * error > surest:
            winner, surest = arm, lead - SURE * error
    return winner


def _lead(value_V: np.ndarray, over_V: np.ndarray, weight_V: np.ndarray) -> tuple[float, float]:
    """The weighted mean of the difference, and its standard error."""
    difference_V = (value_V - over_V) * weight_V * len(weight_V)
    return float(difference_V.mean()), float(difference_V.std(ddof=1) / np.sqrt(len(difference_V)))


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
