"""Which way of selecting trains best, and where? Drawn worlds with known faults in, one row a trained model out.

    python experiments/selection.py --seeds 0 1 2                       (all worlds, the main arms)
    python experiments/selection.py --seeds 0 --worlds clean --phases main more

In every world the pool is scored by every method; the base is trained on what each keeps of each domain, at equal
compute (100 steps of 16, whatever was kept) or, in phase `more`, also for equal epochs; the model answers 300 held-out
questions. `oracle` keeps the samples that were drawn without a fault. `judge` is a judge who is right about four
samples of five. `auto` is the bake-off of the default recipe with fractions 20, 50 and 80 %; its row says what it
chose and what it cost. Resumable: what has a record in --runs is not computed again, and rows are gathered from the
records. About 20 seconds of one core a row. `scripts/evidence.py` makes the tables of docs/evidence.md from the rows.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datalloy import bakeoff
from datalloy.config import load_recipe
from datalloy.evaluation import answer_losses, answer_probabilities, count_tokens, evaluate
from datalloy.run import Run, write_atomically, write_json
from datalloy.scores import Scores
from datalloy.selection import select
from datalloy.tiny.pools import PoolPlan, read_truth, write_pool
from datalloy.tiny.world import FAULTS
from datalloy.training import train
from datalloy.workflows import Workflow

DOMAINS = ("chart", "counting")
PER_DOMAIN = 160
TARGET_ITEMS = 64  # a target: half of them score, half judge the bake-off
HOLDOUT_ITEMS = 150
BATCH, STEPS = 16, 100


def plan(faults: Mapping[str, float], *, hard: float = 0.4, target_hard: float | None = None) -> PoolPlan:
    return PoolPlan(
        samples=dict.fromkeys(DOMAINS, PER_DOMAIN),
        faults=faults,
        hard=hard,
        target_hard=target_hard,
        targets=DOMAINS,
        target_items=TARGET_ITEMS,
        holdout_items=HOLDOUT_ITEMS,
    )


WORLDS: dict[str, PoolPlan] = {
    "wrong 30 %": plan({"wrong_answer": 0.3}),
    "hard matters": plan({"wrong_answer": 0.2}, hard=0.25, target_hard=1.0),
    "clean": plan({}),
    "wrong 50 %": plan({"wrong_answer": 0.5}),
    "off-target 60 %": plan({"off_target": 0.6, "wrong_answer": 0.1}),
    "other picture 30 %": plan({"other_picture": 0.3}),
    "near-copies 50 %": plan({"near_copy": 0.5}),
    "wrong 10 %": plan({"wrong_answer": 0.1}),
}
UTILITIES = ("exact", "calibrated", "tail", "first_order")
BASELINES = ("low_loss", "mid_loss", "high_loss", "length")
MAIN = ("exact", "calibrated", "low_loss", "tail", "first_order", "high_loss", "judge")
FEW = ("exact", "calibrated", "low_loss")
MAIN_FRACTIONS, MORE_FRACTIONS = (0.5, 0.2), (0.1, 0.8)
JUDGE_ACCURACY = 0.8
AUTO_ARMS, AUTO_FRACTIONS, AUTO_EPOCHS = ("calibrated", "low_loss"), (0.2, 0.5, 0.8), 12.0
RECIPE = """\
name: selection
base: tiny
domains:
  chart: {{path: data/chart.jsonl}}
  counting: {{path: data/counting.jsonl}}
targets:
  chart: {{path: data/chart.target.jsonl}}
  counting: {{path: data/counting.target.jsonl}}
evaluation:
  chart-holdout: {{path: data/chart.holdout.jsonl}}
  counting-holdout: {{path: data/counting.holdout.jsonl}}
score: {{method: auto, target_items: 32, probes: 96, min_agreement: 0.01, seed: {seed}}}
select: {{drop_toxic: false, bakeoff_arms: [exact, calibrated, tail, first_order], seed: {seed}}}
train: {{adapter: none, freeze_vision: false, learning_rate: 5e-4, batch_size: 16, samples: 1600, seed: {seed}}}
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


def jobs(phase: str) -> Iterator[Job]:
    if phase == "main":
        yield from (Job("base"), Job("full"), Job("oracle"))
        for fraction in MAIN_FRACTIONS:
            yield from (Job(scorer, fraction) for scorer in MAIN)
            yield from (Job("random", fraction, draw) for draw in range(3))
        return
    yield from (Job("random", fraction, draw) for fraction in MAIN_FRACTIONS for draw in (3, 4))
    yield from (Job(scorer, fraction) for fraction in MAIN_FRACTIONS for scorer in ("mid_loss", "length"))
    yield from (Job(scorer, fraction) for fraction in MORE_FRACTIONS for scorer in (*FEW, "random"))
    yield from (Job(s, f, within="global") for f in MAIN_FRACTIONS for s in FEW)
    for fraction in MAIN_FRACTIONS:
        yield from (Job(scorer, fraction, protocol="fixed epochs") for scorer in (*FEW, "random"))
    yield Job("full", protocol="fixed epochs")


class World:
    """One drawn pool, scored once by everything, and the models trained on its parts."""

    def __init__(self, name: str, seed: int, folder: Path, run: Run) -> None:
        self.name, self.seed, self.run = name, seed, run
        self.workflow = Workflow(run)
        self.truth = read_truth(folder / "data")
        self.fault_N = np.array([self.truth[s.id]["fault"] for s in self.workflow.pool])
        self.hard_N = np.array([self.truth[s.id]["hard"] for s in self.workflow.pool])

    def scores(self, job: Job) -> Scores:
        if job.scorer in (*UTILITIES, *BASELINES):
            return self.workflow.scores_by(job.scorer)
        rng = np.random.default_rng([self.seed, job.draw])
        value_N = rng.random(len(self.workflow.pool))
        if job.scorer == "judge":
            says_good_N = self.is_clean_N ^ (rng.random(len(value_N)) > JUDGE_ACCURACY)
            value_N = value_N + says_good_N
        table = self.workflow.score()
        return table.with_utility(value_N, table.state, {"method": job.scorer, "signed": False})

    @property
    def is_clean_N(self) -> np.ndarray:
        return np.isin(self.fault_N, ("clean", "near_copy"))

    def kept(self, job: Job) -> list[int]:
        if job.scorer in ("full", "base"):
            return list(range(len(self.fault_N)))
        if job.scorer == "oracle":
            return np.flatnonzero(self.is_clean_N).tolist()
        settings = self.run.recipe.select.model_copy(update={"within": job.within})
        return self.workflow._kept_indices(select(self.scores(job), settings, fraction=job.fraction))

    def row(self, job: Job) -> dict[str, Any]:
        kept = self.kept(job)
        measured = self.run.once(f"train/{job.name}", lambda: self.measure(job, kept))
        return {"world": self.name, "seed": self.seed, **vars(job), **measured}

    def measure(self, job: Job, kept: list[int]) -> dict[str, Any]:
        vlm, steps = self.workflow._base.copy(), 0
        if job.scorer != "base":
            steps = STEPS
            if job.protocol == "fixed epochs":
                steps = max(1, round(STEPS * len(kept) / len(self.fault_N)))
            train(vlm, self.workflow._encoded_pool.pick(kept), self.workflow._train_settings(), None, steps=steps)
        right, probability = [], []
        for samples in self.workflow.evaluation.values():
            right += evaluate(vlm, samples, "exact_match", self.run.recipe.evaluate).values_V.astype(int).tolist()
            encoded = [vlm.encode(sample) for sample in samples]
            loss_V = answer_losses(vlm, encoded, batch_size=100)
            probability += answer_probabilities(loss_V, count_tokens(encoded)).tolist()
        return {
            "steps": steps,
            "kept": len(kept),
            "share": {fault: float((self.fault_N[kept] == fault).mean()) for fault in ("clean", *FAULTS)},
            "hard": float(self.hard_N[kept].mean()),
            "accuracy": float(np.mean(right)),
            "probability": float(np.mean(probability)),
            "right": "".join(map(str, right)),
        }

    def auto(self) -> dict[str, Any]:
        """What the bake-off chooses, as the default recipe would run it, and the model trained on that."""

        def choose() -> dict[str, Any]:
            work = self.workflow
            items = work._judge()
            outcome = bakeoff.race(
                bakeoff.make_arms(AUTO_ARMS, AUTO_FRACTIONS, ("domain", "global")),
                lambda arm, steps, number: work._run_arm(arm, steps, number, items),
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
        return {**row, **spent, "scorer": "auto"}

    def agreements(self) -> dict[str, float]:
        """Spearman with exact, over the whole pool, and the AUC of every score for clean against faulty."""
        found = {}
        for name in (*UTILITIES, "low_loss"):
            found[f"auc {name}"] = auc(self.scores(Job(name)).utility, self.is_clean_N)
            found[f"auc {name}, hard"] = auc(self.scores(Job(name)).utility, self.is_clean_N, self.hard_N)
        return found


def auc(score_N: np.ndarray, is_good_N: np.ndarray, among_N: np.ndarray | None = None) -> float | None:
    good, bad = score_N[is_good_N if among_N is None else is_good_N & among_N], score_N[~is_good_N]
    if not len(good) or not len(bad):
        return None
    return float((good[:, None] > bad).mean() + 0.5 * (good[:, None] == bad).mean())


def run_world(name: str, seed: int, phases: list[str], folder: Path) -> list[dict[str, Any]]:
    if not (folder / "drawn").exists():
        write_pool(folder / "data", WORLDS[name], seed)
        write_atomically(folder / "recipe.yaml", RECIPE.format(seed=seed).encode())
        write_atomically(folder / "drawn", b"")
    rows = []
    with Run(load_recipe(folder / "recipe.yaml"), folder / "run") as run:
        world = World(name, seed, folder, run)
        for phase in phases:
            rows += [world.row(job) for job in jobs(phase)]
        rows.append({**world.auto(), "agreements": world.agreements()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--phases", nargs="+", choices=["main", "more"], default=["main"])
    parser.add_argument("--runs", type=Path, default=Path("runs/selection"))
    parser.add_argument("--out", type=Path, default=Path("experiments/results/selection"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    about = {"commit": commit, "machine": f"{platform.platform()}, {os.cpu_count()} cores", "torch": torch.__version__}
    for seed in args.seeds:
        for name in args.worlds:
            slug = name.replace(" %", "").replace(" ", "-")
            rows = run_world(name, seed, args.phases, args.runs / f"{slug}-{seed}")
            write_json(args.out / f"{slug}-{seed}.json", {"rows": rows, **about})
            print(json.dumps({r["scorer"] + f" {r['fraction']}": round(r["accuracy"], 3) for r in rows}), flush=True)


if __name__ == "__main__":
    main()
