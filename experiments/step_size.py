"""Which step size selects best? Pools with known faults in, accuracy of models trained on what each step keeps out.

    python experiments/step_size.py --seeds 0 1 2 --out experiments/results/step_size.json

For every seed a faulty pool is drawn, every sample is scored by the tail and the exact step at several multiples of
the Polyak step, and the base is trained on the top 50 % and 20 % of each domain, at equal compute, beside full,
random, low loss and the clean samples alone (an oracle). Rows tell the effect of
every step, which is what `scorers.probing.DEFAULT_EFFECT` should be chosen by. Some 20 minutes of one core a seed.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from datalloy import scorers
from datalloy.config import load_recipe
from datalloy.evaluation import answer_losses, evaluate
from datalloy.run import Run, write_json
from datalloy.scorers.one_step import ExactScorer
from datalloy.scorers.step import Steppable, StepRule, scoped_parameters
from datalloy.scorers.tail import TailScorer
from datalloy.scorers.taps import Taps
from datalloy.tiny.demo import PLAN, RECIPE
from datalloy.tiny.pools import read_truth, write_pool
from datalloy.training import train
from datalloy.workflows import Workflow

MULTIPLES = {"tail": (0.25, 1.0, 4.0, 16.0), "exact": (0.25, 1.0, 4.0)}
FRACTIONS = (0.5, 0.2)


def top_within(utility_N: np.ndarray, domain_N: np.ndarray, fraction: float) -> list[int]:
    kept: list[int] = []
    for domain in sorted(set(domain_N)):
        rows = np.flatnonzero(domain_N == domain)
        order = rows[np.argsort(-utility_N[rows], kind="stable")]
        kept += order[: round(fraction * len(rows))].tolist()
    return kept


def run_seed(seed: int, methods: list[str], recipe_text: str, baselines: bool) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pool(root / "data", PLAN, seed)
        (root / "recipe.yaml").write_text(recipe_text)
        recipe = load_recipe(root / "recipe.yaml", (f"score.seed={seed}", f"train.seed={seed}", f"select.seed={seed}"))
        with Run(recipe, root / "run") as run:
            return measure(Workflow(run), read_truth(root / "data"), seed, methods, baselines)


def measure(workflow: Workflow, truth: dict, seed: int, methods: list[str], baselines: bool) -> list[dict]:
    workflow.check()
    pool, encoded, inputs = workflow.pool, workflow._encoded_pool, workflow._scoring_inputs
    domain_N = np.array([s.domain for s in pool])
    fault_N = np.array([truth[s.id]["fault"] for s in pool])
    hard_N = np.array([truth[s.id]["hard"] for s in pool])
    harmful_N = np.isin(fault_N, ("wrong_answer", "other_picture", "garbled"))
    loss_scorer = scorers.prepare("low_loss", inputs, None, [])
    loss_N = loss_scorer.score([encoded[i] for i in range(len(pool))]).loss_N
    rng = np.random.default_rng(seed)
    polyaks: dict[str, float] = {}
    effects: dict[tuple[str, float], float] = {}
    rankings = {("random", 0.0): rng.random(len(pool)), ("low_loss", 0.0): -loss_N}
    rankings[("oracle", 0.0)] = np.where(np.isin(fault_N, ("clean", "near_copy")), rng.random(len(pool)), -1.0)
    for method in methods:
        multiples = MULTIPLES[method]
        if method == "tail":
            taps, check = Taps(inputs.vlm, 1), encoded[0]
            rule = StepRule("sgd")
            scorer = TailScorer(inputs.vlm, inputs.items, taps, check=check, rule=rule, step=0.0, batch_size=16)
        else:
            parameters = scoped_parameters(inputs.vlm, "full", freeze_vision=False)
            scorer = ExactScorer(inputs.vlm, inputs.items, Steppable(parameters), rule=StepRule("sgd"), step=0.0)
        polyak = float(np.median(scorer.polyak_steps([encoded[i] for i in range(0, len(pool), 10)])))
        polyaks[method] = polyak
        steps = [m * polyak for m in multiples]
        falls = [scorer.falls([encoded[i]], steps)[1][0] @ inputs.items.item_weight_V for i in range(len(pool))]
        target_loss = scorer.before_V @ inputs.items.item_weight_V
        for s, multiple in enumerate(multiples):
            effects[(method, multiple)] = float(np.median(np.abs(np.array(falls)[:, s])) / target_loss)
            rankings[(method, multiple)] = np.array(falls)[:, s]
    arms = [
        (name, multiple, f)
        for (name, multiple) in rankings
        for f in FRACTIONS
        if (baselines or name in methods) and not (name == "oracle" and f == 0.2)
    ]
    rows = []
    for name, multiple, fraction in ([("full", 0.0, 1.0)] if baselines else []) + arms:
        utility_N = rankings.get((name, multiple), np.zeros(len(pool)))
        kept = top_within(utility_N, domain_N, fraction)
        vlm = workflow._base.copy()
        train(vlm, encoded.pick(kept), workflow.recipe.train, None)
        values, losses = [], []
        for samples in workflow.evaluation.values():
            values.append(evaluate(vlm, samples, "exact_match", workflow.recipe.evaluate).values_V)
            losses.append(answer_losses(vlm, [vlm.encode(s) for s in samples], batch_size=64))
        row = {
            "seed": seed,
            "arm": name,
            "multiple": multiple,
            "fraction": fraction,
            "kept": len(kept),
            "accuracy": float(np.concatenate(values).mean()),
            "loss": float(np.concatenate(losses).mean()),
            "harmful_kept": float(harmful_N[kept].mean()),
            "hard_kept": float(hard_N[kept].mean()),
            "off_target_kept": float((fault_N[kept] == "off_target").mean()),
            "negative": float((utility_N < 0).mean()),
            "polyak": polyaks.get(name),
            "effect": effects.get((name, multiple)),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["tail", "exact"])
    parser.add_argument("--multiples", nargs="+", metavar="METHOD=M,M", help="instead of the default grids")
    parser.add_argument("--no-baselines", action="store_true", help="train the scored arms alone")
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = RECIPE.replace("base: tiny", f"base: {args.base}")
    if args.learning_rate:
        recipe = recipe.replace("learning_rate: 1e-3", f"learning_rate: {args.learning_rate}")
    for text in args.multiples or []:
        method, _, values = text.partition("=")
        MULTIPLES[method] = tuple(float(value) for value in values.split(","))
    started = time.monotonic()
    rows = [row for seed in args.seeds for row in run_seed(seed, args.methods, recipe, not args.no_baselines)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    write_json(
        args.out,
        {"rows": rows, "commit": commit, "machine": platform.platform(), "seconds": time.monotonic() - started},
    )


if __name__ == "__main__":
    main()
