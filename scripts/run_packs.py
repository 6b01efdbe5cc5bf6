"""The example recipe on real data: a folder with the unpacked packs in, a results table (JSON) out.

    python scripts/run_packs.py --data FOLDER --out experiments/results/packs.json --seeds 0 1 2

For every seed: `examples/packs.yaml` end to end, and beside it the full pool, a random half, and the half and the four
fifths of lowest loss, trained at equal compute. Resumable: run the same command again.
"""

import argparse
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

from datalloy import progress
from datalloy.bakeoff import FULL, Arm
from datalloy.config import load_recipe
from datalloy.report import write_report
from datalloy.report.facts import RunFacts
from datalloy.run import Run, write_json
from datalloy.workflows import Workflow

EXAMPLE = Path(__file__).parent.parent / "examples" / "packs.yaml"
ARMS = {
    "full": FULL,
    "random 50 %": Arm("random", 0.5, "domain"),
    "low loss 50 %": Arm("low_loss", 0.5, "domain"),
    "low loss 80 %": Arm("low_loss", 0.8, "domain"),
}


def run_seed(data: Path, runs: Path, seed: int, overrides: list[str]) -> dict:
    seeds = (f"train.seed={seed}", f"score.seed={seed}", f"select.seed={seed}")
    recipe = load_recipe(EXAMPLE, (f"data_root={data.absolute()}", *seeds, *overrides))
    with Run(recipe, runs / f"packs-{seed}") as run:
        workflow = Workflow(run)
        status = workflow.run_all()
        compared = workflow.compare(ARMS)
        scores, selection = workflow.score(), workflow.select()
        print(write_report(run.folder))
        facts = RunFacts(run.folder)
        gains = {name: facts.gain(name) for name in ("base", *compared)}
        models = {"base": status["metrics"]["base"], "auto": status["metrics"]["model"]}
        models |= {name: row["sets"] for name, row in compared.items()}
        return {
            "seed": seed,
            "arm": selection.metadata["arm"],
            "margins": selection.metadata["bakeoff"]["margins"],
            "kept": {"auto": int(selection.kept.sum()), **{name: row["kept"] for name, row in compared.items()}},
            "toxic": int((selection.reason == "toxic").sum()),
            "pool": len(scores),
            "agreement_with_exact": scores.metadata.get("agreement_with_exact"),  # none where only losses were needed
            "models": models,
            "gains of auto": {over: {"mean": g.mean, "interval": list(g.interval)} for over, g in gains.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("experiments/results/packs.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    progress.show(True)
    rows = [run_seed(args.data, args.runs, seed, args.overrides) for seed in args.seeds]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.platform()}, {os.cpu_count()} cores"
    write_json(args.out, {"rows": rows, "overrides": args.overrides, "commit": commit, "machine": machine})
    for name in rows[0]["models"]:
        means = [np.mean([s["mean"] for key, s in r["models"][name].items() if key.endswith("-holdout")]) for r in rows]
        print(name, "held-out accuracy, mean of packs, by seed:", [round(float(m), 4) for m in means])


if __name__ == "__main__":
    main()
