"""The example recipe on real data: a folder with the unpacked packs in, a results table (JSON) out.

    python scripts/run_packs.py --data FOLDER --out experiments/results/packs.json --seeds 0 1 2

For every seed: `examples/packs.yaml` end to end, and beside it the full pool, a random half, and the half and the four
fifths of lowest loss, of the domain or among answers of like length, trained at equal compute. `--arms` takes some of
them or none. `--race`: the bake-off alone, for what it would choose. Resumable: run the same command again.
"""

import argparse
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

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
    "low loss by length 50 %": Arm("low_loss_by_length", 0.5, "domain"),
    "low loss by length 80 %": Arm("low_loss_by_length", 0.8, "domain"),
}


@contextmanager
def opened(data: Path, runs: Path, seed: int, overrides: Sequence[str]) -> Iterator[Run]:
    seeds = (f"train.seed={seed}", f"score.seed={seed}", f"select.seed={seed}")
    recipe = load_recipe(EXAMPLE, (f"data_root={data.absolute()}", *seeds, *overrides))
    with Run(recipe, runs / f"packs-{seed}") as run:
        yield run


def race(data: Path, runs: Path, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """What the bake-off chooses, and what every run of it gave."""
    with opened(data, runs, seed, overrides) as run:
        metadata = Workflow(run).select().metadata
        return {"seed": seed, "arm": metadata["arm"], "bakeoff": metadata["bakeoff"]}


def run_seed(data: Path, runs: Path, seed: int, overrides: Sequence[str], arms: Sequence[str]) -> dict[str, Any]:
    with opened(data, runs, seed, overrides) as run:
        workflow = Workflow(run)
        status = workflow.run_all()
        compared = workflow.compare({name: ARMS[name] for name in arms})
        scores, selection = workflow.score(), workflow.select()
        print(write_report(run.folder))
        facts = RunFacts(run.folder)
        gains = {name: facts.gain(name) for name in ("base", *compared)}
        pairs = {f"{of} minus {over}": facts.gain(over, of) for of, over in permutations(compared, 2)}
        models = {"base": status["metrics"]["base"], "auto": status["metrics"]["model"]}
        models |= {name: row["sets"] for name, row in compared.items()}
        return {
            "seed": seed,
            "arm": selection.metadata["arm"],
            "margins": (selection.metadata["bakeoff"] or {}).get("margins"),  # none where the recipe names an arm
            "kept": {"auto": int(selection.kept.sum()), **{name: row["kept"] for name, row in compared.items()}},
            "toxic": int((selection.reason == "toxic").sum()),
            "pool": len(scores),
            "agreement_with_exact": scores.metadata.get("agreement_with_exact"),  # none where only losses were needed
            "models": models,
            "gains of auto": {over: {"mean": g.mean, "interval": list(g.interval)} for over, g in gains.items()},
            "differences": {pair: {"mean": g.mean, "interval": list(g.interval)} for pair, g in pairs.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("experiments/results/packs.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--race", action="store_true", help="only the bake-off")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    progress.show(True)
    seed_of = race if args.race else partial(run_seed, arms=args.arms)
    rows = [seed_of(args.data, args.runs, seed, args.overrides) for seed in args.seeds]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.platform()}, {os.cpu_count()} cores"
    write_json(args.out, {"rows": rows, "overrides": args.overrides, "commit": commit, "machine": machine})
    for name in rows[0].get("models", ()):
        means = [np.mean([s["mean"] for key, s in r["models"][name].items() if key.endswith("-holdout")]) for r in rows]
        print(name, "held-out accuracy, mean of packs, by seed:", [round(float(m), 4) for m in means])


if __name__ == "__main__":
    main()
