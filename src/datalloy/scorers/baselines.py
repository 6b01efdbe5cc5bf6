"""Losses, lengths and seeds in, the scores that every utility has to beat out.

Utility here only means "kept first": these scores know no target and carry no sign, so nothing is ever called toxic
by them. All of them follow from one forward pass, hence from the columns of any other scorer's table; low loss by
neighbours needs one more.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata

from datalloy.config import Precision
from datalloy.scorers.one_step import ScoreBlock
from datalloy.similarity import States, median_of_neighbours
from datalloy.strata import MAX_STRATA, length_strata
from datalloy.vlm import VLM, Encoded


class Seen(NamedTuple):
    """What baselines may see: losses (nats per token), supervised tokens, domains, content hashes (once); a seed.

    `prompts`: gives where the proxy puts the prompts of these samples, [R, D], for a pass of its own over all.
    """

    loss_N: np.ndarray
    tokens_N: np.ndarray
    domain_N: np.ndarray
    keys: Iterable[str]
    seed: int
    prompts: States | None = None


def random_score(seen: Seen) -> np.ndarray:
    """A draw in [0, 1) that depends on the seed and the sample's content alone, not on its place in the file."""
    digests = (hashlib.sha256(f"{seen.seed} {key}".encode()).digest() for key in seen.keys)
    return np.fromiter((int.from_bytes(digest[:8]) / 2**64 for digest in digests), np.float64)


def low_loss(seen: Seen) -> np.ndarray:
    """What the proxy knows already comes first."""
    return -seen.loss_N


def low_loss_by_length(seen: Seen) -> np.ndarray:
    """What the proxy knows already among answers of like length: minus the place in a stratum of a domain, in (-1, 0).

    Low loss alone drops long answers, right or wrong, and with them what is hard. Here every stratum
    (`strata.length_strata`) gives the same share. Equal losses share a place; a missing loss stays missing.
    """
    cell_N = np.zeros(len(seen.loss_N), dtype=np.int64)
    known_N = np.isfinite(seen.loss_N)
    domain_N = np.unique(seen.domain_N[known_N], return_inverse=True)[1]
    cell_N[known_N] = domain_N * MAX_STRATA + length_strata(seen.tokens_N[known_N], domain_N)
    return -places(seen.loss_N, cell_N)


def places(value_N: np.ndarray, cell_N: np.ndarray) -> np.ndarray:
    """Place of each value in its cell, lowest first, [N] in (0, 1); equal ones share it, missing ones have none."""
    place_N = np.full(len(value_N), np.nan)
    known_N = np.isfinite(value_N)
    for cell in np.unique(cell_N[known_N]):
        rows = np.flatnonzero(known_N & (cell_N == cell))
        place_N[rows] = (rankdata(value_N[rows]) - 0.5) / len(rows)
    return place_N


def low_loss_by_neighbours(seen: Seen) -> np.ndarray:
    """What the proxy knows better than its like comes first: the median loss of its neighbours minus its own, nats.

    Neighbours (`similarity.py`) are samples of the domain whose prompts are alike to the proxy, so what makes a kind of
    question hard, or its answers long, is in their losses too. A missing loss stays missing and is nobody's neighbour.
    Zero for a sample that is alone in its domain.
    """
    if seen.prompts is None:
        raise ValueError("low_loss_by_neighbours needs to see the prompts")
    prompts, draw_N = seen.prompts, random_score(seen)
    gain_N = np.full(len(seen.loss_N), np.nan)
    known_N = np.isfinite(seen.loss_N)
    for domain in np.unique(seen.domain_N[known_N]):
        rows = np.flatnonzero(known_N & (seen.domain_N == domain))

        def of_domain(places: np.ndarray, rows: np.ndarray = rows) -> np.ndarray:
            return prompts(rows[places])

        median_N = median_of_neighbours(seen.loss_N[rows], of_domain, draw_N[rows])
        gain_N[rows] = median_N - seen.loss_N[rows]
    return gain_N


def right_and_wanted(seen: Seen, slope_N: np.ndarray) -> np.ndarray:
    """Two numbers: is the answer right, and do the targets want it? Places in the domain, added, [N] in (0, 2).

    Low loss by neighbours finds wrong answers and cannot tell what is of use; the gradient dot product, `slope_N`,
    finds what the targets ask for and takes wrong answers with it (docs/evidence.md).
    """
    return places(low_loss_by_neighbours(seen), seen.domain_N) + places(slope_N, seen.domain_N)


def high_loss(seen: Seen) -> np.ndarray:
    """What the proxy does not know comes first, noise included."""
    return seen.loss_N


def mid_loss(seen: Seen) -> np.ndarray:
    """What is nearest to the pool's median loss comes first."""
    return -np.abs(seen.loss_N - np.nanmedian(seen.loss_N))


def length(seen: Seen) -> np.ndarray:
    """Long answers come first."""
    return seen.tokens_N.astype(float)


MADE_FROM = {"right_and_wanted": "first_order"}  # of another scorer's utility; it says nothing of harm itself
WITHOUT_MODEL = {"random", "length"}  # need no loss, so no pass of the proxy

BASELINES: dict[str, Callable[[Seen], np.ndarray]] = {
    "random": random_score,
    "low_loss": low_loss,
    "low_loss_by_length": low_loss_by_length,
    "low_loss_by_neighbours": low_loss_by_neighbours,
    "mid_loss": mid_loss,
    "high_loss": high_loss,
    "length": length,
}


class LossScorer:
    """The forward pass that all baselines share. Utilities are filled in by `BASELINES` once all losses are known."""

    signed = False

    def __init__(self, vlm: VLM, *, targets: int, batch_size: int, precision: Precision = "float32") -> None:
        self.vlm, self.targets, self.batch_size, self.precision = vlm, targets, batch_size, precision

    def losses(self, samples: Sequence[Encoded]) -> np.ndarray:
        """Losses of the samples, [N], nats per token."""
        with torch.no_grad(), self.vlm.autocast(self.precision):
            losses = [self.vlm.losses(self.vlm.collate(batch)) for batch in self.batches(samples)]
            return np.array([loss for loss_B in losses for loss in loss_B.cpu().double().tolist()])

    def batches(self, samples: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
        for start in range(0, len(samples), self.batch_size):
            yield samples[start : start + self.batch_size]

    def score(self, samples: Sequence[Encoded]) -> ScoreBlock:
        zeros = np.zeros(len(samples))
        nothing_NG = np.zeros((len(samples), self.targets))
        return ScoreBlock(self.losses(samples), nothing_NG, zeros, np.full(len(samples), np.nan))
