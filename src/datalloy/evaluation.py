"""A model and questions with known answers in, a mark for every item and the mean with its interval out.

Two ways to judge. Generation writes answers greedily and marks them with a metric; it is what users mean by quality,
slow and coarse. Scoring asks how probable the known answer was, as a loss or as a probability; one forward pass, and
smooth enough to rank models that differ by little. They can disagree: the mean loss hangs on the few items where the
model is sure of another answer, the mean probability counts them as wrong and no more. Every stage that measures a
model measures it here: `evaluate` one model, with intervals; `MetricItems` many candidates on the same items, which
are decoded, laid out and, where the vision tower is shared, looked at only once.

Results do not depend on the batch size up to rounding: losses within about 1e-5 nats in float32, and answers except
where two tokens are equally probable to that precision. Batches are laid out the same way each time, so equal calls
give equal bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from datalloy.config import Evaluate, Metric
from datalloy.encoding import length_batches
from datalloy.errors import DataError, ModelError
from datalloy.metrics import METRICS
from datalloy.progress import track
from datalloy.sample import Sample
from datalloy.target_items import TargetItems
from datalloy.uncertainty import Interval, bootstrap_interval
from datalloy.vision_features import VisionFeatures
from datalloy.vlm import VLM, Encoded, Prompts

BOOTSTRAP_SEED = 0
SCORED = ("loss", "answer_probability")  # metrics for which nothing is generated
CHUNK_BATCHES = (
    8  # prepared at a time: sorting by length inside a chunk saves padding, pixels of all items would not fit
)


@dataclass(frozen=True)
class Evaluation:
    """A model's marks on one set, item by item in the order of the set.

    `values_V` is in [0, 1], higher is better; for the metric `loss` it is the answer loss in nats per token, lower is
    better. For `loss` and `answer_probability` `predictions` is empty because nothing was generated.
    """

    metric: Metric
    values_V: np.ndarray
    mean: float
    interval: Interval
    predictions: tuple[str, ...]
    references: tuple[str, ...]
    ids: tuple[str, ...]


@torch.no_grad()
def answer_losses(vlm: VLM, encoded: Sequence[Encoded], *, batch_size: int) -> np.ndarray:
    """Mean loss of each item over its supervised tokens: [V] float64, nats per token, in the order given.

    Batches hold items of like length, shortest first, ties in the order given. A loss that is not finite is returned
    as it is: whether a broken candidate is an error is for the caller to say.
    """
    loss_V = np.empty(len(encoded))
    for batch in length_batches(encoded, batch_size):
        loss_V[batch] = vlm.losses(vlm.collate([encoded[i] for i in batch])).double().cpu().numpy()
    return loss_V


def answer_probabilities(loss_V: np.ndarray, tokens_V: np.ndarray) -> np.ndarray:
    """Probability of each whole answer, [V] in [0, 1], from its loss per token. Tiny for answers of many words."""
    return np.exp(-loss_V * tokens_V)


def count_tokens(encoded: Sequence[Encoded]) -> np.ndarray:
    """Supervised tokens of each item, [V]."""
    return np.array([item.supervised_tokens for item in encoded], dtype=int)


def without_writing(metric: Metric) -> Metric:
    """What judges in the place of a metric where answers are not to be written: cheaper, and less coarse than marks.

    Of metrics that mark answers, the probability of the right one.
    """
    return metric if metric in SCORED else "answer_probability"


def evaluate(vlm: VLM, samples: Sequence[Sample], metric: Metric, settings: Evaluate) -> Evaluation:
    """The marks of `vlm` on `samples`; a sample's reference is the text of its last answer.

    Raises DataError where there are no samples, one cannot be encoded or its reference does not suit the metric, and
    ModelError where a loss is not finite.
    """
    if not samples:
        raise DataError(f"nothing to evaluate {vlm.name} on: the set has no samples")
    values: list[float] = []
    predictions: list[str] = []
    size = CHUNK_BATCHES * settings.batch_size
    chunks = [samples[start : start + size] for start in range(0, len(samples), size)]
    for chunk in track(chunks, f"evaluating {metric}", len(chunks)):
        if metric in SCORED:
            encoded = [vlm.encode(sample) for sample in chunk]
            loss_V = answer_losses(vlm, encoded, batch_size=settings.batch_size)
            values.extend(loss_V if metric == "loss" else answer_probabilities(loss_V, count_tokens(encoded)))
        else:
            written = vlm.generate(chunk, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
            values.extend(_mark(answer, sample, metric) for answer, sample in zip(written, chunk, strict=True))
            predictions.extend(written)
    values_V = np.array(values)
    _check_losses(vlm, samples, values_V)
    interval = bootstrap_interval(
        values_V, confidence=settings.confidence, resamples=settings.resamples, seed=BOOTSTRAP_SEED
    )
    return Evaluation(
        metric=metric,
        values_V=values_V,
        mean=float(values_V.mean()),
        interval=interval,
        predictions=tuple(predictions),
        references=tuple(sample.answer for sample in samples),
        ids=tuple(sample.id for sample in samples),
    )


@dataclass(frozen=True)
class MetricItems:
    """The items of all targets, each judged by its target's metric, in fixed batches for many candidates.

    They are dealt to blocks for racing: `block_V` is the block of each item, and each block holds items of every
    target. Which item comes into which block depends on its content alone, not on the order of the samples. Targets
    come in the order given, items in the order of their samples. Marks equal those of `evaluate`.
    """

    names: tuple[str, ...]
    target_V: np.ndarray
    block_V: np.ndarray
    samples_V: tuple[Sample, ...] = field(repr=False)
    _metric_G: tuple[Metric, ...] = field(repr=False)
    _blocks: tuple["_Block", ...] = field(repr=False)

    @classmethod
    def lay_out(
        cls,
        vlm: VLM,
        samples: Mapping[str, Sequence[Sample]],
        metrics: Mapping[str, Metric],
        settings: Evaluate,
        *,
        blocks: int,
        vision: VisionFeatures | None = None,
    ) -> "MetricItems":
        """Lay out `samples` of each target. `vision`: all candidates have one vision tower; what it sees is kept there.

        Price: pixels of all items stay in memory, and with `vision` what the tower sees in them. Raises DataError
        where a target has fewer items than `blocks`, or an item cannot be encoded.
        """
        for name, group in samples.items():
            if len(group) < max(blocks, 1):
                raise DataError(f"target {name} has {len(group)} items, too few for {blocks} blocks with one in each")
        target_V = np.repeat(np.arange(len(samples)), [len(group) for group in samples.values()])
        block_V = np.concatenate([_deal(group, blocks) for group in samples.values()])
        samples_V = tuple(sample for group in samples.values() for sample in group)
        metric_G = tuple(metrics[name] for name in samples)
        is_scored_V = np.array([metric in SCORED for metric in metric_G])[target_V]
        is_loss_V = np.array([metric == "loss" for metric in metric_G])[target_V]
        return cls(
            names=tuple(samples),
            target_V=target_V,
            block_V=block_V,
            samples_V=samples_V,
            _metric_G=metric_G,
            _blocks=tuple(
                _Block.lay_out(
                    vlm,
                    samples_V,
                    scored_V=np.flatnonzero((block_V == block) & is_scored_V),
                    written_V=np.flatnonzero((block_V == block) & ~is_scored_V),
                    is_loss_V=is_loss_V,
                    settings=settings,
                    vision=vision,
                )
                for block in range(blocks)
            ),
        )

    def values(self, vlm: VLM, block: int | None = None) -> np.ndarray:
        """Values of the block's items, or of all, in the order of V: higher is better, the metric loss comes negated.

        Raises ModelError where a loss is not finite, DataError where a reference does not suit its metric.
        """
        value_V = np.empty(len(self.target_V))
        for part in self._blocks if block is None else (self._blocks[block],):
            value_V[part.scored_V] = part.scores(vlm)
            for v, answer in zip(part.written_V.tolist(), part.answers(vlm), strict=True):
                value_V[v] = _mark(answer, self.samples_V[v], self._metric_G[self.target_V[v]])
        shown_V = np.arange(len(value_V)) if block is None else np.flatnonzero(self.block_V == block)
        _check_losses(vlm, [self.samples_V[v] for v in shown_V], value_V[shown_V])
        return value_V[shown_V]


@dataclass(frozen=True)
class JudgedItems:
    """The items that a race is judged on: the mean of each one's mark and of the probability of its right answer.

    That is its accuracy by greedy decoding and by sampling, half each. The probability alone is smooth but favours what
    makes the model sure, such as few easy samples seen often; marks alone are coarse. Where the metric of a target asks
    for no answer to be written, its own value. Price: answers are written for the other targets.
    """

    _marks: MetricItems
    _scores: MetricItems | None  # None where nothing is written

    @classmethod
    def lay_out(
        cls, vlm: VLM, samples: Mapping[str, Sequence[Sample]], metrics: Mapping[str, Metric], settings: Evaluate
    ) -> "JudgedItems":
        """Raises DataError as `MetricItems.lay_out` does."""
        scored = {name: without_writing(metric) for name, metric in metrics.items()}
        marks = MetricItems.lay_out(vlm, samples, metrics, settings, blocks=1)
        return cls(marks, None if scored == metrics else MetricItems.lay_out(vlm, samples, scored, settings, blocks=1))

    @property
    def names(self) -> tuple[str, ...]:
        return self._marks.names

    @property
    def target_V(self) -> np.ndarray:
        return self._marks.target_V

    def values(self, vlm: VLM) -> np.ndarray:
        """Values of the items, [V], in the order of the targets: higher is better, the metric loss comes negated."""
        mark_V = self._marks.values(vlm)
        return mark_V if self._scores is None else (mark_V + self._scores.values(vlm)) / 2


@dataclass(frozen=True)
class _Block:
    """The items of one block in batches: those whose answers are scored, and those whose answers are written."""

    scored_V: np.ndarray
    written_V: np.ndarray
    is_loss_S: np.ndarray  # of those that are scored; the others are judged by the answer's probability
    tokens_S: np.ndarray
    items: TargetItems
    prompts: Prompts
    vision: VisionFeatures | None
    max_new_tokens: int

    @classmethod
    def lay_out(
        cls,
        vlm: VLM,
        samples_V: Sequence[Sample],
        *,
        scored_V: np.ndarray,
        written_V: np.ndarray,
        is_loss_V: np.ndarray,
        settings: Evaluate,
        vision: VisionFeatures | None,
    ) -> "_Block":
        encoded = [vlm.encode(samples_V[v]) for v in scored_V]
        size = settings.batch_size
        groups = {"scored": encoded}
        return cls(
            scored_V=scored_V,
            written_V=written_V,
            is_loss_S=is_loss_V[scored_V],
            tokens_S=count_tokens(encoded),
            items=TargetItems.lay_out(vlm, groups, {"scored": 1.0}, items_per_batch=size, vision=vision),
            prompts=vlm.lay_out_prompts([samples_V[v] for v in written_V], size),
            vision=vision,
            max_new_tokens=settings.max_new_tokens,
        )

    def scores(self, vlm: VLM) -> np.ndarray:
        loss_S = self.items.losses(vlm)
        return np.where(self.is_loss_S, -loss_S, answer_probabilities(loss_S, self.tokens_S))

    def answers(self, vlm: VLM) -> list[str]:
        return vlm.write_answers(self.prompts, max_new_tokens=self.max_new_tokens, vision=self.vision)


def _deal(samples: Sequence[Sample], blocks: int) -> np.ndarray:
    """The block of each sample, in the order given: dealt round robin in the order of their content."""
    order = sorted(range(len(samples)), key=lambda i: (samples[i].content_hash, i))
    block_V = np.empty(len(samples), dtype=int)
    block_V[order] = np.arange(len(samples)) % blocks
    return block_V


def _check_losses(vlm: VLM, samples: Sequence[Sample], values_V: np.ndarray) -> None:
    if broken := np.flatnonzero(~np.isfinite(values_V)).tolist():
        raise ModelError(
            f"the answer loss of {vlm.name} is not finite on {len(broken)} of {len(samples)} samples, the first is "
            f"{samples[broken[0]].id}; its weights or its training diverged"
        )


def _mark(answer: str, sample: Sample, metric: Metric) -> float:
    try:
        return METRICS[metric](answer, sample.answer)
    except DataError as error:
        raise DataError(f"{sample.origin}: sample {sample.id}: {error}") from error
