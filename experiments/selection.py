"""Which way of selecting trains best, and where? Drawn worlds with known faults in, one row a trained model out.

    python experiments/selection.py --seeds 0 1 2                       (all worlds, the main arms)
    python experiments/selection.py --seeds 0 --worlds clean --phases main more "by length" auto
    python experiments/selection.py --base shipped --worlds clean       (the base that has nothing left to learn)
    python experiments/selection.py --set score.warmup_fraction=0 --runs runs/cold --out experiments/results/cold
    python experiments/selection.py --set score.warmup_fraction=0 --phases auto \
        --runs runs/cold --out experiments/results/cold                           (the default recipe's race)
    python experiments/selection.py --set score.warmup_fraction=0 score.step=batch_share --phases calibrated \
        --runs runs/batch_share --out experiments/results/batch_share             (OST's utility alone, by default)
    python experiments/selection.py --seeds 20 21 22 --set score.warmup_fraction=0 --shares 0.2 0.5 \
        --phases fewest "by neighbours" "right and wanted" auto --out experiments/results/fresh_pools
    python experiments/selection.py --seeds 20 21 22 --set score.warmup_fraction=0 score.step=batch_share \
        --shares 0.2 0.5 --phases "right and useful" calibrated auto --out experiments/results/fresh_pools_batch_share

In every world the pool is scored by every method; the base (bases.py) is trained on what each keeps of each domain, at
equal compute (40 steps of 16, whatever was kept) or, in phase `more`, also for equal epochs; the model answers 300
held-out questions. `oracle` keeps the samples that were drawn without a fault. `judge` is a judge who is right about
four samples of five; `deita` multiplies that judge's verdict by a word on difficulty that is right as often, and passes
over near-copies; `calibrated diverse` spreads what calibrated keeps; `visual_gain mean` is visual gain as its paper has
it, over tokens. `put back` trains on the half that exact utility prefers and a fifth of the pool besides: the worst or
a random one of the rest. `few`, `fewest` (what all else is held against, and low loss), `by length` and `entropy` need
one forward pass, `by neighbours` and `visual gain` two, `right and wanted` the pass of another scorer besides, as have
`right and useful` (the same with calibrated utility in the place of the dot product) and `utility by neighbours`
(calibrated utility, held against its neighbours'); `calibrated` and `tail` alone are for other settings of them. `auto`
is the bake-off of the default arms; its row says what it chose and what it cost. Scores are those of a proxy that was
warmed up on 5 % of the pool, at steps of a visible effect, but where `--set` says otherwise: the default recipe does
not warm up, and its utility takes the step of a batch's share where it selects alone.

Resumable: what has a record in --runs is not computed again, and rows are gathered from the records; rows of phases
that are not asked for stay in the file. About 8 seconds of one core a row, 2 minutes of scoring a world, 2 of `auto`.
`scripts/evidence.py` makes tables of docs/evidence.md. Pools 20 to 22 of every world were drawn when all rules, arms
and steps had been settled on the others; nothing was chosen by them.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import parser_of
from bases import BASES, base_path
from held_out import HeldOut
from provenance import provenance

from datalloy import bakeoff
from datalloy.config import Select, load_recipe
from datalloy.run import Run, write_atomically, write_json
from datalloy.scorers import Seen
from datalloy.scorers.baselines import low_loss_by_neighbours, right_and_wanted
from datalloy.scores import Scores
from datalloy.selection import select, toxic_mask
from datalloy.tiny.pools import PoolPlan, read_truth, write_pool
from datalloy.tiny.world import FAULTS
from datalloy.training import train
from datalloy.vlm import VLM
from datalloy.workflows import Workflow

DOMAINS = ("chart", "counting")
PER_DOMAIN = 160
TARGET_ITEMS = 64  # a target: half of them score, half judge the bake-off
HOLDOUT_ITEMS = 150
BATCH, STEPS = 16, 40


def plan(
    faults: Mapping[str, float], *, hard: float = 0.4, target_hard: float | None = None, hard_as: str = "in words"
) -> PoolPlan:
    return PoolPlan(
        samples=dict.fromkeys(DOMAINS, PER_DOMAIN),
        faults=faults,
        hard=hard,
        target_hard=target_hard,
        hard_as=hard_as,
        targets=DOMAINS,
        target_items=TARGET_ITEMS,
        holdout_items=HOLDOUT_ITEMS,
    )


WORLDS: dict[str, PoolPlan] = {
    "wrong 30 %": plan({"wrong_answer": 0.3}),
    "hard matters": plan({"wrong_answer": 0.2}, hard=0.25, target_hard=1.0),
    "hard, no longer": plan({"wrong_answer": 0.2}, hard=0.5, target_hard=1.0, hard_as="plus one"),
    "clean": plan({}),
    "wrong 50 %": plan({"wrong_answer": 0.5}),
    "off-target 60 %": plan({"off_target": 0.6, "wrong_answer": 0.1}),
    "other picture 30 %": plan({"other_picture": 0.3}),
    "near-copies 50 %": plan({"near_copy": 0.5}),
    "wrong 10 %": plan({"wrong_answer": 0.1}),
}
UTILITIES = ("exact", "calibrated", "tail", "first_order", "less")
SCORERS = (*UTILITIES, "visual_gain", "entropy_minus_loss")  # with a pass of their own
RELATIVE, USEFUL = "calibrated_by_neighbours", "right_and_useful"  # of calibrated; no scorers of the product
BASELINES = ("low_loss", "low_loss_by_length", "low_loss_by_neighbours", "mid_loss", "high_loss", "length")
MAIN = (*UTILITIES, "low_loss", "judge", "deita", "calibrated diverse")
FEW = ("exact", "calibrated", "low_loss")
PUT_BACK = ("put back worst", "put back random")
RATING_ACCURACY = 0.8
OF_CALIBRATED = (RELATIVE, USEFUL)
OF_ONE_SCORER = {
    "by length": "low_loss_by_length",
    "by neighbours": "low_loss_by_neighbours",
    "utility by neighbours": RELATIVE,
    "right and wanted": "right_and_wanted",
    "right and useful": USEFUL,
    "dot product": "first_order",
    "calibrated": "calibrated",
    "tail": "tail",
    "visual gain": "visual_gain",
    "entropy": "entropy_minus_loss",
}
PHASES = ("main", "more", *OF_ONE_SCORER, "few", "fewest")
SHARES = (0.2, 0.5, 0.65, 0.8)
AUTO = Select()  # the default recipe's arms
AUTO_EPOCHS = 15.6  # 12 steps for each of eleven arms, 36 for five finalists
RECIPE = """\
name: selection
base: {base}
domains:
  chart: {{path: data/chart.jsonl}}
  counting: {{path: data/counting.jsonl}}
targets:
  chart: {{path: data/chart.target.jsonl}}
  counting: {{path: data/counting.target.jsonl}}
evaluation:
  chart-holdout: {{path: data/chart.holdout.jsonl}}
  counting-holdout: {{path: data/counting.holdout.jsonl}}
score:
  {{method: auto, step: visible_effect, warmup_fraction: 0.05, target_items: 32, probes: 96, min_agreement: 0.001,
    seed: {seed}}}
select:
  drop_toxic: false
  bakeoff_arms: [exact, calibrated, tail, first_order, less, visual_gain, entropy_minus_loss]
  seed: {seed}
train: {{adapter: none, freeze_vision: false, learning_rate: 5e-4, batch_size: 16, samples: 640, seed: {seed}}}
evaluate: {{max_new_tokens: 12, batch_size: 100}}
leakage: {{on_leak: allow}}
"""


@dataclass(frozen=True)
class Job:
    """One model to be trained: by which score, what share of each domain, which draw, how long."""

    scorer: str
    fraction: float = 1.0
    draw: int = 0
    within: str = "domain"
    protocol: str = "fixed compute"

    @property
    def name(self) -> str:
        return f"{self.scorer} {100 * self.fraction:g} {self.within} {self.draw} {self.protocol}".replace(" ", "-")


def jobs(phase: str, shares: Sequence[float] = SHARES) -> Iterator[Job]:
    if phase in OF_ONE_SCORER:
        yield from (Job(OF_ONE_SCORER[phase], fraction) for fraction in shares)
        if phase == "visual gain":
            yield from (Job("visual_gain mean", fraction) for fraction in (0.2, 0.5))
    elif phase == "few":
        yield from (Job("base"), Job("full"), Job("oracle"), Job("judge", 0.5), Job("judge", 0.2))
        yield from (Job("random", fraction, draw) for fraction in (0.5, 0.2) for draw in range(3))
        yield from (Job("low_loss", fraction) for fraction in SHARES)
    elif phase == "fewest":
        yield from (Job("base"), Job("full"), Job("oracle"), Job("low_loss", 0.5), Job("low_loss", 0.8))
        yield from (Job("random", 0.5), Job("random", 0.5, 1), Job("random", 0.2))
    elif phase == "main":
        yield from (Job("base"), Job("full"), Job("oracle"), Job("low_loss", 0.65))
        for fraction in (0.5, 0.2):
            yield from (Job(scorer, fraction) for scorer in MAIN)
            yield from (Job("random", fraction, draw) for draw in range(3))
        yield from (Job(scorer, 0.8) for scorer in (*FEW, "random"))
        yield from (Job(scorer, 0.5) for scorer in ("high_loss", *PUT_BACK))
    elif phase == "more":
        yield from (Job(scorer, 0.5) for scorer in ("mid_loss", "length"))
        yield from (Job(scorer, 0.1) for scorer in (*FEW, "random"))
        yield from (Job(scorer, 0.5, within="global") for scorer in FEW)
        yield from (Job(scorer, 0.5, protocol="fixed epochs") for scorer in (*FEW, "random"))


class World:
    """One drawn pool, scored once by everything, and the models trained on its parts."""

    def __init__(self, name: str, base: str, seed: int, folder: Path, run: Run) -> None:
        self.name, self.base, self.seed, self.run = name, base, seed, run
        self.workflow = Workflow(run)
        self.truth = read_truth(folder / "data")
        self.fault_N = np.array([self.truth[s.id]["fault"] for s in self.workflow.pool])
        self.hard_N = np.array([self.truth[s.id]["hard"] for s in self.workflow.pool])

    def scores(self, scorer: str, draw: int = 0) -> Scores:
        if scorer in (*SCORERS, *BASELINES, "right_and_wanted"):
            return self.workflow.scores_by(scorer)
        if scorer in OF_CALIBRATED:
            return self.from_calibrated(scorer)
        rng = np.random.default_rng([self.seed, draw])
        value_N = rng.random(len(self.workflow.pool))
        if scorer in ("judge", "deita"):
            value_N = value_N + self.says(self.is_clean_N, rng)
        if scorer == "deita":
            value_N = value_N * (1 + self.says(self.hard_N, rng))
        table = self.workflow.score()
        return table.with_utility(value_N, table.state, {"method": scorer, "signed": False})

    def from_calibrated(self, scorer: str) -> Scores:
        """Utilities minus the median of their neighbours', or their places beside those by low loss by neighbours."""
        work = self.workflow
        table = work.scores_by("calibrated")
        keys, tokens_N = work.pool.content_hashes(), table.supervised_tokens
        seen = Seen(table.loss, tokens_N, table.domain, keys, self.seed, lambda row_R: work._prompts(row_R))
        if scorer == USEFUL:
            value_N = right_and_wanted(seen, table.utility)
        else:
            value_N = low_loss_by_neighbours(seen._replace(loss_N=-table.utility))  # low where utility is high
        return table.with_utility(value_N, table.state, {"method": scorer, "signed": False})

    def says(self, is_true_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What a rater says who is right about four samples of five."""
        return is_true_N ^ (rng.random(len(is_true_N)) > RATING_ACCURACY)

    @property
    def is_clean_N(self) -> np.ndarray:
        return np.isin(self.fault_N, ("clean", "near_copy"))

    def told_apart(self, score_N: np.ndarray, kept: Sequence[int]) -> dict[str, Any]:
        """How well a score tells clean from faulty, hard clean ones apart, and the shares of both in what it keeps."""
        return {
            "auc": auc(score_N, self.is_clean_N),
            "auc hard": auc(score_N, self.is_clean_N, self.hard_N),
            "faulty": float(1 - self.is_clean_N[kept].mean()),
            "hard": float(self.hard_N[kept].mean()),
        }

    def kept(self, job: Job) -> list[int]:
        if job.scorer in ("full", "base"):
            return list(range(len(self.fault_N)))
        if job.scorer == "oracle":
            return np.flatnonzero(self.is_clean_N).tolist()
        if job.scorer in PUT_BACK:
            return self.put_back(job)
        settings = self.run.recipe.select.model_copy(update={"within": job.within})
        scorer, _, variant = job.scorer.partition(" ")
        if variant == "diverse":
            settings = settings.model_copy(update={"diversity": "facility_location"})
        elif scorer == "deita":
            settings = settings.model_copy(update={"diversity": "threshold"})
        scores = self.scores(scorer, job.draw)
        if variant == "mean":
            scores = scores.with_utility(scores.utility / scores.supervised_tokens, scores.state, scores.metadata)
        directions_ND = None if settings.diversity == "off" else self.workflow._directions_ND
        normalised = self.run.recipe.score.length_normalised
        kept = select(scores, settings, fraction=job.fraction, direction_ND=directions_ND, length_normalised=normalised)
        return self.workflow._kept_indices(kept)

    def put_back(self, job: Job) -> list[int]:
        """The half that exact utility prefers, and a fifth of the pool: the worst, or a random one of the rest."""
        kept = self.kept(Job("exact", job.fraction))
        rest = np.setdiff1d(np.arange(len(self.fault_N)), kept)
        worst_first = rest[np.argsort(self.scores("exact").utility[rest], kind="stable")]
        if job.scorer == "put back random":
            worst_first = np.random.default_rng(self.seed).permutation(rest)
        return sorted([*kept, *worst_first[: len(self.fault_N) // 5].tolist()])

    def row(self, job: Job) -> dict[str, Any]:
        kept = self.kept(job)
        measured = self.run.once(f"train/{job.name}", lambda: self.measure(job, kept))
        return {"world": self.name, "base": self.base, "seed": self.seed, **vars(job), **measured}

    @cached_property
    def held_out(self) -> HeldOut:
        return HeldOut.lay_out(self.workflow)

    def tuned_on(self, kept: Sequence[int], steps: int = STEPS, **settings: Any) -> VLM:
        """The base trained on these samples; `settings` are changes to the recipe's section train."""
        work, vlm = self.workflow, self.workflow._base.copy()
        train(vlm, work._encoded_pool.pick(kept), work._train_settings(**settings), None, steps=steps)
        return vlm

    def measure(self, job: Job, kept: list[int]) -> dict[str, Any]:
        vlm, steps = self.workflow._base, 0
        if job.scorer != "base":
            steps = STEPS
            if job.protocol == "fixed epochs":
                steps = max(1, round(STEPS * len(kept) / len(self.fault_N)))
            vlm = self.tuned_on(kept, steps)
        return {
            "steps": steps,
            "kept": len(kept),
            "share": {fault: float((self.fault_N[kept] == fault).mean()) for fault in ("clean", *FAULTS)},
            "hard": float(self.hard_N[kept].mean()),
            **self.held_out.measure(vlm),
        }

    def auto(self, scorers: Sequence[str]) -> dict[str, Any]:
        """What the bake-off of these scorers chooses, as a recipe would run it, and the model trained on that."""

        def choose() -> dict[str, Any]:
            work = self.workflow
            items = work._judge()
            kept = work._kept_by_arm(bakeoff.make_arms(scorers, AUTO.bakeoff_fractions))
            outcome = bakeoff.race(
                list(kept),
                lambda arm, steps, number: work._run_arm(arm, kept[arm], steps, number, items),
                base_V=items.values(work._base),
                weight_V=work._item_weights(items),
                budget_steps=int(AUTO_EPOCHS * len(work.pool) / BATCH),
                longest_steps=STEPS,
                seed=self.seed,
            )
            winner = outcome.winner
            return {
                "job": [winner.scorer, winner.fraction, winner.within],
                "steps_spent": outcome.steps_spent,
                "over_base": [outcome.over_base.mean, *outcome.over_base.interval],
            }

        chosen = self.run.once("auto", choose)
        scorer, fraction, within = chosen["job"]
        row = self.row(Job(scorer, fraction if scorer != "full" else 1.0, 0, within))
        spent = {"chose": row["scorer"], "race_steps": chosen["steps_spent"], "over_base": chosen["over_base"]}
        return {**row, **spent, "scorer": "auto" if scorers == AUTO.bakeoff_arms else f"auto {', '.join(scorers)}"}

    def agreements(self, scorers: Sequence[str]) -> dict[str, float | None]:
        """The AUC of scores for clean against faulty, over the whole pool and for hard clean samples.

        Beside it the Spearman with exact utilities on the probes, where it is known, and how many samples are called
        toxic by a score that knows the targets: all, those that are faulty, and hard clean ones.
        """
        found = {}
        for name in scorers:
            table = self.scores(name)
            if agreement := table.metadata.get("agreement_with_exact"):
                found[f"exact {name}"] = agreement["spearman"]
            found[f"auc {name}"] = auc(table.utility, self.is_clean_N)
            found[f"auc {name}, hard"] = auc(table.utility, self.is_clean_N, self.hard_N)
            if table.is_signed:
                toxic_N = toxic_mask(table, AUTO.toxic_confidence)
                found[f"toxic {name}"] = int(toxic_N.sum())
                found[f"toxic {name}, faulty"] = int((toxic_N & ~self.is_clean_N).sum())
                found[f"toxic {name}, hard"] = int((toxic_N & self.is_clean_N & self.hard_N).sum())
        return found

    def score_seconds(self) -> dict[str, float]:
        """What each method's scores took, the probing that all of them share apart."""
        shards = range(len(self.workflow._shards()))
        found = {
            method: sum((self.run.finished(f"scores/{method}/{n:05d}") or {})["seconds"] for n in shards)
            for method in UTILITIES
        }
        return {**found, "probing": (self.run.finished("probes") or {})["seconds"]}


def auc(score_N: np.ndarray, is_good_N: np.ndarray, among_N: np.ndarray | None = None) -> float | None:
    good, bad = score_N[is_good_N if among_N is None else is_good_N & among_N], score_N[~is_good_N]
    if not len(good) or not len(bad):
        return None
    return float((good[:, None] > bad).mean() + 0.5 * (good[:, None] == bad).mean())


@contextmanager
def open_world(
    name: str,
    base: str,
    seed: int,
    folder: Path,
    overrides: Sequence[str] = (),
    run: str = "run",
    plan: PoolPlan | None = None,
) -> Iterator[World]:
    """A world of `WORLDS`, drawn into `folder` where it is not there yet; its run folder is a part of it.

    `plan`: drawn by this instead of the world's own.
    """
    if not (folder / "drawn").exists():
        write_pool(folder / "data", plan or WORLDS[name], seed)
        recipe = RECIPE.format(seed=seed, base=base_path(base, folder.parent))
        write_atomically(folder / "recipe.yaml", recipe.encode())
        write_atomically(folder / "drawn", b"")
    with Run(load_recipe(folder / "recipe.yaml", overrides), folder / run) as opened:
        yield World(name, base, seed, folder, opened)


def slug(name: str) -> str:
    return name.replace(" %", "").replace(",", "").replace(" ", "-")


def run_world(
    name: str,
    base: str,
    seed: int,
    phases: Sequence[str],
    folder: Path,
    settings: Sequence[str] = (),
    raced: Sequence[str] = AUTO.bakeoff_arms,
    shares: Sequence[float] = SHARES,
) -> list[dict[str, Any]]:
    """Scored by everything where `main` or `more` are asked for, else by what the phases need: a run folder each."""
    overrides, run = tuple(settings), "run"
    alone = [scorer for phase, scorer in OF_ONE_SCORER.items() if phase in phases]
    if not {"main", "more"} & set(phases):
        own = ["calibrated" if scorer in OF_CALIBRATED else scorer for scorer in alone if scorer not in BASELINES]
        arms = list(dict.fromkeys([*(raced if "auto" in phases else ()), *own])) or ["low_loss"]
        run, overrides = "-".join(arms), (*overrides, f"select.bakeoff_arms=[{', '.join(arms)}]")
    with open_world(name, base, seed, folder, overrides, run) as world:
        rows = [world.row(job) for phase in phases for job in jobs(phase, shares)]
        if "auto" in phases:
            rows.append(world.auto(raced))
        if "main" in phases:  # of the pool, not of a model; they stand with the first
            rows[0] |= {"agreements": world.agreements((*SCORERS, "low_loss")), "score_seconds": world.score_seconds()}
        elif alone:
            rows[0] |= {"agreements": world.agreements(alone)}
        return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a file of results, in the place of those of the same model where there are any."""
    commit = provenance()["commit"]
    found = json.loads(path.read_text()) if path.exists() else {"rows": [], **provenance()}
    by_model: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in (*found["rows"], *({"commit": commit, **row} for row in rows)):
        is_auto = row["scorer"].startswith("auto")
        identity = (row["scorer"],) if is_auto else tuple(row[field] for field in Job.__dataclass_fields__)
        by_model[identity] = {**by_model.get(identity, {}), **row}
    write_json(path, {**found, "rows": list(by_model.values())})


def worlds_parser(description: str, name: str, worlds: Sequence[str] = tuple(WORLDS)) -> argparse.ArgumentParser:
    """The options of an experiment over pools of these worlds, all of one base."""
    parser = parser_of(description, name)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(worlds))
    parser.add_argument("--base", choices=BASES, default=BASES[0])
    return parser


def asked_pools(args: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """World, seed and the name of the folder of every pool that is asked for."""
    for seed in args.seeds:
        for world in args.worlds:
            yield world, seed, f"{slug(world)}-{args.base}-{seed}"


def main() -> None:
    parser = worlds_parser(__doc__, "selection")
    parser.add_argument("--phases", nargs="+", choices=[*PHASES, "auto"], default=["main", "auto"])
    parser.add_argument("--set", nargs="+", default=[], help="settings of the recipe; with folders of their own")
    parser.add_argument("--arms", nargs="+", default=AUTO.bakeoff_arms, help="scorers that `auto` races")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="kept in phases of one scorer")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, seed, place in asked_pools(args):
        raced = tuple(args.arms)
        rows = run_world(name, args.base, seed, args.phases, args.runs / place, args.set, raced, args.shares)
        write_rows(args.out / f"{place}.json", rows)
        said = {f"{row['scorer']} {row['fraction']}": round(row["accuracy"], 3) for row in rows if "accuracy" in row}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
