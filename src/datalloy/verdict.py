"""What a few real runs say about the advice in, a verdict on it out: trust, follow, use uniform, deploy the merge.

Two things make the best of a few runs look better than it is: the search, the calibration and the choice were made on
the same target items, and among trainings of which some were lucky. In the drawn pools of experiments/mixtures.py a
lead of a mixture over the others, measured by one training on half of the items, was found again by another training on
the other half to less than its half. So the pick is confirmed: it and uniform weights are trained again from other
seeds, and their gain is read on items that no choice was made on.

The gain's interval then covers the choice of items, by the bootstrap, and the luck of training, by Student's t: the
spread between trainings on one mixture is measured on the few that there are and drawn towards what is usual
(`USUAL_CORRELATION`), which counts as `USUAL_TRAININGS` more. Trap: what is usual was measured on this project's small
models. With one further training it weighs more than what was measured; with many it does not matter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from datalloy.calibration import SAME_MIXTURE, Surface, TrainedMixtures
from datalloy.errors import DataError
from datalloy.objective import Objective
from datalloy.uncertainty import (
    Coefficient,
    Interval,
    RankAgreement,
    mixture_agreement,
    percentile_interval,
    resampled_means,
    target_means,
    top_1_regret,
    top_1_regret_interval,
)

Source = Literal["confirmed", "measured", "predicted"]
Decision = Literal["trust", "follow", "use uniform", "deploy the merge"]

RESAMPLES = 2000
# Two trainings on one mixture differ on an item by luck that other items share to this part: of a target's mean, the
# variance between trainings is this times that of an item, however many items there are.
USUAL_CORRELATION = 0.015
USUAL_TRAININGS = 4  # degrees of freedom that the usual luck counts for
LIKELY = 0.9  # of a gain's chance, to be followed although it is not shown


@dataclass(frozen=True)
class Gain:
    """How much higher the objective is at the pick than elsewhere, in the values' unit.

    `confirmed`: by further trainings, on items that no choice was made on (`Confirmation`). `measured`: both were
    really trained, paired over items; the luck of training is not in the interval. `predicted`: from draws of the
    calibrated posterior. `training_sd`: standard deviation of the objective between trainings on one mixture, whatever
    the items; None where nothing was trained twice. `chance`: the part of the interval's draws that is above zero; None
    for a mixture against itself.
    """

    mean: float
    interval: Interval
    source: Source
    training_sd: float | None = None
    chance: float | None = None

    @property
    def is_likely(self) -> bool:
        """Nine chances in ten at least, by trainings and items that chose nothing."""
        return self.source == "confirmed" and self.chance is not None and self.chance >= LIKELY


@dataclass(frozen=True)
class Confirmation:
    """The pick and uniform weights trained R times each, by seeds alone different, on V items that decided nothing.

    Row 0 of `pick_RV` and `uniform_RV` is the training by which the pick was chosen: it tells how far trainings differ,
    but gains come from the further ones. Values are higher-is-better, `target_V` is the target of each item.

    Raises DataError for arrays that do not fit, and without a further training.
    """

    pick_RV: np.ndarray
    uniform_RV: np.ndarray
    target_V: np.ndarray

    def __post_init__(self) -> None:
        shape = self.pick_RV.shape
        if shape != self.uniform_RV.shape or shape[1:] != self.target_V.shape:
            raise DataError(
                f"trainings of the pick have values of shape {shape}, those of uniform weights "
                f"{self.uniform_RV.shape}, of {len(self.target_V)} items"
            )
        if len(self.pick_RV) < 2:
            raise DataError("a pick is confirmed by trainings beside the one that chose it, and there is none")

    @property
    def further(self) -> int:
        """Trainings of each that no choice was made on."""
        return len(self.pick_RV) - 1

    def gain(self, objective: Objective, *, confidence: float, seed: int) -> Gain:
        """Of the pick over uniform weights, as another training would have it on other items of the targets."""
        value_SV = np.concatenate([self.pick_RV[1:], self.uniform_RV[1:]])
        mean = self._difference(objective.score(target_means(value_SV, self.target_V)))
        drawn_RSG = resampled_means(value_SV, self.target_V, resamples=RESAMPLES, seed=seed)
        variance, freedom = self.luck(objective)
        luck_R = np.random.default_rng([seed, 1]).standard_t(freedom, RESAMPLES)
        gain_R = self._difference(objective.score(drawn_RSG).T) + math.sqrt(2 * variance / self.further) * luck_R
        return _drawn_gain(float(mean), gain_R, confidence, "confirmed", math.sqrt(variance))

    def _difference(self, score_S: np.ndarray) -> np.ndarray:
        """Of the means over trainings, the pick's first; further axes are kept."""
        return score_S[: self.further].mean(axis=0) - score_S[self.further :].mean(axis=0)

    def luck(self, objective: Objective) -> tuple[float, int]:
        """Variance of the objective between trainings on one mixture, beyond that of items, and degrees of freedom."""
        trainings_XRV = np.stack([self.pick_RV, self.uniform_RV])
        item_G = np.array(
            [trainings_XRV[:, :, self.target_V == g].var(axis=1, ddof=1).mean() for g in np.unique(self.target_V)]
        )
        of_items = _of_objective(objective, item_G / np.bincount(self.target_V))
        score_XR = np.stack([objective.score(target_means(value_RV, self.target_V)) for value_RV in trainings_XRV])
        freedom = 2 * self.further
        measured = max(0.0, float(score_XR.var(axis=1, ddof=1).mean()) - of_items)
        usual = USUAL_CORRELATION * _of_objective(objective, item_G)
        in_all = freedom + USUAL_TRAININGS
        return (freedom * measured + USUAL_TRAININGS * usual) / in_all, in_all


def _of_objective(objective: Objective, variance_G: np.ndarray) -> float:
    """Variance of the objective where targets vary on their own."""
    if objective.kind == "worst":
        return float(variance_G.max())
    weight_G = np.full(len(variance_G), 1 / len(variance_G)) if objective.kind == "mean" else objective.weight_G
    return float(weight_G**2 @ variance_G)


@dataclass(frozen=True)
class Regret:
    """What trusting the merged models alone would have lost among the trained mixtures, in the values' unit."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Agreement:
    """How well merged models ordered the really trained mixtures by the objective.

    At a vertex merged and trained are one model, so that vertices agree for nothing: without them is the honest
    number, with them the one that covers the whole simplex. `regret` is None where nothing was trained.
    """

    spearman: RankAgreement
    kendall: RankAgreement
    spearman_without_vertices: RankAgreement
    kendall_without_vertices: RankAgreement
    regret: Regret | None


@dataclass(frozen=True)
class Verdict:
    """What to do, how sure that is, and why, for one objective at one confidence.

    trust: the gain over uniform weights is above zero with its whole interval. follow: it is not, but it is confirmed
    and has nine chances in ten to be above zero. use uniform: neither, or the pick breaks a guard rail. deploy the
    merge: the merged model at the pick scores above every trained model, each beyond its paired interval; `merge_score`
    is then its objective and else None, and `trusted` still speaks of training on the pick.

    What the intervals cover stands in `Gain`. Gains that are not confirmed lean to the high side: the pick was chosen
    by the very trainings that are compared.
    """

    verdict: Decision
    trusted: bool
    reason: str
    confidence: float
    gain_vs_uniform: Gain
    gain_vs_size_proportional: Gain
    agreement: Agreement
    merge_score: float | None


def judge(
    trained: TrainedMixtures,
    calibration: Surface,
    objective: Objective,
    *,
    pick_K: np.ndarray,
    uniform_K: np.ndarray,
    size_K: np.ndarray,
    confidence: float,
    seed: int,
    chosen_among: int = 1,
    confirmation: Confirmation | None = None,
) -> Verdict:
    """The verdict on `pick_K`, by the really trained mixtures, experts among them, and the calibrated surface.

    Args:
        uniform_K, size_K: what the pick is held against: uniform weights and the shares of the domains' sizes, or what
            is nearest to them among the feasible mixtures.
        chosen_among: from how many trained mixtures the pick was chosen by their results. The best of several looks
            better than it is, so the intervals of gains that are not confirmed are widened until all would hold
            together (Bonferroni). Simulated with three equally good mixtures and uniform weights, this trusted 4 % of
            the picks instead of 10 %.
        confirmation: further trainings of the pick and of uniform weights; the gain over uniform weights is theirs.
    """
    scores = _score(trained, objective, seed)
    together = 1 - (1 - confidence) / chosen_among
    over_uniform, over_size = (
        _gain(trained, scores, calibration, objective, np.stack([pick_K, base_K]), together, seed)
        for base_K in (uniform_K, size_K)
    )
    if confirmation is not None:
        over_uniform = confirmation.gain(objective, confidence=confidence, seed=seed)
    pick = trained.find(pick_K)
    value_G = calibration.predict(pick_K[None])[0][0] if pick is None else trained.true_NG[pick]
    broken = None if objective.allowed(value_G) else _broken_rail(trained.targets, objective, value_G)
    is_merge_best = pick is not None and _is_merge_best(trained, scores, objective, pick, confidence)
    trusted = broken is None and over_uniform.interval.low > 0
    is_likely = broken is None and over_uniform.is_likely
    reason = broken or _gain_in_words(
        over_uniform, trained, confidence, confirmation, is_uniform=_is_same(pick_K, uniform_K)
    )
    merge_score = float(scores.merged_N[pick]) if is_merge_best else None
    if merge_score is not None:
        reason = (
            f"The merged model at the pick scores {merge_score:.4f}, above every trained model (the best has "
            f"{scores.true_N.max():.4f}) by more than its {confidence:.0%} interval; of training: {reason}"
        )
    return Verdict(
        verdict=_decide(is_merge_best=is_merge_best, trusted=trusted, is_likely=is_likely),
        trusted=trusted,
        reason=reason,
        confidence=confidence,
        gain_vs_uniform=over_uniform,
        gain_vs_size_proportional=over_size,
        agreement=_agree(scores, ~trained.is_vertex_N, confidence),
        merge_score=merge_score,
    )


def _decide(*, is_merge_best: bool, trusted: bool, is_likely: bool) -> Decision:
    if is_merge_best:
        return "deploy the merge"
    if trusted:
        return "trust"
    return "follow" if is_likely else "use uniform"


@dataclass(frozen=True)
class _Scores:
    """The objective of N trained mixtures and of the merges at their weights; the same for R draws of the items."""

    true_N: np.ndarray
    merged_N: np.ndarray
    true_RN: np.ndarray
    merged_RN: np.ndarray


def _score(trained: TrainedMixtures, objective: Objective, seed: int) -> _Scores:
    true_RNG, merged_RNG = (
        resampled_means(value_NV, trained.target_V, resamples=RESAMPLES, seed=seed)  # the same items for both
        for value_NV in (trained.true_NV, trained.merged_NV)
    )
    true_RNG += trained.seed_sd_G * np.random.default_rng([seed, 1]).standard_normal(true_RNG.shape)
    return _Scores(
        objective.score(trained.true_NG),
        objective.score(trained.merged_NG),
        objective.score(true_RNG),
        objective.score(merged_RNG),
    )


def _gain(
    trained: TrainedMixtures,
    scores: _Scores,
    calibration: Surface,
    objective: Objective,
    weight_MK: np.ndarray,
    confidence: float,
    seed: int,
) -> Gain:
    """Of the first of two mixtures over the second."""
    if _is_same(*weight_MK):
        return Gain(0.0, Interval(0.0, 0.0), "measured")
    first, second = (trained.find(weight_K) for weight_K in weight_MK)
    if first is None or second is None:
        drawn_RM = objective.score(calibration.draw(weight_MK, RESAMPLES, seed))
        gain_R = drawn_RM[:, 0] - drawn_RM[:, 1]
        return _drawn_gain(float(gain_R.mean()), gain_R, confidence, "predicted")
    gain_R = scores.true_RN[:, first] - scores.true_RN[:, second]
    mean = float(scores.true_N[first] - scores.true_N[second])
    return _drawn_gain(mean, gain_R, confidence, "measured")


def _drawn_gain(
    mean: float, gain_R: np.ndarray, confidence: float, source: Source, training_sd: float | None = None
) -> Gain:
    return Gain(mean, percentile_interval(gain_R, confidence), source, training_sd, float((gain_R > 0).mean()))


def _is_merge_best(
    trained: TrainedMixtures, scores: _Scores, objective: Objective, pick: int, confidence: float
) -> bool:
    """Whether the merge at the pick beats every trained model; it has to beat all, so luck with one is no help."""
    margin_RN = scores.merged_RN[:, [pick]] - scores.true_RN
    lows = [percentile_interval(margin_R, confidence).low for margin_R in margin_RN.T]
    return min(lows) > 0 and bool(objective.allowed(trained.merged_NG[pick]))


def _agree(scores: _Scores, is_inner_N: np.ndarray, confidence: float) -> Agreement:
    def agreement(rows: np.ndarray, coefficient: Coefficient) -> RankAgreement:
        return mixture_agreement(
            scores.merged_N[rows],
            scores.true_N[rows],
            coefficient,
            confidence=confidence,
            a_RN=scores.merged_RN[:, rows],
            b_RN=scores.true_RN[:, rows],
        )

    every_N = np.ones_like(is_inner_N)
    return Agreement(
        agreement(every_N, "spearman"),
        agreement(every_N, "kendall"),
        agreement(is_inner_N, "spearman"),
        agreement(is_inner_N, "kendall"),
        _regret(scores, confidence) if len(every_N) else None,
    )


def _regret(scores: _Scores, confidence: float) -> Regret:
    interval = top_1_regret_interval(
        scores.merged_N,
        scores.true_N,
        surrogate_RN=scores.merged_RN,
        true_RN=scores.true_RN,
        confidence=confidence,
    )
    return Regret(top_1_regret(scores.merged_N, scores.true_N), interval)


def _is_same(weight_K: np.ndarray, other_K: np.ndarray) -> bool:
    return bool((np.abs(weight_K - other_K) <= SAME_MIXTURE).all())


def _broken_rail(targets: Sequence[str], objective: Objective, value_G: np.ndarray) -> str:
    fall_G = objective.base_G - value_G
    worst = int(np.argmax(fall_G - objective.max_fall_G))
    return (
        f"Training on the pick lets {targets[worst]} fall {fall_G[worst]:.4f} below the base model, "
        f"its guard rail allows {objective.max_fall_G[worst]:.4f}."
    )


def _gain_in_words(
    gain: Gain, trained: TrainedMixtures, confidence: float, confirmation: Confirmation | None, *, is_uniform: bool
) -> str:
    if is_uniform:
        return "The pick is the uniform mixture itself."
    low, high = gain.interval
    source = f"measured on {len(trained.target_V)} items" if trained.has_items else "from the standard errors told"
    if gain.source == "predicted":
        source = f"predicted from {_counted(int((~trained.is_vertex_N).sum()), 'real run')}"
    if confirmation is not None:
        times = _counted(confirmation.further, "further training")
        source = f"confirmed by {times} of each on {len(confirmation.target_V)} items that decided nothing"
    numbers = f"{gain.mean:+.4f} ({confidence:.0%} interval {low:+.4f} to {high:+.4f}, {source})"
    if low > 0:
        return f"Training on the pick gains {numbers} over uniform weights."
    if high < 0:
        return f"Training on the pick loses against uniform weights: {numbers}."
    if gain.is_likely:
        return f"A gain over uniform weights is likely ({gain.chance:.0%}), but not shown: it is {numbers}."
    return f"A gain over uniform weights is not shown: it is {numbers}."


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
