"""Which settings of the exact score train best? A world and one changed setting at a time in, trained models out.

    python experiments/scoring_settings.py --world "wrong 30 %" --seeds 0 1 2
    python experiments/scoring_settings.py --world "hard matters" --settings default "step 1/4" unit_norm adamw

For every setting the pool of that world (selection.py) is scored by the exact step, the base is trained on the best
half and the best fifth of each domain at equal compute, and answers the held-out questions. Settings: the step size
(multiples of the Polyak step, where the default asks for a step that changes the targets' loss by 200 %), the rule of
the step, warm-up of the proxy on 0, 25 and 100 % of the pool (default 5 %), 8, 16 and 64 items a target (default 32),
the unblurred model as proxy. `low_loss` is beside them, under every proxy. Resumable. Two minutes of one core a row.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bases import BASES
from provenance import provenance
from selection import WORLDS, Job, auc, open_world, slug

from datalloy.run import write_json
from datalloy.uncertainty import rank_agreement

STEPS = {"step 1/16": 0, "step 1/4": 1, "step 1": 2, "step 4": 3}  # rows of the scan, multiples of the Polyak step
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    **dict.fromkeys(STEPS, ()),
    "unit_norm": ("score.step_rule=unit_norm",),
    "adamw": ("score.step_rule=adamw",),
    "warm-up 0 %": ("score.warmup_fraction=0",),
    "warm-up 25 %": ("score.warmup_fraction=0.25",),
    "warm-up 100 %": ("score.warmup_fraction=1",),
    "8 items a target": ("score.target_items=8",),
    "16 items a target": ("score.target_items=16",),
    "64 items a target": ("score.target_items=64",),
    "proxy: the unblurred model": ("proxy=tiny",),
}
ONE_SCORER = ("score.method=exact",)
FRACTIONS = (0.5, 0.2)


def run_setting(setting: str, name: str, base: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    step = (f"score.step={scanned_step(folder, STEPS[setting])}",) if setting in STEPS else ()
    run = slug(setting).replace("/", "-").replace(":", "")
    with open_world(name, base, seed, folder, (*ONE_SCORER, *SETTINGS[setting], *step), run) as world:
        table = world.scores("exact")
        scan = (world.run.finished("probes") or {})["scans"]["exact"]
        found = {
            "auc": auc(table.utility, world.is_clean_N),
            "auc hard": auc(table.utility, world.is_clean_N, world.hard_N),
            "spearman with low loss": rank_agreement(table.utility, -table.loss),
            "step": scan["chosen"],
            "negative": float(np.mean(table.utility < 0)),
        }
        rows = [world.row(Job(scorer, fraction)) for scorer in ("exact", "low_loss") for fraction in FRACTIONS]
        return [{"setting": setting, **found, **row} for row in rows]


def scanned_step(folder: Path, row: int) -> float:
    """The step of a row of the default run's scan."""
    record = json.loads((folder / "default" / "units" / "probes.json").read_bytes())
    return record["data"]["scans"]["exact"]["rows"][row]["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=list(WORLDS), default="wrong 30 %")
    parser.add_argument("--base", choices=BASES, default=BASES[0])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/scoring_settings"))
    parser.add_argument("--out", type=Path, default=Path("experiments/results/scoring_settings"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        place = f"{slug(args.world)}-{args.base}-{seed}"
        rows: list[dict[str, Any]] = []
        for setting in args.settings:
            rows += run_setting(setting, args.world, args.base, seed, args.runs / place)
            print(seed, setting, [round(row["accuracy"], 3) for row in rows[-4:]], rows[-1]["auc"], flush=True)
        write_json(args.out / f"{place}.json", {"rows": rows, **provenance()})


if __name__ == "__main__":
    main()
