"""Does a verdict's gain come true? Worlds and seeds in; per pool what was promised and what further trainings gave out.

    python experiments/verdicts.py --seeds 0 1 2
    python experiments/verdicts.py --worlds "wrong 30 %" --seeds 0

Three domains, two of which have a target, with the faults of the worlds of selection.py in all three; whole domains are
mixed by an ordinary recipe (three real runs; four trainings of the pick and of uniform shares that confirm). Gains of
the pick over uniform shares are noted: `chosen`, by the runs and the items that chose the pick, its interval widened
for the choice; and `confirmed`, as the verdict has it, by the first one, two and four of the trainings that confirm.
All are held against `delivered`: the pick and uniform shares trained from four more seeds and measured on held-out
questions. Beside them stands how far trainings on one mixture differ there. The base is blurred (bases.py). Resumable.
Five minutes of one core a pool.
"""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import parser_of
from bases import base_path
from joint import ALL, recipe_of
from provenance import provenance
from selection import WORLDS, slug

from datalloy.calibration import calibrate, interaction_scale
from datalloy.config import load_recipe
from datalloy.engines import complete
from datalloy.evaluation import JudgedItems
from datalloy.mixing import Mixing
from datalloy.run import Run, write_atomically, write_json
from datalloy.strict_yaml import dump_yaml
from datalloy.tiny.pools import write_pool
from datalloy.uncertainty import target_means
from datalloy.verdict import Gain, judge
from datalloy.vlm import VLM
from datalloy.workflows import Workflow

TARGET_ITEMS, HOLDOUT_ITEMS = 128, 400  # of each target
CHOSEN = ("wrong 30 %", "off-target 60 %", "hard matters", "clean")
CONFIRMING = (1, 2, 4)  # trainings each
DELIVERED = range(101, 105)  # numbers of the trainings that no verdict sees


def chosen_gain(mixing: Mixing, weight_NK: np.ndarray, pick_K: np.ndarray) -> Gain:
    """What the trainings and items say that chose the pick."""
    found, trained = mixing.search(), mixing._evidence(weight_NK)
    eligible = sum(mixing.simplex.contains(weight_K, 1e-7) for weight_K in weight_NK)
    return judge(
        trained,
        calibrate(found.predict, trained, interaction_scale(trained.merged_NG)),
        mixing.objective,
        pick_K=pick_K,
        uniform_K=mixing.simplex.uniform,
        size_K=mixing.simplex.project(mixing.sizes_K),
        confidence=mixing.settings.confidence,
        seed=mixing.settings.seed,
        chosen_among=eligible,
    ).gain_vs_uniform


def confirmed_gains(mixing: Mixing, weight_NK: np.ndarray, pick_K: np.ndarray) -> dict[str, dict[str, Any]]:
    """As `verify` has it, by fewer of the trainings too."""
    whole = mixing._confirmation(mixing._unseen_evidence(weight_NK), pick_K)
    if whole is None:
        return {}
    found = {}
    for count in CONFIRMING:
        rows = slice(1 + count)
        fewer = replace(whole, pick_RV=whole.pick_RV[rows], uniform_RV=whole.uniform_RV[rows])
        settings = mixing.settings
        found[str(count)] = asdict(fewer.gain(mixing.objective, confidence=settings.confidence, seed=settings.seed))
    return found


def delivered(work: Workflow, weight_K: np.ndarray, items: JudgedItems) -> list[dict[str, list[float]]]:
    """What each of the further trainings on a mixture gives on the held-out questions, by item."""
    mixing = work.mixing
    units = [mixing._confirm_unit(weight_K, number) for number in DELIVERED]
    complete(mixing.engine, work.run, units, "delivered")

    def measure(unit: str) -> dict[str, list[float]]:
        vlm = VLM.load(str(work.run.path(unit)))
        return {"judged": items.values(vlm).tolist(), "marks": items._marks.values(vlm).tolist()}

    return [work.run.once(f"{unit.name}/delivered", partial(measure, unit.name)) for unit in units]


def luck(values_XRV: np.ndarray, target_V: np.ndarray) -> dict[str, float]:
    """Between trainings on one mixture: deviation of the mean that items do not explain, correlation of items in it."""
    item_G = np.array([values_XRV[:, :, target_V == g].var(axis=1, ddof=1).mean() for g in np.unique(target_V)])
    of_objective = item_G.sum() / len(item_G) ** 2
    mean_XR = np.stack([target_means(values_RV, target_V).mean(axis=1) for values_RV in values_XRV])
    variance = mean_XR.var(axis=1, ddof=1).mean() - of_objective / np.bincount(target_V)[0]
    return {"variance": float(variance), "of items": float(of_objective), "correlation": float(variance / of_objective)}


def run_world(world: str, seed: int, folder: Path) -> dict[str, Any]:
    if not (folder / "drawn").exists():
        plan = replace(
            WORLDS[world],
            samples=dict.fromkeys(ALL, 160),
            target_items=TARGET_ITEMS,
            holdout_items=HOLDOUT_ITEMS,
        )
        write_pool(folder / "data", plan, seed)
        write_atomically(folder / "drawn", b"")
    path = folder / "mixture.yaml"
    recipe = recipe_of("mixture", seed, base_path("blurred", folder.parent))
    recipe["mixture"]["confirm_runs"] = max(CONFIRMING)
    write_atomically(path, dump_yaml(recipe).encode())
    with Run(load_recipe(path), folder / "mixture") as run:
        work = Workflow(run)
        mixing, advice = work.mixing, work.verify()
        pick_K = np.array([advice.searched[name] for name in mixing.names])
        row = {"world": world, "seed": seed, "pick": dict(advice.searched), "verdict": advice.verdict}
        if advice.expected_gain_vs_uniform.source != "confirmed":
            return {**row, "reason": advice.reason}
        weight_NK = mixing._really_trained(mixing.search())
        metrics = dict.fromkeys(work.evaluation, "exact_match")
        items = JudgedItems.lay_out(work._base, work.evaluation, metrics, work.recipe.evaluate)
        after = [delivered(work, weight_K, items) for weight_K in (pick_K, mixing.simplex.uniform)]
        values = {m: np.array([[one[m] for one in trainings] for trainings in after]) for m in ("judged", "marks")}
        gains = {m: value_XRV[0].mean(axis=0) - value_XRV[1].mean(axis=0) for m, value_XRV in values.items()}
        luck_of = luck(values["judged"], items.target_V)
        error = gains["judged"].var() / len(items.target_V) + 2 * max(luck_of["variance"], 0) / len(DELIVERED)
        return {
            **row,
            "chosen": asdict(chosen_gain(mixing, weight_NK, pick_K)),
            "confirmed": confirmed_gains(mixing, weight_NK, pick_K),
            "delivered": float(gains["judged"].mean()),
            "delivered error": float(np.sqrt(error)),
            "delivered marks": float(gains["marks"].mean()),
            "luck": luck_of,
        }


def main() -> None:
    parser = parser_of(__doc__, "verdicts")
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(CHOSEN))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        for world in args.worlds:
            row = run_world(world, seed, args.runs / f"{slug(world)}-{seed}")
            write_json(args.out / f"{slug(world)}-{seed}.json", {"row": row, **provenance()})
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
