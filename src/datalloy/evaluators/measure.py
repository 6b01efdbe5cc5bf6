"""One row of the tidy table: what one evaluator found of one model by one metric, and the mean of items that it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Measure:
    """A value with what is known of its error.

    `variant` is the answer filter of a harness or the split of VLMEvalKit, "none" where there is one only. `n`: items
    that the value is over. `standard_error` is in the value's unit. None is what the file does not tell.
    """

    evaluator: str
    model: str
    task: str
    metric: str
    variant: str
    value: float
    standard_error: float | None
    n: int | None
    higher_is_better: bool | None


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of items and its standard error, which one item does not have."""
    value_V = np.array(values, dtype=float)
    error = float(value_V.std(ddof=1) / np.sqrt(len(value_V))) if len(value_V) > 1 else None
    return float(value_V.mean()), error


def as_number(value: Any) -> float | None:
    """A finite number as it is, None for anything else, such as "N/A"."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
