"""How much of what a model computes is padding? One pool in, shares of padding and seconds an epoch out.

    python benchmarks/padding.py

The pool of scoring.py on the embedded model. Scoring lays out shards by length. Training draws its batches at random,
and a batch that goes through the model at once is padded to its longest sample; cut into micro-batches it is laid out
by length before. Seconds are of the processor, for one epoch of all weights, over those of the same batch uncut: the
median over turns of the ratio within a turn. Four minutes of one core.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from datalloy.config import Train
from datalloy.encoding import length_batches
from datalloy.run import write_json
from datalloy.training import train
from datalloy.vlm import VLM, Encoded
from scoring import draw, seconds

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
from provenance import provenance

SCORED_TOGETHER = 16  # of a shard, as `score.batch_size` is by default
LAYOUTS = {128: (128, 64, 32, 16, 8), 16: (16, 8, 4)}  # batch: micro-batches
TURNS = 5


class Seen:
    """Notes what is put together for a model: tokens, and how many of them are padding."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm, self.tokens, self.padding = vlm, 0, 0
        self._collate, vlm.collate = vlm.collate, self  # type: ignore[method-assign]

    def __call__(self, items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        batch = self._collate(items)
        self.tokens += batch["attention_mask"].numel()
        self.padding += int((batch["attention_mask"] == 0).sum())
        return batch


def train_epoch(vlm: VLM, pool: Sequence[Encoded], batch: int, micro: int, seed: int) -> dict[str, float]:
    """Share of padding and seconds of the processor."""
    seen = Seen(vlm)
    settings = Train(
        adapter="none", freeze_vision=False, batch_size=batch, micro_batch_size=micro, learning_rate=5e-4, seed=seed
    )
    taken = seconds(lambda: train(vlm, pool, settings, None, steps=len(pool) // batch))
    return {"padding": seen.padding / seen.tokens, "seconds": taken}


def scored(pool: Sequence[Encoded], shard: int) -> float:
    """Share of padding when scoring, whose shards are laid out by length."""
    padded = tokens = 0
    for start in range(0, len(pool), shard):
        part = pool[start : start + shard]
        for batch in length_batches(part, SCORED_TOGETHER):
            longest = max(part[i].length for i in batch)
            tokens += longest * len(batch)
            padded += sum(longest - part[i].length for i in batch)
    return padded / tokens


def measure(seed: int, folder: Path) -> list[dict[str, Any]]:
    vlm = models.load("embedded", folder)
    pool, _ = draw(vlm, folder, seed)
    rows: list[dict[str, Any]] = [{"pass": "scoring", "batch": SCORED_TOGETHER, "padding": scored(pool, shard=128)}]
    for batch, micros in LAYOUTS.items():
        turns = [
            {micro: train_epoch(vlm.copy(), pool, batch, micro, seed) for micro in micros} for _ in range(TURNS + 1)
        ][1:]  # the first warms up
        for micro in micros:
            ratio = np.median([turn[micro]["seconds"] / turn[batch]["seconds"] for turn in turns])
            layout = {"pass": "training", "batch": batch, "micro_batch": micro}
            rows.append({**layout, "padding": turns[0][micro]["padding"], "seconds_over_uncut": float(ratio)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/padding.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args.seed, Path(folder))
    write_json(args.out, {"rows": rows, "seed": args.seed, **provenance()})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
