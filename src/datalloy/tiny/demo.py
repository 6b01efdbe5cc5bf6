"""A folder and a seed in, the main job on a drawn pool out: what was chosen, and whether it was right.

The pool has known faults (truth.jsonl), so what a real user can never see is printed here: how much of what was
called toxic truly was faulty, and how models trained on other selections do at equal compute. The recipe is an
ordinary one; only this file reads the truth.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datalloy.bakeoff import FULL, Arm
from datalloy.config import load_recipe
from datalloy.report import write_report
from datalloy.run import Run, write_atomically, write_json
from datalloy.scores import Scores
from datalloy.selection import toxic_mask
from datalloy.tiny.pools import PoolPlan, read_truth, write_pool
from datalloy.tiny.world import FAULTS
from datalloy.uncertainty import bootstrap_interval, paired_interval
from datalloy.workflows import Workflow

PLAN = PoolPlan(
    samples={"chart": 320, "counting": 320, "table": 160},
    targets=("chart", "counting"),
    target_items=96,
    holdout_items=200,
)
ARMS = {
    "full SFT": FULL,
    "random 50 %": Arm("random", 0.5, "domain"),
    "random 20 %": Arm("random", 0.2, "domain"),
    "low loss 50 %": Arm("low_loss", 0.5, "domain"),
    "low loss 20 %": Arm("low_loss", 0.2, "domain"),
}
RECIPE = """\
# The demo's recipe: three drawn domains with faults, two targets. An ordinary recipe; edit and run it.
name: demo
base: tiny
domains:
  chart: {path: data/chart.jsonl}
  counting: {path: data/counting.jsonl}
  table: {path: data/table.jsonl}
targets:
  chart: {path: data/chart.target.jsonl, metric: exact_match}
  counting: {path: data/counting.target.jsonl, metric: exact_match}
evaluation:
  chart-holdout: {path: data/chart.holdout.jsonl, metric: exact_match}
  counting-holdout: {path: data/counting.holdout.jsonl, metric: exact_match}
score: {method: auto, target_items: 48, probes: 96, warmup_fraction: 0.05}
select: {keep_fraction: auto, bakeoff_epochs: 14}
train:
  adapter: none
  freeze_vision: false
  learning_rate: 1e-3
  batch_size: 16
  samples: 4800
evaluate: {max_new_tokens: 12}
"""


def run_demo(folder: Path, seed: int) -> Iterator[str]:
    """Draw the pool, run the recipe, train the other arms at equal compute; yields the lines of the tables.

    The figures are also written to `demo.json`.
    """
    data, recipe_path = folder / "data", folder / "recipe.yaml"
    if not (folder / "drawn").exists():
        write_pool(data, PLAN, seed)
        write_atomically(recipe_path, RECIPE.encode())
        write_atomically(folder / "drawn", f"{seed}\n".encode())
    with Run(load_recipe(recipe_path), folder / "run") as run:
        workflow = Workflow(run)
        workflow.run_all()
        scores = workflow.score()
        method = scores.metadata["method"]  # the fast utility; another one where it disagreed with exact
        workflow.compare({**ARMS, "OST 50 %": Arm(method, 0.5, "domain"), "OST 20 %": Arm(method, 0.2, "domain")})
        rows = _comparison(run.folder)
        agreements = {
            path.stem: Scores.read(path).metadata["agreement_with_exact"]
            for path in run.path("scores").glob("*.parquet")
        }
        toxic = _toxic(scores, run.recipe.select.toxic_confidence, read_truth(data))
        figures = {
            "seed": int((folder / "drawn").read_text()),
            "models": rows,
            "agreements": agreements,
            "toxic": toxic,
        }
        write_json(folder / "demo.json", figures)
        yield from _lines(figures)
        yield str(write_report(run.folder))


def _comparison(run: Path) -> list[dict[str, Any]]:
    """Accuracy on the held-out sets, which nothing was decided on; intervals over items."""
    names = {"base, untrained": "base", **{name: name for name in [*ARMS, "OST 50 %", "OST 20 %"]}}
    names[f"auto: {_chosen(run)}"] = "model"
    values = {label: _holdout_values(run, name) for label, name in names.items()}
    reference = values["full SFT"]
    return [
        {
            "trained on": label,
            "kept": _kept(run, name),
            "accuracy": float(values[label].mean()),
            "interval": bootstrap_interval(values[label], confidence=0.95, resamples=2000, seed=0),
            "gain over full": float((values[label] - reference).mean()),
            "gain interval": paired_interval(values[label], reference, confidence=0.95, resamples=2000, seed=0),
            "items": len(reference),
        }
        for label, name in names.items()
    ]


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"{'trained on':<34}{'kept':>6}{'accuracy':>10}  {'95 % interval':<16}against full SFT"
    for row in figures["models"]:
        kept = "" if row["kept"] is None else row["kept"]
        against = f"{row['gain over full']:+.3f} {_bracket(row['gain interval'], '+.3f')}"
        accuracy = f"{row['accuracy']:>10.3f}  {_bracket(row['interval'], '.3f'):<16}"
        yield f"{row['trained on']:<34}{kept:>6}{accuracy}{'' if row['trained on'] == 'full SFT' else against}"
    items = figures["models"][0]["items"]
    yield f"{items} held-out questions; equal compute for all trained rows; one seed, intervals over items"
    yield ""
    for method, agreement in figures["agreements"].items():
        yield (
            f"fast utility {method} against exact utility: Spearman {agreement['spearman']:.2f} "
            f"{_bracket(agreement['interval'], '.2f')} on {agreement['probes']} probes"
        )
    toxic = figures["toxic"]
    yield ""
    yield (
        f"called toxic: {toxic['called']} of {toxic['samples']} samples, {toxic['truly faulty']} of them truly faulty "
        f"(the pool's share of faulty samples is {toxic['share of faulty']:.0%})"
    )
    yield f"{'what it truly was':<20}{'samples':>8}{'called toxic':>14}{'median utility':>16}"
    for name, group in toxic["groups"].items():
        yield f"{name:<20}{group['samples']:>8}{group['called toxic']:>14.0%}{group['median utility']:>16.4f}"


def _toxic(scores: Scores, confidence: float, truth: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What was called toxic beside what it truly was. Faulty: every fault but near-copies, which are only redundant."""
    fault_N = np.array([truth[sample_id]["fault"] for sample_id in scores.id])
    hard_N = np.array([truth[sample_id]["hard"] for sample_id in scores.id])
    toxic_N = toxic_mask(scores, confidence)
    faulty_N = ~np.isin(fault_N, ("clean", "near_copy"))
    groups = {"clean, easy": (fault_N == "clean") & ~hard_N, "clean, hard": (fault_N == "clean") & hard_N}
    groups |= {name.replace("_", " "): fault_N == name for name in FAULTS}
    return {
        "samples": len(scores),
        "called": int(toxic_N.sum()),
        "truly faulty": int((toxic_N & faulty_N).sum()),
        "share of faulty": float(faulty_N.mean()),
        "groups": {
            name: {
                "samples": int(mask_N.sum()),
                "called toxic": float(toxic_N[mask_N].mean()),
                "median utility": float(np.nanmedian(scores.utility[mask_N])),
            }
            for name, mask_N in groups.items()
        },
    }


def _holdout_values(run: Path, name: str) -> np.ndarray:
    results = json.loads((run / "evaluation" / f"{name}.json").read_text())
    return np.concatenate([row["values"] for key, row in results.items() if key.endswith("-holdout")])


def _chosen(run: Path) -> str:
    arm = json.loads((run / "units" / "selection.json").read_text())["data"]["arm"]
    return Arm(**arm).name


def _kept(run: Path, name: str) -> int | None:
    if name == "base":
        return None
    unit = "model" if name == "model" else f"compare--{name}"
    return json.loads((run / "units" / f"{unit}.json").read_text())["data"]["kept"]


def _bracket(interval: Sequence[float], spec: str) -> str:
    low, high = interval
    return f"[{low:{spec}}, {high:{spec}}]"
