"""Filter within domains, mix across them, both, or neither? Worlds and seeds in, one row a trained model out.

    python experiments/joint.py --seeds 0 1 2
    python experiments/joint.py --worlds "wrong 30 %" --seeds 0

Three domains, two of which have a target, with the faults of the worlds of selection.py in all three. Five ordinary
recipes: `full SFT` (all samples as they lie), `selection` (the bake-off between fractions of low loss), `mixture`
(whole domains, merged experts, three real runs), `both` (the mixture of what the bake-off keeps) and `buckets` (every
domain cut at the middle of its scores, and the six halves mixed). The final training takes 40 steps of 16 everywhere;
`steps` says how many were taken to decide. The base is blurred (bases.py). Beside the rows stands how far domain-level
utility (the mean over a domain) ranks domains as the searched shares do. Resumable. Five minutes of one core a world
and seed.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
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
CHOSEN = ("wrong 30 %", "off-target 60 %", "hard matters", "clean")
PER_DOMAIN, STEPS, BATCH = 160, 40, 16
MIXTURE = {"verify_runs": 3, "checkpoints": []}
WAYS: Mapping[str, dict[str, Any]] = {
    "full SFT": {"select": {"keep_fraction": 1.0, "drop_toxic": False}},
    "selection": {},
    "mixture": {"mixture": {**MIXTURE, "data": "whole"}},
    "both": {"mixture": MIXTURE},
    "buckets": {"mixture": {**MIXTURE, "buckets": 2}},
}


def recipe_of(way: str, seed: int, base: str) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "name": f"joint-{slug(way)}",
        "base": base,
        "domains": {name: {"path": f"data/{name}.jsonl"} for name in ALL},
        "targets": {name: {"path": f"data/{name}.target.jsonl"} for name in DOMAINS},
        "evaluation": {f"{name}-holdout": {"path": f"data/{name}.holdout.jsonl"} for name in DOMAINS},
        "score": {"method": "auto", "target_items": 32, "warmup_fraction": 0, "seed": seed},
        "select": {
            "bakeoff_arms": ["low_loss"],
            "bakeoff_fractions": [0.2, 0.5, 0.8],
            "bakeoff_epochs": 8.0,
            "drop_toxic": False,
            "seed": seed,
        },
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


def run_way(way: str, world: str, seed: int, folder: Path) -> dict[str, Any]:
    path = folder / f"{slug(way)}.yaml"
    write_atomically(path, dump_yaml(recipe_of(way, seed, base_path("blurred", folder.parent))).encode())
    with Run(load_recipe(path), folder / slug(way)) as run:
        work = Workflow(run)
        model = work.train()
        measured = run.once("measured", partial(measure, work, model))
        told = verdict_of(work) if work.recipe.mixture else {}
        utility = domain_utility(work) if way == "mixture" else {}
        return {"world": world, "seed": seed, "way": way, **measured, **told, **utility}


def measure(work: Workflow, model: Path) -> dict[str, Any]:
    """Marks of the model on the held-out questions, and the steps that were taken before it."""
    recipe, spent = work.recipe, 0
    share: Mapping[str, float] = {}
    if recipe.mixture is not None:
        mixing = work.mixing
        advice = work.verify()
        share = advice.searched
        spent = STEPS * (len(mixing.names) + advice.spent.runs)
    if (outcome := work.run.path("bakeoff.json")).exists():
        spent += json.loads(outcome.read_bytes())["steps_spent"]
    return {"steps": spent, "share": dict(share), **HeldOut.lay_out(work).measure(VLM.load(str(model)))}


def verdict_of(work: Workflow) -> dict[str, Any]:
    """What the final training took, and the gain of the pick over uniform shares that decided it."""
    advice = work.verify().to_json()
    gain = advice["expected_gain_vs_uniform"]
    return {"verdict": advice["verdict"], "gain": [gain["mean"], *gain["interval"]]}


def domain_utility(work: Workflow) -> dict[str, Any]:
    """The mean of low loss over each domain, beside the searched shares: does one tell the other?"""
    share = work.verify().searched
    by_domain: dict[str, list[float]] = {name: [] for name in share}
    table = work.scores_by("low_loss")
    for domain, value in zip(table.domain, table.utility, strict=True):
        by_domain[domain].append(value)
    means = {name: float(np.mean(values)) for name, values in by_domain.items()}
    agreement = rank_agreement(np.array([*means.values()]), np.array([*share.values()]))
    return {"domain utility": means, "agreement": agreement}


def run_world(world: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    if not (folder / "drawn").exists():
        plan = replace(WORLDS[world], samples=dict.fromkeys(ALL, PER_DOMAIN))
        write_pool(folder / "data", plan, seed)
        write_atomically(folder / "drawn", b"")
    return [run_way(way, world, seed, folder) for way in WAYS]


def main() -> None:
    parser = parser_of(__doc__, "joint")
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(CHOSEN))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for world in args.worlds:
            rows = run_world(world, seed, args.runs / f"{slug(world)}-{seed}")
            write_json(args.out / f"{slug(world)}-{seed}.json", {"rows": rows, **provenance()})
            print(world, seed, {row["way"]: round(row["accuracy"], 3) for row in rows}, flush=True)


if __name__ == "__main__":
    main()
