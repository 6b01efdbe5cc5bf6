"""Is the cost of scoring linear in the pool, and its memory bounded? Pool sizes in, seconds and memory out.

    python benchmarks/scaling.py --sizes 1000 10000 100000

Drawn samples of the embedded model's world; above a thousand, the same thousand pictures are asked about again under
other ids. Everything that scoring does for a sample is done: picture decoded, text rendered and split, calibrated
utility, shard by shard with the next shard read ahead. Each size runs in a process of its own. About half an hour of
one core, nearly all of it for the largest.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from datalloy.config import Score
from datalloy.encoding import EncodedSamples
from datalloy.run import write_json
from datalloy.scorers import ScoringInputs, prepare, probe
from datalloy.target_items import TargetItems
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.vlm import VLM
from datalloy.workflows import SHARD

PLAN = PoolPlan(samples={"chart": 500, "counting": 500}, target_items=16, holdout_items=1)
PROBES = 32
CACHE_BYTES = 256 * 2**20


def measure(size: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_pool(folder, PLAN, seed)
        vlm = VLM.load("tiny", device="cpu")
        drawn = [sample for skill in PLAN.samples for sample in models.read(folder / f"{skill}.jsonl")]
        pool = [dataclasses.replace(drawn[i % len(drawn)], id=str(i)) for i in range(size)]
        targets = {t: [vlm.encode(s) for s in models.read(folder / f"{t}.target.jsonl")] for t in PLAN.targets}
        items = TargetItems.lay_out(vlm, targets, dict.fromkeys(targets, 1.0))
        encoded = EncodedSamples(vlm, pool, max_tokens=256, cache_bytes=CACHE_BYTES)
        score = Score(probes=PROBES, min_agreement=0.01, seed=seed)
        inputs = ScoringInputs(
            vlm, items, targets, encoded[:64], score, "batch_share", freeze_vision=False, train_batch_size=16
        )
        probes = [vlm.encode(drawn[i]) for i in np.random.default_rng(seed).permutation(len(drawn))[:PROBES]]
        scorer = prepare("calibrated", inputs, probe(inputs, [], probes), probes)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        processor, wall = time.process_time(), time.perf_counter()
        finite = 0
        for start in range(0, size, SHARD):
            encoded.read_ahead(range(start + SHARD, min(start + 2 * SHARD, size)))
            finite += int(scorer.score(encoded[start : start + SHARD]).finite_N.sum())
        return {
            "samples": size,
            "finite": finite,
            "processor_seconds": time.process_time() - processor,
            "wall_seconds": time.perf_counter() - wall,
            "mib_before": before / 1024,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="measure one size in this process and print it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.sizes[0], args.seed)))
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    about = {"seed": args.seed, "commit": commit, "machine": f"{platform.platform()}, {os.cpu_count()} cores, 1 thread"}
    rows = []
    for size in args.sizes:
        command = [sys.executable, __file__, "--alone", "--sizes", str(size), "--seed", str(args.seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        write_json(args.out, {"rows": rows, **about, "torch": torch.__version__})
        each = 1e3 * rows[-1]["processor_seconds"] / size
        wall = 1e3 * rows[-1]["wall_seconds"] / size
        print(f"| {size} | {each:.1f} | {wall:.1f} | {rows[-1]['peak_mib']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
