"""What does a row cost that is read, checked, scored, selected and exported? Pool sizes in, seconds and memory out.

    python benchmarks/streaming.py --sizes 10000 100000 1000000

Rows of text, drawn on the spot, and the cheapest scorer there is, which asks no model (`length`; every row is rendered
and split into tokens for it, once); or one forward pass a row with `--method low_loss`. The stages are those of a real
run, with shards, done-records and all checks. Each size runs in a process of its own, on one thread. Processor time
includes that of the process that renders the chat template. What a row costs in memory is the growth of the peak from
the smallest size to the largest: libraries and model are in both.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from datalloy.config import load_recipe
from datalloy.run import Run, write_json
from datalloy.tiny.pools import WORDS
from datalloy.workflows import Workflow

TARGET_ITEMS = 16
RECIPE = """\
name: streaming
base: tiny
domains:
  text: {{path: pool.jsonl}}
targets:
  goal: {{path: goal.jsonl, metric: loss}}
score: {{method: {method}, warmup_fraction: 0, target_items: 16}}
select: {{keep_fraction: 0.3, drop_toxic: false}}
"""


def rows(count: int, seed: int, first: int = 0) -> Iterator[str]:
    """Lines of JSONL: sums hidden in words, all different."""
    draw = random.Random(seed)
    for i in range(first, first + count):
        story = " ".join(draw.choices(WORDS, k=8))
        question = f"{story}. What is {i} plus {i % 997}?"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": str(i + i % 997)}]
        yield json.dumps({"id": f"row-{i:08d}", "messages": turns}) + "\n"


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def processor_seconds() -> float:
    """Of this process and of those that it started and that still run."""
    times = [child.cpu_times() for child in psutil.Process().children()]
    return time.process_time() + sum(t.user + t.system for t in times)


def measure(size: int, method: str, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with (folder / "pool.jsonl").open("w") as file:
            file.writelines(rows(size, seed))
        with (folder / "goal.jsonl").open("w") as file:
            file.writelines(rows(TARGET_ITEMS, seed + 1, first=10**9))
        (folder / "recipe.yaml").write_text(RECIPE.format(method=method))
        found: dict[str, Any] = {"rows": size, "bytes": (folder / "pool.jsonl").stat().st_size, "stages": {}}
        with Run(load_recipe(folder / "recipe.yaml"), folder / "run") as run:
            workflow = Workflow(run)
            found["mib_before"] = peak_mib()
            for stage in ("check", "score", "select", "export"):
                processor, wall = processor_seconds(), time.perf_counter()
                getattr(workflow, stage)()
                found["stages"][stage] = {
                    "processor_seconds": processor_seconds() - processor,
                    "wall_seconds": time.perf_counter() - wall,
                    "peak_mib": peak_mib(),
                }
            exported = sum(1 for _ in (folder / "run" / "export" / "text.jsonl").open("rb"))
        found["exported"] = exported
        found["microseconds_a_row"] = sum(s["processor_seconds"] for s in found["stages"].values()) / size * 1e6
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--method", default="length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="measure one size in this process and print it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streaming.json"))
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.sizes[0], args.method, args.seed)))
        return
    results = []
    for size in args.sizes:
        command = [sys.executable, __file__, "--alone", "--sizes", str(size), "--method", args.method]
        done = subprocess.run(
            [*command, "--seed", str(args.seed)], stdout=subprocess.PIPE, check=True, text=True, env=_one_thread()
        )
        results.append(json.loads(done.stdout))
        print(json.dumps(results[-1]))
    machine = {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
    about = {"method": args.method, "seed": args.seed, "machine": machine, "bytes_a_row": bytes_a_row(results)}
    write_json(args.out, {**about, "results": results})


def bytes_a_row(results: list[dict[str, Any]]) -> dict[str, float] | None:
    """Growth of the peak up to the end of each stage, by row, between the smallest and the largest size."""
    least, most = (pick(results, key=lambda found: found["rows"]) for pick in (min, max))
    if (more := most["rows"] - least["rows"]) == 0:
        return None
    growth = {stage: most["stages"][stage]["peak_mib"] - least["stages"][stage]["peak_mib"] for stage in most["stages"]}
    return {stage: mib * 2**20 / more for stage, mib in growth.items()}


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
