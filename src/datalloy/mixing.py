"""Parts of a pool and targets in, a recommended mixture with its evidence out.

The method of linear merging for data mixtures (arXiv 2602.04937), from one expert a part to a verdict:

    experts -> mergeability -> search over merged models -> a few real runs -> calibration -> confirmation -> verdict

A part is what gets a weight of its own: a domain (its selected samples or all of them), or a score bucket of one. The
experts' training is the price, one run a part; a candidate costs one evaluation; each verified mixture one more run.
Everything measured is a unit of the run folder, so a killed search goes on with the answers it has.

What is recommended was really trained, where any runs are allowed: the search's pick, the pick after a first
calibration, and what they are held against. Half of each target's items search, calibrate and choose; the verdict is
read on the other half, of further trainings of the pick and of uniform shares (`verdict.py` says why).
"""

import logging
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datalloy import config
from datalloy.calibration import (
    Calibration,
    TrainedMixtures,
    calibrate,
    interaction_scale,
    plan_runs,
    recommend,
    weight_intervals,
)
from datalloy.checkpoints import merge_checkpoints
from datalloy.durable import complete_files
from datalloy.encoding import EncodedSamples
from datalloy.engines import Engine, Unit, complete
from datalloy.evaluation import JudgedItems, MetricItems, answer_losses, count_tokens, without_writing
from datalloy.mergeability import Expert, diagnose
from datalloy.merging import Merge, open_merge
from datalloy.mixture import Mixture, Spent, materialise, plan_shares, write_candidates
from datalloy.objective import Objective
from datalloy.run import Run, digest, write_json
from datalloy.sample import Sample
from datalloy.search import Found, search
from datalloy.simplex import Group, Simplex, largest_remainder
from datalloy.slope_stage import follow_slopes
from datalloy.surface import describe_surface
from datalloy.surrogates.mixmin import MixMin
from datalloy.target_items import TargetItems
from datalloy.training import train
from datalloy.uncertainty import Interval, rank_agreement, target_means
from datalloy.verdict import Confirmation, Verdict, judge
from datalloy.vision_features import VisionFeatures
from datalloy.vlm import VLM

log = logging.getLogger(__name__)

BLOCKS = 4  # of target items, for racing
OWN_ITEMS = 32  # of a part that its expert is not trained on: whether it learned its own domain is seen there
OWN_FRACTION = 0.1  # of a part that may be kept from its expert
OTHER_SEED = 1000  # between the seeds of trainings on one mixture
FIRST_RUNS = 2  # before the first calibration: the search's pick and uniform shares
SAME_PICK = 0.05  # share of samples in which two picks must differ for the second to be trained too
FEASIBLE = 1e-7  # rounding of solvers, in weights
FAR_APART = 0.3  # share of samples in which two recommendations differ enough for a warning
STABILITY_CALLS, STABILITY_TOLERANCE, STABILITY_POINTS = 4, 0.05, 64


@dataclass(frozen=True)
class Part:
    """What gets a weight of its own: a domain, or a score bucket of one."""

    name: str
    domain: str
    samples: Sequence[Sample]


class MergedModels:
    """What a search may measure: the merged models of one set of experts on the targets' items.

    Every answer is recorded as a unit of the run under `unit`; what has a record is not measured again.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        unit: str,
        merge: Merge,
        targets: Mapping[str, Sequence[Sample]],
        metric: str,
    ) -> None:
        self._run, self._engine, self._unit, self._merge = run, engine, unit, merge
        recipe, shared = run.recipe, merge.vision_is_shared
        encoded = {n: EncodedSamples(merge.vlm, s, max_tokens=recipe.train.max_tokens) for n, s in targets.items()}
        even = dict.fromkeys(targets, 1.0)
        vision = VisionFeatures() if shared else None
        metrics = metrics_of(run.recipe, metric)
        self._loss_items = TargetItems.lay_out(
            merge.vlm,
            encoded,
            even,
            vision=vision,
            targets_apart=True,
            by_probability=[name for name in targets if metrics[name] != "loss"],
        )
        self._tokens_V = count_tokens([item for group in encoded.values() for item in group])
        self._items = lay_out_items(merge.vlm, run, targets, metric, vision)
        self.names, self.targets = merge.names, tuple(targets)
        self.target_V, self.block_V = self._items.target_V, self._items.block_V

    def slopes(self, weight_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Risk of each target at theta_w, [G], and its slopes, [G, K]: the answer loss, or the probability, negated."""

        def measure() -> dict[str, Any]:
            loss_G, slope_GK = self._merge.slopes(weight_K, self._loss_items)
            return {"losses": loss_G.tolist(), "slopes": slope_GK.tolist()}

        done = self._run.once(f"{self._unit}/slopes-{_key(weight_K)}", measure)
        return np.array(done["losses"]), np.array(done["slopes"])

    def values(self, weight_K: np.ndarray, block: int) -> np.ndarray:
        """Values of the items of a block, higher is better: a loss comes negated."""
        done = self._run.once(
            self._values_unit(weight_K, block).name,
            lambda: {"values": self._items.values(self._merge.set(weight_K), block).tolist()},
        )
        return np.array(done["values"])

    def foresee(self, weights: Sequence[np.ndarray], blocks: Sequence[int]) -> None:
        """Measure these values now, on as many workers as the engine has."""
        units = [self._values_unit(weight_K, block) for weight_K in weights for block in blocks]
        complete(self._engine, self._run, list(dict.fromkeys(units)), "evaluate merged models")

    def _values_unit(self, weight_K: np.ndarray, block: int) -> Unit:
        name = f"{self._unit}/values-{_key(weight_K)}-{block}"
        return Unit(name, "measure", "values", (tuple(weight_K.tolist()), block))

    def answer_log_probs(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of each item's whole answer under each expert, [K, V] nats, and the items' weights.

        An item counts as in the loss: by its target's weight, per token of its answer.
        """
        units = [Unit(f"{self._unit}/losses-{name}", "measure", "losses", (k,)) for k, name in enumerate(self.names)]
        complete(self._engine, self._run, units, "evaluate experts")
        loss_KV = [self.expert_losses(k) for k in range(len(self.names))]
        return -np.array(loss_KV) * self._tokens_V, self._loss_items.item_weight_V / self._tokens_V

    def expert_losses(self, k: int) -> list[float]:
        """Answer loss of each target item under one expert, nats per token."""
        done = self._run.once(
            f"{self._unit}/losses-{self.names[k]}",
            lambda: {"losses": self._loss_items.losses(self._merge.set(np.eye(len(self.names))[k])).tolist()},
        )
        return done["losses"]

    def all_values(self, weight_K: np.ndarray) -> np.ndarray:
        """Values of all items, [V]."""
        value_V = np.empty(len(self.block_V))
        for block in np.unique(self.block_V):
            value_V[self.block_V == block] = self.values(weight_K, int(block))
        return value_V


class Mixing:
    """The mixture half of one run. `total` is how many samples the final training sees."""

    def __init__(
        self,
        run: Run,
        engine: Engine,
        settings: config.Mixture,
        base: VLM,
        parts: Sequence[Part],
        targets: Mapping[str, Sequence[Sample]],
        total: int,
    ) -> None:
        self.run, self.engine, self.base, self.parts, self.total = run, engine, base, parts, total
        self.settings = settings
        self.targets, self.unseen = targets, targets  # items that search and choose; items that the verdict is read on
        if settings.verify_runs:
            self.targets, self.unseen = _halves(targets, settings.seed)
        self.names = tuple(part.name for part in parts)

    def perform(self, unit: Unit) -> None:
        """Do one unit of work for an engine and commit its record."""
        match unit.work:
            case "expert":
                self._expert(self.parts[unit.arguments[0]])
            case "real_run":
                self._really_train(np.array(unit.arguments[0]))
            case "confirm":
                self._confirm(np.array(unit.arguments[0]), unit.arguments[1])
            case "final":
                self._train_final(unit.name)
            case "values":
                self.merged.values(np.array(unit.arguments[0]), unit.arguments[1])
            case "losses":
                self.merged.expert_losses(unit.arguments[0])

    # --- what is allowed and what is wanted --------------------------------------------------------------------

    @cached_property
    def simplex(self) -> Simplex:
        """The mixtures that the recipe's limits allow. Raises RecipeError where there is none."""
        domains = self.run.recipe.domains
        cap_K = np.ones(len(self.parts))
        for k, part in enumerate(self.parts):
            if (epochs := domains[part.domain].max_epochs) is not None:
                cap_K[k] = epochs * len(part.samples) / self.total
        floor_K = np.zeros(len(self.parts))
        groups = [Group(self._parts_of(g.domains), g.min_share, g.max_share) for g in self.settings.groups.values()]
        for name, domain in domains.items():
            inside = self._parts_of([name])
            if len(inside) == 1:
                floor_K[self.names.index(inside[0])] = domain.min_share
            elif domain.min_share:
                groups.append(Group(inside, domain.min_share, 1.0))
        return Simplex(self.names, floor_K, cap_K, tuple(groups))

    def _parts_of(self, domains: Sequence[str]) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts if part.domain in domains)

    @cached_property
    def sizes_K(self) -> np.ndarray:
        """Shares of the parts in the pool: what mixing without a thought would use."""
        count_K = np.array([len(part.samples) for part in self.parts], dtype=float)
        return count_K / count_K.sum()

    @cached_property
    def objective(self) -> Objective:
        weight_G = np.ones(len(self.targets))
        if self.settings.objective in ("weighted", "pareto"):
            weight_G = np.array([self.run.recipe.targets[name].weight for name in self.targets])
        rails = self.settings.guard_rails
        return Objective(
            kind=self.settings.objective,
            weight_G=weight_G / weight_G.sum(),
            base_G=target_means(self.base_values[None], self._items.target_V)[0],
            max_fall_G=np.array([rails.get(name, np.inf) for name in self.targets]),
        )

    # --- experts -----------------------------------------------------------------------------------------------

    def experts(self) -> dict[str, Path]:
        """One model a part, all from one base by one recipe and equal steps. Writes `experts/PART/`."""
        units = [Unit(f"experts/{part.name}", "train", "expert", (k,)) for k, part in enumerate(self.parts)]
        complete(self.engine, self.run, units, "experts")
        return {part.name: self.run.path(f"experts/{part.name}") for part in self.parts}

    def _expert(self, part: Part) -> None:
        folder, unit = self.run.path(f"experts/{part.name}"), f"experts/{part.name}"
        if self.run.finished(unit) is None:
            own, rest = self._split(part)
            log.info("expert %s: %d samples, %d steps", part.name, len(rest), self.steps)
            milestones = {self._milestone(f): folder / _after(f) for f in self.settings.checkpoints if f < 1}
            vlm = self.base.copy()
            encoded = self._encode(vlm, own)
            before = _losses(vlm, encoded)
            trained = train(
                vlm, self._encode(vlm, rest), self._train_settings, folder, steps=self.steps, milestones=milestones
            )
            facts = {"samples": len(rest), "own_before": before, "own_after": _losses(vlm, encoded)}
            self.run.commit(unit, [folder], {**asdict(trained), **facts})

    def _split(self, part: Part) -> tuple[Sequence[Sample], Sequence[Sample]]:
        """A few samples of the part to see its expert learn, drawn by content; and those it is trained on."""
        order = sorted(part.samples, key=lambda s: digest(["own", self.settings.seed, s.content_hash]))
        own = min(OWN_ITEMS, int(OWN_FRACTION * len(order)))
        return order[:own], order[own:]

    def _milestone(self, fraction: float) -> int:
        return max(1, round(fraction * self.steps))

    @property
    def steps(self) -> int:
        """Optimiser steps of every expert and of every mixture that is really trained."""
        batch = self.run.recipe.train.batch_size
        return max(1, round((self.settings.expert_samples or self.total) / batch))

    @property
    def _train_settings(self) -> config.Train:
        return self.run.recipe.train.model_copy(update={"report_to": ()})

    def _encode(self, vlm: VLM, samples: Sequence[Sample]) -> EncodedSamples:
        return EncodedSamples(vlm, samples, max_tokens=self.run.recipe.train.max_tokens)

    # --- merged models -----------------------------------------------------------------------------------------

    @cached_property
    def merged(self) -> MergedModels:
        """The experts as they are at the end of their training, merged."""
        return MergedModels(self.run, self.engine, "mixture/merged", self.merge, self.targets, self.settings.metric)

    @cached_property
    def merge(self) -> Merge:
        return open_merge(self.base, self.experts())

    @cached_property
    def base_values(self) -> np.ndarray:
        """Values of the targets' items under the base, [V]."""
        return self._measure("mixture/base", None, self._items)

    def diagnose(self) -> dict[str, Any]:
        """Whether these experts can stand in for mixtures at all. Writes `mixture/mergeability.json`."""
        path = self.run.path("mixture/mergeability.json")
        found = diagnose([self._facts(part) for part in self.parts], self.merge.gram_KK, self.merge.base_norm)
        for warning in found.warnings:
            log.warning("%s", warning)
        write_json(path, asdict(found))
        return asdict(found)

    def _facts(self, part: Part) -> Expert:
        done = self.run.finished(f"experts/{part.name}") or {}
        settings = self.run.recipe.train.model_dump(mode="json", exclude={"report_to", "micro_batch_size"})
        equal = {"base": self.base.name, **settings}
        return Expert(part.name, done["steps"], done["own_before"], done["own_after"], equal)

    # --- search ------------------------------------------------------------------------------------------------

    def search(self) -> Found:
        """The mixture whose merged model is expected to be best. Writes `mixture/candidates.parquet`.

        Deterministic given the answers, and those are recorded: called again, it costs no evaluation.
        """
        self.experts()
        self.diagnose()
        found = search(
            self.merged,
            self.simplex,
            self.objective,
            slopes_tell=self.settings.metric != "target",
            evaluations=self.settings.evaluations,
            seed=self.settings.seed,
        )
        path = self.run.path("mixture/candidates.parquet")
        if self.run.finished("mixture/search") is None:
            write_candidates(path, self.names, tuple(self.targets), found.rows)
            log.info("the search recommends %s", self.describe(found.weight_K))
            data = {
                "weights": self._named(found.weight_K),
                "stability": self._stability(),
                "mixmin": self._mixmin(found.weight_K),
            }
            self.run.commit("mixture/search", [path], data)
        return found

    def _mixmin(self, weight_K: np.ndarray) -> dict[str, Any]:
        """What the experts' own predictions recommend without a merge: a cross-check that costs one pass of each."""
        mixmin_K = MixMin(*self.merged.answer_log_probs()).best(self.simplex)
        apart = float(np.abs(mixmin_K - weight_K).sum() / 2)
        if apart > FAR_APART:
            log.warning(
                "MixMin, which merges nothing, recommends %s: %.0f%% of the samples would be others. Two ways of "
                "thinking disagree; trust what the real runs say",
                self.describe(mixmin_K),
                100 * apart,
            )
        return {"weights": self._named(mixmin_K), "apart": apart}

    def _stability(self) -> list[dict[str, Any]]:
        """Where slopes lead on the experts as they were earlier in their training, and how alike they rank mixtures.

        A recommendation that wanders with the budget is not to be trusted beyond it.
        """
        wanted = replace(
            self.objective, base_G=np.zeros(len(self.targets)), max_fall_G=np.full(len(self.targets), np.inf)
        )
        stages = {}
        for fraction in sorted({*self.settings.checkpoints, 1.0}):
            merged = self.merged if fraction == 1 else self._merged_after(fraction)
            stages[fraction] = follow_slopes(
                merged.slopes, self.simplex, wanted, calls=STABILITY_CALLS, tolerance=STABILITY_TOLERANCE
            )
        sample_NK = self.simplex.sample(STABILITY_POINTS, self.settings.seed)
        score = {f: wanted.score(-stage.quadratics.losses(sample_NK)) for f, stage in stages.items()}
        return [
            {
                "fraction": fraction,
                "weights": self._named(stage.weight_K),
                "moved": float(np.abs(stage.weight_K - stages[1.0].weight_K).sum() / 2),
                "spearman": _alike(score[fraction], score[1.0]),
            }
            for fraction, stage in stages.items()
        ]

    def _merged_after(self, fraction: float) -> MergedModels:
        folders = {name: folder / _after(fraction) for name, folder in self.experts().items()}
        merge = open_merge(self.base, folders)
        unit = f"mixture/merged-{_after(fraction)}"
        return MergedModels(self.run, self.engine, unit, merge, self.targets, self.settings.metric)

    # --- verify ------------------------------------------------------------------------------------------------

    def verify(self) -> Mixture:
        """Train a few mixtures really, calibrate the search by them, confirm the best of them, and give the verdict.

        Writes `mixture/mixture.json` and `mixture/surface.json`. Of the runs, the search's pick and uniform shares come
        first; the calibrated surface then has its pick, which is trained too unless it is much the same; what is left
        goes to the shares of the domains' sizes and to where the surface is least known.
        """
        path = self.run.path("mixture/mixture.json")
        if self.run.finished("mixture/verdict") is not None:
            return Mixture.read(path)
        found = self.search()
        weight_NK = self._really_trained(found)
        trained = self._evidence(weight_NK)
        calibration = _calibrated(found, trained)
        eligible_NK = np.array([weight_K for weight_K in weight_NK if self.simplex.contains(weight_K, FEASIBLE)])
        pick_K = self._best(calibration, eligible_NK) if self.settings.verify_runs else found.weight_K
        verdict, confirming = self._judge(calibration, trained, pick_K, len(eligible_NK))
        interval_K2 = weight_intervals(
            calibration,
            self.simplex,
            self.objective,
            pick_K,
            confidence=self.settings.confidence,
            seed=self.settings.seed,
        )
        trusted_K = self.simplex.uniform if verdict.verdict == "use uniform" else pick_K
        runs = int((weight_NK.max(axis=1) < 1).sum()) + confirming
        advice = Mixture.judged(
            self._named(trusted_K),
            dict(zip(self.names, (Interval(*pair) for pair in interval_K2.tolist()), strict=True)),
            verdict,
            searched=self._named(pick_K),
            objective=self.settings.objective,
            metric=self.settings.metric,
            judged_by=self._judged_by,
            spent=Spent(found.slope_calls, math.ceil(found.evaluations), runs),
        )
        advice.write(path)
        surface = describe_surface(
            calibration,
            trained,
            self.objective,
            self.simplex,
            pick_K,
            confidence=self.settings.confidence,
            seed=self.settings.seed,
        )
        surface_path = self.run.path("mixture/surface.json")
        write_json(surface_path, surface)
        self.run.commit("mixture/verdict", [path, surface_path])
        log.info("verdict: %s. %s", verdict.verdict, verdict.reason)
        return advice

    def _really_trained(self, found: Found) -> np.ndarray:
        """Weights of all mixtures that were really trained, the experts first."""
        weight_NK = np.eye(len(self.parts))
        for count in (min(FIRST_RUNS, self.settings.verify_runs), self.settings.verify_runs):
            calibration = _calibrated(found, self._evidence(weight_NK))
            pick_K = found.weight_K
            if len(weight_NK) > len(self.parts):
                calibrated_K = recommend(calibration, self.simplex, self.objective, seed=self.settings.seed)
                is_new = np.abs(weight_NK - calibrated_K).sum(axis=1).min() / 2 > SAME_PICK
                pick_K = calibrated_K if is_new else found.weight_K
            planned = plan_runs(
                calibration,
                self.simplex,
                self.objective,
                pick_K=pick_K,
                size_K=self.sizes_K,
                count=count + len(self.parts) - len(weight_NK),
                seed=self.settings.seed,
                trained_NK=weight_NK,
            )
            weight_NK = np.vstack([weight_NK, *(run.weight_K for run in planned)])
        return weight_NK

    def _evidence(self, weight_NK: np.ndarray) -> TrainedMixtures:
        units = [self._real_run(weight_K) for weight_K in weight_NK if weight_K.max() < 1]
        complete(self.engine, self.run, units, "real runs")
        self.merged.foresee(list(weight_NK), np.unique(self.merged.block_V).tolist())
        return TrainedMixtures(
            targets=tuple(self.targets),
            weight_NK=weight_NK,
            true_NV=np.array([self.trained(weight_K) for weight_K in weight_NK]),
            merged_NV=np.array([self.merged.all_values(weight_K) for weight_K in weight_NK]),
            target_V=self.merged.target_V,
            seed_sd_G=np.zeros(len(self.targets)),
        )

    def _judge(
        self, calibration: Calibration, trained: TrainedMixtures, pick_K: np.ndarray, eligible: int
    ) -> tuple[Verdict, int]:
        """The verdict on the pick by the unseen items, and how many trainings confirmed it."""
        objective, confirmation = self.objective, None
        if self.settings.verify_runs:
            trained = self._unseen_evidence(trained.weight_NK)
            base_V = self._measure("mixture/base/verdict", None, self._unseen_items)
            objective = replace(objective, base_G=target_means(base_V[None], trained.target_V)[0])
            confirmation = self._confirmation(trained, pick_K)
        verdict = judge(
            trained,
            calibration,
            objective,
            pick_K=pick_K,
            uniform_K=self.simplex.uniform,
            size_K=self.simplex.project(self.sizes_K),
            confidence=self.settings.confidence,
            seed=self.settings.seed,
            chosen_among=eligible if self.settings.verify_runs else 1,
            confirmation=confirmation,
        )
        return verdict, 0 if confirmation is None else 2 * confirmation.further

    def _unseen_evidence(self, weight_NK: np.ndarray) -> TrainedMixtures:
        """The trained mixtures and the merged models at their weights, measured on the unseen items."""
        items = self._unseen_items
        merged_NV = np.array([self._merged_on_unseen(weight_K) for weight_K in weight_NK])
        true_NV = merged_NV.copy()
        for n in np.flatnonzero(weight_NK.max(axis=1) < 1):  # the merged model at a vertex is the expert
            folder = self.train_on(weight_NK[n])
            true_NV[n] = self._measure(f"{folder.relative_to(self.run.folder)}/verdict", folder, items)
        return TrainedMixtures(
            targets=tuple(self.targets),
            weight_NK=weight_NK,
            true_NV=true_NV,
            merged_NV=merged_NV,
            target_V=items.target_V,
            seed_sd_G=np.zeros(len(self.targets)),
        )

    def _merged_on_unseen(self, weight_K: np.ndarray) -> np.ndarray:
        def measure() -> dict[str, Any]:
            return {"values": self._unseen_items.values(self.merge.set(weight_K)).tolist()}

        return np.array(self.run.once(f"mixture/merged/verdict-{_key(weight_K)}", measure)["values"])

    def _confirmation(self, trained: TrainedMixtures, pick_K: np.ndarray) -> Confirmation | None:
        """The pick and uniform shares trained again; None where there is nothing to confirm or it is not asked for."""
        pick, uniform = trained.find(pick_K), trained.find(self.simplex.uniform)
        if not self.settings.confirm_runs or pick is None or uniform is None or pick == uniform:
            return None
        weights = {pick: pick_K, uniform: self.simplex.uniform}
        numbers = range(1, self.settings.confirm_runs + 1)
        units = [self._confirm_unit(weight_K, number) for weight_K in weights.values() for number in numbers]
        complete(self.engine, self.run, units, "confirming runs")
        by_row = {
            row: [
                self._measure(f"{unit.name}/verdict", self.run.path(unit.name), self._unseen_items)
                for unit in (self._confirm_unit(weight_K, number) for number in numbers)
            ]
            for row, weight_K in weights.items()
        }
        pick_RV, uniform_RV = (np.array([trained.true_NV[row], *by_row[row]]) for row in (pick, uniform))
        return Confirmation(pick_RV, uniform_RV, trained.target_V)

    def _best(self, calibration: Calibration, weight_NK: np.ndarray) -> np.ndarray:
        """The mixture with the best expected objective; guard rails come before it."""
        value_NG = calibration.predict(weight_NK)[0]
        rank = list(zip(self.objective.allowed(value_NG), self.objective.score(value_NG), strict=True))
        return weight_NK[max(range(len(rank)), key=rank.__getitem__)]

    # --- real runs ---------------------------------------------------------------------------------------------

    def train_on(self, weight_K: np.ndarray) -> Path:
        """Really train on a mixture for as many steps as an expert; the folder. At a vertex, the expert itself."""
        if weight_K.max() == 1:
            return self.experts()[self.names[int(weight_K.argmax())]]
        unit = self._real_run(weight_K)
        complete(self.engine, self.run, [unit], "real run")
        return self.run.path(unit.name)

    def _real_run(self, weight_K: np.ndarray) -> Unit:
        counts = largest_remainder(weight_K, self.steps * self.run.recipe.train.batch_size)
        return Unit(f"mixture/runs/{_key(counts)}", "train", "real_run", (tuple(weight_K.tolist()),))

    def _confirm_unit(self, weight_K: np.ndarray, number: int) -> Unit:
        """Training on the same samples once more, from another seed."""
        name = f"{self._real_run(weight_K).name.replace('/runs/', '/confirm/')}-{number}"
        return Unit(name, "train", "confirm", (tuple(weight_K.tolist()), number))

    def _really_train(self, weight_K: np.ndarray) -> None:
        log.info("really training on %s", self.describe(weight_K))
        self._train_mixture(self._real_run(weight_K).name, weight_K, self._train_settings)

    def _confirm(self, weight_K: np.ndarray, number: int) -> None:
        settings = self._train_settings
        log.info("confirming %s, training %d", self.describe(weight_K), number)
        seed = settings.seed + OTHER_SEED * number
        self._train_mixture(
            self._confirm_unit(weight_K, number).name, weight_K, settings.model_copy(update={"seed": seed})
        )

    def _train_mixture(self, unit: str, weight_K: np.ndarray, settings: config.Train) -> None:
        samples = self._samples_of(weight_K, self.steps * settings.batch_size, settings.seed)
        self._train_in_order(unit, samples, settings, {"weights": self._named(weight_K)})

    def _train_in_order(
        self, unit: str, samples: Sequence[Sample], settings: config.Train, about: Mapping[str, Any]
    ) -> None:
        """The base tuned on samples as they lie, and committed with `about`."""
        vlm, folder = self.base.copy(), self.run.path(unit)
        steps = len(samples) // settings.batch_size
        trained = train(vlm, self._encode(vlm, samples), settings, folder, steps=steps, in_order=True)
        self.run.commit(unit, [folder], {**asdict(trained), **about})

    def trained(self, weight_K: np.ndarray) -> np.ndarray:
        """Values of the targets' items after really training on a mixture, [V]."""
        if weight_K.max() == 1:
            return self.merged.all_values(weight_K)  # the merged model at a vertex is the expert
        folder = self.train_on(weight_K)
        return self._measure(f"{folder.relative_to(self.run.folder)}/values", folder, self._items)

    def trained_uniform(self) -> Path | None:
        """The model trained on uniform shares, if verification trained one for as long as the final model."""
        total = self.steps * self.run.recipe.train.batch_size
        unit = f"mixture/runs/{_key(largest_remainder(self.simplex.uniform, total))}"
        return self.run.path(unit) if total == self.total and self.run.finished(unit) is not None else None

    def _measure(self, unit: str, folder: Path | None, items: MetricItems | JudgedItems) -> np.ndarray:
        """Values of items under a checkpoint, None being the base; recorded in the run."""

        def measure() -> dict[str, Any]:
            vlm = self.base if folder is None else VLM.load(str(folder), device=self.run.recipe.device)
            return {"values": items.values(vlm).tolist()}

        return np.array(self.run.once(unit, measure)["values"])

    @cached_property
    def _items(self) -> MetricItems:
        return lay_out_items(self.base, self.run, self.targets, self.settings.metric)

    @cached_property
    def _unseen_items(self) -> MetricItems | JudgedItems:
        """Where search is by probability, marks count half, as in the bake-off: the probability alone misleads."""
        if self.settings.metric != "probability":
            return lay_out_items(self.base, self.run, self.unseen, self.settings.metric)
        metrics = metrics_of(self.run.recipe, "target")
        return JudgedItems.lay_out(self.base, self.unseen, metrics, self.run.recipe.evaluate)

    @property
    def _judged_by(self) -> str:
        is_both = self.settings.metric == "probability" and self.settings.verify_runs
        return "marks and probability" if is_both else self.settings.metric

    # --- the final training ------------------------------------------------------------------------------------

    def train_final(self) -> None:
        """The base tuned on the recommended mixture, in `model/`. A verified run of the same length is it already."""
        unit, folder = "model", self.run.path("model")
        if self.run.finished(unit) is not None:
            return
        weight_K = self._recommended()
        if self.steps * self.run.recipe.train.batch_size != self.total:
            complete(self.engine, self.run, [Unit(unit, "train", "final")], "train")
            return
        source = self.train_on(weight_K)
        facts = self.run.finished(str(source.relative_to(self.run.folder))) or {}
        shutil.rmtree(folder, ignore_errors=True)
        with complete_files(folder) as staging:
            shutil.copytree(source, staging, ignore=shutil.ignore_patterns("after-*"), dirs_exist_ok=True)
        self.run.commit(unit, [folder], {**facts, "kept": _distinct(self.training_set())})

    def _train_final(self, unit: str) -> None:
        samples = self.training_set()
        self._train_in_order(unit, samples, self.run.recipe.train, {"kept": _distinct(samples)})

    def write_merge(self) -> Path | None:
        """The merged model at the searched mixture as a checkpoint, where the verdict offers it; else None."""
        advice, folder = self.verify(), self.run.path("mixture/merge")
        if advice.verdict != "deploy the merge":
            return None
        if self.run.finished("mixture/merge") is None:
            shutil.rmtree(folder, ignore_errors=True)
            merge_checkpoints([(self.experts()[name], share) for name, share in advice.searched.items()], folder)
            self.run.commit("mixture/merge", [folder])
        return folder

    def training_set(self) -> list[Sample]:
        """The samples of the final training, in order and with repetitions: exact counts by largest remainder."""
        return self._samples_of(self._recommended(), self.total, self.run.recipe.train.seed)

    def shares(self) -> list[dict[str, Any]]:
        """What the final training takes of each part: count, samples there are, how often each is used."""
        available = {part.name: len(part.samples) for part in self.parts}
        planned = plan_shares(self._named(self._recommended()), available, self.total)
        return [{**asdict(share), "passes": share.passes} for share in planned]

    def _recommended(self) -> np.ndarray:
        advice = self.verify()
        return np.array([advice.weights[name] for name in self.names])

    # --- samples of a mixture ----------------------------------------------------------------------------------

    def _samples_of(self, weight_K: np.ndarray, total: int, order_seed: int) -> list[Sample]:
        """The `total` samples of a mixture, in order and with repetitions."""
        by_key = {part.name: _keyed(part.samples) for part in self.parts}
        ids = {name: list(keyed) for name, keyed in by_key.items()}
        chosen = materialise(self._named(weight_K), ids, total, self.settings.seed, order_seed)
        return [by_key[name][key] for name, key in chosen]

    def _named(self, weight_K: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, weight_K.tolist(), strict=True))

    def describe(self, weight_K: np.ndarray) -> str:
        """A mixture in words, largest share first."""
        shares = sorted(self._named(weight_K).items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)


def metrics_of(recipe: config.Recipe, metric: str) -> dict[str, config.Metric]:
    """What the items of each target are judged by, where a search is on `metric` of the mixture section."""
    if metric == "loss":
        return dict.fromkeys(recipe.targets, "loss")
    own: dict[str, config.Metric] = {name: target.metric for name, target in recipe.targets.items()}
    return own if metric == "target" else {name: without_writing(m) for name, m in own.items()}


def lay_out_items(
    vlm: VLM, run: Run, targets: Mapping[str, Sequence[Sample]], metric: str, vision: VisionFeatures | None = None
) -> MetricItems:
    """The targets' items in blocks, judged as `metrics_of` says."""
    metrics = metrics_of(run.recipe, metric)
    blocks = min(BLOCKS, min(len(items) for items in targets.values()))
    return MetricItems.lay_out(vlm, targets, metrics, run.recipe.evaluate, blocks=blocks, vision=vision)


def _halves(targets: Mapping[str, Sequence[Sample]], seed: int) -> tuple[dict[str, list[Sample]], ...]:
    """The items of each target dealt to two halves in an order drawn by content; the first has the odd one."""
    halves: tuple[dict[str, list[Sample]], ...] = ({}, {})
    for name, items in targets.items():
        order = sorted(items, key=lambda s: digest(["verdict", seed, s.content_hash]))
        for half, chosen in zip(halves, (order[0::2], order[1::2]), strict=True):
            half[name] = chosen
    return halves


def _calibrated(found: Found, trained: TrainedMixtures) -> Calibration:
    return calibrate(found.predict, trained, interaction_scale(trained.merged_NG))


def _keyed(samples: Sequence[Sample]) -> dict[str, Sample]:
    """Samples by their content, the copies of one content numbered."""
    seen: Counter[str] = Counter()
    keyed = {}
    for sample in sorted(samples, key=lambda s: (s.content_hash, s.id)):
        keyed[f"{sample.content_hash}-{seen[sample.content_hash]}"] = sample
        seen[sample.content_hash] += 1
    return keyed


def _distinct(samples: Sequence[Sample]) -> int:
    return len({(sample.domain, sample.id) for sample in samples})


def _key(numbers: np.ndarray) -> str:
    return digest(np.asarray(numbers).tolist())[:16]


def _alike(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Spearman's rank correlation; None where one side holds all mixtures for equal."""
    return rank_agreement(a_N, b_N) if np.ptp(a_N) > 0 and np.ptp(b_N) > 0 else None


def _after(fraction: float) -> str:
    return f"after-{round(100 * fraction)}"


def _losses(vlm: VLM, encoded: EncodedSamples) -> list[float]:
    return answer_losses(vlm, encoded, batch_size=OWN_ITEMS).tolist()
