import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from datalloy.errors import RecipeError
from datalloy.objective import Objective, pareto_front

FREE = np.full(2, np.inf)
VALUES_MG = np.array([[0.2, 0.8], [0.6, 0.5], [0.1, 0.1]])


def _objective(kind="mean", weight_G=(0.75, 0.25), base_G=(0.0, 0.0), max_fall_G=FREE) -> Objective:
    return Objective(kind, np.array(weight_G), np.array(base_G), np.array(max_fall_G))


@pytest.mark.parametrize(
    ("kind", "scores"),
    [
        ("mean", [0.5, 0.55, 0.1]),
        ("weighted", [0.35, 0.575, 0.1]),
        ("worst", [0.2, 0.5, 0.1]),
        ("pareto", [0.35, 0.575, 0.1]),
    ],
)
def test_scores_are_what_their_kind_says(kind, scores):
    assert _objective(kind).score(VALUES_MG) == pytest.approx(scores)


@pytest.mark.parametrize("kind", ["mean", "weighted", "worst", "pareto"])
def test_draws_of_values_are_scored_as_their_rows_are(kind):
    objective = _objective(kind, max_fall_G=(0.0, 0.0), base_G=(0.15, 0.3))
    draws_SMG = np.stack([VALUES_MG, VALUES_MG[::-1]])
    for rows in (objective.score, objective.allowed):
        assert np.array_equal(rows(draws_SMG), [rows(VALUES_MG), rows(VALUES_MG[::-1])])


def test_a_mixture_is_allowed_down_to_the_guard_rail_itself():
    objective = _objective(base_G=(0.7, 0.0), max_fall_G=(0.1, np.inf))
    assert objective.allowed(np.array([[0.6, -9.0], [0.6 - 1e-6, 9.0]])).tolist() == [True, False]


def test_one_broken_guard_rail_is_enough():
    objective = _objective(base_G=(0.5, 0.5), max_fall_G=(0.1, 0.1))
    assert objective.allowed(np.array([[0.9, 0.39], [0.39, 0.9], [0.4, 0.4]])).tolist() == [False, False, True]


def test_without_guard_rails_the_base_needs_no_value():
    objective = _objective(base_G=(np.nan, np.nan))
    assert objective.allowed(VALUES_MG).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "best"}, "one of mean, weighted, worst, pareto, found 'best'"),
        ({"weight_G": (0.5, 0.6)}, "must sum to one"),
        ({"weight_G": (1.5, -0.5)}, "must not be negative"),
        ({"weight_G": (np.nan, 1.0)}, "must not be negative"),
        ({"weight_G": (1.0,)}, r"for each target, found arrays of \(1,\), \(2,\) and \(2,\)"),
        ({"max_fall_G": (-0.1, 0.0)}, "zero or more"),
        ({"max_fall_G": (np.nan, 0.0)}, "zero or more"),
        ({"base_G": (np.nan, 0.0), "max_fall_G": (0.1, np.inf)}, "finite value of the base"),
    ],
)
def test_objectives_without_sense_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        _objective(**change)


def test_the_front_of_known_rows():
    value_MG = np.array([[1.0, 0.0], [0.0, 1.0], [0.4, 0.4], [0.3, 0.4], [1.0, -1.0]])
    assert pareto_front(value_MG).tolist() == [True, True, True, False, False]


def test_equal_rows_are_on_the_front_together():
    assert pareto_front(np.array([[0.5, 0.5], [0.5, 0.5], [0.4, 0.5]])).tolist() == [True, True, False]


VALUES = arrays(float, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.integers(0, 4).map(float))


@given(VALUES)
def test_every_row_off_the_front_is_dominated_by_one_on_it(value_MG):
    front_M = pareto_front(value_MG)
    for row in value_MG[~front_M]:
        assert ((value_MG[front_M] >= row).all(axis=1) & (value_MG[front_M] > row).any(axis=1)).any()


@given(VALUES, st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order(value_MG, random):
    order = list(range(len(value_MG)))
    random.shuffle(order)
    assert np.array_equal(pareto_front(value_MG[order]), pareto_front(value_MG)[order])


@given(VALUES)
def test_the_best_by_any_mean_is_on_the_front(value_MG):
    assert pareto_front(value_MG)[value_MG.mean(axis=1).argmax()]
