"""Recipes in, what the bake-off chooses and how a model trained on that choice does on the held-out sets out.

python scripts/chosen_arm.py demo-0/recipe.yaml demo-1/recipe.yaml --out experiments/results/demo_race.json

Only scoring, the bake-off and one training each; run folders are `chosen-run` beside the recipes, and resumable.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from datalloy.bakeoff import Arm
from datalloy.config import load_recipe
from datalloy.run import Run, write_json
from datalloy.workflows import Workflow


def measure(recipe: Path) -> dict[str, Any]:
    with Run(load_recipe(recipe), recipe.parent / "chosen-run") as run:
        workflow = Workflow(run)
        arm = Arm(**workflow.select().metadata["arm"])
        workflow.compare({"chosen": arm})
        results = json.loads(run.path("evaluation/chosen.json").read_text())
        race = json.loads(run.path("bakeoff.json").read_text())
    values = [v for name, row in results.items() if name not in load_recipe(recipe).targets for v in row["values"]]
    return {"recipe": recipe.parent.name, "chosen": arm.name, "accuracy": float(np.mean(values)), "race": race}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    rows = [measure(recipe) for recipe in args.recipes]
    write_json(args.out, {"rows": rows, "commit": commit})
    for row in rows:
        print(f"| {row['recipe']} | {row['chosen']} | {row['accuracy']:.3f} |")


if __name__ == "__main__":
    main()
