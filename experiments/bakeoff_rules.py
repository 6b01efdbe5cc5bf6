"""By which rule should the bake-off decide? Every arm of drawn pools trained briefly and long, from several seeds.

    python experiments/bakeoff_rules.py --worlds "wrong 30 %" --seeds 0 1 2 --runs runs/selection
    python experiments/bakeoff_rules.py --worlds "wrong 30 %" --items 256 --runs runs/selection

One row an arm and seed of training: the value of every target item (half mark, half probability of the right answer)
after the short and the long training, and after the short one and one of half the length on as much smaller a part of
what the arm keeps, as the race has it; which items score samples and which judge, and how many of the 300 held-out
questions the long one answers rightly. Rules are then compared on the rows alone (`scripts/evidence.py`): what each
would have chosen from one seed, and what training on that gave from all others. Goes on in the pools and scores of
selection.py where `--runs` holds them. Resumable. Two minutes of one core a pool and seed of training.

With `--scorer` the arms are those of one scorer that needs no probes, in files of their own; `--set` changes settings
of the recipe for it:

    python experiments/bakeoff_rules.py --scorer low_loss --set score.warmup_fraction=0 --runs runs/cold \\
        --out experiments/results/bakeoff_rules_cold

With `--items` so many further items of each target judge, drawn for it and seen by nothing else, and only the arms of
the default race are trained: what would more target items be worth? Three minutes a pool and seed.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from selection import STEPS, TARGET_ITEMS, WORLDS, Job, World, asked_pools, open_world, worlds_parser

from datalloy.config import DataSource
from datalloy.evaluation import JudgedItems
from datalloy.readers import read_all
from datalloy.run import write_json
from datalloy.sample import Sample
from datalloy.tiny.pools import write_pool

SHORT = 12  # steps of a first round of eight arms
PARTS = {"part": SHORT, "half": STEPS // 2}  # steps of runs on parts
ARMS = (
    Job("full"),
    Job("random", 0.5),
    *(Job("low_loss", fraction) for fraction in (0.2, 0.5, 0.65, 0.8)),
    *(Job("calibrated", fraction) for fraction in (0.5, 0.8)),
    *(Job("less", fraction) for fraction in (0.2, 0.5)),
)
ALONE = {
    scorer: tuple(Job(scorer, fraction) for fraction in (0.2, 0.5, 0.65, 0.8))
    for scorer in ("low_loss", "low_loss_by_length", "low_loss_by_neighbours", "visual_gain", "entropy_minus_loss")
}
RACED = tuple(
    job for job in (*ARMS, *itertools.chain(*ALONE.values())) if job.scorer != "less" and job.fraction != 0.65
)


def measure(world: World, kept: Sequence[int], seed: int, items: JudgedItems) -> dict[str, Any]:
    """Values of all target items [V] after both trainings, and the held-out questions after the long one."""
    found: dict[str, Any] = {}
    for length, steps in (("short", SHORT), ("long", STEPS)):
        vlm = world.tuned_on(kept, steps, seed=seed)
        found[length] = np.round(items.values(vlm), 4).tolist()
    return {**found, **world.held_out.measure(vlm)}


def measure_part(world: World, kept: Sequence[int], seed: int, items: JudgedItems, name: str) -> dict[str, Any]:
    """Values of all target items after a training on a part, repeated as often as all are in the long one."""
    vlm = world.tuned_on(world.workflow._part_for(kept, PARTS[name]), PARTS[name], seed=seed)
    return {name: np.round(items.values(vlm), 4).tolist()}


def further_items(name: str, seed: int, count: int, folder: Path) -> dict[str, list[Sample]]:
    """Items of each target that come after its own in the same draw; the pool that is drawn with them is the same."""
    data = folder / f"data-{count}"
    if not data.exists():
        write_pool(data, replace(WORLDS[name], target_items=TARGET_ITEMS + count), seed)
    names = WORLDS[name].targets
    files = {target: DataSource(path=str(data / f"{target}.target.jsonl"), skip=TARGET_ITEMS) for target in names}
    return {target: read_all(source, target)[0] for target, source in files.items()}


def run_world(
    name: str,
    base: str,
    seed: int,
    train_seeds: Sequence[int],
    folder: Path,
    further: int | None,
    scorer: str | None,
    settings: Sequence[str],
) -> dict[str, Any]:
    # a bake-off, which keeps half of the target items for judging; of one scorer without probes
    overrides, run = ((f"select.bakeoff_arms=[{scorer}]", *settings), scorer) if scorer else (tuple(settings), "run")
    with open_world(name, base, seed, folder, overrides, run) as world:
        work = world.workflow
        judges = {sample.id for samples in work._target_items("judge").values() for sample in samples}
        targets: Mapping[str, Sequence[Sample]] = work.targets
        arms, unit = ALONE[scorer] if scorer else ARMS, "rules"
        if further is not None:
            targets = further_items(name, seed, further, folder)
            judges = {sample.id for samples in targets.values() for sample in samples}
            arms, unit = tuple(job for job in arms if job in RACED), f"rules-{further}"
        metrics = {target: settings.metric for target, settings in work.recipe.targets.items()}
        items = JudgedItems.lay_out(work._base, targets, metrics, work.recipe.evaluate)
        rows = []
        for train_seed in train_seeds:
            for job in arms:
                train_and_judge = partial(measure, world, world.kept(job), train_seed, items)
                found = world.run.once(f"{unit}/{train_seed}-{job.name}", train_and_judge)
                if further is None and job in RACED:
                    for run in PARTS:
                        train_part = partial(measure_part, world, world.kept(job), train_seed, items, run)
                        found = {**found, **world.run.once(f"{run}/{train_seed}-{job.name}", train_part)}
                arm = {"scorer": job.scorer, "fraction": job.fraction, "train_seed": train_seed}
                rows.append({**arm, **found})
        return {
            "world": name,
            "base": base,
            "seed": seed,
            "target": items.target_V.tolist(),
            "judges": [sample.id in judges for samples in targets.values() for sample in samples],
            "base_values": np.round(items.values(work._base), 4).tolist(),
            "rows": rows,
            **provenance(),
        }


def main() -> None:
    parser = worlds_parser(__doc__, "bakeoff_rules")
    parser.add_argument("--train-seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--items", type=int, help="further items of each target that judge in the place of its own")
    parser.add_argument("--scorer", choices=list(ALONE), help="these arms alone")
    parser.add_argument("--set", nargs="+", default=[], help="settings of the recipe; with folders of their own")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, seed, place in asked_pools(args):
        found = run_world(name, args.base, seed, args.train_seeds, args.runs / place, args.items, args.scorer, args.set)
        parts = [place, *([args.scorer] if args.scorer else []), *([f"{args.items}-items"] if args.items else [])]
        write_json(args.out / f"{'-'.join(parts)}.json", found)
        rows = found["rows"]
        print(place, [(r["scorer"], r["fraction"], round(r["accuracy"], 3)) for r in rows], flush=True)


if __name__ == "__main__":
    main()
