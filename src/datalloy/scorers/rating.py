"""Samples in, ratings out: what scorers that read a sample have in common, unlike those that measure its effect.

A rating knows no target and carries no sign: only the order means something. A sample that could not be rated has a
state word and no number; it is not ranked, and nothing is put in its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from datalloy.sample import Sample


@dataclass(frozen=True)
class Ratings:
    """Ratings of n samples, higher is better; NaN exactly where `state_N` is not "ok"."""

    rating_N: np.ndarray
    state_N: np.ndarray


class Rater(Protocol):
    """Rates samples, in the order they are given; no rating depends on who else is in the call."""

    def rate(self, samples: Sequence[Sample]) -> Ratings: ...
