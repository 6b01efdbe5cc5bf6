"""Do subsets chosen by the fast utility train as well as subsets chosen by the exact one? Pools in, accuracies out.

    python benchmarks/trained.py --worlds noisy half off_target --seeds 0 1 2

Drawn worlds with known faults. The whole pool is scored exactly (one real step and all target items for every sample)
and by the fast scorers, each at the step that its scan chose; the best 30 and 50 % within each domain are trained on,
at equal compute, from one base with one seed; accuracy on 300 held-out questions. Differences are paired over the
questions, with a 95 % interval over runs and questions. Resumable: what has a record is not computed again. About eight
minutes of one core a world and seed.
"""

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datalloy import bakeoff
from datalloy.config import load_recipe
from datalloy.run import Run, write_atomically, write_json
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.uncertainty import rank_agreement
from datalloy.workflows import Workflow

FAULTS: dict[str, dict[str, float]] = {
    "noisy": {"wrong_answer": 0.2, "other_picture": 0.1, "off_target": 0.08, "near_copy": 0.06, "garbled": 0.06},
    "half": {"wrong_answer": 0.5},
    "off_target": {"wrong_answer": 0.1, "off_target": 0.4},
}
# run folders: calibrated with and without items replayed are two recipes, the rest share the probes of the first
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "replayed_items: 3": ("exact, calibrated, tail", {"exact": "exact", "calibrated": "calibrated", "tail": "tail"}),
    "replayed_items: 0": ("calibrated", {"calibrated": "calibrated, no item replayed"}),
}
SCORERS = ("exact", "calibrated", "tail", "calibrated, no item replayed")
FRACTIONS = (0.3, 0.5)
RESAMPLES = 4000
RECIPE = """\
name: trained
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
score: {{method: auto, target_items: 32, probes: 96, min_agreement: 0.01, seed: {seed}, {setting}}}
select: {{drop_toxic: false, bakeoff_arms: [{methods}]}}
train: {{adapter: none, freeze_vision: false, learning_rate: 5e-4, batch_size: 16, samples: 2400, seed: {seed}}}
evaluate: {{max_new_tokens: 12, batch_size: 100}}
"""


def run_world(world: str, seed: int, folder: Path) -> dict[str, Any]:
    """Accuracy on every held-out question of models trained on what each scorer keeps."""
    data = folder / "data"
    if not (folder / "drawn").exists():
        plan = PoolPlan(
            samples={"chart": 240, "counting": 240},
            targets=("chart", "counting"),
            target_items=32,
            holdout_items=150,
            faults=FAULTS[world],
        )
        write_pool(data, plan, seed)
        write_atomically(folder / "drawn", b"")
    values: dict[str, list[float]] = {}
    utilities: dict[str, np.ndarray] = {}
    for number, (setting, (methods, names)) in enumerate(RUNS.items()):
        recipe = folder / f"{number}.yaml"
        write_atomically(recipe, RECIPE.format(methods=methods, seed=seed, setting=setting).encode())
        with Run(load_recipe(recipe), folder / str(number)) as run:
            workflow = Workflow(run)
            arms = {f"{n} {f:.0%}": bakeoff.Arm(m, f, "domain") for m, n in names.items() for f in FRACTIONS}
            if number == 0:
                arms |= {f"random {f:.0%}": bakeoff.Arm("random", f, "domain") for f in FRACTIONS}
                arms |= {f"low loss {f:.0%}": bakeoff.Arm("low_loss", f, "domain") for f in FRACTIONS}
                arms["full"] = bakeoff.FULL
            workflow.score()
            utilities |= {name: workflow.scores_by(method).utility for method, name in names.items()}
            workflow.compare(arms)
            for arm in arms:
                results = json.loads(run.path(f"evaluation/{arm}.json").read_text())
                values[arm] = [v for key, row in results.items() if key.endswith("-holdout") for v in row["values"]]
    both = {n: np.isfinite(u) & np.isfinite(utilities["exact"]) for n, u in utilities.items()}
    return {
        "world": world,
        "seed": seed,
        "spearman": {n: rank_agreement(u[both[n]], utilities["exact"][both[n]]) for n, u in utilities.items()},
        "accuracy": {arm: float(np.mean(v)) for arm, v in values.items()},
        "values": {arm: [round(v, 3) for v in row] for arm, row in values.items()},
    }


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each fast scorer against exact, over all worlds and seeds: runs are drawn with replacement, then questions."""
    found = []
    rng = np.random.default_rng(0)
    for fraction in FRACTIONS:
        for name in (*SCORERS[1:], "low loss", "random"):
            gap_RQ = [
                np.subtract(r["values"][f"{name} {fraction:.0%}"], r["values"][f"exact {fraction:.0%}"]) for r in rows
            ]
            drawn = [
                np.mean(
                    [rng.choice(gap_RQ[r], len(gap_RQ[r])).mean() for r in rng.integers(len(gap_RQ), size=len(gap_RQ))]
                )
                for _ in range(RESAMPLES)
            ]
            low, high = np.quantile(drawn, (0.025, 0.975))
            mean = float(np.mean([gap.mean() for gap in gap_RQ]))
            found.append({"scorer": name, "fraction": fraction, "mean": mean, "interval": [float(low), float(high)]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/trained"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/trained.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.platform()}, {os.cpu_count()} cores, 1 thread"
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for world in args.worlds:
            rows.append(run_world(world, seed, args.runs / f"{world}-{seed}"))
            about = {"commit": commit, "machine": machine, "torch": torch.__version__}
            write_json(args.out, {"against exact": differences(rows), "rows": rows, **about})
            print(world, seed, rows[-1]["spearman"], rows[-1]["accuracy"], flush=True)
    for row in differences(rows):
        low, high = row["interval"]
        print(f"| {row['scorer']} | {row['fraction']:.0%} | {row['mean']:+.3f} [{low:+.3f}, {high:+.3f}] |")


if __name__ == "__main__":
    main()
