"""Is low loss better when answers of like length are ranked against each other? Drawn worlds in, trained models out.

    python experiments/like_lengths.py --seeds 0 1 2
    python experiments/like_lengths.py --seeds 3 4 5 --worlds "hard matters"

Low loss drops what is hard, since long and rare answers have a high loss whether they are right or wrong. As
`low_loss_by_length`, each stratum of answer length gives the same share. `calibrated_by_length` is the same by OST's
calibrated utility, `target_tuned` by the loss of the base tuned on the target items that score. The same pools, base,
training and held-out questions as selection.py, whose rows are the comparison; `--scores references` trains low loss,
full SFT and the oracle where it has none. Resumable. Eight seconds of one core a row.
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

# what has to be scored; where nothing is named, losses alone
METHODS = {"calibrated_by_length": "calibrated"}
TUNING_STEPS = 24
FRACTIONS = (0.2, 0.5, 0.65, 0.8)
JOBS = {
    "low_loss_by_length": [Job("low_loss_by_length", fraction) for fraction in FRACTIONS],
    "calibrated_by_length": [Job("calibrated_by_length", fraction) for fraction in FRACTIONS],
    "target_tuned": [Job("target_tuned", fraction) for fraction in FRACTIONS],
    "references": [Job("full"), Job("oracle"), *(Job("low_loss", fraction) for fraction in FRACTIONS)],
}


class LikeLengths(World):
    """A world whose samples may be ranked by other scores among answers of like length, too."""

    def scores(self, scorer: str, draw: int = 0) -> Scores:
        if scorer not in ("calibrated_by_length", "target_tuned"):
            return super().scores(scorer, draw)
        table = self.workflow.score()
        loss_N = -table.utility
        if scorer == "target_tuned":
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


def trained(world: World, asked: str) -> Iterator[dict[str, Any]]:
    for job in JOBS[asked]:
        found = {}
        if asked != "references":
            utility_N = world.scores(job.scorer).utility
            found["auc"] = auc(utility_N, world.is_clean_N)
            found["auc hard"] = auc(utility_N, world.is_clean_N, world.hard_N)
        yield {**world.row(job), **found}


def main() -> None:
    parser = worlds_parser(__doc__, "like_lengths")
    parser.add_argument("--scores", nargs="+", choices=list(JOBS), default=list(JOBS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, seed, place in asked_pools(args):
        folder = args.runs / place
        rows: list[dict[str, Any]] = []
        for asked in args.scores:
            method = METHODS.get(asked, "low_loss")
            overrides = (f"score.method={method}", "select.keep_fraction=0.5")  # no bake-off
            with open_world(name, args.base, seed, folder, overrides, method) as drawn:
                rows += trained(LikeLengths(name, args.base, seed, folder, drawn.run), asked)
        write_json(args.out / f"{place}.json", {"rows": rows, **provenance()})
        said = [f"{row['scorer']} {row['fraction']}: {row['accuracy']:.3f}" for row in rows]
        print(place, json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
