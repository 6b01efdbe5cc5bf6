"""A folder and a seed in, the main job on a drawn pool out: what was chosen, and whether it was right.

The pool has known faults (truth.jsonl), so what a real user can never see is printed here: how much of what was
called toxic truly was faulty, and how models trained on other selections do at equal compute. The recipe is an
ordinary one; only this file reads the truth.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datalloy.bakeoff import FULL, Arm
from datalloy.config import load_recipe
from datalloy.report import write_report
from datalloy.run import Run, write_atomically
from datalloy.scores import Scores
from datalloy.selection import toxic_mask
from datalloy.tiny.pools import PoolPlan, read_truth, write_pool
from datalloy.uncertainty import Interval, bootstrap_interval, paired_interval
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
    "OST 50 %": Arm("calibrated", 0.5, "domain"),
    "OST 20 %": Arm("calibrated", 0.2, "domain"),
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
    """Draw the pool, run the recipe, train the other arms at equal compute; yields the lines of the tables."""
    data, recipe_path = folder / "data", folder / "recipe.yaml"
    if not (folder / "drawn").exists():
        write_pool(data, PLAN, seed)
        write_atomically(recipe_path, RECIPE.encode())
        write_atomically(folder / "drawn", f"seed {seed}\n".encode())
    with Run(load_recipe(recipe_path), folder / "run") as run:
        workflow = Workflow(run)
        workflow.run_all()
        workflow.compare(ARMS)
        yield from _comparison(run.folder)
        yield from _agreement(run.path("scores.parquet"))
        yield from _toxic(workflow.score(), run.recipe.select.toxic_confidence, read_truth(data))
        yield str(write_report(run.folder))


def _comparison(run: Path) -> Iterator[str]:
    """Accuracy on the held-out sets, which nothing was decided on; intervals over items."""
    names = {"base, untrained": "base", **{name: name for name in ARMS}, f"auto: {_chosen(run)}": "model"}
    values = {label: _holdout_values(run, name) for label, name in names.items()}
    reference = values["full SFT"]
    yield ""
    yield f"{'trained on':<34}{'kept':>6}{'accuracy':>10}  {'95 % interval':<16}{'against full SFT':<26}"
    for label, name in names.items():
        interval = bootstrap_interval(values[label], confidence=0.95, resamples=2000, seed=0)
        margin = paired_interval(values[label], reference, confidence=0.95, resamples=2000, seed=0)
        gain = float((values[label] - reference).mean())
        against = "" if label == "full SFT" else f"{gain:+.3f} {_bracket(margin, '+.3f')}"
        accuracy = f"{values[label].mean():>10.3f}  {_bracket(interval, '.3f'):<16}"
        yield f"{label:<34}{_kept(run, name):>6}{accuracy}{against}"
    yield f"{len(reference)} held-out questions; equal compute for all trained rows; one seed, intervals over items"


def _agreement(path: Path) -> Iterator[str]:
    metadata = Scores.read(path).metadata
    agreement = metadata["agreement_with_exact"]
    low, high = agreement["interval"]
    yield ""
    yield (
        f"fast utility ({metadata['method']}, step {metadata['step']:.3g}) against exact utility: Spearman "
        f"{agreement['spearman']:.2f} [{low:.2f}, {high:.2f}] on {agreement['probes']} probes; "
        f"noise floor {metadata['noise_floor']:.1e} nats"
    )


def _toxic(scores: Scores, confidence: float, truth: dict[str, dict[str, Any]]) -> Iterator[str]:
    faults = np.array([truth[sample_id]["fault"] for sample_id in scores.id])
    toxic = toxic_mask(scores, confidence)
    harmful = np.isin(faults, ("wrong_answer", "other_picture", "garbled"))
    yield ""
    yield (
        f"called toxic: {toxic.sum()} of {len(toxic)} samples, {(toxic & harmful).sum()} of them truly faulty "
        f"({(toxic & harmful).sum() / max(toxic.sum(), 1):.0%}; the pool's share is {harmful.mean():.0%})"
    )
    hard = np.array([truth[sample_id]["hard"] for sample_id in scores.id]) & (faults == "clean")
    groups = {"clean, easy": (faults == "clean") & ~hard, "clean, hard": hard}
    groups |= {name.replace("_", " "): faults == name for name in sorted(set(faults) - {"clean"})}
    yield f"{'what it truly was':<20}{'samples':>8}{'called toxic':>14}{'median utility':>16}"
    for name, mask in groups.items():
        yield f"{name:<20}{mask.sum():>8}{toxic[mask].mean():>14.0%}{np.nanmedian(scores.utility[mask]):>16.4f}"


def _holdout_values(run: Path, name: str) -> np.ndarray:
    results = json.loads((run / "evaluation" / f"{name}.json").read_text())
    return np.concatenate([row["values"] for key, row in results.items() if key.endswith("-holdout")])


def _chosen(run: Path) -> str:
    arm = json.loads((run / "units" / "selection.json").read_text())["data"]["arm"]
    return Arm(**arm).name


def _kept(run: Path, name: str) -> str:
    unit = {"base": None, "model": "model"}.get(name, f"compare--{name}")
    return "" if unit is None else str(json.loads((run / "units" / f"{unit}.json").read_text())["data"]["kept"])


def _bracket(interval: Interval, spec: str) -> str:
    return f"[{interval.low:{spec}}, {interval.high:{spec}}]"
