"""Finished demo folders in, one JSON with the figures of all seeds and a Markdown table out.

for s in 0 1 2; do datalloy demo --folder demo-$s --seed $s --grid; done
python scripts/collect_demo.py demo-0 demo-1 demo-2 --out experiments/results/demo.json
"""

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np

from datalloy.run import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    runs = [
        {
            **json.loads((folder / "demo.json").read_text()),
            "race": json.loads((folder / "run/bakeoff.json").read_text()),
        }
        for folder in args.folders
    ]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    write_json(args.out, {"runs": runs, "commit": commit, "machine": f"{platform.platform()}, {os.cpu_count()} cores"})
    print(f"| trained on | accuracy, mean of {len(runs)} pools | by pool | gain over full SFT, by pool (95 %) |")
    print("|---|---|---|---|")
    for rows in zip(*(run["models"] for run in runs), strict=True):
        name = rows[0]["trained on"].partition(":")[0]
        accuracies = [row["accuracy"] for row in rows]
        gains = [
            f"{gain['mean']:+.3f} [{gain['interval'][0]:+.3f}, {gain['interval'][1]:+.3f}]"
            for gain in (row["gain over full SFT"] for row in rows)
        ]
        by_pool = ", ".join(f"{a:.3f}" for a in accuracies)
        print(f"| {name} | {np.mean(accuracies):.3f} | {by_pool} | {'; '.join(gains) if name != 'full SFT' else ''} |")
    print()
    print("auto chose:", ", ".join(run["models"][-1]["trained on"].partition(": ")[2] for run in runs))
    for run in runs:
        agreements = {
            m: f"{a['spearman']:.2f} [{a['interval'][0]:.2f}, {a['interval'][1]:.2f}]"
            for m, a in run["agreements"].items()
        }
        toxic, mixture = run["toxic"], run["mixture"]
        print(f"seed {run['seed']}: {mixture['verdict']}, {mixture['searched']}: {mixture['reason']}")
        print(f"  best of the grid: {mixture['grid']['best']}")
        print(f"  grid: {mixture['grid']['spearman']}, spent {mixture['spent']}")
        print(f"seed {run['seed']}: agreement {agreements}; toxic {toxic['called']}, faulty {toxic['truly faulty']}")


if __name__ == "__main__":
    main()
