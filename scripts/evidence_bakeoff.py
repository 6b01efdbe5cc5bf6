"""The rows of experiments/bakeoff_rules.py in, what rules of the bake-off would have chosen out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from datalloy import bakeoff
from datalloy.bakeoff import FULL, Arm
from evidence_tables import table

RESULTS = Path("experiments/results")
JUDGING = 32  # items of a target, as in the experiments: half of what there is
FURTHER = "-items.json"  # how the names of results end where further items judge
COLD = "bakeoff_rules_cold"
# and where they hold the arms of one scorer
ALONE = ("low_loss_by_length", "low_loss_by_neighbours", "visual_gain", "entropy_minus_loss")
DRAWS = 20
LOST = 0.02  # against full SFT
RANDOM = Arm("random", 0.5, "domain")
RUNS = {"short", "long", "part", "half"}
FINAL_STEPS = 40


def arms(scorer: str, *fractions: float) -> tuple[Arm, ...]:
    return tuple(Arm(scorer, fraction, "domain") for fraction in fractions)


LOW, LESS, OST = arms("low_loss", 0.2, 0.5, 0.8), arms("less", 0.2, 0.5), arms("calibrated", 0.5, 0.8)
LIKE = arms("low_loss_by_length", 0.2, 0.5, 0.8)
VISUAL = arms("visual_gain", 0.2, 0.5, 0.8)
NEAR = arms("low_loss_by_neighbours", 0.2, 0.5, 0.8)
ENTROPY = arms("entropy_minus_loss", 0.2, 0.5, 0.8)
MORE = (*arms("low_loss", 0.65), *arms("low_loss_by_length", 0.65))


@dataclass(frozen=True)
class Rule:
    arms: tuple[Arm, ...]
    best: int = bakeoff.BEST
    nearly_tied: float = bakeoff.NEARLY_TIED
    runs: tuple[str, str] = ("short", "long")  # by what the first round judges, and the second
    budget: int = 10**6  # training steps of the race
    favoured: Arm | None = None  # wins where the race's winner does not lead it by a standard error


FORMER = (FULL, RANDOM, *LOW, *OST)  # what the default recipe raced before answers of like length were compared
RACED = (FULL, RANDOM, *LOW, *LIKE, *OST)
BY_LENGTH_FIRST = (FULL, RANDOM, *LIKE, *LOW, *OST)
ENTROPY_FIRST = (FULL, RANDOM, *ENTROPY, *LOW, *LIKE, *OST)
RULES = {
    "full SFT always": Rule((FULL,)),
    "low loss 80 % always": Rule(LOW[2:]),
    "low loss 65 % always": Rule(MORE[:1]),
    "low loss by length 50 % always": Rule(LIKE[1:2]),
    "low loss by length 65 % always": Rule(MORE[1:]),
    "visual gain 50 % always": Rule(VISUAL[1:2]),
    "visual gain 80 % always": Rule(VISUAL[2:]),
    "entropy minus loss 20 % always": Rule(ENTROPY[:1]),
    "entropy minus loss 50 % always": Rule(ENTROPY[1:2]),
    "entropy minus loss 80 % always": Rule(ENTROPY[2:]),
    "low loss raced": Rule((FULL, RANDOM, *LOW)),
    "entropy minus loss raced": Rule((FULL, RANDOM, *ENTROPY)),
    "low loss by length and entropy minus loss raced": Rule((FULL, RANDOM, *LIKE, *ENTROPY)),
    "visual gain raced": Rule((FULL, RANDOM, *VISUAL)),
    "low loss and visual gain raced": Rule((FULL, RANDOM, *LOW, *VISUAL)),
    "OST and low loss raced": Rule(FORMER),
    "low loss by length raced": Rule((FULL, RANDOM, *LIKE)),
    "OST and low loss by length raced": Rule((FULL, RANDOM, *LIKE, *OST)),
    "low loss and low loss by length raced": Rule((FULL, RANDOM, *LIKE, *LOW)),
    "**all three raced**": Rule(RACED),
    "visual gain in the place of low loss by length": Rule((FULL, RANDOM, *LOW, *VISUAL, *OST)),
    "entropy minus loss in the place of low loss": Rule((FULL, RANDOM, *LIKE, *ENTROPY, *OST)),
    "entropy minus loss in the place of low loss by length": Rule((FULL, RANDOM, *LOW, *ENTROPY, *OST)),
    "all three, entropy minus loss too": Rule((FULL, RANDOM, *LOW, *LIKE, *ENTROPY, *OST)),
    "all three, visual gain too": Rule((FULL, RANDOM, *LOW, *LIKE, *VISUAL, *OST)),
    "all three, the best two go on": Rule(RACED, best=2),
    "the same, all arms go on": Rule(RACED, best=99),
    "the same, near ties not to what keeps more": Rule(RACED, nearly_tied=0.0),
    "the same, ties up to one standard error": Rule(RACED, nearly_tied=1.0),
    "the same, LESS too": Rule((*RACED, *LESS)),
    "the same, LESS and 65 % of both low losses too": Rule((*RACED, *LESS, *MORE)),
}
COLD_RULES = {
    "full SFT always": Rule((FULL,)),
    "low loss by length 50 % always": Rule(LIKE[1:2]),
    "low loss by length 80 % always": Rule(LIKE[2:]),
    "low loss by neighbours 50 % always": Rule(NEAR[1:2]),
    "low loss by neighbours 80 % always": Rule(NEAR[2:]),
    "entropy minus loss 20 % always": Rule(ENTROPY[:1]),
    "entropy minus loss 50 % always": Rule(ENTROPY[1:2]),
    "entropy minus loss 80 % always": Rule(ENTROPY[2:]),
    **{
        name: Rule((FULL, RANDOM, *raced), runs=("part", "long"))
        for name, raced in (
            ("low loss raced", LOW),
            ("low loss by length raced", LIKE),
            ("entropy minus loss raced", ENTROPY),
            ("low loss by length and entropy minus loss raced", (*LIKE, *ENTROPY)),
            ("low loss and low loss by length raced", (*LOW, *LIKE)),
            ("low loss and entropy minus loss raced", (*LOW, *ENTROPY)),
            ("both low losses and OST raced", (*LOW, *LIKE, *OST)),
            ("both low losses and entropy minus loss raced", (*LOW, *LIKE, *ENTROPY)),
            ("all four raced", (*LOW, *LIKE, *ENTROPY, *OST)),
            ("low loss by neighbours raced", NEAR),
            ("low loss and low loss by neighbours raced", (*LOW, *NEAR)),
            ("low loss by length and by neighbours raced", (*LIKE, *NEAR)),
            ("low loss, low loss by neighbours and OST raced", (*LOW, *NEAR, *OST)),
            ("all three low losses raced", (*LOW, *LIKE, *NEAR)),
            ("all three low losses and OST raced", (*LOW, *LIKE, *NEAR, *OST)),
        )
    },
    "low loss, low loss by neighbours and OST raced, a half by neighbours where none leads it": Rule(
        (FULL, RANDOM, *LOW, *NEAR, *OST), runs=("part", "long"), favoured=NEAR[1]
    ),
}
HALF = ("half", "half")
PARTS = {
    "short runs alone, on all that an arm keeps": Rule(RACED, best=99, runs=("short", "short")),
    "short runs alone, on a part": Rule(RACED, best=99, runs=("part", "part")),
    "the same, without the smallest share": Rule(
        (FULL, RANDOM, *LIKE[1:], *LOW[1:], *OST), best=99, runs=("part", "part")
    ),
    "the same, ties up to two standard errors": Rule(RACED, best=99, nearly_tied=2.0, runs=("part", "part")),
    **{
        f"**{runs} arms once, on half of what each keeps**": Rule(RACED, runs=HALF, budget=runs * FINAL_STEPS // 2)
        for runs in (2, 3, 4, 5, 7)  # the budget of nine would pay two rounds
    },
    "7 arms in short runs on a part, the surest lead": Rule(FORMER, runs=("part", "part"), budget=7 * FINAL_STEPS // 2),
    **{
        f"{runs} arms once, low loss by length first": Rule(BY_LENGTH_FIRST, runs=HALF, budget=runs * FINAL_STEPS // 2)
        for runs in (3, 4, 5)
    },
    **{
        f"{runs} arms once, entropy minus loss first": Rule(ENTROPY_FIRST, runs=HALF, budget=runs * FINAL_STEPS // 2)
        for runs in (3, 4, 5)
    },
    "4 arms once, near ties to what keeps most": Rule((FULL, *LOW), best=99, runs=HALF),
    "4 arms once, ties up to two standard errors": Rule((FULL, *LOW), best=99, nearly_tied=2.0, runs=HALF),
    "the first round on all, the second as long as the final training": Rule(RACED),
    "**the first round on a part, the second as long as the final training**": Rule(RACED, runs=("part", "long")),
    "the same without low loss by length": Rule(FORMER, runs=("part", "long")),
    "the same, visual gain in its place": Rule((FULL, RANDOM, *LOW, *VISUAL, *OST), runs=("part", "long")),
    "the same, visual gain too": Rule((FULL, RANDOM, *LOW, *LIKE, *VISUAL, *OST), runs=("part", "long")),
    "the same, entropy minus loss in the place of low loss": Rule(
        (FULL, RANDOM, *LIKE, *ENTROPY, *OST), runs=("part", "long")
    ),
    "the same, entropy minus loss in the place of low loss by length": Rule(
        (FULL, RANDOM, *LOW, *ENTROPY, *OST), runs=("part", "long")
    ),
    "the same, entropy minus loss in the place of OST": Rule(
        (FULL, RANDOM, *LOW, *LIKE, *ENTROPY), runs=("part", "long")
    ),
    "the same, entropy minus loss too": Rule((FULL, RANDOM, *LOW, *LIKE, *ENTROPY, *OST), runs=("part", "long")),
    "the same without OST": Rule((FULL, RANDOM, *LIKE, *LOW), runs=("part", "long")),
}


@dataclass(frozen=True)
class Pool:
    """What every arm gave after short and long trainings, by the seed of training."""

    world: str
    target_V: np.ndarray
    value_V: Mapping[tuple[int, Arm, str], np.ndarray]  # of all target items, by seed, arm and run
    accuracy: Mapping[tuple[int, Arm], float]
    seeds: tuple[int, ...]

    @classmethod
    def read(cls, path: Path, cold: bool = False) -> "Pool":
        """`cold`: arms of scores of a proxy without warm-up in the place of those with it, where there are any."""
        found = json.loads(path.read_text())
        rows = found["rows"]
        for scorer in ALONE:
            more = path.with_name(f"{path.stem}-{scorer}.json")
            rows += json.loads(more.read_text())["rows"] if more.exists() else []
        if cold:
            others = sorted((RESULTS / COLD).glob(f"{path.stem}-*.json"))
            instead = [row for other in others for row in json.loads(other.read_text())["rows"]]
            replaced = {row["scorer"] for row in instead}
            rows = [*(row for row in rows if row["scorer"] not in replaced), *instead]
        values: dict[tuple[int, Arm, str], np.ndarray] = {}
        accuracy = {}
        for row in rows:
            arm = FULL if row["scorer"] == "full" else Arm(row["scorer"], row["fraction"], "domain")
            for run in RUNS & row.keys():
                values[row["train_seed"], arm, run] = np.array(row[run])
            accuracy[row["train_seed"], arm] = row["accuracy"]
        seeds = tuple(dict.fromkeys(row["train_seed"] for row in rows))
        return cls(found["world"], np.array(found["target"]), values, accuracy, seeds)

    def gains(self, rule: Rule, judging: int = JUDGING, trainings: int = 1) -> list[float]:
        """What the rule's choice gains on the full pool, by trainings from other seeds than those that chose.

        `judging`: so many items of each target are drawn to judge by. `trainings`: from so many seeds every run of the
        race is trained, and its values are their means.
        """
        found = []
        for seeds in combinations(self.seeds, trainings):
            rng = np.random.default_rng(seeds[0])
            values = {
                (arm, number): np.mean([self.value_V[seed, arm, run] for seed in seeds], axis=0)
                for arm in rule.arms
                for number, run in enumerate(rule.runs, 1)
                if len(rule.arms) > 1
            }
            gains = {arm: self.elsewhere(arm, seeds) - self.elsewhere(FULL, seeds) for arm in rule.arms}
            for _ in range(DRAWS):
                items = [rng.choice(np.flatnonzero(self.target_V == n), judging, replace=False) for n in (0, 1)]
                found.append(gains[self.chosen(rule, values, np.concatenate(items))])
        return found

    def chosen(self, rule: Rule, values: Mapping[tuple[Arm, int], np.ndarray], item_V: np.ndarray) -> Arm:
        """The race's winner by these items; `values` are those of every arm's runs, by number of the round."""
        if len(rule.arms) == 1:
            return rule.arms[0]

        def values_of(arm: Arm, number: int) -> np.ndarray:
            return values[arm, number][item_V]

        weight_V = np.full(len(item_V), 1 / len(item_V))
        constants = {"BEST": rule.best, "FINALISTS": rule.best + 2, "NEARLY_TIED": rule.nearly_tied}
        # margins are not looked at, and take most of a race's time
        with patch.multiple(bakeoff, **constants, _margins=lambda *_: (), _margin=lambda *_: None):
            outcome = bakeoff.race(
                rule.arms,
                lambda arm, _, number: values_of(arm, number),
                base_V=np.zeros(len(item_V)),
                weight_V=weight_V,
                budget_steps=rule.budget,
                longest_steps=FINAL_STEPS,
                seed=0,
            )
        if rule.favoured is not None:
            lead, error = bakeoff._lead(values_of(outcome.winner, 2), values_of(rule.favoured, 2), weight_V)
            if lead < error:
                return rule.favoured
        return outcome.winner

    def elsewhere(self, arm: Arm, seeds: Sequence[int]) -> float:
        """Held-out accuracy of the arm, mean over the trainings from other seeds than those that chose."""
        return float(np.mean([self.accuracy[other, arm] for other in self.seeds if other not in seeds]))


def read_pools(*, further: bool = False) -> list[Pool]:
    """Those judged by the targets' own items, or those judged by further ones."""
    paths = sorted((RESULTS / "bakeoff_rules").glob("*.json"))
    whole = [path for path in paths if not path.stem.endswith(ALONE)]
    return [Pool.read(path) for path in whole if path.name.endswith(FURTHER) == further]


def judging_items() -> str:
    """Gain over full SFT of what the former race chooses, by judging items of a target and trainings of a run."""
    pools = read_pools(further=True)
    worlds = list(dict.fromkeys(pool.world for pool in pools))
    rule = Rule(FORMER)
    available = int(np.bincount(pools[0].target_V).min())
    rows = []
    seeds = min(len(pool.seeds) for pool in pools)
    for trainings, judging in product(range(1, seeds), (16, 32, 64, 128, 256)):
        if judging <= available:
            gains = {
                world: np.concatenate([p.gains(rule, judging, trainings) for p in pools if p.world == world])
                for world in worlds
            }
            lost = np.mean(np.concatenate(list(gains.values())) < -LOST)
            means = [found.mean() for found in gains.values()]
            cells = [f"{np.mean(means):+.3f}", f"{100 * lost:.0f} %", *(f"{mean:+.3f}" for mean in means)]
            rows.append([str(trainings), str(judging), *cells])
    best = best_arms(pools, worlds)
    told = ["", "the best arm, known afterwards"]
    rows.append([*told, f"{np.mean(best):+.3f}", "", *(f"{mean:+.3f}" for mean in best)])
    counts = [sum(pool.world == world for pool in pools) for world in worlds]
    head = [f"{world} ({count})" for world, count in zip(worlds, counts, strict=True)]
    asked = ["trainings of a run", "judging items of a target", "mean over worlds", f"more than {LOST} lost"]
    return table([*asked, *head], rows)


def rules() -> str:
    """Gain over full SFT of what each rule chooses, mean over pools, seeds and drawn judging items."""
    return _rules(RULES, read_pools())


def parts() -> str:
    """The same for races whose short runs see all that an arm keeps, or as much smaller a part of it."""
    return _rules(PARTS, read_pools())


def cold_rules(warm_up: str) -> str:
    """The same for arms of a proxy without warm-up ("0"), or warmed up on 5 % ("5"), on the pools that have both.

    Without the rules of arms that were not run with a warm-up.
    """
    found = {path.stem.rsplit("-", 1)[0] for path in (RESULTS / COLD).glob("*.json")}
    paths = [RESULTS / "bakeoff_rules" / f"{stem}.json" for stem in sorted(found)]
    pools = [Pool.read(path, cold=warm_up == "0") for path in paths]
    run = {arm for _, arm in pools[0].accuracy}
    return _rules({name: rule for name, rule in COLD_RULES.items() if run.issuperset(rule.arms)}, pools)


def _rules(rules: Mapping[str, Rule], pools: Sequence[Pool]) -> str:
    wanted = {run for rule in rules.values() for run in rule.runs}
    pools = [pool for pool in pools if all((pool.seeds[0], FULL, run) in pool.value_V for run in wanted)]
    worlds = list(dict.fromkeys(pool.world for pool in pools))
    rows = []
    for name, rule in rules.items():
        gains = {world: np.concatenate([p.gains(rule) for p in pools if p.world == world]) for world in worlds}
        means = [found.mean() for found in gains.values()]
        lost = np.mean(np.concatenate(list(gains.values())) < -LOST)
        rows.append([name, f"{np.mean(means):+.3f}", f"{100 * lost:.0f} %", *(f"{mean:+.3f}" for mean in means)])
    best = best_arms(pools, worlds)
    rows.append(["the best arm, known afterwards", f"{np.mean(best):+.3f}", "", *(f"{mean:+.3f}" for mean in best)])
    counts = [sum(pool.world == world for pool in pools) for world in worlds]
    head = [f"{world} ({count})" for world, count in zip(worlds, counts, strict=True)]
    return table(["rule", "mean over worlds", f"more than {LOST} lost", *head], rows)


def noise() -> str:
    """How far two arms can be told apart: by so many judging items, and by one training each."""
    pools = read_pools()
    errors, trainings = [], []
    for pool in pools:
        for seed, arm in pool.accuracy:
            if arm != FULL:
                difference_V = pool.value_V[seed, arm, "long"] - pool.value_V[seed, FULL, "long"]
                errors.append(difference_V.std(ddof=1))
        for arm in dict.fromkeys(arm for _, arm in pool.accuracy):
            trainings.append(np.std([pool.accuracy[seed, arm] for seed in pool.seeds], ddof=1))
    rows = [
        [f"difference of an arm and the full pool by {items} items", f"{np.median(errors) / np.sqrt(items):.3f}"]
        for items in (64, 128, 400)
    ]
    luck = np.sqrt(np.mean(np.square(trainings)))
    return table(["of what", "standard error"], [*rows, ["held-out accuracy by the seed of training", f"{luck:.3f}"]])


def best_arms(pools: Sequence[Pool], worlds: list[str]) -> list[float]:
    """Gain of the arm that is best over all trainings of a pool, by world: more than any rule can reach."""
    found: dict[str, list[float]] = {world: [] for world in worlds}
    for pool in pools:
        means: dict[Any, float] = {
            arm: float(np.mean([pool.accuracy[seed, arm] for seed in pool.seeds])) for _, arm in pool.accuracy
        }
        found[pool.world].append(max(means.values()) - means[FULL])
    return [float(np.mean(gains)) for gains in found.values()]
