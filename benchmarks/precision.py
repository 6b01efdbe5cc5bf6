"""Does reading the pool in bfloat16 keep the ranks? Models in, Spearman with float32 and with exact utility out.

    python benchmarks/precision.py --models embedded qwen3_vl

Pool, probes and held-out samples are those of scoring.py. Everything that `score.precision` touches is scored twice:
under bfloat16 autocast and in float32. Exact utility, by which both are judged, is float32. What it saves in time shows
on a GPU alone (gpu.py). Five minutes of one core a model.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from datalloy.config import Score
from datalloy.run import write_json
from datalloy.scorers import ScoringInputs, prepare, probe
from datalloy.target_items import TargetItems
from datalloy.training import train
from datalloy.uncertainty import rank_agreement
from scoring import HELD_OUT, PROBES, TRAIN, draw

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
from provenance import provenance

METHODS = ("calibrated", "less", "first_order_hooks", "loss")
WARM_UP_STEPS = 4


def measure(name: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    vlm = models.load(name, folder / name)
    pool, targets = draw(vlm, folder / f"{name}-{seed}", seed)
    probes, held_out = pool[:PROBES], pool[PROBES : PROBES + HELD_OUT]
    train(vlm := vlm.copy(), pool, TRAIN, None, steps=WARM_UP_STEPS)
    items = TargetItems.lay_out(vlm, targets, dict.fromkeys(targets, 1.0))

    def inputs(precision: str) -> ScoringInputs:
        score = Score.model_validate({"probes": PROBES, "min_agreement": 0.01, "seed": seed, "precision": precision})
        return ScoringInputs(
            vlm, items, targets, pool[:64], score, "batch_share", freeze_vision=False, train_batch_size=16
        )

    probing = probe(inputs("float32"), [], probes)
    exact_N = prepare("exact", inputs("float32"), probing, probes).score(held_out).utility_N

    def utility(method: str, precision: str) -> np.ndarray:
        block = prepare(method, inputs(precision), probing, probes).score(held_out)
        return -block.loss_N if method == "loss" else block.utility_N

    rows = []
    for method in METHODS:
        whole_N, half_N = utility(method, "float32"), utility(method, "bfloat16")
        found = {"float32": rank_agreement(whole_N, exact_N), "bfloat16": rank_agreement(half_N, exact_N)}
        rows.append({"model": name, "seed": seed, "scorer": method, "of both": rank_agreement(whole_N, half_N)})
        rows[-1]["with exact"] = found
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded", "qwen3_vl"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/precision.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            rows += measure(name, args.seed, Path(folder))
            write_json(args.out, {"rows": rows, **provenance()})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
