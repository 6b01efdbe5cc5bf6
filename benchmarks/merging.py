"""Four full experts merged by us, merged by mergekit, and merely copied: checkpoints in, a table of seconds out.

    python benchmarks/merging.py --mergekit PATH/bin/mergekit-yaml --out benchmarks/results/merging.json

A random model of the embedded family (Idefics3, grown to 119 million parameters) and four experts, each off by random
numbers of about the size of a tuning, in float32 and in bfloat16; mixed 0.4, 0.3, 0.2, 0.1. Everything is in the page
cache. Every contestant is a process of its own and they take turns; a ratio is the median over turns of the ratio
within a turn, with the least and the most beside it.

- datalloy: `datalloy merge` as one calls it; the result is synced to disk
- mergekit: `mergekit-yaml`, method linear, its defaults otherwise; the result is not synced
- copy: `cp` of the four experts, synced; copy one: of one expert, which is as much as a merge writes

"Command" is the whole process. "Merge" is what `merge_checkpoints` or mergekit's `run_merge` takes in it, with no
imports. Peak memory is the most that was resident; pages of files that are mapped (mergekit does) count in it, and are
left out of private memory. It is read from /proc while a process runs, so this needs Linux.

Exactness: the sum in float64, rounded once to the experts' dtype, is the truth. Errors are in halves of a unit in the
last place of the largest of the four weights that were summed: a correctly rounded sum is off by one at most.

Mergekit belongs into an environment of its own: `pip install -c constraints.txt mergekit torch==2.13.0`. Without
--mergekit its rows are left out. A file of results that is there is continued: its turns count
too, and every row names its commit.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from datalloy.tiny.model import build_model, build_processor

WEIGHTS = (0.4, 0.3, 0.2, 0.1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UPDATE = 0.003  # standard deviation of an expert's difference from the base; weights have 0.02
POLL_SECONDS = 0.01
FILE = "model.safetensors"
# A console script with a clock around the function that does the work. What it took is written to a file.
LAUNCH = """
import importlib, json, pathlib, sys, time
clock, command, entry, place, name = sys.argv[1:6]
sys.argv[:6] = [command]
main, place = getattr(importlib.import_module(command), entry), importlib.import_module(place)
work = getattr(place, name)
def timed(*given, **named):
    wall, processor = time.perf_counter(), time.process_time()
    result = work(*given, **named)
    taken = {"merge_wall": time.perf_counter() - wall, "merge_processor": time.process_time() - processor}
    pathlib.Path(clock).write_text(json.dumps(taken))
    return result
setattr(place, name, timed)
main()
"""
OURS = ("datalloy.cli", "main", "datalloy.checkpoints", "merge_checkpoints")
THEIRS = ("mergekit.scripts.run_yaml", "main", "mergekit.scripts.run_yaml", "run_merge")

INSIDE = ("merge_wall", "merge_processor")


class Comparison(NamedTuple):
    """`slow` takes so many times what `fast` takes; wanted is `at_least`."""

    slow: str
    fast: str
    measure: str
    at_least: float


COMPARISONS = (
    Comparison("mergekit", "datalloy", "wall", 1.5),
    Comparison("mergekit", "datalloy", "processor", 1.5),
    Comparison("mergekit", "datalloy", "merge_wall", 1.5),
    Comparison("mergekit", "datalloy", "merge_processor", 1.5),
    Comparison("mergekit", "datalloy", "peak_mb", 1.0),
    Comparison("mergekit", "datalloy", "private_mb", 1.0),
    Comparison("copy", "datalloy", "wall", 0.5),
    Comparison("copy", "datalloy", "merge_wall", 0.5),
    Comparison("copy", "datalloy", "merge_processor", 0.5),
    Comparison("copy one", "datalloy", "merge_wall", 0.5),
    Comparison("copy one", "datalloy", "merge_processor", 0.5),
)


def write_experts(folder: Path, dtypes: Iterable[str], width: int, layers: int, seed: int) -> None:
    """Folders `DTYPE-K`. The experts of all dtypes are the same ones, rounded."""
    processor = build_processor()
    model = build_model(processor.tokenizer, width=width, layers=layers, seed=seed)
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for k in range(len(WEIGHTS)):
        generator = torch.Generator().manual_seed(seed + k)
        for dtype in dtypes:
            model.float()
            generator.manual_seed(seed + k)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(base[name] + UPDATE * torch.randn(parameter.shape, generator=generator))
            model.to(DTYPES[dtype]).save_pretrained(folder / f"{dtype}-{k}")
            processor.save_pretrained(folder / f"{dtype}-{k}")
    os.sync()


def commands(folder: Path, dtype: str, out: Path, clock: Path, mergekit: Path | None) -> dict[str, list[str]]:
    experts = [folder / f"{dtype}-{k}" for k in range(len(WEIGHTS))]
    weighted = [f"{expert}={weight}" for expert, weight in zip(experts, WEIGHTS, strict=True)]
    contestants = {
        "datalloy": [sys.executable, "-c", LAUNCH, str(clock), *OURS, "merge", *weighted, "--out", str(out)],
        "copy": copy_command(experts, out),
        "copy one": copy_command(experts[:1], out),
    }
    if mergekit:
        recipe = folder / f"{dtype}.yaml"
        models = [
            {"model": str(expert), "parameters": {"weight": weight}}
            for expert, weight in zip(experts, WEIGHTS, strict=True)
        ]
        recipe.write_text(yaml.safe_dump({"merge_method": "linear", "dtype": dtype, "models": models}))
        python = str(mergekit.with_name("python"))
        contestants["mergekit"] = [python, "-c", LAUNCH, str(clock), *THEIRS, str(recipe), str(out)]
    return contestants


def copy_command(experts: Sequence[Path], out: Path) -> list[str]:
    sources, target = shlex.join(map(str, experts)), shlex.quote(str(out))
    return ["sh", "-c", f"mkdir {target} && cp -r {sources} {target} && sync {target}/*/* {target}/* {target}"]


def measure(command: Sequence[str], clock: Path) -> dict[str, float]:
    """Seconds of the clock and of the processor and MB of one process, with its children; its own times too."""
    clock.unlink(missing_ok=True)
    peak, private = 0, 0
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            resident = read_memory(process.pid)
            peak = max(peak, resident.get("VmHWM", 0))
            private = max(private, resident.get("RssAnon", 0))
            time.sleep(POLL_SECONDS)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{shlex.join(command)} failed:\n{said.read().decode()[-2000:]}")
    measured = {"wall": wall, "processor": usage.ru_utime + usage.ru_stime}
    measured |= {"peak_mb": peak * 1024 / 1e6, "private_mb": private * 1024 / 1e6}
    inside = json.loads(clock.read_text()) if clock.exists() else {}
    return measured | {name: inside.get(name, measured[name.removeprefix("merge_")]) for name in INSIDE}


def read_memory(pid: int) -> dict[str, int]:
    """Kilobytes by the kernel's names; nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "kB" in value}


def check_exactness(folder: Path, dtype: str, merged: Path) -> dict[str, float]:
    """How far a merged file is from the sum in float64, rounded once."""
    half_unit = torch.finfo(DTYPES[dtype]).eps / 2
    elements, equal, square, most = 0, 0, 0.0, 0.0
    with safe_open(merged / FILE, "pt") as found:
        experts = [safe_open(folder / f"{dtype}-{k}" / FILE, "pt") for k in range(len(WEIGHTS))]
        if set(found.keys()) != set(experts[0].keys()):
            raise SystemExit(f"{merged} has other tensors than the experts")
        for key in experts[0].keys():  # noqa: SIM118 - a file, not a mapping
            value_K = [expert.get_tensor(key).double() for expert in experts]
            truth: Tensor = sum(weight * value for weight, value in zip(WEIGHTS, value_K, strict=True))
            result = found.get_tensor(key)
            if result.dtype != DTYPES[dtype]:
                raise SystemExit(f"{key} in {merged} is {result.dtype}")
            largest = torch.stack(value_K).abs().amax(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
            error = (result.double() - truth).abs() / (half_unit * largest)
            elements += result.numel()
            equal += int((result == truth.to(DTYPES[dtype])).sum())
            square += float(error.square().sum())
            most = max(most, float(error.max()))
    return {"rounded_as_float64": equal / elements, "rms_error": (square / elements) ** 0.5, "most_error": most}


def take_turns(options: argparse.Namespace, folder: Path, dtype: str, first_turn: int) -> list[dict]:
    """Rows of measurements. Who begins changes from turn to turn; the first turn's results are checked too."""
    rows = []
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    out, clock = folder / "out", folder / "clock.json"
    contestants = list(commands(folder, dtype, out, clock, options.mergekit).items())
    for turn in range(first_turn, first_turn + options.turns):
        begin = turn % len(contestants)
        for name, command in contestants[begin:] + contestants[:begin]:
            row = {"dtype": dtype, "turn": turn, "contestant": name, "commit": commit} | measure(command, clock)
            if turn == 0 and not name.startswith("copy"):
                row |= check_exactness(folder, dtype, out)
            rows.append(row)
            shutil.rmtree(out)
    return rows


def compare(rows: Sequence[Mapping], dtype: str) -> list[dict]:
    """Ratios within turns: the median, the least, the most, and whether the median reaches what is wanted."""
    compared = []
    for slow, fast, measured, at_least in COMPARISONS:
        value_of = {(row["contestant"], row["turn"]): row[measured] for row in rows if row["dtype"] == dtype}
        turns = [turn for name, turn in value_of if name == slow and (fast, turn) in value_of]
        if turns:
            ratios = [value_of[slow, turn] / value_of[fast, turn] for turn in turns]
            low, middle, high = np.quantile(ratios, (0, 0.5, 1)).tolist()
            named = {"dtype": dtype, "slow": slow, "fast": fast, "measure": measured, "turns": len(turns)}
            compared.append(named | {"ratio": middle, "low": low, "high": high, "bar": at_least})
            compared[-1]["met"] = middle >= at_least
    return compared


def print_tables(rows: Sequence[Mapping], compared: Sequence[Mapping]) -> None:
    measured = ("wall", "processor", "merge_wall", "merge_processor", "peak_mb", "private_mb")
    print("| dtype | | command s | processor s | merge s | merge processor s | peak MB | private MB | as float64 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype, name in dict.fromkeys((row["dtype"], row["contestant"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["contestant"]) == (dtype, name)]
        medians = [float(np.median([row[what] for row in own])) for what in measured]
        shares = [f"{row['rounded_as_float64']:.2%}" for row in own if "rounded_as_float64" in row]
        print(f"| {dtype} | {name} | {' | '.join(f'{value:.3g}' for value in medians)} | {''.join(shares) or '-'} |")
    print("\n| dtype | ratio | of | median (least to most) | bar | met |\n|---|---|---|---|---|---|")
    for row in compared:
        spread = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        met = "yes" if row["met"] else "no"
        print(
            f"| {row['dtype']} | {row['slow']} / {row['fast']} | {row['measure']} | {spread} | {row['bar']} | {met} |"
        )


def read_versions(mergekit: Path | None) -> dict[str, str]:
    names = ("torch", "safetensors", "transformers")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}
    if mergekit:
        ask = f"import importlib.metadata as m; print(*(m.version(n) for n in {('mergekit', *names)}))"
        command = [str(mergekit.with_name("python")), "-c", ask]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        versions["mergekit"] = f"{said[0]} with " + ", ".join(map(" ".join, zip(names, said[1:], strict=True)))
    return versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, metavar="PATH_TO_BIN", help="its mergekit-yaml; else left out")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    # a virtual environment's python is a link: it must not be resolved
    options.mergekit = options.mergekit and Path(os.path.abspath(options.mergekit))  # noqa: PTH100
    about = {
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "seed": options.seed,
        "width": options.width,
        "layers": options.layers,
        "weights": list(WEIGHTS),
    }
    before = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    if before["rows"] and any(before.get(key) != value for key, value in about.items()):
        raise SystemExit(f"{options.out} is of another machine, seed or size; remove it or name another file")
    rows = before["rows"]
    with tempfile.TemporaryDirectory() as name:
        write_experts(Path(name), options.dtypes, options.width, options.layers, options.seed)
        about["expert_mb"] = {
            dtype: (Path(name) / f"{dtype}-0" / FILE).stat().st_size / 1e6 for dtype in options.dtypes
        } | before.get("expert_mb", {})
        for dtype in options.dtypes:
            first_turn = 1 + max((row["turn"] for row in rows if row["dtype"] == dtype), default=-1)
            rows += take_turns(options, Path(name), dtype, first_turn)
    compared = [line for dtype in dict.fromkeys(row["dtype"] for row in rows) for line in compare(rows, dtype)]
    versions = before.get("versions", {}) | read_versions(options.mergekit)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figures = about | {"versions": versions, "rows": rows, "compared": compared}
    options.out.write_text(json.dumps(figures, indent=2) + "\n")
    print_tables(rows, compared)
    if not any(row["contestant"] == "mergekit" for row in rows):
        print("\nmergekit was left out: name its mergekit-yaml with --mergekit")


if __name__ == "__main__":
    main()
