import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datalloy.errors import RecipeError
from datalloy.simplex import Group, Simplex, dirichlet, grid, largest_remainder

ABC = ("a", "b", "c")


def _limited() -> Simplex:
    return Simplex(ABC, np.array([0.1, 0, 0]), np.array([1, 0.5, 0.7]), (Group(("b", "c"), 0.3, 0.6),))


def test_a_grid_has_every_lattice_point_once():
    points_NK = grid(3, 8)
    assert len(points_NK) == math.comb(10, 2)
    assert len({tuple(row) for row in points_NK}) == len(points_NK)
    assert np.allclose(points_NK.sum(axis=1), 1)
    assert np.allclose(points_NK * 8, np.round(points_NK * 8))


def test_the_interior_grid_is_that_of_the_paper():
    assert len(grid(2, 8, interior=True)) == 7
    assert len(grid(3, 8, interior=True)) == 21
    assert grid(3, 8, interior=True).min() == 1 / 8


def test_dirichlet_draws_are_mixtures_and_repeat_by_seed():
    draws_NK = dirichlet(4, 50, seed=3)
    assert np.allclose(draws_NK.sum(axis=1), 1)
    assert np.array_equal(draws_NK, dirichlet(4, 50, seed=3))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda w: sum(w) > 0.01), st.integers(0, 10_000))
def test_counts_add_up_and_each_is_within_one_of_its_share(weights, total):
    weight_K = np.array(weights) / sum(weights)
    count_K = largest_remainder(weight_K, total)
    assert count_K.sum() == total
    assert (np.abs(count_K - weight_K * total) < 1 + 1e-6).all()
    assert (count_K[weight_K == 0] == 0).all()


def test_the_largest_remainders_are_rounded_up():
    assert largest_remainder(np.array([0.4, 0.35, 0.25]), 10).tolist() == [4, 4, 2]


def test_projection_onto_the_free_simplex_is_the_known_one():
    assert np.allclose(Simplex.free(ABC).project(np.array([0.9, 0.5, -0.3])), [0.7, 0.3, 0])


def test_what_is_feasible_is_its_own_projection():
    weight_K = np.array([0.5, 0.2, 0.3])
    assert np.array_equal(_limited().project(weight_K), weight_K)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1, 2), min_size=3, max_size=3))
def test_a_projection_is_feasible_and_no_feasible_point_is_nearer(point):
    simplex = _limited()
    point_K = np.array(point)
    nearest_K = simplex.project(point_K)
    assert simplex.contains(nearest_K, 1e-7)
    others_NK = simplex.sample(20, seed=0)
    assert (np.linalg.norm(others_NK - point_K, axis=1) >= np.linalg.norm(nearest_K - point_K) - 1e-6).all()


def test_the_uniform_mixture_is_moved_to_the_nearest_that_is_allowed():
    simplex = Simplex(ABC, np.zeros(3), np.array([0.2, 1, 1]))
    assert np.allclose(simplex.uniform, [0.2, 0.4, 0.4])


def test_a_linear_objective_ends_in_a_corner_within_the_limits():
    assert np.allclose(_limited().maximise_linear(np.array([0.0, 1.0, 2.0])), [0.4, 0, 0.6])


def test_a_quadratic_is_maximised_where_calculus_says():
    peak_K = np.array([0.5, 0.3, 0.2])
    found_K = Simplex.free(ABC).maximise(lambda w: (-float(((w - peak_K) ** 2).sum()), -2 * (w - peak_K)), np.eye(3))
    assert np.allclose(found_K, peak_K, atol=1e-5)


def test_the_best_of_several_local_maxima_is_found_from_several_starts():
    def two_peaks(weight_K):
        return float(weight_K[0] ** 2 + 2 * weight_K[1] ** 2), np.array([2 * weight_K[0], 4 * weight_K[1], 0.0])

    assert np.allclose(Simplex.free(ABC).maximise(two_peaks, np.eye(3)), [0, 1, 0])


@pytest.mark.parametrize("simplex", [Simplex.free(ABC), _limited()], ids=["free", "limited"])
def test_samples_and_spread_points_are_feasible_and_repeat_by_seed(simplex):
    for draw in (simplex.sample, simplex.spread):
        points_NK = draw(12, seed=1)
        assert points_NK.shape == (12, 3)
        assert all(simplex.contains(row, 1e-7) for row in points_NK)
        assert np.array_equal(points_NK, draw(12, seed=1))


def test_samples_of_a_limited_set_are_uniform_over_it():
    # caps that no mixture reaches leave the simplex as it is, but make it be sampled by hit and run
    almost_free = Simplex(ABC, np.zeros(3), np.ones(3), (Group(("a",), 0.0, 1.0),))
    mean_K = almost_free.sample(2000, seed=0).mean(axis=0)
    share = (almost_free.sample(2000, seed=0)[:, 0] > 0.5).mean()
    assert np.allclose(mean_K, 1 / 3, atol=0.02)
    assert share == pytest.approx(0.25, abs=0.04)


def test_spread_points_keep_further_apart_than_random_ones():
    def nearest(points_NK):
        return min(np.linalg.norm(a - b) for a, b in itertools.combinations(points_NK, 2))

    simplex = Simplex.free(ABC)
    assert nearest(simplex.spread(10, seed=0)) > 2 * nearest(simplex.sample(10, seed=0))


def test_spread_points_keep_away_from_what_is_there():
    simplex = Simplex.free(ABC)
    taken_NK = np.eye(3)
    points_NK = simplex.spread(3, seed=0, beside_NK=taken_NK)
    assert min(np.linalg.norm(a - b) for a in points_NK for b in taken_NK) > 0.4


@pytest.mark.parametrize(
    ("floor", "cap", "groups", "said"),
    [
        ([0.5, 0.4, 0.2], [1, 1, 1], (), "floors add up to 1.1"),
        ([0, 0, 0], [0.2, 0.3, 0.4], (), "can fill 0.9"),
        ([0.3, 0, 0], [0.2, 1, 1], (), "domain a must have at least 0.3"),
        ([0, 0, 0], [1, 1, 1], (Group(("d",), 0, 1),), "names d"),
        ([0.5, 0, 0], [1, 1, 1], (Group(("b", "c"), 0.6, 1),), "b \\+ c in \\[0.6, 1\\]"),
    ],
)
def test_limits_that_cannot_hold_together_are_refused_by_name(floor, cap, groups, said):
    with pytest.raises(RecipeError, match=said):
        Simplex(ABC, np.array(floor), np.array(cap), groups)


def test_one_domain_leaves_one_mixture():
    simplex = Simplex.free(("only",))
    assert simplex.uniform.tolist() == [1.0]
    assert simplex.sample(2, seed=0).tolist() == [[1.0], [1.0]]
    assert grid(1, 4).tolist() == [[1.0]]
