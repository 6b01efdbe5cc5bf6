"""Vectors of samples in, who is like whom out: directions for cosines, and what samples like each of them have.

Trap: raw states of all samples point in nearly one direction, so that every cosine is near one. `directions` takes out
what the samples have in common; similarities then depend on the pool, and a threshold on them is one for this pool.

The loss of an answer says as much of the question as of the answer: whole kinds of question are hard for a model, right
answers and wrong ones alike. Held against the losses of samples that look the same to the model before the answer is
given, what belongs to the kind cancels. The median, because up to half of the neighbours may be wrong.

Price of neighbours: all samples are compared with at most `REFERENCES` of their group, seconds for ten thousand. Held
in memory are the states of these and of `ROWS` others, however many there are.
"""

from collections.abc import Callable

import numpy as np

States = Callable[[np.ndarray], np.ndarray]  # places of samples in, [R], their states out, [R, D]
NEIGHBOURS = 20
REFERENCES = 20_000  # of a group: larger ones look for neighbours among so many, drawn at random
ROWS = 1024  # compared at once


def directions(state_ND: np.ndarray) -> np.ndarray:
    """The states seen from their common mean, at unit length, [N, D].

    Zero, which is similar to nothing, where a state is the mean itself or not finite.
    """
    finite_N = np.isfinite(state_ND).all(axis=1)
    mean_D = state_ND[finite_N].mean(axis=0) if finite_N.any() else np.zeros_like(state_ND[0])
    return _seen_from(mean_D, state_ND)


def _seen_from(mean_D: np.ndarray, state_ND: np.ndarray) -> np.ndarray:
    finite_N1 = np.isfinite(state_ND).all(axis=1, keepdims=True)
    centred_ND = np.where(finite_N1, state_ND - mean_D, 0)
    norm_N1 = np.linalg.norm(centred_ND, axis=1, keepdims=True)
    return centred_ND / np.where(norm_N1 > 0, norm_N1, 1.0)


def median_of_neighbours(value_N: np.ndarray, states: States, draw_N: np.ndarray) -> np.ndarray:
    """Median of the values of the 20 most similar others of one group, [N]; see `neighbours`.

    The sample's own value where it is alone.
    """
    if len(value_N) == 1:
        return value_N.copy()
    return np.median(value_N[neighbours(states, draw_N)], axis=1)


def neighbours(states: States, draw_N: np.ndarray, count: int = NEIGHBOURS) -> np.ndarray:
    """Positions of the most similar others of one group, [N, count] in any order; of all others where there are fewer.

    Similarity is the cosine of the states, all finite, seen from the group's mean. `draw_N` are random numbers that
    belong to the samples, so that what is drawn does not depend on their order. A group has two samples at least.
    """
    blocks = np.split(np.arange(len(draw_N)), range(ROWS, len(draw_N), ROWS))
    mean_D = sum(states(rows).sum(axis=0, dtype=np.float64) for rows in blocks) / len(draw_N)
    drawn_R = np.argsort(draw_N, kind="stable")[:REFERENCES]  # in this order, which settles ties too
    reference_RD = _seen_from(mean_D, states(drawn_R))
    count = min(count, len(drawn_R) - 1)
    nearest_NK = np.empty((len(draw_N), count), dtype=np.int64)
    for rows in blocks:
        similarity_BR = _seen_from(mean_D, states(rows)) @ reference_RD.T
        similarity_BR[rows[:, None] == drawn_R] = -np.inf  # nobody is a neighbour of himself
        nearest_NK[rows] = drawn_R[np.argpartition(-similarity_BR, count - 1, axis=1)[:, :count]]
    return nearest_NK
