"""Numbers of several pools in, cells and tables of docs/evidence.md out.

Intervals are 95 % over pools and questions: pools are drawn with replacement, then the questions of each, paired where
two models answer the same ones. With three pools the draw of pools is coarse (ten different sets), so a narrow interval
is worth less than it looks, a wide one is not.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from datalloy.uncertainty import bootstrap_interval

RESAMPLES = 1000
Pools = Mapping[int, np.ndarray]  # right or wrong for every question, by pool


def by_pool(rows: Iterable[Mapping[str, Any]]) -> dict[int, np.ndarray]:
    """Right or wrong for every question, by pool, averaged over rows of one pool, [Q] each."""
    found: dict[int, list[np.ndarray]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append(np.array(list(row["right"]), dtype=float))
    return {seed: np.mean(same, axis=0) for seed, same in found.items()}


def interval(values: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean over pools and questions with its interval; `values`: one array of questions a pool."""
    counts, pools = _draws(tuple(len(value_Q) for value_Q in values))
    # [R, P]: a resampled mean of every pool for every place that a drawn pool can take
    means = np.stack([counts_RPQ.astype(float) @ v / len(v) for counts_RPQ, v in zip(counts, values, strict=True)])
    drawn = np.take_along_axis(means, pools[None], axis=0)[0].mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(np.mean([v.mean() for v in values])), float(low), float(high)


@lru_cache(maxsize=16)
def _draws(questions: tuple[int, ...]) -> tuple[list[np.ndarray], np.ndarray]:
    """How often each question of every pool is drawn, [R, P, Q] a pool, and which pools are, [R, P].

    The same for all cells with as many pools and questions, and most of their time.
    """
    rng = np.random.default_rng(0)
    shape = (RESAMPLES, len(questions))
    counts = [_counts(rng.integers(count, size=(*shape, count))) for count in questions]
    return counts, rng.integers(len(questions), size=shape)


def _counts(drawn_RPQ: np.ndarray) -> np.ndarray:
    """How often each number from 0 to Q - 1 stands in the last axis; never 256 times, of some hundred draws."""
    count = drawn_RPQ.shape[-1]
    rows = np.arange(drawn_RPQ.size // count).reshape(*drawn_RPQ.shape[:-1], 1) * count
    return np.bincount((drawn_RPQ + rows).ravel(), minlength=drawn_RPQ.size).reshape(drawn_RPQ.shape).astype(np.uint8)


def difference(one: Pools, other: Pools) -> str:
    """Mean of one minus the other with its interval, over the pools that both have; empty where there is none."""
    both = sorted(one.keys() & other.keys())
    if not both:
        return ""
    mean, low, high = interval([one[seed] - other[seed] for seed in both])
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def pooled(worlds: Iterable[tuple[Pools, Pools]]) -> str:
    """Mean over all pools of several worlds of one minus the other; the pools that both have are drawn anew.

    The luck of questions and of training is in the pools' means, so it is not drawn a second time.
    """
    gains = [float((one[seed] - other[seed]).mean()) for one, other in worlds for seed in sorted(one.keys() & other)]
    if not gains:
        return ""
    low, high = bootstrap_interval(np.array(gains), confidence=0.95, resamples=10_000, seed=0)
    return f"{np.mean(gains):+.3f} [{low:+.3f}, {high:+.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
