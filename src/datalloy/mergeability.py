"""What is known of the experts before any mixture is searched in; whether their merges can stand in for training, out.

Merged models rank mixtures well where experts are small, alike in size and trained alike, and each did learn its
domain. All that can be read off `<tau_i, tau_j>` (`tau` is expert minus base) and the experts' own losses for nothing,
before evaluations are spent. Unequal training settings are an error, since then merging has no meaning; the rest are
warnings in plain words. None of it is proof: only really trained mixtures are (`calibration`).

Sources of the thresholds: relative updates, DeMix (arXiv 2602.00747, Table 12: merged and trained agree at 3.1 %, the
merge picks the worst of four mixtures at 6.9 % and above; one pair of domains, so a warning and no law); norms,
DisTaC (arXiv 2508.01148); shrinking, MAGIC (arXiv 2512.19320); experts trained too little, arXiv 2602.04937 (10,000
samples do not rank, 50,000 do).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from datalloy.errors import ModelError
from datalloy.uncertainty import Interval, paired_interval

MAX_RELATIVE_UPDATE = 0.05
MAX_NORM_RATIO = 2.0
MAX_COSINE = 0.9
NEARLY_ORTHOGONAL = 0.3  # mean cosine between experts below which shrinking is worth a note
CONFIDENCE = 0.95
RESAMPLES = 2000

Setting = str | int | float | bool | None


@dataclass(frozen=True)
class Expert:
    """One expert as it was trained.

    `own_before`, `own_after`: losses under the base and under the expert of the same items of its own domain, which it
    was not trained on, nats per token; empty where there were none to spare. `settings`: what has to be equal for all
    experts (base, learning rate, adapter, rank ...), by name.
    """

    name: str
    steps: int
    own_before: Sequence[float]
    own_after: Sequence[float]
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class OwnGain:
    """Mean fall of an expert's loss on its own domain, nats per token, with its 95 % interval paired over items."""

    mean: float
    interval: Interval
    items: int


@dataclass(frozen=True)
class Finding:
    """What was found, what it means, and what to do about it."""

    found: str
    means: str
    advice: str

    def __str__(self) -> str:
        return f"{self.found}: {self.means}. To do: {self.advice}"


@dataclass(frozen=True)
class Mergeability:
    """Sizes and directions of K experts' updates, and what to be wary of.

    Args:
        relative_update: `|tau| / (|theta_0| + |theta_0 + tau|)` by expert, DeMix's measure, about half of
            `|tau| / |theta_0|`. The update is taken as orthogonal to the base, which matters for huge ones only.
        norm_ratio: the longest update over the shortest.
        cosine: between updates, K rows of K.
        shrinkage: length of the uniform merge's update over the mean length of the experts': 1 where all point one way,
            `1 / sqrt(K)` where they are orthogonal and equally long.
        own_gain: by expert; None where no item was kept from it.
        warnings: what casts doubt on the search. `notes` are usual, and explain what calibration is for.
    """

    names: tuple[str, ...]
    relative_update: Mapping[str, float]
    norm_ratio: float
    cosine: tuple[tuple[float, ...], ...]
    shrinkage: float
    own_gain: Mapping[str, OwnGain | None]
    warnings: tuple[Finding, ...]
    notes: tuple[Finding, ...]


def diagnose(experts: Sequence[Expert], gram_KK: np.ndarray, base_norm: float) -> Mergeability:
    """Whether merges of the experts can stand in for training on mixtures.

    Args:
        gram_KK: `<tau_i, tau_j>` over all trained tensors, in the order of `experts`.
        base_norm: `|theta_0|` over the same tensors.

    Raises ModelError where experts differ in a setting, where one did not move at all, and where the products are not
    finite.
    """
    _refuse_unequal_settings(experts)
    if not np.isfinite(gram_KK).all():
        raise ModelError("products of the experts' updates are not finite; an expert diverged, lower its learning rate")
    norm_K = np.sqrt(np.diagonal(gram_KK))
    if (norm_K == 0).any():
        name = experts[int(np.argmin(norm_K))].name
        raise ModelError(
            f"expert {name} is equal to the base: nothing was trained; look at its learning rate and steps"
        )
    relative_K = norm_K / (base_norm + np.hypot(base_norm, norm_K))
    cosine_KK = np.clip(gram_KK / np.outer(norm_K, norm_K), -1, 1)
    own_gain = {expert.name: _own_gain(expert) for expert in experts}
    shrinkage = float(np.sqrt(max(gram_KK.mean(), 0.0)) / norm_K.mean())
    return Mergeability(
        names=tuple(expert.name for expert in experts),
        relative_update={expert.name: float(size) for expert, size in zip(experts, relative_K, strict=True)},
        norm_ratio=float(norm_K.max() / norm_K.min()),
        cosine=tuple(tuple(float(value) for value in row_K) for row_K in cosine_KK),
        shrinkage=shrinkage,
        own_gain=own_gain,
        warnings=(
            *_large_updates(experts, relative_K),
            *_unequal_lengths(experts, norm_K),
            *_same_directions(experts, cosine_KK),
            *_nothing_learnt(own_gain),
            *_unequal_steps(experts),
        ),
        notes=tuple(_shrinking(cosine_KK, shrinkage)),
    )


def _refuse_unequal_settings(experts: Sequence[Expert]) -> None:
    first = experts[0]
    for other in experts[1:]:
        for key in sorted(first.settings.keys() | other.settings.keys()):
            values = [expert.settings.get(key, "absent") for expert in (first, other)]
            if values[0] != values[1]:
                raise ModelError(
                    f"experts {first.name} and {other.name} cannot be merged: {key} is {values[0]} for the one and "
                    f"{values[1]} for the other; train all experts from one base with one setting"
                )


def _large_updates(experts: Sequence[Expert], relative_K: np.ndarray) -> Iterator[Finding]:
    for expert, size in zip(experts, relative_K, strict=True):
        if size > MAX_RELATIVE_UPDATE:
            yield Finding(
                f"expert {expert.name} moved the weights by {size:.1%}, above {MAX_RELATIVE_UPDATE:.0%}",
                "merges stand in for training while updates are small: in DeMix they ranked well at 3 % and picked the "
                "worst of four at 7 %",
                "lower train.learning_rate or mixture.expert_samples, or compare with experts' earlier checkpoints "
                "(mixture.checkpoints)",
            )


def _unequal_lengths(experts: Sequence[Expert], norm_K: np.ndarray) -> Iterator[Finding]:
    longest, shortest = experts[int(norm_K.argmax())].name, experts[int(norm_K.argmin())].name
    ratio = norm_K.max() / norm_K.min()
    if ratio > MAX_NORM_RATIO:
        yield Finding(
            f"the update of expert {longest} is {ratio:.1f} times as long as that of {shortest}",
            f"a merge leans to {longest} by more than its weight says",
            "train all experts for equal steps; where steps are equal, look at the data of the two",
        )


def _same_directions(experts: Sequence[Expert], cosine_KK: np.ndarray) -> Iterator[Finding]:
    for first, second in itertools.combinations(range(len(experts)), 2):
        if cosine_KK[first, second] > MAX_COSINE:
            names = f"{experts[first].name} and {experts[second].name}"
            yield Finding(
                f"experts {names} went the same way (cosine {cosine_KK[first, second]:.2f})",
                "they are nearly one domain, and how weight is split between them cannot be told",
                f"join {names} into one domain, or read their weights as a sum",
            )


def _own_gain(expert: Expert) -> OwnGain | None:
    if len(expert.own_before) == 0:
        return None
    before_V, after_V = np.array(expert.own_before), np.array(expert.own_after)
    interval = paired_interval(before_V, after_V, confidence=CONFIDENCE, resamples=RESAMPLES, seed=0)
    return OwnGain(float((before_V - after_V).mean()), interval, len(before_V))


def _nothing_learnt(own_gain: Mapping[str, OwnGain | None]) -> Iterator[Finding]:
    for name, gain in own_gain.items():
        if gain is None:
            yield Finding(
                f"expert {name} has no items of its own domain that it was not trained on",
                "whether it learnt its domain cannot be seen",
                "give the domain more samples",
            )
        elif gain.interval.low <= 0:
            low, high = gain.interval
            yield Finding(
                f"expert {name} gained {gain.mean:.3g} nats a token on {gain.items} items of its own domain, "
                f"{CONFIDENCE:.0%} interval {low:.3g} to {high:.3g}",
                "it is not shown to have learnt its domain, and what its weight does in a merge may be noise",
                "train experts on more samples (mixture.expert_samples), or give the domain more",
            )


def _unequal_steps(experts: Sequence[Expert]) -> Iterator[Finding]:
    steps = [expert.steps for expert in experts]
    if min(steps) != max(steps):
        yield Finding(
            f"experts were trained for {min(steps)} to {max(steps)} steps",
            "a weight in the merge stands for another share of the training than of the data",
            "train all experts for equal steps, repeating the samples of small domains",
        )


def _shrinking(cosine_KK: np.ndarray, shrinkage: float) -> Iterator[Finding]:
    off_diagonal = cosine_KK[~np.eye(len(cosine_KK), dtype=bool)]
    if len(off_diagonal) and off_diagonal.mean() < NEARLY_ORTHOGONAL:
        yield Finding(
            f"the experts' updates are nearly orthogonal (mean cosine {off_diagonal.mean():.2f})",
            f"the update of the uniform merge is {shrinkage:.2f} times as long as an expert's; training on the mixture "
            "need not move less, so merged models tend to undervalue mixing",
            "believe in a corner only after real runs; calibration by them corrects this",
        )
