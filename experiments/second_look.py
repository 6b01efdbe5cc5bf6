"""Do proxies that learnt from what was kept judge the pool better? Worlds of selection.py in, accuracies by round out.

    python experiments/second_look.py --worlds "wrong 30 %" "hard matters" "wrong 50 %" --seeds 0 1 2

A remedy for what the losses of the base miss. Round 0 ranks by the base. Every round keeps the half with the lowest
losses among answers of like length, cuts the pool in two at random, trains the base on what is kept of one part (half
of the final steps) and scores the other part with it, both ways and for two draws of the cut: no sample is judged by a
model that saw it. The mean losses rank the next round. One row a round, ranking and share: what is kept, and the
held-out answers of the base trained on that. A round costs two final trainings. Three minutes of one core a pool.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from other_losses import best
from provenance import provenance
from selection import STEPS, World, asked_pools, open_world, worlds_parser

from datalloy.evaluation import answer_losses
from datalloy.run import write_json
from datalloy.scorers import BASELINES, Seen
from datalloy.vlm import VLM, Encoded

ROUNDS, DRAWS = 2, 2
FRACTIONS = (0.5, 0.65)


class Losses(NamedTuple):
    """Of every answer, nats per token: with its pictures, and with grey in their place."""

    seen_N: np.ndarray
    unseen_N: np.ndarray


def losses(vlm: VLM, pool: list[Encoded]) -> Losses:
    grey = [sample.without_pictures() for sample in pool]
    return Losses(answer_losses(vlm, pool, batch_size=32), answer_losses(vlm, grey, batch_size=32))


def measure(world: World) -> Iterator[dict[str, Any]]:
    work = world.workflow
    pool = [work._encoded_pool[i] for i in range(len(work.pool))]
    tokens_N = np.array([sample.supervised_tokens for sample in pool])
    domain_N = np.array(work.pool.domains())

    def by_length(found: Losses) -> np.ndarray:
        return BASELINES["low_loss_by_length"](Seen(found.seen_N, tokens_N, domain_N, (), 0))

    def look_again(found: Losses, number: int) -> Losses:
        kept = set(best(by_length(found), domain_N, 0.5))
        seen_DN, unseen_DN = np.empty((2, DRAWS, len(pool)))
        for draw in range(DRAWS):
            order = np.random.default_rng([world.seed, number, draw]).permutation(len(pool))
            for judged, learnt in ((order[::2], order[1::2]), (order[1::2], order[::2])):
                vlm = world.tuned_on(sorted(kept.intersection(learnt.tolist())), STEPS // 2)
                seen_DN[draw, judged], unseen_DN[draw, judged] = losses(vlm, [pool[i] for i in judged])
        return Losses(seen_DN.mean(axis=0), unseen_DN.mean(axis=0))

    found = losses(work._base, pool)
    for number in range(ROUNDS + 1):
        if number:
            found = look_again(found, number)
        gain_N = (found.unseen_N - found.seen_N) * tokens_N
        for scorer, score_N in (("low_loss_by_length", by_length(found)), ("visual_gain", gain_N)):
            for fraction in FRACTIONS:
                kept = best(score_N, domain_N, fraction)
                yield {
                    "world": world.name,
                    "seed": world.seed,
                    "round": number,
                    "scorer": scorer,
                    "fraction": fraction,
                    **world.told_apart(score_N, kept),
                    **world.held_out.measure(world.tuned_on(kept)),
                }


def main() -> None:
    args = worlds_parser(__doc__, "second_look", ("wrong 30 %", "hard matters", "wrong 50 %")).parse_args()
    torch.set_num_threads(1)
    for name, seed, place in asked_pools(args):
        with open_world(name, args.base, seed, args.runs / place) as world:
            rows = [{"base": args.base, **row} for row in measure(world)]
        write_json(args.out / f"{place}.json", {"rows": rows, **provenance()})
        print(place, [(r["round"], r["scorer"], r["fraction"], round(r["accuracy"], 3)) for r in rows], flush=True)


if __name__ == "__main__":
    main()
