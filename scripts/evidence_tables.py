"""Numbers of several pools in, cells and tables of docs/evidence.md out.

Intervals are 95 % over pools and questions: pools are drawn with replacement, then the questions of each, paired where
two models answer the same ones. With three pools the draw of pools is coarse (ten different sets), so a narrow interval
is worth less than it looks, a wide one is not.
"""

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 1000


def interval(values: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Mean over pools and questions with its interval; `values`: one array of questions a pool."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        pools = rng.integers(len(values), size=len(values))
        drawn.append(np.mean([rng.choice(values[p], len(values[p])).mean() for p in pools]))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(np.mean([v.mean() for v in values])), float(low), float(high)


def difference(one: Mapping[int, np.ndarray], other: Mapping[int, np.ndarray]) -> str:
    """Mean of one minus the other with its interval, over the pools that both have; empty where there is none."""
    both = sorted(one.keys() & other.keys())
    if not both:
        return ""
    mean, low, high = interval([one[seed] - other[seed] for seed in both])
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
