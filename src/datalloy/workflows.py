"""The one file that knows the order of the stages: a recipe in, a run folder with a better model out.

    check -> score -> select -> mix -> verify -> train -> evaluate -> export

Each stage is X in, Y out; stages meet in artefacts (samples, scores, a selection, a checkpoint), never in each
other. A stage asks for what it needs, so any verb can be called first; what already has a done-record in the run
folder is read, not computed again.

The method is that of One-Step-Train (arXiv 2605.07488): tune the proxy a little, score every sample by what one
training step on it does to the targets, keep the useful part, throw out the toxic part. What to keep is then
decided by small measured runs, not by the score alone (DESIGN 2.1, "from score to decision"). Where the recipe has a
mixture section, what share each domain gets is searched on merged models of one expert a domain (arXiv 2602.04937)
and verified by real runs; `mixing.py` knows that half. Filtered within domains, mixed across them.
"""

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datalloy import accounts, bakeoff, config, embeddings, scorers
from datalloy.attempts import Attempt
from datalloy.checking import Checking
from datalloy.encoding import EncodedSamples
from datalloy.engines import Engine, LocalEngine, Unit, complete, on_ray, processes
from datalloy.errors import AgreementError, DataError, RecipeError, RunError
from datalloy.evaluation import Evaluation, JudgedItems, evaluate
from datalloy.exporters import EXPORTERS, Handover, Portion, by_domain, export_rows
from datalloy.mixing import Mixing, Part
from datalloy.mixture import Mixture
from datalloy.readers import Samples
from datalloy.run import SCHEMA_VERSION, Run, write_atomically, write_json
from datalloy.sample import Sample
from datalloy.scores import Scores
from datalloy.search import Found
from datalloy.selection import Selection, select
from datalloy.sharding import check_launcher
from datalloy.similarity import directions
from datalloy.target_items import TargetItems, item_weights
from datalloy.tiny.model import WEIGHTS
from datalloy.training import train, training_flops
from datalloy.vlm import VLM

log = logging.getLogger(__name__)

SHARD = 128  # samples in one unit of scoring: what a kill can cost at most


class Workflow:
    """The stages of one run. Data are read once and models loaded when a stage first needs them.

    Without an engine, all work is done in this process.
    """

    def __init__(self, run: Run, engine: Engine | None = None) -> None:
        self.run, self.recipe = run, run.recipe
        self.engine = engine or LocalEngine(self)
        self._ready: dict[str, tuple[scorers.Scorer, scorers.Rater | None]] = {}  # of the scorer at work
        self._made: dict[str, Scores] = {}

    def perform(self, unit: Unit, coming: Unit | None = None) -> None:
        """Do one unit of work for an engine and commit its record."""
        match unit.work:
            case "score":
                self._score_shard(unit, coming)
            case "embed":
                self._embed_shard(unit, coming)
            case "train":
                self._train_on(self._kept_indices(self.select()), unit.name, self.run.path(unit.name))
            case _:
                self.mixing.perform(unit)

    # --- check: files in, samples that a model can be trained on out -------------------------------------------

    def check(self) -> dict[str, Any]:
        """Read everything, refuse what cannot be trained on, look for leaks. Returns the counts.

        Writes `rejected.jsonl` and `check.json`. Raises DataError over the error budget or where a set is too
        small, LeakageError when a target or evaluation item is in the pool.
        """
        return self._checking.outcome.counts

    @cached_property
    def _checking(self) -> Checking:
        return Checking(self.run, lambda: self._proxy_base)

    @property
    def pool(self) -> Samples:
        """All usable samples, sorted by domain and id: the order of every table. Their turns stay on disk."""
        return self._checking.outcome.pool

    @property
    def targets(self) -> dict[str, Samples]:
        return self._checking.outcome.targets

    @property
    def evaluation(self) -> dict[str, Samples]:
        return self._checking.outcome.evaluation

    # --- models ------------------------------------------------------------------------------------------------

    @cached_property
    def _proxy_base(self) -> VLM:
        return VLM.load(self.recipe.proxy_model, device=self.recipe.device)

    @cached_property
    def _base(self) -> VLM:
        if self.recipe.base == self.recipe.proxy_model:
            return self._proxy_base
        return VLM.load(self.recipe.base, device=self.recipe.device)

    @cached_property
    def _encoded_pool(self) -> EncodedSamples:
        return EncodedSamples(self._proxy_base, self.pool, max_tokens=self.recipe.train.max_tokens)

    def _target_items(self, part: str) -> dict[str, list[Sample]]:
        """The items of each target that score samples, or those that judge the bake-off: never the same ones.

        At most `score.target_items` of a target score, and where a bake-off follows at most half of them; up to
        `bakeoff.JUDGING_ITEMS` of the others judge. The order is that of content hashes, so that it does not depend
        on the file's.
        """
        chosen = {}
        for name, samples in self.targets.items():
            ordered = sorted(samples, key=lambda s: s.content_hash)
            scoring = self.recipe.score.target_items
            if self.recipe.is_raced:
                scoring = min(scoring, len(ordered) // 2)
            chosen[name] = ordered[:scoring] if part == "score" else ordered[scoring:][: bakeoff.JUDGING_ITEMS]
        return chosen

    def _encode(self, vlm: VLM, groups: Mapping[str, Sequence[Sample]]) -> dict[str, EncodedSamples]:
        limit = self.recipe.train.max_tokens
        return {name: EncodedSamples(vlm, samples, max_tokens=limit) for name, samples in groups.items()}

    def warm_up(self) -> VLM:
        """The proxy, tuned on `score.warmup_fraction` of the pool, drawn at random; by default as it is."""
        fraction = self.recipe.score.warmup_fraction
        if fraction == 0:
            return self._proxy_base
        folder = self.run.path("proxy")
        if self.run.finished("proxy") is None:
            order = self._random_order("warm-up")
            chosen = order[: max(1, round(fraction * len(order)))]
            log.info("warm-up: tuning the proxy on %d samples", len(chosen))
            # all weights: LoRA starts where half its gradient is zero, and scores there are a random projection
            settings = self._train_settings(adapter="none", seed=self.recipe.score.seed)
            # a few steps even where 5 % of the pool is less than a batch
            steps = max(4, round(len(chosen) / settings.batch_size))
            trained = train(self._proxy_base.copy(), self._encoded_pool.pick(chosen), settings, folder, steps=steps)
            self.run.commit(
                "proxy", [folder], {"samples": len(chosen), "steps": trained.steps, "seconds": trained.seconds}
            )
        return VLM.load(str(folder), device=self.recipe.device)

    def _train_settings(self, **changes: Any) -> config.Train:
        """Training settings of runs that only measure."""
        return self.recipe.train.model_copy(update={"report_to": (), **changes})

    def _random_order(self, purpose: str) -> list[int]:
        """Indices of the pool in an order drawn from the seed and each sample's content."""
        keys = (f"{purpose} {content}" for content in self.pool.content_hashes())
        nothing_N = np.empty(0)
        seen = scorers.Seen(nothing_N, nothing_N, nothing_N, keys, self.recipe.score.seed)
        draw_N = scorers.BASELINES["random"](seen)
        return [int(i) for i in np.argsort(draw_N, kind="stable")]

    # --- score: samples in, utilities out ----------------------------------------------------------------------

    def score(self) -> Scores:
        """Score every sample of the pool by every scorer the recipe needs; returns the table of the first.

        Writes `scores/METHOD.parquet`, and the first of them as `scores.parquet`.
        """
        tables = self._tables
        target = self.run.path("scores.parquet")
        if self.run.finished("scores") is None:
            next(iter(tables.values())).write(target)
            self.run.commit("scores", [target])
        return next(iter(tables.values()))

    @cached_property
    def _tables(self) -> dict[str, Scores]:
        """One table a scorer. A cheap scorer that disagrees with exact is left out where others are raced with it."""
        tables = {}
        for method in self._methods:
            try:
                tables[method] = self._table(method)
            except AgreementError as error:
                if self.recipe.score.method != "auto" or not self.recipe.is_raced:
                    raise
                log.warning("%s is left out of the bake-off: %s", method, error)
        return tables or {"loss": self._table("loss")}

    @property
    def _methods(self) -> list[str]:
        """Scorers that need a pass of their own; all others follow from the columns of their tables.

        Those that know the targets come first: the first table is the run's.
        """
        method = self.recipe.score.method
        wanted: Sequence[str] = self.recipe.select.bakeoff_arms if method == "auto" else (method,)
        passes = [scorers.MADE_FROM.get(method, method) for method in wanted if method not in scorers.BASELINES]
        passes = list(dict.fromkeys(passes))
        passes.sort(key=lambda method: method in scorers.WITHOUT_PROBES)
        return passes or (["lengths"] if set(wanted) <= scorers.WITHOUT_MODEL else ["loss"])

    def _table(self, method: str) -> Scores:
        target = self.run.path(f"scores/{method}.parquet")
        if self.run.finished(f"scores/{method}") is not None:
            return self._refuse_unscored(Scores.read(target))
        table = self._unscored() if method == "lengths" else self._scored_in_shards(method)
        table.write(target)
        self.run.commit(f"scores/{method}", [target])
        return self._refuse_unscored(table)

    def _unscored(self) -> Scores:
        """The pool with its lengths alone: all that baselines without a model need."""
        table = self._checking.lengths()
        nothing_N = np.full(len(table), np.nan)
        return Scores.from_columns(
            **{name: table[name].to_numpy() for name in table.column_names},
            loss=nothing_N,
            utility=np.zeros(len(table)),
            utility_by_target={},
            utility_se=nothing_N,
            state=np.full(len(table), "ok"),
            metadata={"method": "lengths", "signed": False},
        )

    def _scored_in_shards(self, method: str) -> Scores:
        units = [
            Unit(f"scores/{method}/{number:05d}", "score", "score", (method, shard.start, shard.stop))
            for number, shard in enumerate(self._shards())
        ]
        if any(self.run.finished(unit.name) is None for unit in units):
            self._prepare_scoring(method)
            complete(self.engine, self.run, units, f"score ({method})")
        parts = [Scores.read(self.run.path(f"{unit.name}.parquet")) for unit in units]
        table = replace(Scores.concat(parts), metadata=self._score_metadata(method))
        self._ready.clear()
        return table

    def _prepare_scoring(self, method: str) -> None:
        """What all shards need and one process has to make: the tuned proxy and the probes."""
        self.warm_up()
        if method not in scorers.WITHOUT_PROBES:
            _ = self._probing

    def _score_shard(self, unit: Unit, coming: Unit | None) -> None:
        started = time.monotonic()
        method, *ends = unit.arguments
        if coming is not None:
            self._encoded_pool.read_ahead(range(*coming.arguments[1:]))
        path = self.run.path(f"{unit.name}.parquet")
        if method not in self._ready:
            rater = self._rater(method) if method in scorers.RATERS else None
            self._ready = {method: (self._scorer(method), rater)}
        self._score_rows(*self._ready[method], range(*ends), method, unit.name).write(path)
        self.run.commit(unit.name, [path], {"seconds": time.monotonic() - started})

    def _scorer(self, method: str) -> scorers.Scorer:
        probing = None if method in scorers.WITHOUT_PROBES else self._probing
        return scorers.prepare(method, self._scoring_inputs, probing, self._encoded_probes)

    def _rater(self, method: str) -> scorers.Rater:
        """One of `scorers.RATERS`."""
        return self._judge_rater() if method == "judge" else self._deita()

    def _judge_rater(self) -> scorers.JudgeRater:
        settings = self.recipe.judge
        if settings is None:
            raise RecipeError("the recipe has no judge; add judge: {url: ..., model: ...}")
        store = Path(settings.cache) if settings.cache else self.run.path("judge.sqlite")
        return scorers.JudgeRater(settings, store, run=self.run.fingerprint)

    def _deita(self) -> scorers.Rater:
        settings = self.recipe.deita
        names = (settings.complexity_model, settings.quality_model)
        # one model once, also where it is asked both questions
        loaded = {name: VLM.load(name, device=self.recipe.device) if name else self._proxy_base for name in set(names)}
        return scorers.DeitaRater(
            *(loaded[name] for name in names),
            complexity_prompt=settings.complexity_prompt,
            quality_prompt=settings.quality_prompt,
            batch_size=self.recipe.score.batch_size,
        )

    def _score_rows(
        self, scorer: scorers.Scorer, rater: scorers.Rater | None, shard: range, method: str, unit: str
    ) -> Scores:
        samples, encoded = [self.pool[i] for i in shard], [self._encoded_pool[i] for i in shard]
        with Attempt(self.run.path(f"attempts/{unit}.json")) as attempt:
            keys = [s.content_hash for s in samples]
            isolated = scorers.score_isolated(scorer, encoded, keys, targets=len(self.targets), attempt=attempt)
        for position, error in isolated.errors.items():
            sample, state = samples[position], isolated.state_N[position]
            log.warning("%s: sample %.200r is not scored (%s): %s", sample.origin, sample.id, state, error)
        block, state_N = isolated.block, np.array(isolated.state_N)
        is_ok_N = state_N == "ok"
        utility_NG = np.where(is_ok_N[:, None], block.utility_NG, np.nan)
        falls = None
        if self.recipe.score.contributions and block.fall_NV is not None:
            falls = [fall_V if ok else None for fall_V, ok in zip(block.fall_NV, is_ok_N, strict=True)]
        scores = Scores.from_columns(
            id=[s.id for s in samples],
            domain=[s.domain for s in samples],
            supervised_tokens=[e.supervised_tokens for e in encoded],
            length_tokens=[e.length for e in encoded],
            loss=np.where(is_ok_N, block.loss_N, np.nan),
            utility=np.where(is_ok_N, block.utility_N, np.nan),
            utility_by_target=dict(zip(self.targets, utility_NG.T, strict=True)),
            utility_se=np.where(is_ok_N, block.error_N, np.nan),
            state=state_N,
            contributions=falls,
            metadata={"method": method, "signed": scorer.signed},
        )
        if rater is None:
            return scores
        ratings = rater.rate(samples)
        return scores.with_utility(ratings.rating_N, np.where(is_ok_N, ratings.state_N, state_N), scores.metadata)

    def _refuse_unscored(self, table: Scores) -> Scores:
        """The table, where no more samples could not be scored than the error budget allows. Raises DataError."""
        is_bad_N, allowed = np.isin(table.state, scorers.FAULTS), self.recipe.max_rejected_fraction
        bad = int(is_bad_N.sum())
        if bad > allowed * len(table):
            states = dict(Counter(table.state[is_bad_N].tolist()))
            first = int(np.flatnonzero(is_bad_N)[0])
            raise DataError(
                f"{bad} of {len(table)} samples could not be scored by {table.metadata['method']} ({states}), "
                f"max_rejected_fraction is {allowed}; the first is {table.id[first]!r:.200} of domain "
                f"{table.domain[first]}, all are in {self.run.path('scores')}. Mend or remove them, lower score.step "
                "where they are nonfinite, or raise max_rejected_fraction and go on in the same folder"
            )
        return table

    @cached_property
    def _proxy(self) -> VLM:
        return self.warm_up()

    @cached_property
    def _scoring_inputs(self) -> scorers.ScoringInputs:
        targets = self._encode(self._proxy, self._target_items("score"))
        weights = {name: target.weight for name, target in self.recipe.targets.items()}
        batch = self.recipe.train.batch_size
        return scorers.ScoringInputs(
            vlm=self._proxy,
            items=TargetItems.lay_out(self._proxy, targets, weights),
            targets=targets,
            pool_batch=self._encoded_pool.pick(self._random_order("second moments")[: scorers.POOL_BATCHES * batch]),
            settings=self.recipe.score,
            step=self.recipe.scoring_step,
            freeze_vision=self.recipe.train.freeze_vision,
            train_batch_size=batch,
        )

    @property
    def _probes(self) -> list[int]:
        return self._random_order("probes")[: self.recipe.score.probes]

    @cached_property
    def _encoded_probes(self) -> Sequence[Any]:
        return self._encoded_pool.pick(self._probes)

    @cached_property
    def _probing(self) -> scorers.Probing:
        """Step sizes and exact utilities of the probes, the dearest part of scoring: `probes.npz` and `probes.json`."""
        path = self.run.path("probes.npz")
        if (done := self.run.finished("probes")) is None:
            log.info("probing: %d probes scored exactly, step sizes scanned", len(self._probes))
            started = time.monotonic()
            probing = scorers.probe(self._scoring_inputs, self._methods, self._encoded_probes)
            write_atomically(path, probing.exact.to_bytes())
            names_path = self.run.path("probes.json")
            write_json(names_path, self._names_of_probes())
            settings = {
                "scans": probing.scans,
                "steps": probing.steps,
                "harm_below": probing.harm_below,
                "noise_floor": probing.noise_floor,
                "seconds": time.monotonic() - started,
            }
            done = self.run.commit("probes", [path, names_path], settings)
        found = {name: value for name, value in done.items() if name != "seconds"}
        return scorers.Probing(**found, exact=scorers.ScoreBlock.from_bytes(path.read_bytes()))

    def _names_of_probes(self) -> dict[str, Any]:
        """Which sample and which target item each number of `probes.npz` is of; contributions have the same items."""
        return {
            "samples": [[self.pool[i].domain, self.pool[i].id] for i in self._probes],
            "items": [[name, item.id] for name, items in self._target_items("score").items() for item in items],
        }

    def _score_metadata(self, method: str) -> dict[str, Any]:
        if method == "judge":
            judge = self._judge_rater()
            judge.write_details(self.run.path("judge.parquet"), self.pool)
            return {"method": method, "signed": False, "judge": judge.account(self.pool)}
        if method in scorers.WITHOUT_PROBES:
            return {"method": method, "signed": False}
        scorer = self._scorer(method)
        agreement = scorers.agreement_with_exact(scorer, self._probing, self._encoded_probes, self.recipe.score.seed)
        return {
            "method": method,
            "signed": scorer.signed,
            "step": self._probing.steps.get(method, self._probing.steps["exact"]),
            "step_rule": self.recipe.score.step_rule,
            "agreement_with_exact": asdict(agreement),
            "noise_floor": self._probing.noise_floor,
            "harm_below": 0.0
            if method in scorers.WITHOUT_STEP
            else self._probing.harm_below.get(method, self._probing.harm_below["exact"]),
            "step_scans": dict(self._probing.scans),
        }

    # --- select: utilities in, kept ids out --------------------------------------------------------------------

    def select(self) -> Selection:
        """Keep the useful part. Where the recipe says auto, the bake-off decides how. Writes `selection.parquet`."""
        path = self.run.path("selection.parquet")
        if self.run.finished("selection") is not None:
            return Selection.read(path)
        arm, outcome = self._chosen_arm()
        selection = self.selection_of(arm)
        selection = selection.with_metadata({**selection.metadata, "arm": asdict(arm), "bakeoff": outcome})
        selection.write(path)
        files = [path, self.run.path("bakeoff.json")] if outcome else [path]
        self.run.commit("selection", files, {"arm": asdict(arm), "kept": int(selection.kept.sum())})
        return selection

    def selection_of(self, arm: bakeoff.Arm) -> Selection:
        """What one way of selecting keeps of the pool."""
        settings = self.recipe.select.model_copy(update={"within": arm.within})
        if arm.scorer == "full":
            settings = settings.model_copy(update={"drop_toxic": False})
        if arm.scorer in ("full", "random"):  # what the others are compared with
            settings = settings.model_copy(update={"diversity": "off"})
        return select(
            self.scores_by("random" if arm.scorer == "full" else arm.scorer),
            settings,
            fraction=arm.fraction,
            length_normalised=self.recipe.score.length_normalised,
            cost_N=self._training_flops_N,
            direction_ND=None if settings.diversity == "off" else self._directions_ND,
        )

    @cached_property
    def _directions_ND(self) -> np.ndarray:
        """Where the proxy's last layer puts each sample, seen from the pool's mean, in the order of the pool."""
        return directions(self._states("samples")(np.arange(len(self.pool))))

    @cached_property
    def _prompts(self) -> embeddings.StoredStates:
        """Where the proxy's last layer puts the prompts of samples."""
        return self._states("prompts")

    def _states(self, of: embeddings.Embedded) -> embeddings.StoredStates:
        """Where the proxy's last layer puts samples or their prompts; NaN for those whose scoring failed."""
        table = self.score()
        is_usable_N = table.is_ok | np.isfinite(table.loss)
        folder = "embeddings" if of == "samples" else "prompts"
        units = []
        for number, shard in enumerate(self._shards()):
            rows = [row for row in shard if is_usable_N[row]]
            if rows:
                units.append(Unit(f"{folder}/{number:05d}", "score", "embed", (of, *rows)))
        if any(self.run.finished(unit.name) is None for unit in units):
            _ = self._proxy  # tuned here, where workers are yet to load it
            complete(self.engine, self.run, units, f"embed {of}")
        parts = [(self.run.path(f"{unit.name}.npy"), unit.arguments[1:]) for unit in units]
        return embeddings.StoredStates(parts, len(self.pool))

    def _embed_shard(self, unit: Unit, coming: Unit | None) -> None:
        of, *rows = unit.arguments
        if coming is not None:
            self._encoded_pool.read_ahead(coming.arguments[1:])
        path = self.run.path(f"{unit.name}.npy")
        states = embeddings.embed(self._proxy, [self._encoded_pool[row] for row in rows], of)
        write_atomically(path, embeddings.to_bytes(states))
        self.run.commit(unit.name, [path])

    def _shards(self) -> list[range]:
        """Rows of the pool, a unit of work each."""
        return [range(i, min(i + SHARD, len(self.pool))) for i in range(0, len(self.pool), SHARD)]

    def scores_by(self, scorer: str) -> Scores:
        """The pool's scores by any scorer.

        Baselines are made from the columns of the first table, `right_and_wanted` from those of first_order's.
        """
        if scorer not in (*scorers.BASELINES, *scorers.MADE_FROM):
            return self._tables[scorer]
        if scorer not in self._made:
            self._made[scorer] = self._baseline(scorer) if scorer in scorers.BASELINES else self._right_and_wanted()
        return self._made[scorer]

    def _right_and_wanted(self) -> Scores:
        method = "right_and_wanted"
        table = self._tables[scorers.MADE_FROM[method]]
        utility_N = scorers.right_and_wanted(self._seen(table), table.utility)
        return table.with_utility(utility_N, table.state, {"method": method, "signed": False})

    def _seen(self, table: Scores) -> scorers.Seen:
        self._check_order(table.table)
        return scorers.Seen(
            table.loss,
            table.supervised_tokens,
            table.domain,
            self.pool.content_hashes(),
            self.recipe.select.seed,
            lambda row_R: self._prompts(row_R),
        )

    def _baseline(self, scorer: str) -> Scores:
        table = self.score()
        utility_N = scorers.BASELINES[scorer](self._seen(table))
        # what a rater could not rate has a loss all the same; where no model was asked there are no losses at all
        is_usable_N = table.is_ok if table.metadata["method"] == "lengths" else np.isfinite(table.loss)
        state_N = np.where(is_usable_N, "ok", np.where(table.is_ok, "nonfinite", table.state))
        return table.with_utility(utility_N, state_N, {"method": scorer, "signed": False})

    def _chosen_arm(self) -> tuple[bakeoff.Arm, dict[str, Any] | None]:
        score, settings = self.recipe.score, self.recipe.select
        methods: Sequence[str] = (score.method,)
        if score.method == "auto":
            at_hand = {*scorers.BASELINES, *self._tables}
            methods = [m for m in settings.bakeoff_arms if scorers.MADE_FROM.get(m, m) in at_hand]
        fractions = settings.bakeoff_fractions if settings.keep_fraction == "auto" else (settings.keep_fraction,)
        if len(methods) == 1 and len(fractions) == 1:
            return bakeoff.Arm(methods[0], fractions[0], settings.within), None
        kept = self._kept_by_arm(bakeoff.make_arms(methods, fractions, settings.within))
        items = self._judge()
        batch = self.recipe.train.batch_size
        outcome = bakeoff.race(
            list(kept),
            lambda arm, steps, number: self._run_arm(arm, kept[arm], steps, number, items),
            base_V=items.values(self._proxy_base),
            weight_V=self._item_weights(items),
            budget_steps=int(settings.bakeoff_epochs * len(self.pool) / batch),
            longest_steps=self._final_steps,
            seed=settings.seed,
        )
        write_json(self.run.path("bakeoff.json"), asdict(outcome))
        if outcome.caution:
            log.warning("%s", outcome.caution)
        if outcome.over_base.interval.high < 0:
            log.warning(
                "every way to train on this pool makes the targets worse than the untrained base in the short runs: "
                "%+.3f [%+.3f, %+.3f] for the best of them. Consider not to train on it",
                outcome.over_base.mean,
                *outcome.over_base.interval,
            )
        return outcome.winner, asdict(outcome)

    def _kept_by_arm(self, arms: Sequence[bakeoff.Arm]) -> dict[bakeoff.Arm, np.ndarray]:
        """What each arm keeps, [N] bool, without arms that keep just what an earlier one keeps.

        So keep low loss by length and low loss where all lengths are equal.
        """
        found: dict[bakeoff.Arm, np.ndarray] = {}
        for arm in arms:
            selection = self.selection_of(arm)
            self._check_order(selection.table)
            twin = next((other for other, kept_N in found.items() if np.array_equal(kept_N, selection.kept)), None)
            if twin is None:
                found[arm] = selection.kept
            else:
                log.info("bake-off: %s is left out, it keeps what %s keeps", arm.name, twin.name)
        return found

    def _judge(self) -> JudgedItems:
        """The target items that arms are judged on."""
        samples = self._target_items("judge")
        metrics = {name: self.recipe.targets[name].metric for name in samples}
        return JudgedItems.lay_out(self._proxy_base, samples, metrics, self.recipe.evaluate)

    def _item_weights(self, items: JudgedItems) -> np.ndarray:
        """Weight of each item in the weighted mean over targets of the mean over items, [V]; sums to one."""
        weight_G = np.array([self.recipe.targets[name].weight for name in items.names])
        return item_weights(weight_G / weight_G.sum(), items.target_V)

    def _run_arm(self, arm: bakeoff.Arm, kept_N: np.ndarray, steps: int, number: int, items: JudgedItems) -> np.ndarray:
        def measure() -> dict[str, Any]:
            log.info("bake-off round %d: %s, %d steps", number, arm.name, steps)
            vlm = self._proxy_base.copy()
            part = self._part_for(np.flatnonzero(kept_N).tolist(), steps)
            train(vlm, self._encoded_pool.pick(part), self._train_settings(), None, steps=steps)
            return {"steps": steps, "values": items.values(vlm).tolist()}

        unit = f"bakeoff/{number}-{arm.name.replace(' ', '-').replace('%', '')}"
        return np.array(self.run.once(unit, measure)["values"])

    def _part_for(self, kept: Sequence[int], steps: int) -> list[int]:
        """Of kept samples a random part, as much smaller as the run is shorter than the final training.

        So a short run sees each sample as often as the final training will: a small selection shows what it loses by
        being repeated, and a large one is not cut off before it was seen. The parts of all arms come from one order.
        """
        count = round(len(kept) * min(1.0, steps / self._final_steps))
        wanted = set(kept)
        order = [i for i in self._order_of_parts if i in wanted]
        return sorted(order[: max(count, min(self.recipe.train.batch_size, len(kept)))])

    @cached_property
    def _order_of_parts(self) -> list[int]:
        return self._random_order("bake-off")

    def _kept_indices(self, selection: Selection) -> list[int]:
        self._check_order(selection.table)
        return np.flatnonzero(selection.kept).tolist()

    def _check_order(self, table: pa.Table) -> None:
        """Rows of a table are the samples of the pool, one by one: no index of a million keys is needed."""
        pool = {"id": self.pool.ids(), "domain": self.pool.domains()}
        if any(not table[name].cast(pa.large_string()).equals(pa.chunked_array([pool[name]])) for name in pool):
            raise RunError(f"a table of {self.run.folder} does not hold the pool's samples in their order; start anew")

    @property
    def _final_steps(self) -> int:
        settings = self.recipe.train
        if settings.protocol == "fixed_compute":
            return max(1, round(settings.samples / settings.batch_size))
        return max(1, round(settings.epochs * len(self.pool) / settings.batch_size))

    @cached_property
    def _training_flops_N(self) -> np.ndarray:
        """Training FLOPs of one pass over each sample, in the order of the pool."""
        return training_flops(self._base, 1) * self.score().length_tokens.astype(float)

    # --- mix, verify: kept samples in, shares of the domains out ------------------------------------------------

    def mix(self) -> Found:
        """Search the domains' shares on merged models of one expert each. Writes `mixture/candidates.parquet`."""
        return self.mixing.search()

    def verify(self) -> Mixture:
        """Really train a few mixtures, calibrate, give the verdict. Writes `mixture/mixture.json`."""
        return self.mixing.verify()

    @cached_property
    def mixing(self) -> Mixing:
        """The mixture half, on the parts that the recipe asks for. Raises RecipeError without a mixture section."""
        settings = self.recipe.mixture
        if settings is None:
            raise RecipeError("the recipe has no mixture section; `mixture: {}` switches the search on, all defaults")
        total = self._final_steps * self.recipe.train.batch_size
        return Mixing(self.run, self.engine, settings, self._base, self._parts(settings), self.targets, total)

    def _parts(self, settings: config.Mixture) -> list[Part]:
        """What gets a weight of its own: domains, of their selected samples or all; or score buckets of domains."""
        by_domain: dict[str, list[Sample]] = {name: [] for name in self.recipe.domains}
        for sample in self._used_samples():
            by_domain[sample.domain].append(sample)
        if empty := [name for name, samples in by_domain.items() if not samples]:
            raise DataError(f"domain {empty[0]} has no sample left to train on; leave it out of the recipe")
        if settings.buckets is None:
            return [Part(name, name, samples) for name, samples in by_domain.items()]
        table = self._bucket_scores()
        utility = dict(zip(zip(table.domain, table.id, strict=True), table.utility, strict=True))
        return [
            Part(f"{name}.{number}", name, bucket)
            for name, samples in by_domain.items()
            for number, bucket in enumerate(_buckets(samples, utility, settings.buckets), start=1)
        ]

    def _bucket_scores(self) -> Scores:
        """By the recipe's scorer; of those it lets race, by low loss by neighbours (docs/evidence.md), or the first.

        By low loss where only the loss was measured.
        """
        method = self.recipe.score.method
        if method == "auto" and "low_loss_by_neighbours" in self.recipe.select.bakeoff_arms:
            method = "low_loss_by_neighbours"
        if method != "auto":
            return self.scores_by(method)
        table = self.score()
        return self.scores_by("low_loss") if table.metadata["method"] == "loss" else table

    def _used_samples(self) -> Sequence[Sample]:
        """What may be trained on. Buckets weigh all of it: what is toxic gets a small weight by having been tried."""
        settings = self.recipe.mixture
        if settings is not None and (settings.buckets is not None or settings.data == "whole"):
            return self.pool
        selection = self.select()
        self._check_order(selection.table)
        return self.pool.take(selection.kept)

    # --- train: kept samples in, checkpoint out ----------------------------------------------------------------

    def train(self) -> Path:
        """Tune the base model on what was kept, in the shares that were found. Writes `model/`."""
        folder = self.run.path("model")
        if self.recipe.mixture is None:
            self.select()
            complete(self.engine, self.run, [Unit("model", "train", "train")], "train")
        else:
            self.mixing.train_final()
        return folder

    def _train_on(self, indices: Sequence[int], unit: str, folder: Path) -> dict[str, Any]:
        if (done := self.run.finished(unit)) is not None:
            return done
        log.info("training %s on %d samples", unit, len(indices))
        vlm = self._base.copy()
        encoded = EncodedSamples(vlm, self.pool.take(np.asarray(indices)), max_tokens=self.recipe.train.max_tokens)
        trained = train(vlm, encoded, self.recipe.train, folder)
        facts = asdict(trained)
        return self.run.commit(unit, [folder], {**facts, "kept": len(indices)})

    # --- evaluate: checkpoint in, metrics out ------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        """Measure the base and the trained model on targets and held-out sets. Writes `metrics.json`.

        With a mixture also the model trained on uniform shares, and the merge where the verdict offers it.
        """
        models = {"base": None, "model": self.train()}
        if self.recipe.mixture:
            beside = {"uniform": self.mixing.trained_uniform(), "merge": self.mixing.write_merge()}
            models |= {name: folder for name, folder in beside.items() if folder}
        metrics = {name: self.evaluate_model(name, folder) for name, folder in models.items()}
        write_json(self.run.path("metrics.json"), metrics)
        return metrics

    def evaluate_model(self, name: str, folder: Path | None) -> dict[str, Any]:
        """The metric of every set with its interval; values and answers of all items go to `evaluation/NAME.json`.

        `folder` is a checkpoint; None is the base.
        """
        path = self.run.path(f"evaluation/{name}.json")
        if self.run.finished(f"evaluation/{name}") is None:
            started = time.monotonic()
            vlm = self._base if folder is None else VLM.load(str(folder), device=self.recipe.device)
            sets = {**self.recipe.targets, **self.recipe.evaluation}
            samples = {**self.targets, **self.evaluation}
            results = {
                key: _as_data(evaluate(vlm, samples[key], target.metric, self.recipe.evaluate))
                for key, target in sets.items()
            }
            write_json(path, results)
            self.run.commit(f"evaluation/{name}", [path], {"seconds": time.monotonic() - started})
        headline = ("metric", "mean", "interval", "items")
        return {key: {field: row[field] for field in headline} for key, row in json.loads(path.read_text()).items()}

    # --- export: kept ids in, training files out ---------------------------------------------------------------

    def export(self) -> Path:
        """Write what is trained on for each of `export.formats`; the folder of the last.

        `rows` goes to `export/`: the rows byte for byte in their own format, one file a domain. Any other goes to
        `export-FORMAT/`, with the trainer's own configuration. With a mixture, each row stands there as often as the
        final training sees it: its counts, not only its shares. Native shares go to `export-FORMAT-native/`.
        """
        return [self._export(name) for name in self.recipe.export.formats][-1]

    def _export(self, name: str) -> Path:
        native = self.recipe.export.weights == "native" and name != "rows"
        unit = "export" if name == "rows" else f"export-{name}{'-native' if native else ''}"
        folder = self.run.path(unit)
        if self.run.finished(unit) is not None:
            return folder
        if name == "rows":
            files = export_rows(self._training_set, folder, sources=self.recipe.domains)
        else:
            files = EXPORTERS[name](self._handover(native), folder)
        self.run.commit(unit, files, {"samples": len(self._training_set)})
        return folder

    @cached_property
    def _training_set(self) -> Sequence[Sample]:
        """What is trained on, in the mixture's counts where there is one; else what was kept, each once."""
        return self.mixing.training_set() if self.recipe.mixture else self._used_samples()

    def _handover(self, native: bool) -> Handover:
        if self.recipe.mixture:
            counts = {share["domain"]: share["count"] for share in self.mixing.shares()}
            parts = [(part.name, part.samples, counts[part.name]) for part in self.mixing.parts]
        else:
            parts = [(name, rows, len(rows)) for name, rows in by_domain(self._training_set).items()]
        return Handover(
            name=self.recipe.name,
            base=str(WEIGHTS) if self.recipe.base == "tiny" else self.recipe.base,
            train=self.recipe.train,
            steps=self._final_steps,
            samples=self._training_set,
            portions=[Portion(name, rows, count) for name, rows, count in parts if count],
            native=native,
            is_schedule=self.recipe.mixture is not None,
        )

    # --- compare: other selections trained and measured at equal compute ---------------------------------------

    def compare(self, arms: Mapping[str, bakeoff.Arm]) -> dict[str, Any]:
        """Train the base on what each arm keeps, at equal compute, and measure. The OST paper's tables.

        Returns, for every arm, the results of `evaluate` and how many samples it kept.
        """
        table = {}
        for name, arm in arms.items():
            folder = self.run.path(f"compare/{name}")
            indices = self._kept_indices(self.selection_of(arm))
            self._train_on(indices, f"compare/{name}", folder)
            results = self.evaluate_model(name, folder)
            table[name] = {"kept": len(indices), "sets": results}
        return table

    def _decided(self) -> dict[str, Any]:
        """What became of the pool's samples, and what is still to do."""
        counts: dict[str, Any] = {"pending": len([*self.run.path("attempts").rglob("*.json")])}
        settings = self.recipe.mixture
        if settings is None or settings.buckets is not None or settings.data != "whole":
            path = self.run.path("scores.parquet")  # made again where it was damaged after all else was done
            table = self.score() if self.run.finished("scores") is None else Scores.read(path)
            counts["scored"] = dict(sorted(Counter(table.state.tolist()).items()))
        if self.run.finished("selection") is not None:
            counts["selected"] = self.select().count_reasons()
        return counts

    def run_all(self) -> dict[str, Any]:
        """The whole chain. Writes `status.json` last, and only where inputs are unchanged and the counts add up.

        Raises RunError where they do not.
        """
        counts = self.check()
        used = self._used_samples()
        advice = self.verify() if self.recipe.mixture else None
        metrics = self.evaluate()
        self.export()
        self._checking.verify_inputs()
        counts = {**counts, **self._decided()}
        accounts.require_balance(counts, self.run.folder)
        status = {
            "complete": True,
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.run.fingerprint,
            "counts": counts,
            "kept": len(used),
            "metrics": metrics,
        }
        if advice:
            status["mixture"] = advice.to_json()
        write_json(self.run.path("status.json"), status)
        return status


def open_worker(recipe: config.Recipe, folder: Path) -> Workflow:
    """A worker on the run folder that another process has open."""
    return Workflow(Run(recipe, folder).join())


@contextlib.contextmanager
def open_workflow(run: Run) -> Iterator[Workflow]:
    """The stages of an open run on the engine that the recipe, or the launcher of this process, asks for.

    Raises RecipeError, EnvironmentFault.
    """
    workflow = Workflow(run)
    if processes.count() > 1 and run.recipe.engine != "local":
        raise RecipeError(f"engine is {run.recipe.engine} and torchrun started {processes.count()} processes; use one")
    if processes.count() > 1:
        check_launcher()
        workflow.engine = processes.ProcessEngine(workflow)
    elif run.recipe.engine == "ray":
        workflow.engine = on_ray.RayEngine(run.recipe, run.folder, open_worker)
    try:
        yield workflow
    finally:
        workflow.engine.close()


def serve_workflow(recipe: config.Recipe, folder: Path | None) -> None:
    """What every process of torchrun but the first does: what the first tells it to."""
    run = Run(recipe, folder)
    processes.serve(lambda: Workflow(run.join()))


def _as_data(result: Evaluation) -> dict[str, Any]:
    """An evaluation as plain data: the headline, and every item's value and answer."""
    data = asdict(result)
    values = data.pop("values_V").tolist()
    return {**data, "values": values, "items": len(values)}


def _buckets(samples: Sequence[Sample], utility: Mapping[tuple[str, str], float], count: int) -> list[list[Sample]]:
    """The samples by falling utility, cut into `count` parts of equal size; those without a utility come last."""
    key = {s.id: utility[s.domain, s.id] for s in samples}
    order = sorted(samples, key=lambda s: (not np.isfinite(key[s.id]), -key[s.id], s.content_hash))
    return [list(part) for part in np.array_split(np.array(order, dtype=object), count)]
