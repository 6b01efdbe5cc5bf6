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
    place_RP = np.empty((RESAMPLES, len(values)))
    for value_Q, (is_drawn_RP, counts_DQ) in zip(values, _draws(tuple(map(len, values))), strict=True):
        place_RP[is_drawn_RP] = counts_DQ @ value_Q / len(value_Q)
    low, high = np.quantile(place_RP.mean(axis=1), (0.025, 0.975))
    return float(np.mean([v.mean() for v in values])), float(low), float(high)


@lru_cache(maxsize=16)
def _draws(questions: tuple[int, ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each pool the places it is drawn for, [R, P], and how often each of its questions is drawn there, [D, Q].

    The same for all cells with as many pools and questions, and most of their time.
    """
    rng = np.random.default_rng(0)
    shape = (RESAMPLES, len(questions))
    counts = [_counts(rng.integers(count, size=(*shape, count))) for count in questions]
    pools_RP = rng.integers(len(questions), size=shape)
    return [(pools_RP == pool, counts_RPQ[pools_RP == pool].astype(float)) for pool, counts_RPQ in enumerate(counts)]


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


def pooled_gain(worlds: Iterable[tuple[Pools, Pools]]) -> tuple[float, float, float] | None:
    """Mean over all pools of several worlds of one minus the other, with its interval; none without a pool.

    The pools that both have are drawn anew. The luck of questions and of training is in their means, so it is not drawn
    a second time.
    """
    gains = [float((one[seed] - other[seed]).mean()) for one, other in worlds for seed in sorted(one.keys() & other)]
    if not gains:
        return None
    low, high = bootstrap_interval(np.array(gains), confidence=0.95, resamples=10_000, seed=0)
    return float(np.mean(gains)), low, high


def pooled(worlds: Iterable[tuple[Pools, Pools]]) -> str:
    """The same as a cell; empty without a pool."""
    gain = pooled_gain(worlds)
    return "" if gain is None else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*gain)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
