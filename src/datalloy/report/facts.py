"""A finished run folder in, what the page tells out: every file read once, when a section first asks for it.

Nothing is computed again and no model is loaded. A run of an earlier version may lack a file; what it would have shown
is then None, and the section says so.
"""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datalloy import readers
from datalloy.accounts import require_balance
from datalloy.config import DataSource, Recipe, load_recipe
from datalloy.errors import DataError, RunError
from datalloy.metrics import higher_is_better
from datalloy.mixture import Evaluated, read_candidates
from datalloy.sample import Sample
from datalloy.scores import Scores
from datalloy.selection import Selection, toxic_mask
from datalloy.uncertainty import Interval, percentile_interval, resampled_means

Key = tuple[str, str]  # domain or set, and id
VERIFICATION, COMPARISON = "verification of the mixture", "for comparison alone"
STAGES = (  # of the chain: its name, its units, and what one of them is
    ("warm-up of the proxy", r"proxy", "training run"),
    ("exact utilities of the probes", r"probes", "scan"),
    ("utilities of the pool", r"scores/[^/]+/\d+", "block"),
    ("bake-off of selections", r"bakeoff/.+", "short training run"),
    ("experts, one a domain", r"experts/[^/]+", "training run"),
    ("search on merged models", r"mixture/(merged.*|base)", "measurement"),
    (VERIFICATION, r"mixture/runs/[^/]+", "training run"),
    ("confirmation of the pick", r"mixture/confirm/[^/]+", "training run"),
    ("final training", r"model", "training run"),
    ("evaluation", r"evaluation/(base|model|uniform|merge)", "model"),
    (COMPARISON, r"compare/.+", "training run"),
)
RESAMPLES = 2000
LABELS = {
    "base": "base, not trained",
    "model": "trained as advised",
    "uniform": "trained on uniform shares",
    "merge": "merge of the experts",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over items with its interval, or the difference of two, paired."""

    mean: float
    interval: Interval
    items: int


@dataclass(frozen=True)
class Work:
    """What one stage took. `seconds` is None where a run of an earlier version did not note it."""

    stage: str
    what: str
    steps: int
    seconds: float | None


@dataclass(frozen=True)
class ItemFalls:
    """What a step on each of n samples did: the fall of every target item's loss, [n, V], and the utility, [n]."""

    samples: Sequence[Key]
    items: Sequence[Key]
    fall_NV: np.ndarray
    utility_N: np.ndarray

    @cached_property
    def rows(self) -> Mapping[Key, int]:
        return {key: row for row, key in enumerate(self.samples)}


class RunFacts:
    """What is in one run folder. Raises RunError where there is no finished run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "status.json").exists():
            raise RunError(
                f"{folder} holds no finished run; `datalloy run RECIPE --run {folder}` makes one, report included"
            )

    # --- what was asked for and how it went

    @cached_property
    def recipe(self) -> Recipe:
        return load_recipe(self.folder / "config.yaml")

    @cached_property
    def status(self) -> dict[str, Any]:
        status = self._json("status.json")
        require_balance(status["counts"], self.folder)
        return status

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return self._json("provenance.json")

    @property
    def counts(self) -> dict[str, Any]:
        return self.status["counts"]

    @cached_property
    def rejects(self) -> list[dict[str, Any]]:
        path = self.folder / "rejected.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @cached_property
    def units(self) -> dict[str, dict[str, Any]]:
        """Data of the done-records by the unit's name."""
        records = (json.loads(path.read_text()) for path in sorted((self.folder / "units").glob("*.json")))
        return {record["unit"]: record["data"] for record in records}

    # --- utilities and the selection

    @property
    def has_selection(self) -> bool:
        """Whether the run scored and selected samples; a recipe may mix whole domains instead."""
        return (self.folder / "selection.parquet").exists()

    @cached_property
    def scores(self) -> Scores:
        return Scores.read(self.folder / "scores.parquet")

    @cached_property
    def tables(self) -> dict[str, Scores]:
        """The scores of every scorer that had a pass of its own."""
        paths = sorted((self.folder / "scores").glob("*.parquet"))
        return {path.stem: Scores.read(path) for path in paths}

    @cached_property
    def selection(self) -> Selection:
        return Selection.read(self.folder / "selection.parquet")

    @cached_property
    def kept_N(self) -> np.ndarray:
        """Which rows of the scores are kept; both tables are sorted by domain and id."""
        scores, selection = self.scores, self.selection
        if not (np.array_equal(scores.id, selection.id) and np.array_equal(scores.domain, selection.domain)):
            raise DataError(f"scores.parquet and selection.parquet of {self.folder} are of different pools")
        return selection.kept

    @cached_property
    def toxic_N(self) -> np.ndarray:
        """Which rows of the scores harm beyond their interval."""
        return toxic_mask(self.scores, self.recipe.select.toxic_confidence)

    @property
    def arm(self) -> dict[str, Any]:
        """The way of selecting that was chosen: scorer, fraction, within."""
        return self.selection.metadata["arm"]

    @property
    def bakeoff(self) -> dict[str, Any] | None:
        """The outcome of the bake-off; None where there was none to hold."""
        return self.selection.metadata["bakeoff"] if self.has_selection else None

    @cached_property
    def probes(self) -> ItemFalls | None:
        """What steps on the probes did to every target item, measured exactly."""
        arrays, names = self.folder / "probes.npz", self.folder / "probes.json"
        if not arrays.exists() or not names.exists():
            return None
        about = self._json("probes.json")
        with np.load(arrays, allow_pickle=False) as loaded:
            return ItemFalls(_keys(about["samples"]), _keys(about["items"]), loaded["fall_NV"], loaded["utility_N"])

    @cached_property
    def contributions(self) -> ItemFalls | None:
        """The same for every sample, where `score.contributions` keeps it and the scorer can tell."""
        names = self.folder / "probes.json"
        for table in [self.scores, *self.tables.values()]:
            if names.exists() and (fall_NV := table.contributions) is not None:
                keys = list(zip(table.domain, table.id, strict=True))
                return ItemFalls(keys, _keys(self._json("probes.json")["items"]), fall_NV, table.utility)
        return None

    # --- the mixture

    @property
    def has_mixture(self) -> bool:
        return "mixture" in self.status

    @property
    def mixture(self) -> dict[str, Any]:
        """As in `mixture.json`."""
        return self.status["mixture"]

    @cached_property
    def surface(self) -> dict[str, Any] | None:
        path = self.folder / "mixture" / "surface.json"
        return json.loads(path.read_text()) if path.exists() else None

    @cached_property
    def mergeability(self) -> dict[str, Any]:
        return self._json("mixture/mergeability.json")

    @cached_property
    def candidates(self) -> tuple[tuple[str, ...], tuple[str, ...], list[Evaluated]]:
        return read_candidates(self.folder / "mixture" / "candidates.parquet")

    # --- models

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Marks of every model that was measured, by its name and set, item by item; the advised one first."""
        found = {
            path.stem: json.loads(path.read_text()) for path in sorted((self.folder / "evaluation").glob("*.json"))
        }
        order = [name for name in ("model", *LABELS) if name in found]
        return {name: found[name] for name in dict.fromkeys([*order, *found])}

    @property
    def advised(self) -> str:
        """Name of the model that the run advises: the one trained last, or the merge where that is the verdict."""
        is_merge = self.has_mixture and self.mixture["verdict"] == "deploy the merge"
        return "merge" if is_merge and "merge" in self.evaluations else "model"

    @property
    def others(self) -> list[str]:
        """Models that the advised one is held against; uniform shares only where they are not the advice itself."""
        is_uniform = self.has_mixture and self.mixture["verdict"] == "use uniform"
        own = {self.advised, *(["uniform"] if is_uniform else [])}
        return [name for name in self.evaluations if name not in own]

    @property
    def judged_on(self) -> tuple[str, ...]:
        """The sets that the headline is a mean of: held-out ones where there are any, else the targets."""
        return tuple(self.recipe.evaluation) or tuple(self.recipe.targets)

    def headline(self, model: str | None = None) -> Estimate:
        """Of the advised model, or another: mean over sets of the mean over items; a loss counts as it is, in nats."""
        drawn_RG, mean_G = self._marks[model or self.advised]
        return Estimate(float(mean_G.mean()), self._interval(drawn_RG.mean(axis=1)), self.judged_items)

    def gain(self, over: str, of: str | None = None) -> Estimate:
        """How much better `of` (None: the advised model) does than `over` on the same items; less loss is a gain."""
        sign_G = np.array([1.0 if higher_is_better(self._metric(name)) else -1.0 for name in self.judged_on])
        (drawn_RG, mean_G), (other_RG, other_G) = self._marks[of or self.advised], self._marks[over]
        mean = float(((mean_G - other_G) * sign_G).mean())
        return Estimate(mean, self._interval(((drawn_RG - other_RG) * sign_G).mean(axis=1)), self.judged_items)

    def marks(self) -> np.ndarray:
        """The advised model's marks of the items of the sets, [V], higher is better.

        So weighted that their mean is the mean over sets.
        """
        rows = []
        for name in self.judged_on:
            values = np.array(self.evaluations[self.advised][name]["values"])
            sign = 1.0 if higher_is_better(self._metric(name)) else -1.0
            rows.append(sign * values * self.judged_items / (len(self.judged_on) * len(values)))
        return np.concatenate(rows)

    @property
    def judged_items(self) -> int:
        return sum(len(self.evaluations[self.advised][name]["values"]) for name in self.judged_on)

    @property
    def metric(self) -> str:
        """What the headline is a mean of, in words."""
        metrics = {self._metric(name) for name in self.judged_on}
        return metrics.pop().replace("_", " ") if len(metrics) == 1 else "mean mark"

    def _metric(self, name: str) -> str:
        return {**self.recipe.targets, **self.recipe.evaluation}[name].metric

    @cached_property
    def _marks(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Of each model its means by set, [G], and those over items drawn again, [R, G]; all models on one draw."""
        models = list(self.evaluations)
        rows = [[np.array(self.evaluations[model][name]["values"]) for name in self.judged_on] for model in models]
        set_V = np.repeat(np.arange(len(self.judged_on)), [len(values) for values in rows[0]])
        drawn_RNG = resampled_means(np.array([np.concatenate(row) for row in rows]), set_V, resamples=RESAMPLES, seed=0)
        means = (np.array([values.mean() for values in row]) for row in rows)
        return {model: (drawn_RNG[:, n], mean_G) for n, (model, mean_G) in enumerate(zip(models, means, strict=True))}

    def _interval(self, mean_R: np.ndarray) -> Interval:
        return percentile_interval(mean_R, self.recipe.evaluate.confidence)

    # --- the price

    @cached_property
    def work(self) -> list[Work]:
        """What every stage took, in the order of the chain; last what was trained for comparison alone."""
        found: dict[str, list[Mapping[str, Any]]] = {stage: [] for stage, _, _ in STAGES}
        for unit, data in self.units.items():
            stage = next((stage for stage, pattern, _ in STAGES if re.fullmatch(pattern, unit)), None)
            if stage == VERIFICATION and not self._is_of_the_advice(data):
                stage = COMPARISON
            if stage is not None and not (unit == "model" and self._is_verified_run(data)):
                found[stage].append(data)
        return [_work(stage, noun, found[stage]) for stage, _, noun in STAGES if found[stage]]

    def _is_of_the_advice(self, run: Mapping[str, Any]) -> bool:
        if self.surface is None:
            return True
        weights = [run["weights"][name] for name in self.surface["names"]]
        return any(np.allclose(weights, row["weights"], atol=1e-6) for row in self.surface["trained"])

    def _is_verified_run(self, model: Mapping[str, Any]) -> bool:
        """Whether the final model is one of the runs of the mixture half, whose time is counted there."""
        runs = (data for unit, data in self.units.items() if unit.startswith(("mixture/runs/", "experts/")))
        return any(data.get("seconds") == model["seconds"] for data in runs)

    @property
    def steps(self) -> int:
        """Training steps that the advice took, comparisons left out."""
        return sum(work.steps for work in self.work if work.stage != COMPARISON)

    @property
    def seconds(self) -> float | None:
        """Noted seconds of work for the advice; None where an earlier version noted none of some stage."""
        noted = [work.seconds for work in self.work if work.stage != COMPARISON]
        return None if None in noted else sum(s for s in noted if s is not None)

    @property
    def final_steps(self) -> int:
        return self.units.get("model", {}).get("steps", 0)

    # --- the user's samples

    def samples(self, wanted: Collection[Key]) -> dict[Key, Sample]:
        """Samples of the pool by domain and id; reading stops when the last one is found."""
        return _read(self.recipe.domains, wanted)

    def target_items(self, wanted: Collection[Key]) -> dict[Key, Sample]:
        """Items of the targets by the target's name and their id."""
        return _read(self.recipe.targets, wanted)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text())
        except (OSError, ValueError) as error:
            raise RunError(
                f"{self.folder / name} cannot be read: {error}; run the recipe again on this folder"
            ) from None

    @property
    def path(self) -> str:
        """The folder as a command can name it from anywhere."""
        return os.fspath(self.folder.resolve())


def _work(stage: str, noun: str, found: Sequence[Mapping[str, Any]]) -> Work:
    seconds = [data["seconds"] for data in found if "seconds" in data]
    what = f"{len(found)} {noun}{'' if len(found) == 1 else 's'}"
    steps = sum(data["steps"] for data in found) if noun.endswith("training run") else 0
    return Work(stage, what, steps, sum(seconds) if len(seconds) == len(found) else None)


def _keys(pairs: Sequence[Sequence[str]]) -> list[Key]:
    return [(first, second) for first, second in pairs]


def _read(sources: Mapping[str, DataSource], wanted: Collection[Key]) -> dict[Key, Sample]:
    found: dict[Key, Sample] = {}
    for name, source in sources.items():
        missing = {sample_id for domain, sample_id in wanted if domain == name}
        if not missing:
            continue
        for item in readers.read(source, name):
            if isinstance(item, Sample) and item.id in missing:
                found[name, item.id] = item
                missing.remove(item.id)
                if not missing:
                    break
    return found
