"""What does each scorer cost, and how far does it agree with exact utility? Models in, epochs and Spearman out.

    python benchmarks/scoring.py --models embedded qwen3_vl gemma3 --seeds 0      (as where scorers race)
    python benchmarks/scoring.py --step batch_share --scorers loss "calibrated, 0 items replayed" \
        --out benchmarks/results/scoring_batch_share.json                         (as where one selects alone)

The unit is the epoch: seconds of a scorer over the pool, over seconds of one training epoch of all weights on the same
pool by the same `train` with the same batches, in one process; both take turns, and a ratio is the median over turns of
the ratio within a turn. What is paid once and not for every sample (gradients of the targets, the fit; and probing:
the step scan, the exact probes, the threshold of harm) stands apart, in epochs of this pool: it shrinks as pools grow.
Agreement is Spearman's with exact utility of the whole model at the same step, on samples that no probe
contains, with a 95 % interval over samples. About seven minutes of one core a model.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

import models
from datalloy.config import Score, StepSize, Train
from datalloy.run import write_json
from datalloy.scorers import Probing, ScoringInputs, prepare, probe
from datalloy.target_items import TargetItems
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.training import train
from datalloy.uncertainty import rank_agreement, rank_agreement_interval
from datalloy.vlm import VLM, Encoded

PLAN = PoolPlan(
    samples={"chart": 260, "counting": 260, "table": 140},
    targets=("chart", "counting"),
    target_items=50,
    holdout_items=1,
)
PROBES, HELD_OUT, TURNS = 96, 160, 5
TRAIN = Train(adapter="none", freeze_vision=False, batch_size=16, learning_rate=5e-4)
SCORERS: dict[str, dict[str, Any]] = {
    "loss": {"method": "loss"},
    "first_order": {"method": "first_order"},
    "first_order_hooks": {"method": "first_order_hooks"},
    "tail": {"method": "tail"},
    **{f"calibrated, {n} items replayed": {"method": "calibrated", "replayed_items": n} for n in (0, 1, 2, 3, 6)},
}


def draw(vlm: VLM, folder: Path, seed: int) -> tuple[list[Encoded], dict[str, list[Encoded]]]:
    """The pool in a random order, and the items of each target."""
    write_pool(folder, PLAN, seed)
    pool = [vlm.encode(sample) for skill in PLAN.samples for sample in models.read(folder / f"{skill}.jsonl")]
    targets = {t: [vlm.encode(sample) for sample in models.read(folder / f"{t}.target.jsonl")] for t in PLAN.targets}
    return [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))], targets


def seconds(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def measure(name: str, seed: int, folder: Path, labels: Sequence[str], step: StepSize) -> list[dict[str, Any]]:
    vlm = models.load(name, folder / name)
    pool, targets = draw(vlm, folder / f"{name}-{seed}", seed)
    probes, held_out, timed = pool[:PROBES], pool[PROBES : PROBES + HELD_OUT], pool[PROBES + HELD_OUT :]
    train(vlm := vlm.copy(), pool, TRAIN, None, steps=max(4, round(0.05 * len(pool) / TRAIN.batch_size)))  # warm-up
    items = TargetItems.lay_out(vlm, targets, dict.fromkeys(targets, 1.0))

    def inputs(**settings: Any) -> ScoringInputs:
        score = Score(probes=PROBES, min_agreement=0.01, seed=seed, **settings)
        return ScoringInputs(vlm, items, targets, pool[:64], score, step, freeze_vision=False, train_batch_size=16)

    probing: list[Probing] = []
    probing_seconds = seconds(lambda: probing.append(probe(inputs(), ["tail"] if "tail" in labels else [], probes)))
    exact = prepare("exact", inputs(), probing[0], probes)
    exact_N: list[np.ndarray] = []
    exact_seconds = seconds(lambda: exact_N.append(exact.score(held_out).utility_N)) / len(held_out) * len(timed)
    scorers, prepared = {}, {}
    chosen = {label: SCORERS[label] for label in labels}
    for label, settings in chosen.items():
        more = {k: v for k, v in settings.items() if k != "method"}
        prepared[label] = seconds(
            lambda label=label, more=more, method=settings["method"]: scorers.update(
                {label: prepare(method, inputs(**more), probing[0], probes)}
            )
        )
    ratios: dict[str, list[float]] = {label: [] for label in labels}
    epochs = []
    for turn in range(TURNS + 1):
        steps = round(len(timed) / TRAIN.batch_size)
        epoch = seconds(lambda steps=steps: train(vlm.copy(), timed, TRAIN, None, steps=steps))
        for label, scorer in scorers.items():
            spent = seconds(lambda scorer=scorer: scorer.score(timed))
            if turn:  # the first warms up
                ratios[label].append(spent / epoch)
        epochs.append(epoch)
    epoch = float(np.median(epochs[1:]))
    rows = [
        {
            "scorer": label,
            "epochs": float(np.median(ratios[label])),
            "range": [min(ratios[label]), max(ratios[label])],
            "prepare": prepared[label] / epoch,
            **agreement(scorers[label].score(held_out).utility_N, exact_N[0], seed),
        }
        for label in labels
        if label != "loss"
    ]
    if "loss" in labels:
        rows.append({"scorer": "low_loss", "epochs": float(np.median(ratios["loss"])), "range": None, "prepare": 0.0})
        rows[-1] |= agreement(-scorers["loss"].score(held_out).loss_N, exact_N[0], seed)
    rows.append({"scorer": "exact", "epochs": exact_seconds / epoch, "range": None, "prepare": 0.0, "spearman": 1.0})
    about = {
        "model": name,
        "seed": seed,
        "pool": len(timed),
        "target_items": len(items.target_V),
        "probes": PROBES,
        "epoch_seconds": epoch,
        "probing": probing_seconds / epoch,
        "step": probing[0].steps,
    }
    return [{**about, **row} for row in rows]


def agreement(utility_N: np.ndarray, exact_N: np.ndarray, seed: int) -> dict[str, Any]:
    both = np.isfinite(utility_N) & np.isfinite(exact_N)
    interval = rank_agreement_interval(utility_N[both], exact_N[both], seed=seed)
    return {"spearman": rank_agreement(utility_N[both], exact_N[both]), "interval": list(interval)}


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| model | scorer | epochs | once, in epochs of this pool | Spearman with exact |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        interval = row.get("interval")
        spread = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        lines.append(
            f"| {row['model']}, seed {row['seed']} | {row['scorer']} | {row['epochs']:.2f} | {row['prepare']:.2f} | "
            f"{row['spearman']:.2f}{spread} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded", "qwen3_vl", "gemma3"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--scorers", nargs="+", choices=list(SCORERS), default=list(SCORERS))
    parser.add_argument("--step", choices=get_args(StepSize), default="visible_effect")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scoring.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.platform()}, {os.cpu_count()} cores, 1 thread"
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            for seed in args.seeds:
                rows = [row for row in rows if (row["model"], row["seed"]) != (name, seed)]
                found = measure(name, seed, Path(folder), args.scorers, args.step)
                rows += [{**row, "commit": commit} for row in found]
                write_json(args.out, {"rows": rows, "machine": machine, "torch": torch.__version__})
                print(as_markdown(found), flush=True)


if __name__ == "__main__":
    main()
