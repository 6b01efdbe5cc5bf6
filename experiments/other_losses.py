"""Does another proxy's loss tell hard from wrong? Worlds of selection.py in, losses under tuned proxies out.

    python experiments/other_losses.py --worlds "wrong 30 %" "hard matters" --seeds 0

Three remedies against low loss's weakness. A proxy tuned on the target items that score, and its loss; the fall of the
loss by that tuning (conditional loss reduction, as CoLoR-Filter has it, with a few steps of tuning); a proxy tuned on
the whole faulty pool, which learns what is regular before it learns what is wrong. AUC is of clean against faulty
samples, and of clean hard ones against faulty ones; of the losses also the held-out accuracy of the base trained on the
half and the four fifths of each domain where they are lowest. Four minutes of one core a world and seed.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from provenance import provenance
from selection import World, asked_pools, auc, open_world, worlds_parser

from datalloy.evaluation import answer_losses
from datalloy.run import write_json
from datalloy.selection import kept_count
from datalloy.training import train

TARGET_STEPS = (12, 24, 48)
POOL_STEPS = (10, 40)
FRACTIONS = (0.5, 0.8)


def measure(world: World) -> Iterator[dict[str, Any]]:
    work = world.workflow
    pool = [work._encoded_pool[i] for i in range(len(work.pool))]
    items = [item for group in work._encode(work._base, work._target_items("score")).values() for item in group]
    base_N = answer_losses(work._base, pool, batch_size=32)

    domain_N = np.array(work.pool.domains())

    def row(score: str, steps: int, score_N: np.ndarray) -> dict[str, Any]:
        found = {"auc": auc(score_N, world.is_clean_N), "auc hard": auc(score_N, world.is_clean_N, world.hard_N)}
        return {"world": world.name, "seed": world.seed, "score": score, "steps": steps, **found}

    def trained(score_N: np.ndarray) -> dict[str, float]:
        models = {fraction: world.tuned_on(best(score_N, domain_N, fraction)) for fraction in FRACTIONS}
        return {f"accuracy at {at:g}": world.held_out.measure(vlm)["accuracy"] for at, vlm in models.items()}

    yield {**row("low loss of the base", 0, -base_N), **trained(-base_N)}
    for name, samples, lengths in (("the target items", items, TARGET_STEPS), ("the pool", pool, POOL_STEPS)):
        for steps in lengths:
            vlm = work._base.copy()
            train(vlm, samples, work._train_settings(), None, steps=steps)
            loss_N = answer_losses(vlm, pool, batch_size=32)
            yield {**row(f"low loss, tuned on {name}", steps, -loss_N), **trained(-loss_N)}
            yield row(f"fall of the loss by tuning on {name}", steps, base_N - loss_N)


def best(score_N: np.ndarray, domain_N: np.ndarray, fraction: float) -> list[int]:
    """The best share of each domain, in the order of the pool."""
    kept: list[int] = []
    for name in np.unique(domain_N):
        rows = np.flatnonzero(domain_N == name)
        order = np.argsort(-score_N[rows], kind="stable")
        kept += rows[order[: kept_count(fraction, len(rows))]].tolist()
    return sorted(kept)


def main() -> None:
    args = worlds_parser(__doc__, "other_losses", ("wrong 30 %", "hard matters")).parse_args()
    torch.set_num_threads(1)
    for name, seed, place in asked_pools(args):
        with open_world(name, args.base, seed, args.runs / place) as world:
            rows = [{"base": args.base, **row} for row in measure(world)]
        write_json(args.out / f"{place}.json", {"rows": rows, **provenance()})
        print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
