"""Surfaces whose best mixture is known by hand."""

import numpy as np
import pytest

from datalloy.objective import Objective
from datalloy.optimum import best_mixture
from datalloy.simplex import Group, Simplex

ABC = Simplex.free(("a", "b", "c"))
BEST_GK = np.array([[0.6, 0.2, 0.2], [0.2, 0.6, 0.2]])


def bowls(weight_K):
    """Two targets, each one at its best mixture and falling with the squared distance from it."""
    away_GK = weight_K - BEST_GK
    return 1 - (away_GK**2).sum(axis=1), -2 * away_GK


def _objective(kind="mean", base_G=(0.0, 0.0), max_fall_G=(np.inf, np.inf), weight_G=(0.5, 0.5)) -> Objective:
    return Objective(kind, np.array(weight_G), np.array(base_G), np.array(max_fall_G))


def _best(objective, simplex=ABC, surface=bowls):
    return best_mixture(simplex, objective, surface, np.vstack([simplex.uniform, simplex.sample(2, 0)]))


def test_the_mean_of_bowls_is_best_in_the_middle():
    assert _best(_objective()) == pytest.approx([0.4, 0.4, 0.2], abs=1e-5)


def test_weights_move_the_optimum_in_their_proportion():
    assert _best(_objective("weighted", weight_G=(0.75, 0.25))) == pytest.approx([0.5, 0.3, 0.2], abs=1e-5)


def test_the_worst_target_is_lifted_until_another_is_as_low():
    def lowered(weight_K):
        value_G, slope_GK = bowls(weight_K)
        return value_G - np.array([0.08, 0]), slope_GK

    found_K = _best(_objective("worst"), surface=lowered)
    value_G = lowered(found_K)[0]
    assert value_G[0] == pytest.approx(value_G[1], abs=1e-6)
    # on the line between the bowls, x from the first: 0.08 + 2 x^2 = 2 (0.4 - x)^2
    assert found_K == pytest.approx([0.45, 0.35, 0.2], abs=1e-4)


@pytest.mark.parametrize("kind", ["weighted", "worst"])
def test_a_guard_rail_is_kept_and_touched(kind):
    objective = _objective(kind, weight_G=(1.0, 0.0), base_G=(0.0, 1.0), max_fall_G=(np.inf, 0.02))
    value_G = bowls(_best(objective))[0]
    assert objective.allowed(value_G)
    # the second bowl's rail is at distance 0.1 from its best; the first target is best where it touches it
    assert value_G[1] == pytest.approx(0.98, abs=1e-6)


def test_rails_that_cannot_be_kept_are_broken_by_the_least():
    objective = _objective("mean", base_G=(1.0, 1.0), max_fall_G=(0.0, 0.0))
    found_K = _best(objective)
    assert not objective.allowed(bowls(found_K)[0])
    assert found_K == pytest.approx([0.4, 0.4, 0.2], abs=1e-4)


def test_loose_rails_change_nothing():
    assert _best(_objective(max_fall_G=(0.9, 0.9))) == pytest.approx(_best(_objective()), abs=1e-5)


@pytest.mark.parametrize("objective", [_objective(), _objective("worst"), _objective(max_fall_G=(0.99, 0.99))])
def test_limits_hold_for_every_objective(objective):
    simplex = Simplex(ABC.names, np.array([0, 0, 0.1]), np.array([0.3, 1, 1]), (Group(("b", "c"), 0.0, 0.72),))
    found_K = _best(objective, simplex)
    assert simplex.contains(found_K, 1e-7)
    assert found_K[0] == pytest.approx(0.3, abs=0.021)


def test_of_several_starts_the_best_maximum_counts():
    def ridges(weight_K):
        """Two corners are locally best, the second higher."""
        value = weight_K[0] ** 2 + 1.2 * weight_K[1] ** 2
        return np.array([value]), np.array([[2 * weight_K[0], 2.4 * weight_K[1], 0]])

    objective = Objective("mean", np.ones(1), np.zeros(1), np.full(1, np.inf))
    starts_NK = np.array([[0.9, 0.05, 0.05], [0.05, 0.9, 0.05]])
    assert best_mixture(ABC, objective, ridges, starts_NK) == pytest.approx([0, 1, 0], abs=1e-6)
