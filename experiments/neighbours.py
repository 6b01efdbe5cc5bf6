"""Against whose losses should a loss be held? Worlds of selection.py in, variants of low loss by neighbours out.

    python experiments/neighbours.py --worlds "wrong 30 %" "hard matters" "hard, no longer" --seeds 0 1 2

A sample's loss is held against those of its neighbours in its domain. Varied are what makes them neighbours (the
proxy's state before the answer, or its mean state over prompt and answer), how many they are, and what of theirs is
taken: the median, the mean, or the lower quartile, which is a right answer's loss even where most are wrong. By
variant: the AUC of clean against faulty samples and of clean hard ones against faulty ones, what the better half of
each domain holds, and of some the held-out accuracy of the base trained on it. The proxy is the base, without warm-up.
Resumable. Two minutes of one core a world and seed.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from other_losses import best
from provenance import provenance
from selection import World, asked_pools, open_world, worlds_parser

from datalloy.embeddings import embed
from datalloy.evaluation import answer_losses
from datalloy.run import write_json
from datalloy.similarity import neighbours

TAKEN: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "median": lambda value_NK: np.median(value_NK, axis=1),
    "mean": lambda value_NK: value_NK.mean(axis=1),
    "lower quartile": lambda value_NK: np.quantile(value_NK, 0.25, axis=1),
}
NEIGHBOURS = (5, 10, 20, 40)
TRAINED = (
    ("prompts", 20, "median"),
    ("prompts", 20, "mean"),
    ("prompts", 20, "lower quartile"),
    ("prompts", 10, "median"),
    ("prompts", 40, "median"),
    ("samples", 20, "median"),
)


def in_domains(state_ND: np.ndarray, domain_N: np.ndarray, count: int) -> np.ndarray:
    """Rows of the most similar others of the domain, [N, count]."""
    nearest_NK = np.empty((len(state_ND), count), dtype=np.int64)
    for domain in np.unique(domain_N):
        rows = np.flatnonzero(domain_N == domain)
        nearest_NK[rows] = rows[neighbours(state_ND[rows].__getitem__, np.zeros(len(rows)), count)]
    return nearest_NK


def measure(world: World) -> Iterator[dict[str, Any]]:
    work = world.workflow
    pool = [work._encoded_pool[i] for i in range(len(work.pool))]
    loss_N, domain_N = answer_losses(work._base, pool, batch_size=32), np.array(work.pool.domains())

    def trained(kept: list[int]) -> dict[str, float]:
        return {"accuracy": world.held_out.measure(world.tuned_on(kept))["accuracy"]}

    for of in ("prompts", "samples"):
        state_ND = embed(work._base, pool, of)
        for count in NEIGHBOURS:
            nearest_NK = in_domains(state_ND, domain_N, count)
            for taken, statistic in TAKEN.items():
                score_N = statistic(loss_N[nearest_NK]) - loss_N
                kept = best(score_N, domain_N, 0.5)
                row = {
                    "world": world.name,
                    "seed": world.seed,
                    "of": of,
                    "neighbours": count,
                    "taken": taken,
                    **world.told_apart(score_N, kept),
                }
                if (of, count, taken) in TRAINED:
                    unit = f"neighbours/{of}-{count}-{taken.replace(' ', '-')}"
                    row |= world.run.once(unit, partial(trained, kept))
                yield row


def main() -> None:
    args = worlds_parser(__doc__, "neighbours", ("wrong 30 %", "hard matters", "hard, no longer")).parse_args()
    torch.set_num_threads(1)
    for name, seed, place in asked_pools(args):
        with open_world(name, args.base, seed, args.runs / place, ("score.warmup_fraction=0",), "neighbours") as world:
            rows = list(measure(world))
        write_json(args.out / f"{place}.json", {"rows": rows, **provenance()})
        print(json.dumps([row for row in rows if "accuracy" in row]), flush=True)


if __name__ == "__main__":
    main()
