"""MixMin against closed forms, its conditions of optimality, and logarithms that no exponential survives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datalloy.errors import DataError
from datalloy.simplex import Group, Simplex, dirichlet
from datalloy.surrogates.mixmin import OPTIMAL, MixMin

ABC = Simplex.free("abc")


def drawn(experts, items, seed, scale=3.0):
    return -np.random.default_rng(seed).exponential(scale, (experts, items))


def gap(mixmin, weight_K, feasible):
    """How many nats a feasible mixture can at most be better: the problem is concave, so its tangent bounds it."""
    slope_K = mixmin.slopes(weight_K)
    return slope_K @ (feasible.maximise_linear(slope_K) - weight_K)


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_identical_experts_predict_alike_whatever_their_weights():
    mixmin = MixMin(np.tile(drawn(1, 20, 0), (3, 1)))
    assert mixmin.predict(dirichlet(3, 10, 0)) == pytest.approx(drawn(1, 20, 0).mean())
    assert mixmin.best(ABC).tolist() == ABC.uniform.tolist()


def test_an_expert_that_is_best_on_every_item_gets_all():
    log_prob_KT = drawn(3, 30, 0)
    log_prob_KT[1] = log_prob_KT.max(axis=0) + 0.1
    assert MixMin(log_prob_KT).best(ABC) == pytest.approx([0, 1, 0], abs=1e-9)


def test_two_experts_each_right_on_half_of_the_items_get_half():
    log_prob_KT = np.log(np.array([[0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9]]))
    assert MixMin(log_prob_KT).best(Simplex.free("ab")) == pytest.approx([0.5, 0.5], abs=1e-9)


def test_experts_that_share_no_item_get_their_shares_of_item_weight():
    """With p in {1, 0} the objective is sum u_k log w_k, highest at w = u."""
    log_prob_KT = np.where(np.eye(3) == 1, 0.0, -1000.0)
    assert MixMin(log_prob_KT, np.array([5.0, 3.0, 2.0])).best(ABC) == pytest.approx([0.5, 0.3, 0.2], abs=1e-6)


def test_two_experts_have_the_root_of_their_quadratic():
    """One item of odds 4 : 1, one of 1 : 2: 3 / (1 + 3 w) = 1 / (2 - w), so w = 5 / 6."""
    log_prob_KT = np.log(np.array([[0.8, 0.2], [0.2, 0.4]]))
    assert MixMin(log_prob_KT).best(Simplex.free("ab"))[0] == pytest.approx(5 / 6, abs=1e-5)


def test_a_corner_is_scored_as_its_expert():
    log_prob_KT, weight_T = drawn(3, 20, 1), np.arange(1.0, 21)
    experts_K = log_prob_KT @ weight_T / weight_T.sum()
    assert MixMin(log_prob_KT, weight_T).predict(np.eye(3)) == pytest.approx(experts_K, rel=1e-12)


# --- optimality ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(1, 60), st.sampled_from([0.01, 1.0, 30.0]), st.integers(0, 10**6))
def test_the_best_weights_meet_the_conditions_of_optimality(experts, items, scale, seed):
    """On a free simplex: no slope above one, and exactly one wherever there is weight."""
    mixmin = MixMin(drawn(experts, items, seed, scale))
    weight_K = mixmin.best(Simplex.free([str(k) for k in range(experts)]))
    slope_K = mixmin.slopes(weight_K)
    assert slope_K.max() <= 1 + 2 * OPTIMAL
    assert weight_K @ np.abs(slope_K - 1) <= 4 * OPTIMAL


@pytest.mark.parametrize(
    "feasible",
    [
        Simplex(tuple("abc"), np.array([0.5, 0, 0]), np.array([1, 0.3, 1])),
        Simplex(tuple("abc"), np.zeros(3), np.ones(3), (Group(("a", "b"), 0.1, 0.35),)),
    ],
    ids=["capped", "grouped"],
)
def test_no_feasible_mixture_beats_the_best(feasible):
    mixmin = MixMin(drawn(3, 50, 2))
    weight_K = mixmin.best(feasible)
    assert feasible.contains(weight_K)
    assert gap(mixmin, weight_K, feasible) <= OPTIMAL
    others_MK = np.array([feasible.project(other_K) for other_K in dirichlet(3, 50, 0)])
    (best,) = mixmin.predict(weight_K[None])
    assert mixmin.predict(others_MK).max() <= best < mixmin.predict(mixmin.best(ABC)[None])[0] - 0.01


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_objective_is_concave_between_any_two_mixtures(seed, share):
    mixmin = MixMin(drawn(4, 15, seed, 10.0))
    left_K, right_K = dirichlet(4, 2, seed, 0.3)
    between, left, right = mixmin.predict(np.array([share * left_K + (1 - share) * right_K, left_K, right_K]))
    assert between >= share * left + (1 - share) * right - 1e-9


def test_slopes_are_those_of_the_objective():
    mixmin, weight_K = MixMin(drawn(3, 20, 3), np.arange(1.0, 21)), np.array([0.2, 0.5, 0.3])
    step = 1e-6
    for direction_K in ([1, -1, 0], [0, 1, -1]):
        move_K = step * np.array(direction_K)
        ahead, behind = mixmin.predict(np.array([weight_K + move_K, weight_K - move_K]))
        assert mixmin.slopes(weight_K) @ move_K == pytest.approx((ahead - behind) / 2, rel=1e-6)


@given(st.integers(0, 10**6))
def test_weights_times_slopes_add_up_to_one(seed):
    weight_K = dirichlet(4, 1, seed)[0]
    assert weight_K @ MixMin(drawn(4, 10, seed)).slopes(weight_K) == pytest.approx(1)


# --- logarithms ------------------------------------------------------------------------------------------------------


def test_items_a_thousand_nats_away_are_no_zeros():
    mixmin = MixMin(np.array([[-1000.0, -2000.0], [-3000.0, -2500.0]]))
    expected = [-1500, -2750, -1500 + np.log(0.5)]
    assert mixmin.predict(np.array([[1.0, 0], [0, 1], [0.5, 0.5]])) == pytest.approx(expected, rel=1e-12)
    assert mixmin.best(Simplex.free("ab")) == pytest.approx([1, 0], abs=1e-9)


def test_an_expert_that_alone_knows_one_item_in_ten_thousand_keeps_its_share():
    """Optimum in closed form: the rare item's share u, at a cost of c nats' ratio on all others."""
    log_prob_KT = np.full((2, 10_000), -1.0)
    log_prob_KT[1] = -1.1
    log_prob_KT[:, 0] = -1001, -1
    mixmin, free = MixMin(log_prob_KT), Simplex.free("ab")
    rare = 1e-4 / (1 - np.exp(-0.1))  # u / w = (1 - u) (1 - e^-c) / (1 - w (1 - e^-c)), so w = u / (1 - e^-c)
    assert mixmin.best(free)[1] == pytest.approx(rare, rel=1e-3)


def test_slopes_are_finite_where_an_expert_without_weight_alone_knows_an_item():
    slope_K = MixMin(np.array([[-1.0, -1001.0], [-1.1, -1.0]])).slopes(np.array([1.0, 0]))
    assert slope_K[0] == pytest.approx(1)
    assert 1e100 < slope_K[1] < np.inf


def test_what_an_item_costs_every_expert_alike_does_not_matter():
    log_prob_KT = drawn(3, 30, 4)
    hard_T = 500 * np.random.default_rng(0).random(30)
    assert MixMin(log_prob_KT - hard_T).best(ABC) == pytest.approx(MixMin(log_prob_KT).best(ABC), abs=1e-4)


# --- items -----------------------------------------------------------------------------------------------------------


def test_an_item_of_weight_two_counts_as_two():
    log_prob_KT = drawn(3, 8, 5)
    twice = np.concatenate([log_prob_KT, log_prob_KT[:, :3]], axis=1)
    weighted = MixMin(log_prob_KT, np.array([2.0, 2, 2, 1, 1, 1, 1, 1]))
    assert weighted.predict(dirichlet(3, 9, 0)) == pytest.approx(MixMin(twice).predict(dirichlet(3, 9, 0)), rel=1e-12)


def test_the_order_of_items_does_not_matter():
    log_prob_KT, order_T = drawn(3, 40, 6), np.random.default_rng(0).permutation(40)
    one, other = MixMin(log_prob_KT, np.arange(1.0, 41)), MixMin(log_prob_KT[:, order_T], np.arange(1.0, 41)[order_T])
    assert one.predict(dirichlet(3, 9, 0)) == pytest.approx(other.predict(dirichlet(3, 9, 0)), rel=1e-12)
    assert one.best(ABC) == pytest.approx(other.best(ABC), abs=1e-5)


def test_the_order_of_experts_is_that_of_the_weights():
    log_prob_KT = drawn(3, 40, 7)
    assert MixMin(log_prob_KT[::-1]).best(ABC)[::-1] == pytest.approx(MixMin(log_prob_KT).best(ABC), abs=1e-4)


@pytest.mark.parametrize(
    ("log_prob_KT", "weight_T", "message"),
    [
        (np.zeros(3), None, r"must be \[experts, items\], found an array of shape \(3,\)"),
        (np.array([[0, -np.inf]]), None, "1 of the experts' 2 log-probabilities are not finite"),
        (np.zeros((2, 3)), np.ones(2), "item weights must be 3 numbers"),
        (np.zeros((2, 3)), np.array([1, -1, 1]), "none negative"),
        (np.zeros((2, 3)), np.zeros(3), "not all zero"),
    ],
)
def test_what_cannot_be_averaged_is_refused(log_prob_KT, weight_T, message):
    with pytest.raises(DataError, match=message):
        MixMin(log_prob_KT, weight_T)
