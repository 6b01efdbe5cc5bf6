"""Does the machinery still give the committed direction? A world and some mixtures again, against the results.

    python experiments/quick.py            (`make evidence-quick`; under ten minutes of one core)

Some arms of `wrong 30 %` are trained again, and the mixtures of two domains, all of the first pool. Every pair of arms
that was at least `CLEAR` apart in the committed results has to be in the same order, and merged models have to agree
with trained ones as they did, to within `CLOSE`. On another machine numbers differ in their last bits and an answer
here and there, not in this. Exit code 1 where a direction is not what it was.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import mixtures
import torch
from selection import Job, open_world, slug

WORLD, BASE, SEED = "wrong 30 %", "blurred", 0
JOBS = (
    *(Job("base"), Job("full"), Job("oracle")),
    *(Job("random", 0.5), Job("low_loss", 0.5), Job("high_loss", 0.5), Job("calibrated", 0.5), Job("judge", 0.5)),
)
ONE_SCORER = ("score.method=calibrated",)
CLEAR = 0.05  # of accuracy, 15 questions of 300
CLOSE = 0.25  # of Spearman's coefficient over seven mixtures
RESULTS = Path(__file__).parent / "results"


def committed_rows() -> dict[Job, float]:
    rows = json.loads((RESULTS / "selection" / f"{slug(WORLD)}-{BASE}-{SEED}.json").read_text())["rows"]
    names = ("scorer", "fraction", "draw", "within", "protocol")
    return {Job(*(row[name] for name in names)): row["accuracy"] for row in rows if row["scorer"] != "auto"}


def check_selection(folder: Path) -> list[str]:
    before, faults = committed_rows(), []
    with open_world(WORLD, BASE, SEED, folder, ONE_SCORER) as world:
        now = {job: world.row(job)["accuracy"] for job in JOBS}
    for job in JOBS:
        print(f"{job.name:45} committed {before[job]:.3f}, now {now[job]:.3f}", flush=True)
    for one, other in itertools.combinations(JOBS, 2):
        was, found = before[one] - before[other], now[one] - now[other]
        if abs(was) >= CLEAR and was * found <= 0:
            faults.append(f"{one.name} minus {other.name} was {was:+.3f}, is {found:+.3f}")
    return faults


def check_mixtures(folder: Path) -> list[str]:
    result = json.loads((RESULTS / "mixtures_drawn2_blurred.json").read_text())
    before = next(row for row in result["rows"] if row["seed"] == SEED)
    now = mixtures.run_seed("drawn2", BASE, SEED, SEED, folder, None, "none", budget=1.0)
    faults = []
    for metric, rows in now["agreement"].items():
        for was, found in zip(before["agreement"][metric], rows, strict=True):
            pair = was["spearman"]["value"], found["spearman"]["value"]
            print(f"Spearman of {found['of']}, {metric:12} committed {pair[0]:+.2f}, now {pair[1]:+.2f}", flush=True)
            if metric == "probability" and abs(pair[0] - pair[1]) > CLOSE:
                faults.append(f"Spearman of {found['of']} by {metric} was {pair[0]:+.2f}, is {pair[1]:+.2f}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        faults = [*check_selection(Path(folder) / "world"), *check_mixtures(Path(folder))]
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
