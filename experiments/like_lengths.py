"""Which score ranks best among answers of like length? Drawn worlds in, trained models out.

    python experiments/like_lengths.py --worlds "wrong 30 %" "hard matters" --seeds 0 1 2

`low_loss_by_length` (selection.py has its rows) ranks by the base's loss inside strata of answer length, which each
give the same share. Here the same strata are ranked by OST's calibrated utility, and by the loss of the base tuned on
the target items that score. The same pools, base, training and held-out questions as selection.py. Resumable. Eight
seconds of one core a row, a minute of scoring a pool.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from provenance import provenance
from selection import Job, World, asked_pools, auc, open_world, worlds_parser

from datalloy.evaluation import answer_losses
from datalloy.run import write_json
from datalloy.scorers import BASELINES, Seen
from datalloy.scores import Scores
from datalloy.training import train

# the score, and what has to be measured for it
SCORES = {"calibrated_by_length": "calibrated", "target_tuned_by_length": "low_loss"}
TUNING_STEPS = 24
FRACTIONS = (0.2, 0.5, 0.65, 0.8)


class LikeLengths(World):
    """A world whose samples may be ranked by other scores among answers of like length, too."""

    def scores(self, scorer: str, draw: int = 0) -> Scores:
        if scorer not in SCORES:
            return super().scores(scorer, draw)
        table = self.workflow.score()
        loss_N = -table.utility
        if scorer == "target_tuned_by_length":
            losses = self.run.once("target-tuned", lambda: {"losses": self.target_tuned_losses().tolist()})
            loss_N = np.array(losses["losses"])
        place_N = BASELINES["low_loss_by_length"](Seen(loss_N, table.supervised_tokens, table.domain, (), 0))
        return table.with_utility(place_N, table.state, {"method": scorer, "signed": False})

    def target_tuned_losses(self) -> np.ndarray:
        work = self.workflow
        items = [item for group in work._encode(work._base, work._target_items("score")).values() for item in group]
        vlm = work._base.copy()
        train(vlm, items, work._train_settings(), None, steps=TUNING_STEPS)
        return answer_losses(vlm, [work._encoded_pool[i] for i in range(len(work.pool))], batch_size=32)


def trained(world: World, scorer: str) -> Iterator[dict[str, Any]]:
    utility_N = world.scores(scorer).utility
    hard = auc(utility_N, world.is_clean_N, world.hard_N)
    found = {"auc": auc(utility_N, world.is_clean_N), "auc hard": hard}
    yield from ({**world.row(Job(scorer, fraction)), **found} for fraction in FRACTIONS)


def main() -> None:
    parser = worlds_parser(__doc__, "like_lengths", ("wrong 30 %", "hard matters"))
    parser.add_argument("--scores", nargs="+", choices=list(SCORES), default=list(SCORES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, seed, place in asked_pools(args):
        folder = args.runs / place
        rows: list[dict[str, Any]] = []
        for scorer in args.scores:
            method = SCORES[scorer]
            overrides = (f"score.method={method}", "select.keep_fraction=0.5")  # no bake-off
            with open_world(name, args.base, seed, folder, overrides, method) as drawn:
                rows += trained(LikeLengths(name, args.base, seed, folder, drawn.run), scorer)
        write_json(args.out / f"{place}.json", {"rows": rows, **provenance()})
        said = [f"{row['scorer']} {row['fraction']}: {row['accuracy']:.3f}" for row in rows]
        print(place, json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
