"""Ranked samples with their directions in, a diverse part of them out.

Point-wise scores keep near-copies: where one sample is good so are its twins, and the second teaches little (DESIGN
2.1, redundancy). Two ways to choose with an eye on what is chosen already, both greedy, exact and deterministic:

- `apart`: walk down the ranking and pass over what is too similar to something taken (DEITA's filter, arXiv
  2312.15685, sec. 2.4).
- `facility_location`: take the sample that adds most to `(1 - b) * quality + b * coverage`, where coverage is how
  similar the pool's samples are to the nearest chosen one. The sum is monotone and submodular, so greedy choice reaches
  63 % of the best possible value at least (Nemhauser et al. 1978), in practice nearly all of it.

Similarity is the cosine, and none below zero. It is counted in whole units of 2^-20: sums of whole numbers do not
depend on the order of addition, so equal gains are equal and go to the better rank.

Price: `apart` N x (samples taken) products of directions, facility location N x N for its first gains and N for every
gain that has to be looked at again, some dozens for each sample chosen. Similarities are held where they fit half a
gigabyte, up to 11,000 samples, and beyond that computed again whenever they are looked at, which is slower by far.
"""

import heapq
from collections.abc import Iterator

import numpy as np

UNIT = 1 << 20  # similarities are multiples of one over this
HELD = 1 << 27  # similarities that are kept at most
BLOCK = 1 << 22  # similarities that are computed at a time


def apart(direction_ND: np.ndarray, count: int, *, max_similarity: float) -> tuple[list[int], list[int]]:
    """Walk down the ranking until `count` are taken: positions taken, and positions passed over as too similar.

    Args:
        direction_ND: unit vectors in the order of the ranking, best first.
        max_similarity: the cosine with a sample taken, in (0, 1], from which on another is passed over.
    """
    nearest_N = np.zeros(len(direction_ND), dtype=np.int32)  # each one's similarity to the nearest taken
    too_near = round(max_similarity * UNIT)
    similarities = Similarities(direction_ND, held=False)
    taken: list[int] = []
    passed: list[int] = []
    for position in range(len(direction_ND)):
        if len(taken) == count:
            break
        if nearest_N[position] >= too_near:
            passed.append(position)
            continue
        taken.append(position)
        np.maximum(nearest_N, similarities.of(position), out=nearest_N)
    return taken, passed


def facility_location(
    direction_ND: np.ndarray, quality_N: np.ndarray, count: int, *, diversity_weight: float
) -> list[int]:
    """`count` positions in the order greedy choice takes them.

    Args:
        direction_ND: unit vectors, the better ranked first, to whom equal gains go.
        quality_N: what each is worth by itself, in (0, 1].
        diversity_weight: b above; 0 takes the `count` of highest quality, 1 looks at coverage alone.
    """
    total = len(direction_ND)
    best_quality = np.sort(quality_N)[::-1][:count].sum()
    nearest_N = np.zeros(total, dtype=np.int32)

    def value(position: int, coverage: int) -> float:
        covered, good = coverage / (UNIT * total), quality_N[position] / best_quality
        return diversity_weight * covered + (1 - diversity_weight) * good

    # gains never grow while more is chosen, so a gain of an earlier round bounds that of now from above
    similarities = Similarities(direction_ND, held=total**2 <= HELD)
    first_N = similarities.sums()
    bounds = [(-value(n, int(first_N[n])), n, 0) for n in range(total)]
    heapq.heapify(bounds)
    chosen: list[int] = []
    while len(chosen) < min(count, total):
        _, position, seen = heapq.heappop(bounds)
        similarity_N = similarities.of(position)
        if seen < len(chosen):
            gain = int(np.maximum(similarity_N - nearest_N, 0).sum(dtype=np.int64))
            heapq.heappush(bounds, (-value(position, gain), position, len(chosen)))
            continue
        chosen.append(position)
        np.maximum(nearest_N, similarity_N, out=nearest_N)
    return chosen


class Similarities:
    """Cosines of all with all in whole units, negative ones as zero. `held`: each is computed once and kept."""

    def __init__(self, direction_ND: np.ndarray, *, held: bool) -> None:
        self._direction_ND = direction_ND
        self._held_NN = np.concatenate(list(self._blocks())) if held else None

    def of(self, position: int) -> np.ndarray:
        """With one sample, [N]."""
        if self._held_NN is not None:
            return self._held_NN[position]
        return self._rows(slice(position, position + 1))[0]

    def sums(self) -> np.ndarray:
        """Each sample's similarities summed over all, [N]."""
        blocks = self._blocks() if self._held_NN is None else [self._held_NN]
        return np.concatenate([block.sum(axis=1, dtype=np.int64) for block in blocks])

    def _blocks(self) -> Iterator[np.ndarray]:
        total = len(self._direction_ND)
        size = max(1, BLOCK // total)
        return (self._rows(slice(start, start + size)) for start in range(0, total, size))

    def _rows(self, rows: slice) -> np.ndarray:
        cosine_RN = self._direction_ND[rows] @ self._direction_ND.T
        return np.rint(np.maximum(cosine_RN, 0) * UNIT).astype(np.int32)
