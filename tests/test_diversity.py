"""Greedy diverse choice against exhaustive search and against greedy choice without shortcuts."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datalloy.diversity import UNIT, apart, facility_location
from datalloy.similarity import directions


def draw_directions(count, seed, *, width=3, copies=0):
    rng = np.random.default_rng(seed)
    found_ND = directions(rng.normal(size=(count, width)))
    return np.concatenate([found_ND, found_ND[:copies]])


def value(direction_ND, quality_N, chosen, weight, count):
    """What facility location maximises, from its definition, for at most `count` samples."""
    similarity_NN = np.rint(np.maximum(direction_ND @ direction_ND.T, 0) * UNIT) / UNIT
    coverage = similarity_NN[:, chosen].max(axis=1).mean()
    return weight * coverage + (1 - weight) * quality_N[chosen].sum() / np.sort(quality_N)[::-1][:count].sum()


def plain_greedy(direction_ND, quality_N, count, weight):
    chosen = []
    while len(chosen) < count:
        rest = [n for n in range(len(direction_ND)) if n not in chosen]
        values = [round(value(direction_ND, quality_N, [*chosen, n], weight, count), 12) for n in rest]
        chosen.append(rest[int(np.argmax(values))])
    return chosen


pools = st.tuples(st.integers(2, 7), st.integers(0, 10_000), st.integers(0, 3))


@given(pools, st.integers(1, 9), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_gains_of_earlier_rounds_change_no_choice(drawn, count, weight):
    samples, seed, copies = drawn
    direction_ND = draw_directions(samples, seed, copies=min(copies, samples))
    quality_N = 1 - (np.arange(len(direction_ND)) + 0.5) / len(direction_ND)
    count = min(count, len(direction_ND))
    found = facility_location(direction_ND, quality_N, count, diversity_weight=weight)
    assert found == plain_greedy(direction_ND, quality_N, count, weight)


@given(pools, st.integers(1, 4))
def test_greedy_choice_keeps_what_submodularity_promises(drawn, count):
    samples, seed, copies = drawn
    direction_ND = draw_directions(samples, seed, copies=min(copies, samples))
    quality_N = 1 - (np.arange(len(direction_ND)) + 0.5) / len(direction_ND)
    count = min(count, len(direction_ND))
    found = facility_location(direction_ND, quality_N, count, diversity_weight=0.5)
    everything = itertools.combinations(range(len(direction_ND)), count)
    best = max(value(direction_ND, quality_N, list(chosen), 0.5, count) for chosen in everything)
    assert value(direction_ND, quality_N, found, 0.5, count) >= (1 - 1 / np.e) * best - 1e-9


def test_without_weight_on_coverage_the_best_are_taken_in_their_order():
    direction_ND = draw_directions(20, seed=1)
    quality_N = np.random.default_rng(2).permutation(20) / 20 + 0.01
    found = facility_location(direction_ND, quality_N, 7, diversity_weight=0.0)
    assert found == np.argsort(-quality_N)[:7].tolist()


def test_coverage_takes_one_of_each_cluster():
    corners_CD = np.eye(4)
    direction_ND = np.repeat(corners_CD, [9, 5, 3, 1], axis=0)
    found = facility_location(direction_ND, np.full(18, 0.5), 4, diversity_weight=1.0)
    assert found == [0, 9, 14, 17]  # of copies the best ranked, the largest cluster first


def test_all_can_be_asked_for():
    found = facility_location(draw_directions(6, seed=0), np.full(6, 0.5), 99, diversity_weight=0.7)
    assert sorted(found) == list(range(6))


@given(pools, st.integers(1, 9), st.sampled_from([0.2, 0.9, 1.0]))
def test_what_is_taken_is_apart_and_what_is_passed_over_is_not(drawn, count, most):
    samples, seed, copies = drawn
    direction_ND = draw_directions(samples, seed, copies=min(copies, samples))
    taken, passed = apart(direction_ND, count, max_similarity=most)
    similarity_NN = np.rint(direction_ND @ direction_ND.T * UNIT) / UNIT
    most = np.rint(most * UNIT) / UNIT
    for a, b in itertools.combinations(taken, 2):
        assert similarity_NN[a, b] < most
    for position in passed:
        assert similarity_NN[position, [t for t in taken if t < position]].max() >= most
    walked = max([*taken, *passed]) + 1
    assert sorted([*taken, *passed]) == list(range(walked))
    assert len(taken) == count or walked == len(direction_ND)


def test_exact_copies_are_passed_over_even_at_a_similarity_of_one():
    direction_ND = np.repeat(draw_directions(5, seed=3, width=40).astype(np.float32), 2, axis=0)
    assert apart(direction_ND, 10, max_similarity=1.0) == ([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])


def test_directions_are_seen_from_the_mean_at_unit_length():
    state_ND = np.array([[9.0, 1], [9, 3], [9, 5]])
    assert directions(state_ND).tolist() == [[0, -1], [0, 0], [0, 1]]


def test_a_state_that_is_not_finite_is_similar_to_nothing_and_moves_no_other():
    state_ND = np.array([[9.0, 1], [np.nan, 2], [9, 5]])
    assert directions(state_ND).tolist() == [[0, -1], [0, 0], [0, 1]]
    assert directions(state_ND[1:2]).tolist() == [[0, 0]]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_zero_directions_can_be_chosen_from(weight):
    assert facility_location(np.zeros((3, 2)), np.array([0.9, 0.5, 0.1]), 2, diversity_weight=weight) == [0, 1]
