"""Samples in, complexity times quality out: DEITA's evol score with any local model as the rater.

A model is asked how complex a request is, and how good an answer, and told to answer by one digit from 1 to 6. Its
answer is not sampled: the rating is the expected digit under its probabilities for the six, from one forward pass
(Liu et al. 2023, arXiv 2312.15685, sec. 2.2 and 2.3). A sample's rating is complexity times quality, summed over its
turns; the diverse part of DEITA is `select.diversity: threshold`.

Departs from the paper: the raters are models as they come, of any family that `vlm.py` loads, shown the pictures that
the sample shows; DEITA's own are two LLaMA models tuned on ratings by ChatGPT, for text. A model too small to judge
gives expectations near 3.5 for everything, and a ranking that is noise: look at the spread before you believe it.

Price: two forward passes a turn, of the turn and some hundred characters. Trap: a sum over turns favours long
conversations, as DEITA does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datalloy.encoding import length_batches
from datalloy.errors import ModelError
from datalloy.sample import Origin, Part, Sample, Turn
from datalloy.scorers.rating import Ratings
from datalloy.vlm import VLM, Encoded, EncodeError

LEVELS = ("1", "2", "3", "4", "5", "6")


@dataclass(frozen=True)
class Digits:
    """Where a model writes a digit that is its whole answer: the digits' tokens, and how many tokens come after."""

    token_ids: tuple[int, ...]
    tokens_after: int


class DeitaRater:
    """`complexity_prompt` has the place {request}, `quality_prompt` has {request} and, after it, {answer}."""

    def __init__(
        self, complexity: VLM, quality: VLM, *, complexity_prompt: str, quality_prompt: str, batch_size: int
    ) -> None:
        self._raters = {"complexity": complexity, "quality": quality}
        self._digits = {question: find_digits(vlm) for question, vlm in self._raters.items()}
        self._complexity_prompt, self._quality_prompt = complexity_prompt, quality_prompt
        self._batch_size = batch_size

    def rate(self, samples: Sequence[Sample]) -> Ratings:
        state_N = np.full(len(samples), "ok", dtype=object)
        asked: dict[str, list[Encoded]] = {question: [] for question in self._raters}
        owners: list[int] = []
        for n, sample in enumerate(samples):
            try:
                encoded = [self._encode(sample, request, answer) for request, answer in exchanges(sample)]
            except EncodeError as error:
                state_N[n] = error.reason
                continue
            owners += [n] * len(encoded)
            for question, items in asked.items():
                items += [item[question] for item in encoded]
        complexity, quality = (self._expected_digits(question, items) for question, items in asked.items())
        rating_N = np.zeros(len(samples))
        np.add.at(rating_N, owners, complexity * quality)
        state_N[(state_N == "ok") & ~np.isfinite(rating_N)] = "nonfinite"
        return Ratings(np.where(state_N == "ok", rating_N, np.nan), state_N)

    def _encode(self, sample: Sample, request: tuple[Part, ...], answer: str) -> dict[str, Encoded]:
        before, _, after = self._complexity_prompt.partition("{request}")
        between, _, last = self._quality_prompt.partition("{answer}")
        first, _, between = between.partition("{request}")
        questions = {
            "complexity": (before, *request, after),
            "quality": (first, *request, between + answer + last),
        }
        return {name: self._raters[name].encode(_answered(sample, parts)) for name, parts in questions.items()}

    def _expected_digits(self, question: str, asked: Sequence[Encoded]) -> np.ndarray:
        vlm, digits = self._raters[question], self._digits[question]
        expected = np.empty(len(asked))
        for chunk in length_batches(asked, self._batch_size):
            items = [asked[i] for i in chunk]
            position_B = torch.tensor([item.length - digits.tokens_after - 1 for item in items])
            logits_BL = vlm.logits_at(vlm.collate(items), position_B)[:, list(digits.token_ids)]
            probability_BL = torch.softmax(logits_BL.cpu().double(), dim=1).numpy()
            expected[chunk] = probability_BL @ np.arange(1, len(LEVELS) + 1)
        return expected


def exchanges(sample: Sample) -> list[tuple[tuple[Part, ...], str]]:
    """Each answer with its request: the user's parts since the answer before, after the pictures shown earlier."""
    found: list[tuple[tuple[Part, ...], str]] = []
    seen: list[Part] = []
    request: list[Part] = []
    for turn in sample.turns:
        if turn.role == "user":
            request += turn.parts
        elif turn.role == "assistant":
            found.append(((*seen, *request), turn.text))
            seen += [part for part in request if not isinstance(part, str)]
            request = []
    return found


def find_digits(vlm: VLM) -> Digits:
    """How this model writes the answers "1" to "6". Raises ModelError where they are not one token each, in one place.

    Families differ in what stands before an answer (a space, nothing) and in what closes it.
    """
    question = Sample("question", "", (Turn("user", ("question",)),), Origin(Path("deita"), 0), "")
    rows = [vlm.encode(_answered(question, ("question",), level)).inputs["input_ids"][0].tolist() for level in LEVELS]
    differing = [t for t, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1]
    if (
        len({len(row) for row in rows}) > 1
        or len(differing) != 1
        or len({row[differing[0]] for row in rows}) < len(rows)
    ):
        raise ModelError(
            f"{vlm.name} does not write each of the digits 1 to 6 as one token of its own, so their probabilities "
            "cannot be read off one forward pass; name other models in deita.complexity_model and deita.quality_model"
        )
    (position,) = differing
    return Digits(tuple(row[position] for row in rows), len(rows[0]) - position - 1)


def _answered(sample: Sample, parts: Sequence[Part], level: str = LEVELS[0]) -> Sample:
    """A question about the sample, answered: encoded like any conversation, so no template is written down here."""
    turns = (Turn("user", tuple(part for part in parts if part != "")), Turn("assistant", (level,)))
    return Sample(sample.id, sample.domain, turns, sample.origin, sample.content_hash)
