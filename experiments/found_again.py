"""How much of a mixture's lead is found again? Run folders of mixtures.py in, two questions answered by pool out.

    python experiments/found_again.py experiments/results/mixtures_*_blurred.json --runs runs

`again`: a mixture leads the mean mixture by so much, as one training has it on half of the target items; what of that
does another training, from another seed, give on the other half? By the probability of the right answer, by marks and
by both, half each. `items`: does the search need all target items? Pools that were trained twice; a minute for all.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mixture_curves import load, targets_of
from mixtures import run_folder
from provenance import provenance

from datalloy.run import write_json

SPLITS = 100  # of the items into those that measure and those that judge


def found_again(values: dict[str, np.ndarray], other: dict[str, np.ndarray], row: dict[str, Any]) -> Iterator[dict]:
    """How much of what one training measures on half of the items another training gives on the other half.

    Slope and correlation over the inner mixtures of their lead over the mean mixture; also with the lead in marks.
    """
    inner_N = np.array(row["weights"]).max(axis=1) < 1
    measures = {
        name: [_measured(v, name)[inner_N] for v in (values, other)] for name in ("probability", "exact_match", "both")
    }
    target_V = targets_of(row, values)
    for name, (true_NV, other_NV) in measures.items():
        leads: dict[str, list[np.ndarray]] = {"here": [], "again": [], "marks again": []}
        for half_V in _splits(target_V, 0.5):
            leads["here"].append(_lead(true_NV[:, half_V[0]]))
            leads["again"].append(_lead(other_NV[:, half_V[1]]))
            leads["marks again"].append(_lead(measures["exact_match"][1][:, half_V[1]]))
        here, again, marks = (np.concatenate(found) for found in leads.values())
        yield {
            "measure": name,
            "slope": float(np.polyfit(here, again, 1)[0]),
            "correlation": float(np.corrcoef(here, again)[0, 1]),
            "slope of marks": float(np.polyfit(here, marks, 1)[0]),
            "correlation with marks": float(np.corrcoef(here, marks)[0, 1]),
        }


def fewer_items(values: dict[str, np.ndarray], other: dict[str, np.ndarray], row: dict[str, Any]) -> Iterator[dict]:
    """Regret of the merge's pick by the probability of fewer items, judged by both trainings on a third apart."""
    inner_N, target_V = np.array(row["weights"]).max(axis=1) < 1, targets_of(row, values)
    merged_NV = values["merged:probability"][inner_N]
    true_NV = (values["true:probability"] + other["true:probability"])[inner_N] / 2
    regrets: dict[float, list[float]] = {share: [] for share in (1.0, 0.5, 0.25)}
    for judging_V, rest_V in _splits(target_V, 1 / 3):
        true_N = true_NV[:, judging_V].mean(axis=1)
        for share, found in regrets.items():
            seen_V = rest_V[: round(share * len(rest_V))]
            found.append(float(true_N.max() - true_N[merged_NV[:, seen_V].mean(axis=1).argmax()]))
    items = len(target_V) * 2 / 3 / len(np.unique(target_V))
    for share, found in regrets.items():
        yield {"items of a target": round(share * items), "regret": float(np.mean(found))}


def _measured(values: dict[str, np.ndarray], measure: str) -> np.ndarray:
    if measure == "both":
        return (values["true:probability"] + values["true:exact_match"]) / 2
    return values[f"true:{measure}"]


def _lead(value_NV: np.ndarray) -> np.ndarray:
    mean_N = value_NV.mean(axis=1)
    return mean_N - mean_N.mean()


def _splits(target_V: np.ndarray, share: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Items dealt to two parts, the first with this share of every target; in the second targets take turns."""
    rng = np.random.default_rng(0)
    for _ in range(SPLITS):
        drawn = [rng.permutation(np.flatnonzero(target_V == g)) for g in np.unique(target_V)]
        first = np.concatenate([items[: round(share * len(items))] for items in drawn])
        rest = np.stack([items[round(share * len(items)) :] for items in drawn], axis=1).ravel()
        yield first, rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files written by mixtures.py")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of its run folders")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/found_again.json"))
    args = parser.parse_args()
    again: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    for path in args.results:
        result = json.loads(path.read_text())
        about = {name: result[name] for name in ("world", "base", "adapter")}
        for row in result["rows"]:
            which = {**about, "seed": row["seed"], "train_seed": row["train_seed"]}
            others = (r for r in result["rows"] if r["seed"] == row["seed"] and r["train_seed"] != row["train_seed"])
            for other in others:
                one, two = (
                    load(run_folder(args.runs, *about.values(), r["seed"], r["train_seed"])) for r in (row, other)
                )
                again += [{**which, **found} for found in found_again(one, two, row)]
                items += [{**which, **found} for found in fewer_items(one, two, row)]
    write_json(args.out, {"again": again, "items": items, **provenance()})


if __name__ == "__main__":
    main()
