"""A folder and a seed in, the main job on a drawn pool out: what was chosen, and whether it was right.

The pool has known faults (truth.jsonl), so what a real user can never see is printed here: how much of what was
called toxic truly was faulty, how models trained on other selections do at equal compute, and, where it is asked for,
what a grid of mixtures that were all really trained would have found. The recipe is an ordinary one; only this file
reads the truth.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from datalloy.bakeoff import FULL, Arm
from datalloy.calibration import TrainedMixtures
from datalloy.config import load_recipe
from datalloy.mixing import lay_out_items
from datalloy.report import write_report
from datalloy.run import Run, write_atomically, write_json
from datalloy.scores import Scores
from datalloy.selection import toxic_mask
from datalloy.simplex import grid
from datalloy.tiny.pools import PoolPlan, read_truth, write_pool
from datalloy.tiny.world import FAULTS
from datalloy.uncertainty import bootstrap_interval, mixture_agreement, paired_interval
from datalloy.vlm import VLM
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
    "low loss 50 %": Arm("low_loss", 0.5, "domain"),
}
OST, OST_FRACTION = "OST 50 %", 0.5
REFERENCES = ("full SFT", "uniform mixture")
GRID_PARTS = 3  # of the grid of mixtures that are all really trained: 10 for three domains, three of them the experts
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
score: {method: auto, target_items: 48, probes: 96}
select: {keep_fraction: auto, bakeoff_epochs: 13}
mixture: {objective: mean, verify_runs: 3, confirm_runs: 1}
train:
  adapter: none
  freeze_vision: false
  learning_rate: 5e-4
  batch_size: 16
  samples: 2400
evaluate: {max_new_tokens: 12, batch_size: 100}
"""


def run_demo(folder: Path, seed: int, *, with_grid: bool) -> Iterator[str]:
    """Draw the pool, run the recipe, train what it is held against at equal compute; yields the lines of the tables.

    `with_grid`: a grid of mixtures is trained too. The figures are also written to `demo.json`.
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
        workflow.compare({**ARMS, OST: Arm(method, OST_FRACTION, "domain")})
        folders, verdict = _reference_mixtures(workflow), workflow.verify().to_json()
        if with_grid:
            verdict["grid"], folders["best of the grid"] = _train_grid(workflow)
        for name, checkpoint in folders.items():
            workflow.evaluate_model(name, checkpoint)
        agreements = {
            path.stem: Scores.read(path).metadata["agreement_with_exact"]
            for path in run.path("scores").glob("*.parquet")
        }
        figures = {
            "seed": int((folder / "drawn").read_text()),
            "models": _comparison(run.folder, list(folders)),
            "agreements": agreements,
            "toxic": _toxic(scores, run.recipe.select.toxic_confidence, read_truth(data)),
            "mixture": verdict,
        }
        write_json(folder / "demo.json", figures)
        yield from _lines(figures)
        yield str(write_report(run.folder))


def _reference_mixtures(workflow: Workflow) -> dict[str, Path]:
    """Checkpoints of what a user would do without a search, and of the merge where one can be written."""
    mixing = workflow.mixing
    folders = {
        "uniform mixture": mixing.train_on(mixing.simplex.uniform),
        "mixture by size": mixing.train_on(mixing.simplex.project(mixing.sizes_K)),
    }
    if merge := mixing.write_merge():
        folders["merge of the experts"] = merge
    return folders


def _train_grid(workflow: Workflow) -> tuple[dict[str, Any], Path]:
    """What a user without merged models would do: train every mixture of a grid and take the best on all target items.

    Returns how well merged models ranked the grid, and the checkpoint of its best.
    """
    mixing = workflow.mixing
    weight_NK = grid(len(mixing.names), GRID_PARTS)
    items = lay_out_items(mixing.base, mixing.run, workflow.targets, mixing.settings.metric)

    def measure(weight_K: np.ndarray) -> dict[str, list[float]]:
        models = {"true": VLM.load(str(mixing.train_on(weight_K))), "merged": mixing.merge.set(weight_K)}
        return {name: items.values(model).tolist() for name, model in models.items()}

    rows = [mixing.run.once(f"grid/{n}", partial(measure, weight_K)) for n, weight_K in enumerate(weight_NK)]
    true_NV, merged_NV = (np.array([row[name] for row in rows]) for name in ("true", "merged"))
    trained = TrainedMixtures(
        tuple(mixing.targets), weight_NK, true_NV, merged_NV, items.target_V, np.zeros(len(mixing.targets))
    )
    true_N, merged_N = (mixing.objective.score(value_NG) for value_NG in (trained.true_NG, trained.merged_NG))
    inner = ~trained.is_vertex_N
    agreement = mixture_agreement(merged_N[inner], true_N[inner], "spearman", confidence=0.95)
    best_K = weight_NK[int(true_N.argmax())]
    found = {
        "runs": int(inner.sum()),
        "spearman": asdict(agreement),
        "best": mixing.describe(best_K),
        "weights": weight_NK.tolist(),
        "trained": true_N.tolist(),
        "merged": merged_N.tolist(),
    }
    return found, mixing.train_on(best_K)


def _comparison(run: Path, mixtures: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy on the held-out sets, which nothing was decided on; intervals over items."""
    names = {"base, untrained": "base", **{name: name for name in [*ARMS, OST, *mixtures]}}
    names["datalloy: " + _chosen(run)] = "model"
    values = {label: _holdout_values(run, name) for label, name in names.items()}
    return [
        {
            "trained on": label,
            "kept": _kept(run, name),
            "accuracy": float(values[label].mean()),
            "interval": bootstrap_interval(values[label], confidence=0.95, resamples=2000, seed=0),
            **{f"gain over {other}": _gain(values[label], values[other]) for other in REFERENCES},
            "items": len(values[label]),
        }
        for label, name in names.items()
    ]


def _gain(value_V: np.ndarray, other_V: np.ndarray) -> dict[str, Any]:
    interval = paired_interval(value_V, other_V, confidence=0.95, resamples=2000, seed=0)
    return {"mean": float((value_V - other_V).mean()), "interval": interval}


def _lines(figures: dict[str, Any]) -> Iterator[str]:
    yield ""
    against = "".join(f"against {name:<24}" for name in REFERENCES)
    yield f"{'trained on':<40}{'kept':>6}{'accuracy':>10}  {'95 % interval':<16}{against}"
    for row in figures["models"]:
        kept = "" if row["kept"] is None else row["kept"]
        gains = "".join(f"{_gain_in_words(row, name):<32}" for name in REFERENCES)
        accuracy = f"{row['accuracy']:>10.3f}  {_bracket(row['interval'], '.3f'):<16}"
        yield f"{row['trained on']:<40}{kept:>6}{accuracy}{gains}".rstrip()
    items = figures["models"][0]["items"]
    yield f"{items} held-out questions; equal compute for all trained rows; one seed, intervals over items"
    yield ""
    for method, agreement in figures["agreements"].items():
        yield (
            f"fast utility {method} against exact utility: Spearman {agreement['spearman']:.2f} "
            f"{_bracket(agreement['interval'], '.2f')} on {agreement['probes']} probes"
        )
    yield from _mixture_lines(figures["mixture"])
    toxic = figures["toxic"]
    yield ""
    yield (
        f"called toxic: {toxic['called']} of {toxic['samples']} samples, {toxic['truly faulty']} of them truly faulty "
        f"(the pool's share of faulty samples is {toxic['share of faulty']:.0%})"
    )
    yield f"{'what it truly was':<20}{'samples':>8}{'called toxic':>14}{'median utility':>16}"
    for name, group in toxic["groups"].items():
        yield f"{name:<20}{group['samples']:>8}{group['called toxic']:>14.0%}{group['median utility']:>16.4f}"


def _mixture_lines(mixture: dict[str, Any]) -> Iterator[str]:
    spent, grid_found = mixture["spent"], mixture.get("grid")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in mixture["searched"].items())
    yield ""
    yield f"mixture found: {shares}; verdict: {mixture['verdict']}. {mixture['reason']}"
    yield (
        f"spent: {len(mixture['searched'])} experts, {spent['runs']} real runs, {spent['evaluations']} evaluations and "
        f"{spent['slope_calls']} slopes of merged models"
    )
    if grid_found is None:
        return
    yield f"best of the grid by the targets, after {grid_found['runs']} real runs: {grid_found['best']}"
    rank = grid_found["spearman"]
    yield (
        f"merged against trained on the grid: Spearman {rank['value']:.2f} {_bracket(rank['interval'], '.2f')} over "
        f"{rank['mixtures']} mixtures, by the targets' items"
    )


def _gain_in_words(row: dict[str, Any], name: str) -> str:
    if row["trained on"] == name:
        return ""
    gain = row[f"gain over {name}"]
    return f"{gain['mean']:+.3f} {_bracket(gain['interval'], '+.3f')}"


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
    unit = run / "units" / ("model.json" if name == "model" else f"compare--{name}.json")
    return json.loads(unit.read_text())["data"]["kept"] if unit.exists() else None


def _bracket(interval: Sequence[float], spec: str) -> str:
    low, high = interval
    return f"[{low:{spec}}, {high:{spec}}]"
