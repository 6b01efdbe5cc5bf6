"""Lengths of answers in, strata of like length out.

The loss of an answer says something of its length too, whether it is right or wrong. Samples of one stratum are alike
in length, so their ranks among each other say more about the answers.
"""

from collections.abc import Sequence

import numpy as np

MAX_STRATA = 5
MIN_STRATUM_SAMPLES = 20  # in a smaller stratum the place says little: of three samples the best has place 0.17


def length_strata(supervised_tokens_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
    """Stratum of answer length inside each group, [N] int from 0 (short) to at most 4.

    Quantile bins: each but the last holds at least a fifth of its group, all hold at least 20 samples, so a group of
    fewer than 40 is one stratum. Samples of equal length are never parted.
    """
    stratum_N = np.zeros(len(group_N), dtype=np.int64)
    for group in np.unique(group_N):
        in_group_N = group_N == group
        _, length_index, counts = np.unique(supervised_tokens_N[in_group_N], return_inverse=True, return_counts=True)
        stratum_N[in_group_N] = np.array(_close_bins(counts.tolist()))[length_index]
    return stratum_N


def _close_bins(counts: Sequence[int]) -> list[int]:
    """Bin of each length, shortest first, when a bin is closed as soon as it is full and enough is left for another."""
    least = max(sum(counts) / MAX_STRATA, MIN_STRATUM_SAMPLES)
    bins, size, left = [], 0, sum(counts)
    current = 0
    for count in counts:
        bins.append(current)
        size, left = size + count, left - count
        if size >= least and left >= MIN_STRATUM_SAMPLES:
            current, size = current + 1, 0
    return bins
