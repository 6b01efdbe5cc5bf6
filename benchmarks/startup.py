"""How long until something happens? The import and the help in, seconds out.

    python benchmarks/startup.py

Bars: `import datalloy` under 0.2 s, `datalloy --help` under 0.5 s; beside them an interpreter that does nothing.
Medians of fifteen turns, wall and processor seconds.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from datalloy.run import write_json

TURNS = 15
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import datalloy": ["-c", "import datalloy"],
    "datalloy --help": ["-m", "datalloy", "--help"],
}


def spent(arguments: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/startup.json"))
    args = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for turn in range(TURNS + 1):
        for name, arguments in COMMANDS.items():
            once = spent(arguments)
            if turn:  # the first reads the files
                taken[name].append(once)
    rows = []
    for name, times in taken.items():
        wall, processor = (float(np.median(column)) for column in zip(*times, strict=True))
        rows.append({"what": name, "wall_seconds": wall, "processor_seconds": processor})
        print(f"| {name} | {wall:.2f} | {processor:.2f} |")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    machine = f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    write_json(args.out, {"rows": rows, "turns": TURNS, "commit": commit, "machine": machine})


if __name__ == "__main__":
    main()
