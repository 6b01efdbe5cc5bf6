"""A model and questions with known answers in, a mark for every item and the mean with its interval out.

Two ways to judge. Generation writes answers greedily and marks them with a metric; it is what users mean by quality,
slow and coarse. The answer loss asks how probable the known answer was; one forward pass, and smooth enough to rank
models that differ by little. Every stage that measures a model measures it here.

Results do not depend on the batch size up to rounding: losses within about 1e-5 nats in float32, and answers except
where two tokens are equally probable to that precision. Batches are laid out the same way each time, so equal calls
give equal bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from datalloy.config import Evaluate, Metric
from datalloy.errors import DataError, ModelError
from datalloy.metrics import METRICS
from datalloy.progress import track
from datalloy.sample import Sample
from datalloy.uncertainty import Interval, bootstrap_interval
from datalloy.vlm import VLM, Encoded

BOOTSTRAP_SEED = 0
CHUNK_BATCHES = (
    8  # prepared at a time: sorting by length inside a chunk saves padding, pixels of all items would not fit
)


@dataclass(frozen=True)
class Evaluation:
    """A model's marks on one set, item by item in the order of the set.

    `values_V` is in [0, 1], higher is better; for the metric `loss` it is the answer loss in nats per token, lower is
    better, and `predictions` is empty because nothing was generated.
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
    order = sorted(range(len(encoded)), key=lambda i: (encoded[i].length, i))
    loss_V = np.empty(len(encoded))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        loss_V[batch] = vlm.losses(vlm.collate([encoded[i] for i in batch])).double().cpu().numpy()
    return loss_V


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
        if metric == "loss":
            encoded = [vlm.encode(sample) for sample in chunk]
            values.extend(answer_losses(vlm, encoded, batch_size=settings.batch_size))
        else:
            written = vlm.generate(chunk, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
            values.extend(_mark(answer, sample, metric) for answer, sample in zip(written, chunk, strict=True))
            predictions.extend(written)
    values_V = np.array(values)
    if broken := np.flatnonzero(~np.isfinite(values_V)).tolist():
        raise ModelError(
            f"the answer loss of {vlm.name} is {values_V[broken[0]]} on sample {samples[broken[0]].id} and not finite "
            f"on {len(broken)} of {len(samples)}; its weights or its training diverged"
        )
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


def _mark(answer: str, sample: Sample, metric: Metric) -> float:
    try:
        return METRICS[metric](answer, sample.answer)
    except DataError as error:
        raise DataError(f"{sample.origin}: sample {sample.id}: {error}") from error
