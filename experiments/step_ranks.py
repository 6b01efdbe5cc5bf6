"""At which step size does utility tell harmful samples from clean and from hard ones? Faulty pools in, AUC out.

    python experiments/step_ranks.py --seeds 0 1 --out experiments/results/step_ranks.json

Nothing is trained but the warm-up, so this is the cheap half of experiments/step_size.py. A part of the demo's pool is
scored by the exact and the tail step at several sizes; AUC 1 means that every harmful sample (wrong answer, other
picture, garbled) has a lower utility than every clean one, 0.5 that utility tells nothing.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from provenance import provenance
from sklearn.metrics import roc_auc_score

from datalloy.config import load_recipe
from datalloy.run import Run, write_json
from datalloy.scorers.one_step import ExactScorer, OneStepScorer
from datalloy.scorers.step import Steppable, StepRule, scoped_parameters
from datalloy.scorers.tail import TailScorer
from datalloy.scorers.taps import Taps
from datalloy.tiny.demo import PLAN, RECIPE
from datalloy.tiny.pools import read_truth, write_pool
from datalloy.workflows import Workflow

STEPS = {"exact": (0.003, 0.01, 0.03, 0.1, 0.3), "tail": (0.05, 0.2, 0.8, 3.2, 12.8)}
EVERY = 6  # of the pool


def make_scorer(method: str, workflow: Workflow) -> OneStepScorer:
    inputs, rule = workflow._scoring_inputs, StepRule("sgd")
    if method == "tail":
        check = next(item for group in inputs.targets.values() for item in group)
        taps = Taps(inputs.vlm, 1)
        return TailScorer(inputs.vlm, inputs.items, taps, check=check, rule=rule, step=0.0, batch_size=16)
    parameters = scoped_parameters(inputs.vlm, "full", freeze_vision=False)
    return ExactScorer(inputs.vlm, inputs.items, Steppable(parameters), rule=rule, step=0.0)


def measure(workflow: Workflow, truth: dict, seed: int) -> list[dict]:
    rows = []
    indices = range(0, len(workflow.pool), EVERY)
    fault_N = np.array([truth[workflow.pool[i].id]["fault"] for i in indices])
    hard_N = np.array([truth[workflow.pool[i].id]["hard"] for i in indices])
    harmful_N = np.isin(fault_N, ("wrong_answer", "other_picture", "garbled"))
    clean_N = np.isin(fault_N, ("clean", "near_copy"))
    for method, steps in STEPS.items():
        scorer = make_scorer(method, workflow)
        _, fall_NSV = scorer.falls([workflow._encoded_pool[i] for i in indices], steps)
        utility_NS = fall_NSV @ scorer.items.item_weight_V
        target_loss = scorer.before_V @ scorer.items.item_weight_V
        for s, step in enumerate(steps):
            utility_N = utility_NS[:, s]
            auc = {
                name: float(roc_auc_score(harmful_N[mask], -utility_N[mask]))
                for name, mask in {
                    "all": np.ones_like(clean_N),
                    "clean easy": harmful_N | (clean_N & ~hard_N),
                    "clean hard": harmful_N | (clean_N & hard_N),
                }.items()
            }
            row = {"seed": seed, "method": method, "step": step, "auc_harmful_against": auc}
            row["effect"] = float(np.median(np.abs(utility_N)) / target_loss)
            row["negative_fraction"] = float((utility_N < 0).mean())
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def run_seed(seed: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_pool(root / "data", PLAN, seed)
        (root / "recipe.yaml").write_text(RECIPE)
        with Run(load_recipe(root / "recipe.yaml"), root / "run") as run:
            return measure(Workflow(run), read_truth(root / "data"), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    rows = [row for seed in args.seeds for row in run_seed(seed)]
    write_json(args.out, {"rows": rows, "seconds": time.monotonic() - started, **provenance()})


if __name__ == "__main__":
    main()
