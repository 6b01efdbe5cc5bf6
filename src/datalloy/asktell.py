"""Numbers from elsewhere in, the mixtures to measure next and the one to train on out: ask, measure anywhere, tell.

The user's cluster merges, trains and evaluates; here is only what can be thought about the numbers. Two ways in:

- `merged` numbers, of the experts merged by a mixture's weights, are the cheap surrogate of the method: a Gaussian
  process over mixtures (`posterior.py`, without slopes, which only a model can give) says which to merge next and which
  is best, and `trained` numbers, of models really trained on a few mixtures, correct it and are the referee
  (`calibration.py`).
- `trained` numbers alone, a table of weights and metrics, are a surface of their own; how far it can be trusted is seen
  by leaving out each mixture in turn.

Where only means and standard errors are told, the errors of two mixtures are taken as independent, although both were
measured on the same items: intervals are then too wide rather than too narrow. Where no errors are told, they are
estimated by how the values scatter about a smooth surface, which a handful of mixtures hardly shows.

Everything is deterministic in what was told, whatever the order and the number of calls it came in.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg

from datalloy.calibration import (
    Surface,
    TrainedMixtures,
    calibrate,
    interaction_scale,
    plan_runs,
    recommend,
    weight_intervals,
)
from datalloy.errors import DataError
from datalloy.mixture import Mixture, Spent, write_candidates
from datalloy.objective import Objective
from datalloy.optimum import best_mixture
from datalloy.posterior import Posterior
from datalloy.run import take_lock
from datalloy.search import Candidate
from datalloy.simplex import Group, Simplex, largest_remainder
from datalloy.slope_stage import Quadratics
from datalloy.told import BASE, STEPS, Kind, Ledger, Proposal, Told, candidate_name, in_steps, read_told
from datalloy.told_recipe import ToldRecipe, load_told
from datalloy.uncertainty import Interval, mixture_agreement
from datalloy.verdict import Agreement, judge

LEAST = 2  # mixtures of a kind before anything is thought about the others
NOISES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7)  # tried for errors that were not told, in spreads of the values
NOISE_PRIOR = (math.log(0.2), 0.7)  # mean and standard deviation of the logarithm
STAND_INS = 64  # items that stand for those behind a mean and its error, at least
APART = 0.02  # share of samples in which two proposals differ at least
NEAR = 0.005  # share of samples in which a told mixture may differ from uniform shares and still count for them
DRAWS, POOL, STARTS = 64, 256, 2
REGRET_TOLERANCE = 0.25  # of the standard error of the pick's own score: less is not worth another mixture


@dataclass(frozen=True)
class Advice:
    """What is thought now.

    `regret`: what the best mixture is expected to have above the pick; `is_settled`: too little to go on. `estimated`:
    the targets whose standard errors were not told, with what they are taken for.
    """

    mixture: Mixture
    regret: float
    is_settled: bool
    estimated: dict[str, float]


def ask(
    recipe: ToldRecipe | str | Path,
    run: str | Path | None = None,
    *,
    count: int = 4,
    verify: bool = False,
    experts: str | Path = "experts",
) -> list[Proposal]:
    """Up to `count` mixtures whose numbers are wanted and not told yet; those asked for before come first.

    Writes `mixture/proposals.jsonl`. `verify`: mixtures to be really trained instead of merged. `experts`: the folder
    of the experts' checkpoints, for the merge command of each.
    """
    with _opened(recipe, run) as ledger:
        thought = _Thought(ledger)
        kind: Kind = "trained" if verify else "merged"
        wanted = [p for p in ledger.open if p.kind in (kind, BASE)]
        new = thought.propose(kind, max(0, count - sum(p.kind == kind for p in wanted)))
        new = [replace(proposal, about=_about(ledger, proposal, Path(experts))) for proposal in new]
        ledger.propose(new)
        return wanted + new


def tell(
    recipe: ToldRecipe | str | Path,
    results: Sequence[str | Path],
    run: str | Path | None = None,
    *,
    candidate: str | None = None,
    kind: Kind | None = None,
) -> tuple[int, Advice | None]:
    """Take numbers in; how many mixtures were new, and what is thought now, None while too little is known.

    Writes `mixture/told.jsonl`, `mixture/candidates.parquet` and, with advice, `mixture/mixture.json`. Raises
    DataError, and keeps nothing, where a file is not clear and complete or contradicts what was told.
    """
    with _opened(recipe, run) as ledger:
        new = ledger.keep(read_told([Path(path) for path in results], ledger, candidate=candidate, kind=kind))
        thought = _Thought(ledger)
        rows = thought.rows()
        if rows:
            targets = tuple(ledger.recipe.targets)
            write_candidates(ledger.folder / "mixture/candidates.parquet", tuple(ledger.recipe.domains), targets, rows)
        if thought.decision is None:
            return new, None
        advice = thought.decision.advise()
        advice.mixture.write(ledger.folder / "mixture/mixture.json")
        return new, advice


@contextmanager
def _opened(recipe: ToldRecipe | str | Path, run: str | Path | None) -> Iterator[Ledger]:
    recipe = recipe if isinstance(recipe, ToldRecipe) else load_told(recipe)
    folder = Path(run) if run else default_folder(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    lock = take_lock(folder)
    try:
        yield Ledger(folder, recipe)
    finally:
        os.close(lock)


def advice_lines(advice: Advice) -> Iterator[str]:
    """What `mixture.json` does not say, in words."""
    for target, error in advice.estimated.items():
        yield f"no standard error of {target} was told; taken for {error:.4g}, by how its values scatter"
    worth = "too little to measure more for" if advice.is_settled else "more mixtures may find it"
    yield f"the best mixture is expected to score {advice.regret:.4g} above this one: {worth}"


def default_folder(recipe: ToldRecipe) -> Path:
    """Numbers told stay true whatever is wished for, so a changed wish finds them in the same folder."""
    return Path("runs") / f"{recipe.name}-told"


def _about(ledger: Ledger, proposal: Proposal, experts: Path) -> dict[str, Any]:
    """What whoever measures it needs: the merge, or the samples to train on."""
    weights = {name: weight for name, weight in ledger.named(proposal).items() if weight}
    if proposal.kind == "merged":
        parts = " ".join(f"{experts / name}={weight:g}" for name, weight in weights.items())
        return {"command": f"datalloy merge {parts} --out merges/{proposal.candidate}"}
    if proposal.kind == "trained" and ledger.recipe.samples is not None:
        count_K = largest_remainder(proposal.weight_K, ledger.recipe.samples)
        return {"samples": dict(zip(ledger.recipe.domains, count_K.tolist(), strict=True))}
    return {}


# --- what is thought of the numbers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fitted:
    """A surface through told values alone, no surer of itself than its misses of left-out mixtures allow.

    With noise told right, a table of 14 made-up mixtures and one smooth shape for all of them, errors came out a third
    too small; stretched by the misses they fit.
    """

    targets: tuple[str, ...]
    posterior: Posterior
    weight_NK: np.ndarray
    value_NG: np.ndarray
    error_NG: np.ndarray

    def predict(self, weight_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        value_MG, error_MG = self.posterior.predict(weight_MK)
        return value_MG, self.stretch * error_MG

    def draw(self, weight_MK: np.ndarray, count: int, seed: int) -> np.ndarray:
        value_MG = self.posterior.predict(weight_MK)[0]
        return value_MG + self.stretch * (self.posterior.draw(weight_MK, count, seed) - value_MG)

    @cached_property
    def left_out(self) -> tuple[np.ndarray, np.ndarray]:
        """[N, G] what the other mixtures say of each, and their standard errors."""
        rows_N = np.arange(len(self.weight_NK))
        said = [self._without(rows_N != n).predict(self.weight_NK[n]) for n in rows_N]
        return np.array([value_MG[0] for value_MG, _ in said]), np.array([error_MG[0] for _, error_MG in said])

    def _without(self, keep_N: np.ndarray) -> Posterior:
        noise_NG, flat = self.error_NG[keep_N] ** 2, _flat(self.weight_NK, self.targets)
        return Posterior(self.weight_NK[keep_N], self.value_NG[keep_N], noise_NG, flat)

    @cached_property
    def stretch(self) -> float:
        """How many times further off left-out mixtures are than their errors say; at least one."""
        if len(self.weight_NK) <= LEAST:
            return 1.0
        guess_NG, error_NG = self.left_out
        miss_NG = (self.value_NG - guess_NG) ** 2 / (error_NG**2 + self.error_NG**2 + np.finfo(float).tiny)
        return max(1.0, float(np.sqrt(miss_NG.mean())))


class _Thought:
    """The limits and the wish of a recipe, and what the told numbers say, turned so that higher is better."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.recipe = ledger, ledger.recipe
        self.settings = ledger.recipe.mixture
        self.targets = tuple(ledger.recipe.targets)
        self.sign_G = np.array([1.0 if t.higher_is_better else -1.0 for t in ledger.recipe.targets.values()])
        self.estimated: dict[str, float] = {}

    @cached_property
    def simplex(self) -> Simplex:
        domains = self.recipe.domains
        cap_K = [
            1.0 if d.max_epochs is None else d.max_epochs * (d.samples or 0) / (self.recipe.samples or 1)
            for d in domains.values()
        ]
        groups = tuple(Group(g.domains, g.min_share, g.max_share) for g in self.settings.groups.values())
        return Simplex(tuple(domains), np.array([d.min_share for d in domains.values()]), np.array(cap_K), groups)

    @cached_property
    def size_K(self) -> np.ndarray:
        """Shares of the domains' sizes, or uniform ones where a size is not told."""
        sizes = [domain.samples for domain in self.recipe.domains.values()]
        if None in sizes:
            return self.simplex.uniform
        size_K = np.array(sizes, dtype=float)
        return self.simplex.project(size_K / size_K.sum())

    @cached_property
    def objective(self) -> Objective:
        """Without guard rails as long as the base is not told."""
        weight_G = np.ones(len(self.targets))
        if self.settings.objective in ("weighted", "pareto"):
            weight_G = np.array([target.weight for target in self.recipe.targets.values()])
        base = self.ledger.of_kind(BASE)
        max_fall_G = np.array([self.settings.guard_rails.get(name, np.inf) for name in self.targets])
        return Objective(
            kind=self.settings.objective,
            weight_G=weight_G / weight_G.sum(),
            base_G=self._values(base)[0] if base else np.zeros(len(self.targets)),
            max_fall_G=max_fall_G if base else np.full(len(self.targets), np.inf),
        )

    # --- numbers as arrays

    def _values(self, told: Sequence[Told]) -> np.ndarray:
        """[N, G]"""
        value_NG = np.array([[row.values[name] for name in self.targets] for row in told])
        return value_NG.reshape(-1, len(self.targets)) * self.sign_G

    def _errors(self, told: Sequence[Told]) -> np.ndarray:
        """[N, G] standard errors as told, or from the number of items where values are shares; NaN where not known."""
        value_NG = np.abs(self._values(told))
        error_NG = np.full(value_NG.shape, np.nan)
        for n, row in enumerate(told):
            for g, name in enumerate(self.targets):
                if name in row.standard_errors:
                    error_NG[n, g] = row.standard_errors[name]
                elif (count := row.items.get(name, 1)) > 1 and (value_NG[:, g] <= 1).all():
                    # exact for marks of 0 and 1, and no marks between them scatter more
                    error_NG[n, g] = math.sqrt(value_NG[n, g] * (1 - value_NG[n, g]) / (count - 1))
        return error_NG

    def rows(self) -> list[Candidate]:
        """All that was told, for the table of candidates."""
        told = self._sorted("merged") + self._sorted("trained")
        if not told:
            return []
        return [
            Candidate(row.kind, row.weight_K, value_G, error_G, sum(row.items.values()))
            for row, value_G, error_G in zip(told, self._values(told), self._errors(told), strict=True)
        ]

    def _sorted(self, kind: Kind) -> list[Told]:
        """In an order that does not depend on the order of telling."""
        return sorted(self.ledger.of_kind(kind), key=lambda row: row.shares)

    # --- surfaces

    @cached_property
    def merged(self) -> _Fitted | None:
        return self._fit(self._sorted("merged"))

    @cached_property
    def trained(self) -> _Fitted | None:
        return self._fit(self._sorted("trained"))

    def _fit(self, told: Sequence[Told]) -> _Fitted | None:
        if len(told) < LEAST:
            return None
        weight_NK = np.array([row.weight_K for row in told])
        value_NG, error_NG = self._values(told), self._errors(told)
        unknown_NG = np.isnan(error_NG)
        if not unknown_NG.any():
            return _Fitted(self.targets, self._posterior(weight_NK, value_NG, error_NG), weight_NK, value_NG, error_NG)
        fits = []
        for noise in NOISES:
            filled_NG = np.where(unknown_NG, noise * value_NG.std(axis=0), error_NG)
            posterior = self._posterior(weight_NK, value_NG, filled_NG)
            doubt = ((math.log(noise) - NOISE_PRIOR[0]) / NOISE_PRIOR[1]) ** 2 / 2
            fits.append((posterior.evidence - doubt, filled_NG, posterior))
        _, filled_NG, posterior = max(fits, key=lambda fit: fit[0])
        for g, name in enumerate(self.targets):
            if unknown_NG[:, g].any():
                self.estimated[name] = float(filled_NG[unknown_NG[:, g], g].max())
        return _Fitted(self.targets, posterior, weight_NK, value_NG, filled_NG)

    def _posterior(self, weight_NK: np.ndarray, value_NG: np.ndarray, error_NG: np.ndarray) -> Posterior:
        return Posterior(weight_NK, value_NG, error_NG**2, _flat(weight_NK, self.targets))

    @cached_property
    def evidence(self) -> TrainedMixtures:
        """Really trained mixtures, the experts among the merges included, and what merging says at their weights."""
        told = self._sorted("trained")
        known = {row.shares for row in told}
        if self.merged is not None:
            told += [row for row in self._sorted("merged") if max(row.shares) == STEPS and row.shares not in known]
        weight_NK = np.array([row.weight_K for row in told]).reshape(-1, len(self.recipe.domains))
        true_NG, true_error_NG = self._values(told), self._errors(told)
        if self.merged is None:
            merged_NG, merged_error_NG = true_NG, np.zeros_like(true_NG)
        else:
            merged_NG, merged_error_NG = self.merged.predict(weight_NK) if told else (true_NG, true_NG)
            is_vertex_N = weight_NK.max(axis=1, initial=0) == 1
            merged_NG = np.where(is_vertex_N[:, None], true_NG, merged_NG)
        usual_G = self._usual_errors()
        true_error_NG = np.where(np.isnan(true_error_NG), usual_G, true_error_NG)
        stand_in_NGI = _stand_ins(2 * len(told))
        true_NV, merged_NV = (
            np.concatenate([mean_NG[:, [g]] + error_NG[:, [g]] * noise_NI for g in range(len(self.targets))], axis=1)
            for mean_NG, error_NG, noise_NI in (
                (true_NG, true_error_NG, stand_in_NGI[: len(told)]),
                (merged_NG, merged_error_NG, stand_in_NGI[len(told) :]),
            )
        )
        items = stand_in_NGI.shape[1]
        return TrainedMixtures(
            targets=self.targets,
            weight_NK=weight_NK,
            true_NV=true_NV,
            merged_NV=true_NV if self.merged is None else merged_NV,
            target_V=np.repeat(np.arange(len(self.targets)), items),
            seed_sd_G=np.zeros(len(self.targets)),
            has_items=False,
        )

    def _usual_errors(self) -> np.ndarray:
        """[G] of the surface that there is, for a number whose error was not told."""
        fitted = self.trained if self.trained is not None else self.merged
        return np.zeros(len(self.targets)) if fitted is None else np.sqrt((fitted.error_NG**2).mean(axis=0))

    @cached_property
    def surface(self) -> Surface | None:
        """What is thought of training on any mixture; None while too little is told."""
        if self.merged is None:
            return self.trained
        searched_NG = self.merged.value_NG
        return calibrate(self.merged.predict, self.evidence, interaction_scale(searched_NG))

    @cached_property
    def decision(self) -> "_Decision | None":
        return None if self.surface is None else _Decision(self, self.surface)

    # --- what to measure next

    def propose(self, kind: Kind, count: int) -> list[Proposal]:
        """`count` new mixtures, and the base where guard rails need it."""
        proposals = []
        asked = {(p.kind, p.shares) for p in self.ledger.proposals} | {(t.kind, t.shares) for t in self.ledger.told}
        if self.settings.guard_rails and (BASE, ()) not in asked:
            proposals.append(Proposal(BASE, BASE, "base", ()))
        taken = [np.array(shares) / STEPS for known, shares in sorted(asked) if known == kind]
        ideas = self._ideas(kind, count + len(taken), taken)
        while count > 0 and (idea := next(ideas, None)) is not None:
            role, weight_K = idea
            shares = in_steps(weight_K)
            weight_K = np.array(shares) / STEPS
            if all(np.abs(weight_K - other_K).sum() / 2 > APART for other_K in taken):
                named = dict(zip(self.recipe.domains, shares, strict=True))
                proposals.append(Proposal(candidate_name(kind, named), kind, role, shares))
                taken.append(weight_K)
                count -= 1
        return proposals

    def _ideas(self, kind: Kind, count: int, taken: Sequence[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        if kind == "trained" and self.decision is not None:
            yield from self._runs(self.decision, count, taken)
        elif kind == "merged" and self.merged is not None:
            yield from self._tops(self.merged, count)
        else:
            yield "design", self.simplex.uniform
            if kind == "trained":
                yield "design", self.size_K
            else:
                for unit_K in np.eye(len(self.simplex.names)):
                    yield "design", self.simplex.maximise_linear(unit_K)
        beside_NK = np.array(taken) if taken else self.simplex.uniform[None]
        for weight_K in self.simplex.spread(count + len(taken), self.settings.seed, beside_NK=beside_NK):
            yield "spread", weight_K

    def _runs(self, decision: "_Decision", count: int, taken: Sequence[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        yield "pick", decision.pick_K
        trained_NK = np.array(taken) if taken else None
        for run in plan_runs(
            decision.surface,
            self.simplex,
            self.objective,
            pick_K=decision.pick_K,
            size_K=self.size_K,
            count=count,
            seed=self.settings.seed,
            trained_NK=trained_NK,
        ):
            yield run.role, run.weight_K

    def _tops(self, fitted: _Fitted, count: int) -> Iterator[tuple[str, np.ndarray]]:
        """The best mixtures of drawn surfaces, Thompson's way."""
        seed = self.settings.seed + len(fitted.weight_NK)
        draws = fitted.posterior.surfaces(DRAWS, seed)
        pool_NK = np.vstack([self.simplex.uniform, self.simplex.sample(POOL, seed)])
        value_SNG = draws.values(pool_NK)
        for s in range(min(DRAWS, 4 * count)):
            score_N = np.where(self.objective.allowed(value_SNG[s]), 0.0, -1e6) + self.objective.score(value_SNG[s])
            starts_NK = pool_NK[np.argsort(-score_N, kind="stable")[:STARTS]]
            yield "promising", best_mixture(self.simplex, self.objective, partial(draws.at, s), starts_NK)


class _Decision:
    """Which mixture is best by a surface, and how sure that is."""

    def __init__(self, thought: _Thought, surface: Surface) -> None:
        self.thought, self.surface = thought, surface
        self.simplex, self.objective, self.evidence = thought.simplex, thought.objective, thought.evidence
        self.settings, self.ledger = thought.settings, thought.ledger

    @cached_property
    def pick_K(self) -> np.ndarray:
        """The best mixture of the surface, or a trained one that is expected to be about as good."""
        best_K = recommend(self.surface, self.simplex, self.objective, seed=self.settings.seed)
        best_K = np.array(in_steps(best_K)) / STEPS
        ready_NK = np.array([w for w in self.evidence.weight_NK if self._is_allowed(w)])
        if len(ready_NK):
            far_N = np.abs(ready_NK - best_K).sum(axis=1) / 2
            if far_N.min() <= APART:
                return ready_NK[int(far_N.argmin())]
            value_NG = self.surface.predict(ready_NK)[0]
            score_N = np.where(self.objective.allowed(value_NG), self.objective.score(value_NG), -np.inf)
            if score_N.max() >= self._score(best_K) - REGRET_TOLERANCE * self._score_error(best_K):
                return ready_NK[int(score_N.argmax())]
        return best_K

    def _is_allowed(self, weight_K: np.ndarray) -> bool:
        return self.simplex.contains(weight_K, 1 / STEPS)

    def _score(self, weight_K: np.ndarray) -> float:
        return float(self.objective.score(self.surface.predict(weight_K[None])[0])[0])

    def _score_error(self, weight_K: np.ndarray) -> float:
        return float(self.objective.score(self.surface.draw(weight_K[None], 4 * DRAWS, self.settings.seed)).std())

    def _regret(self) -> float:
        pool_NK = np.vstack([self.pick_K, self.simplex.sample(POOL, self.settings.seed)])
        score_SN = self.objective.score(self.surface.draw(pool_NK, 4 * DRAWS, self.settings.seed))
        return float((score_SN.max(axis=1) - score_SN[:, 0]).mean())

    def advise(self) -> Advice:
        """The recommendation with its interval and verdict. Raises DataError where guard rails lack the base."""
        if self.settings.guard_rails and not self.ledger.of_kind(BASE):
            raise DataError(
                "mixture.guard_rails are about falls below the base, whose numbers were not told: tell them as the "
                f"candidate {BASE}. What you told is kept"
            )
        told_N = self.evidence.weight_NK
        pick = self.evidence.find(self.pick_K)
        uniform_K, size_K = (self._told_near(weight_K) for weight_K in (self.simplex.uniform, self.thought.size_K))
        eligible = sum(self._is_allowed(weight_K) for weight_K in told_N)
        verdict = judge(
            self.evidence,
            self.surface,
            self.objective,
            pick_K=self.pick_K,
            uniform_K=uniform_K,
            size_K=size_K,
            confidence=self.settings.confidence,
            seed=self.settings.seed,
            chosen_among=1 if pick is None else max(1, eligible),
        )
        if isinstance(self.surface, _Fitted):
            verdict = replace(verdict, agreement=self._left_out(self.surface))
        interval_K2 = weight_intervals(
            self.surface,
            self.simplex,
            self.objective,
            self.pick_K,
            confidence=self.settings.confidence,
            seed=self.settings.seed,
        )
        regret = self._regret()
        trained_on_K = uniform_K if verdict.verdict == "use uniform" else self.pick_K
        mixture = Mixture.judged(
            self._named(trained_on_K),
            {name: Interval(*pair) for name, pair in zip(self.simplex.names, interval_K2.tolist(), strict=True)},
            verdict,
            searched=self._named(self.pick_K),
            objective=self.settings.objective,
            metric="told",
            judged_by="told",
            spent=Spent(0, len(self.ledger.of_kind("merged")), len(self.ledger.of_kind("trained"))),
        )
        return Advice(
            mixture, regret, regret < REGRET_TOLERANCE * self._score_error(self.pick_K), self.thought.estimated
        )

    def _told_near(self, weight_K: np.ndarray) -> np.ndarray:
        """A trained mixture that stands for these weights, or the weights in steps."""
        told_NK = self.evidence.weight_NK
        weight_K = np.array(in_steps(weight_K)) / STEPS
        if len(told_NK):
            far_N = np.abs(told_NK - weight_K).sum(axis=1) / 2
            if far_N.min() <= NEAR:
                return told_NK[int(far_N.argmin())]
        return weight_K

    def _left_out(self, fitted: _Fitted) -> Agreement:
        """How the surface orders trained mixtures of which it has not seen the one it is asked about."""
        guess_N = true_N = np.empty(0)
        if len(fitted.weight_NK) > LEAST:
            guess_N = self.objective.score(fitted.left_out[0])
            true_N = self.objective.score(fitted.value_NG)
        spearman = mixture_agreement(guess_N, true_N, "spearman", confidence=self.settings.confidence)
        kendall = mixture_agreement(guess_N, true_N, "kendall", confidence=self.settings.confidence)
        return Agreement(spearman, kendall, spearman, kendall, None)

    def _named(self, weight_K: np.ndarray) -> dict[str, float]:
        return dict(zip(self.simplex.names, weight_K.tolist(), strict=True))


def _flat(weight_NK: np.ndarray, targets: Sequence[str]) -> Quadratics:
    """Of losses that nobody measured: they tell no mixture from another."""
    domains = weight_NK.shape[1]
    features = 1 + (domains - 1) + domains * (domains - 1) // 2
    return Quadratics(
        centre_K=np.full(domains, 1 / domains),
        basis_KZ=scipy.linalg.null_space(np.ones((1, domains))),
        coefficient_GP=np.zeros((len(targets), features)),
        covariance_PP=np.zeros((features, features)),
        scale_G=np.ones(len(targets)),
    )


def _stand_ins(rows: int) -> np.ndarray:
    """[rows, V] items for rows of mean zero and standard error one, no two of them correlated."""
    items = max(STAND_INS, rows + 1)
    drawn_VR = np.random.default_rng(0).standard_normal((items, rows + 1))
    drawn_VR[:, 0] = 1  # so that the others, orthogonal to it, have the mean zero
    basis_VR = np.linalg.qr(drawn_VR)[0][:, 1:]
    return basis_VR.T * math.sqrt(items * (items - 1))
