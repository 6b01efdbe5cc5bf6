"""Does another proxy's loss tell hard from wrong? Worlds of selection.py in, the AUC of losses under tuned proxies out.

    python experiments/other_losses.py --worlds "wrong 30 %" "hard matters" --seeds 0

Three remedies against low loss's weakness, on the ranking alone. A proxy tuned on the target items, and its loss; the
fall of the loss by that tuning (conditional loss reduction, as CoLoR-Filter has it, with a few steps of tuning);
a proxy tuned on the whole faulty pool, which learns what is regular before it learns what is wrong. AUC is of clean
against faulty samples, and of clean hard ones against faulty ones. About two minutes of one core a world and seed.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bases import BASES
from provenance import provenance
from selection import WORLDS, World, auc, open_world, slug

from datalloy.evaluation import answer_losses
from datalloy.run import write_json
from datalloy.training import train

TARGET_STEPS = (4, 12, 24, 48)
POOL_STEPS = (10, 20, 40)


def measure(world: World) -> Iterator[dict[str, Any]]:
    work = world.workflow
    pool = [work._encoded_pool[i] for i in range(len(work.pool))]
    items = [item for group in work._encode(work._base, work._target_items("score")).values() for item in group]
    base_N = answer_losses(work._base, pool, batch_size=32)

    def row(score: str, steps: int, score_N: Any) -> dict[str, Any]:
        found = {"auc": auc(score_N, world.is_clean_N), "auc hard": auc(score_N, world.is_clean_N, world.hard_N)}
        return {"world": world.name, "seed": world.seed, "score": score, "steps": steps, **found}

    yield row("low loss of the base", 0, -base_N)
    for name, samples, lengths in (("the target items", items, TARGET_STEPS), ("the pool", pool, POOL_STEPS)):
        for steps in lengths:
            vlm = work._base.copy()
            train(vlm, samples, work._train_settings(), None, steps=steps)
            loss_N = answer_losses(vlm, pool, batch_size=32)
            yield row(f"low loss, tuned on {name}", steps, -loss_N)
            yield row(f"fall of the loss by tuning on {name}", steps, base_N - loss_N)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=["wrong 30 %", "hard matters"])
    parser.add_argument("--base", choices=BASES, default=BASES[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/other_losses"))
    parser.add_argument("--out", type=Path, default=Path("experiments/results/other_losses.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name in args.worlds:
            with open_world(name, args.base, seed, args.runs / f"{slug(name)}-{args.base}-{seed}") as world:
                for row in measure(world):
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    write_json(args.out, {"base": args.base, "rows": rows, **provenance()})


if __name__ == "__main__":
    main()
