"""Which settings of the score train best? A world and one changed setting at a time in, trained models out.

    python experiments/scoring_settings.py --world "wrong 30 %" --seeds 0 1 2
    python experiments/scoring_settings.py --world "hard matters" --settings exact "exact, step 1/4" "exact, unit norm"

For every setting the pool of that world (selection.py) is scored, the base is trained on the best half and the best
fifth of each domain at equal compute, and answers the held-out questions. Of the exact step: its size (multiples of the
Polyak step, where the default asks for a step that changes the targets' loss by 200 %) and its rule. Of the calibrated
score, which is cheaper: warm-up of the proxy on 0, 25 and 100 % of the pool (without a word: 5 %), 8, 16, 64 and 128
items a target (default 32), the unblurred model as proxy, ranking by length. Of low loss by length and entropy minus
loss, which need no target: the warm-up. Resumable; rows of settings that are not asked for stay in the file. Half a
minute of one core a setting of these two, one of `calibrated`, two of `exact`, five with 128 items.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import parser_of
from bases import BASES
from provenance import provenance
from selection import WORLDS, Job, auc, open_world, slug

from datalloy.run import write_json
from datalloy.uncertainty import rank_agreement

# rows of the scan, multiples of the Polyak step
STEPS = {"exact, step 1/16": 0, "exact, step 1/4": 1, "exact, step 1": 2, "exact, step 4": 3}
MANY = "calibrated, 128 items a target"  # twice what the worlds have, so the same pools are drawn with more
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "exact": (),
    **dict.fromkeys(STEPS, ()),
    "exact, unit norm": ("score.step_rule=unit_norm",),
    "exact, adamw": ("score.step_rule=adamw",),
    "calibrated": (),
    "calibrated, warm-up 0 %": ("score.warmup_fraction=0",),
    "calibrated, warm-up 25 %": ("score.warmup_fraction=0.25",),
    "calibrated, warm-up 100 %": ("score.warmup_fraction=1",),
    "calibrated, 8 items a target": ("score.target_items=8",),
    "calibrated, 16 items a target": ("score.target_items=16",),
    # where a bake-off follows, half of the items judge it
    "calibrated, 64 items a target": ("score.target_items=64", "select.keep_fraction=0.5"),
    MANY: ("score.target_items=128", "select.keep_fraction=0.5"),
    "calibrated, the unblurred model as proxy": ("proxy=tiny",),
    "calibrated, ranked by length": ("score.length_normalised=true",),
    "low_loss_by_length": (),
    "low_loss_by_length, warm-up 0 %": ("score.warmup_fraction=0",),
    "low_loss_by_length, warm-up 25 %": ("score.warmup_fraction=0.25",),
    "low_loss_by_length, warm-up 100 %": ("score.warmup_fraction=1",),
    "entropy_minus_loss": (),
    "entropy_minus_loss, warm-up 0 %": ("score.warmup_fraction=0",),
    "entropy_minus_loss, warm-up 25 %": ("score.warmup_fraction=0.25",),
    "entropy_minus_loss, warm-up 100 %": ("score.warmup_fraction=1",),
}
FRACTIONS = (0.5, 0.2)


def run_setting(setting: str, name: str, base: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    step = (f"score.step={scanned_step(folder, STEPS[setting])}",) if setting in STEPS else ()
    run, scorer = slug(setting).replace("/", "-"), setting.split(",")[0]
    plan = WORLDS[name]
    if setting == MANY:
        plan, folder = replace(plan, target_items=128), folder.with_name(f"{folder.name}-128")
    overrides = (f"score.method={scorer}", *SETTINGS[setting], *step)
    with open_world(name, base, seed, folder, overrides, run, plan) as world:
        table = world.scores(scorer)
        probes = world.run.finished("probes")  # of losses alone there are none
        found = {
            "auc": auc(table.utility, world.is_clean_N),
            "auc hard": auc(table.utility, world.is_clean_N, world.hard_N),
            "spearman with low loss": rank_agreement(table.utility, -table.loss),
            "step": probes and probes["scans"]["exact"]["chosen"],
            "negative": float(np.mean(table.utility < 0)),
        }
        rows = [world.row(Job(scorer, fraction)) for fraction in FRACTIONS]
        return [{"commit": provenance()["commit"], "setting": setting, **found, **row} for row in rows]


def scanned_step(folder: Path, row: int) -> float:
    """The step of a row of the default run's scan."""
    record = json.loads((folder / "exact" / "units" / "probes.json").read_bytes())
    return record["data"]["scans"]["exact"]["rows"][row]["step"]


def main() -> None:
    parser = parser_of(__doc__, "scoring_settings")
    parser.add_argument("--world", choices=list(WORLDS), default="wrong 30 %")
    parser.add_argument("--base", choices=BASES, default=BASES[0])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        place = f"{slug(args.world)}-{args.base}-{seed}"
        path = args.out / f"{place}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        for setting in args.settings:
            made = run_setting(setting, args.world, args.base, seed, args.runs / place)
            rows = [row for row in rows if row["setting"] != setting] + made
            print(seed, setting, [round(row["accuracy"], 3) for row in made], made[0]["auc"], flush=True)
        rows.sort(key=lambda row: list(SETTINGS).index(row["setting"]))
        write_json(path, {"rows": rows, **provenance()})


if __name__ == "__main__":
    main()
