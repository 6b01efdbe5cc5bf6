"""Filter within domains, mix across them, both, or neither? Worlds and seeds in, one row a trained model out.

    python experiments/joint.py --seeds 0 1 2
    python experiments/joint.py --worlds "wrong 30 %" --seeds 0

Three domains, two of which have a target, with the faults of the worlds of selection.py in all three. Five ordinary
recipes: `full SFT` (all samples as they lie), `selection` (half of each domain by low loss by neighbours, the best of
the selections that need no run), `mixture` (whole domains, merged experts, three real runs), `both` (the mixture of
what the selection keeps) and `buckets` (every domain cut at the middle of its scores, and the six halves mixed). Of the
ways that mix there are two rows, of the model trained on uniform shares and of the model trained on the pick, with the
gain that the verdict read; which of the two is to be had is the verdict's rule (`scripts/evidence.py`). The final
training takes 40 steps of 16 everywhere; `steps` says how many were taken to decide. The base is blurred (bases.py).
With the pick of `mixture` stands how far domain-level utility (the mean of a score over a domain) ranks domains as the
picked shares do. Resumable. Five minutes of one core a world and seed.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import parser_of
from bases import base_path
from held_out import HeldOut
from provenance import provenance
from selection import DOMAINS, WORLDS, slug

from datalloy.config import load_recipe
from datalloy.run import Run, write_atomically, write_json
from datalloy.strict_yaml import dump_yaml
from datalloy.tiny.pools import write_pool
from datalloy.uncertainty import rank_agreement
from datalloy.vlm import VLM
from datalloy.workflows import Workflow

ALL = (*DOMAINS, "table")
PER_DOMAIN, STEPS, BATCH = 160, 40, 16
MIXTURE = {"verify_runs": 3, "checkpoints": []}
WAYS: Mapping[str, dict[str, Any]] = {
    "full SFT": {"select": {"keep_fraction": 1.0, "drop_toxic": False}},
    "selection": {},
    # its samples are chosen by no score: utility says nothing here but what it is of a domain
    "mixture": {"mixture": {**MIXTURE, "data": "whole"}, "score": {"method": "calibrated", "probes": 48}},
    "both": {"mixture": MIXTURE},
    "buckets": {"mixture": {**MIXTURE, "buckets": 2}},
}
DOMAIN_UTILITIES = ("calibrated", "low_loss")


def recipe_of(way: str, seed: int, base: str) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "name": f"joint-{slug(way)}",
        "base": base,
        "domains": {name: {"path": f"data/{name}.jsonl"} for name in ALL},
        "targets": {name: {"path": f"data/{name}.target.jsonl"} for name in DOMAINS},
        "evaluation": {f"{name}-holdout": {"path": f"data/{name}.holdout.jsonl"} for name in DOMAINS},
        "score": {"method": "low_loss_by_neighbours", "target_items": 32, "min_agreement": 0.001, "seed": seed},
        "select": {"keep_fraction": 0.5, "drop_toxic": False, "seed": seed},
        "train": {
            "adapter": "none",
            "freeze_vision": False,
            "learning_rate": 5e-4,
            "batch_size": BATCH,
            "samples": STEPS * BATCH,
            "seed": seed,
        },
        "evaluate": {"max_new_tokens": 12, "batch_size": 100},
        "leakage": {"on_leak": "allow"},
    }
    for section, values in WAYS[way].items():
        recipe[section] = {**recipe.get(section, {}), **values}
    if "mixture" in recipe:
        recipe["mixture"] = {**recipe["mixture"], "seed": seed}
    return recipe


def run_way(way: str, world: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """The row of a recipe; of one that mixes those of uniform shares and of the pick."""
    path = folder / f"{slug(way)}.yaml"
    write_atomically(path, dump_yaml(recipe_of(way, seed, base_path("blurred", folder.parent))).encode())
    with Run(load_recipe(path), folder / slug(way)) as run:
        work = Workflow(run)
        held_out = HeldOut.lay_out(work)

        def measured(unit: str, model: Path) -> dict[str, Any]:
            return run.once(unit, lambda: held_out.measure(VLM.load(str(model))))

        about = {"world": world, "seed": seed, "way": way}
        if work.recipe.mixture is None:
            return [{**about, "steps": 0, **measured("measured", work.train())}]
        advice, mixing = work.verify(), work.mixing
        gain = advice.to_json()["expected_gain_vs_uniform"]
        about |= {
            "steps": STEPS * (len(mixing.names) + advice.spent.runs),
            "share": dict(advice.searched),
            "gain": [gain["mean"], *gain["interval"]],
            "chance": gain["chance"],
        }
        pick_K = np.array([advice.searched[name] for name in mixing.names])
        utility = {"domain utility": domain_utility(work)} if way == "mixture" else {}
        return [
            {**about, "shares": "uniform", **measured("measured-uniform", mixing.train_on(mixing.simplex.uniform))},
            {**about, "shares": "pick", **utility, **measured("measured-pick", mixing.train_on(pick_K))},
        ]


def domain_utility(work: Workflow) -> dict[str, Any]:
    """Means of scores over each domain, beside the picked shares: does one tell the other? Uniform shares rank none."""
    share = work.verify().searched
    if len(set(share.values())) == 1:
        return {}
    found = {}
    for method in DOMAIN_UTILITIES:
        table = work.scores_by(method)
        means = {name: float(np.mean(table.utility[table.domain == name])) for name in share}
        agreement = rank_agreement(np.array([*means.values()]), np.array([*share.values()]))
        found[method] = {"means": means, "agreement": agreement}
    return found


def run_world(world: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    if not (folder / "drawn").exists():
        plan = replace(WORLDS[world], samples=dict.fromkeys(ALL, PER_DOMAIN))
        write_pool(folder / "data", plan, seed)
        write_atomically(folder / "drawn", b"")
    return [row for way in WAYS for row in run_way(way, world, seed, folder)]


def main() -> None:
    parser = parser_of(__doc__, "joint")
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for world in args.worlds:
            rows = run_world(world, seed, args.runs / f"{slug(world)}-{seed}")
            write_json(args.out / f"{slug(world)}-{seed}.json", {"rows": rows, **provenance()})
            shown = {f"{row['way']} {row.get('shares', '')}": round(row["accuracy"], 3) for row in rows}
            print(world, seed, shown, flush=True)


if __name__ == "__main__":
    main()
