"""Quadratic losses, which the stage must see through, and some that are none."""

import numpy as np
import pytest
from scipy.special import logsumexp

from datalloy.errors import ModelError
from datalloy.objective import Objective
from datalloy.simplex import Group, Simplex
from datalloy.slope_stage import SlopeCall, fit_quadratics, follow_slopes


class Bowls:
    """Losses `low + (w - best) A (w - best) / 2`, A positive definite and uneven; counts its calls."""

    def __init__(self, domains, targets=2, seed=0):
        rng = np.random.default_rng((seed, domains))
        self.names = tuple(f"d{k}" for k in range(domains))
        self.best_GK = rng.dirichlet(np.ones(domains), targets)
        root_GKK = rng.normal(size=(targets, domains, domains))
        self.bend_GKK = root_GKK @ root_GKK.transpose(0, 2, 1) / domains + 0.3 * np.eye(domains)
        self.called = []

    def losses(self, weight_MK):
        away_MGK = np.atleast_2d(weight_MK)[:, None] - self.best_GK
        return 1 + np.einsum("mgi,gij,mgj->mg", away_MGK, self.bend_GKK, away_MGK) / 2

    def __call__(self, weight_K):
        self.called.append(weight_K)
        return self.losses(weight_K)[0], np.einsum("gij,gj->gi", self.bend_GKK, weight_K - self.best_GK)

    def call(self, weight_K):
        return SlopeCall(weight_K, *self(weight_K), None)


def _mean(targets=2, kind="mean", **rails) -> Objective:
    free = {"base_G": np.zeros(targets), "max_fall_G": np.full(targets, np.inf)}
    return Objective(kind, np.full(targets, 1 / targets), **{**free, **rails})


def _follow(slopes, simplex, objective=None, calls=8, tolerance=0.01):
    return follow_slopes(slopes, simplex, objective or _mean(), calls=calls, tolerance=tolerance)


def test_a_quadratic_that_the_calls_determine_is_recovered():
    bowls, simplex = Bowls(4), Simplex.free("abcd")
    fit = fit_quadratics([bowls.call(weight_K) for weight_K in simplex.sample(4, 1)], simplex.uniform)
    probe_MK = simplex.sample(20, 2)
    assert fit.losses(probe_MK) == pytest.approx(bowls.losses(probe_MK), abs=1e-4)
    assert fit.standard_errors(probe_MK).max() < 1e-3


def test_one_call_is_reproduced_with_its_slopes():
    bowls, at_K = Bowls(5), np.array([0.3, 0.1, 0.2, 0.2, 0.2])
    call = bowls.call(at_K)
    loss_G, slope_GK = fit_quadratics([call], at_K).at(at_K)
    assert loss_G == pytest.approx(call.loss_G)
    assert slope_GK == pytest.approx(call.slope_GK - call.slope_GK.mean(axis=1, keepdims=True))


def test_slopes_agree_with_differences_of_losses():
    bowls, simplex = Bowls(4), Simplex.free("abcd")
    fit = fit_quadratics([bowls.call(weight_K) for weight_K in simplex.sample(2, 1)], simplex.uniform)
    at_K, step_K = simplex.sample(1, 3)[0], np.array([1e-5, -1e-5, 0, 0])
    rise_G = fit.losses(at_K + step_K)[0] - fit.losses(at_K - step_K)[0]
    assert 2 * fit.at(at_K)[1] @ step_K == pytest.approx(rise_G, rel=1e-5)
    assert fit.at(at_K)[0] == pytest.approx(fit.losses(at_K)[0])


@pytest.mark.parametrize("domains", [3, 8, 20])
def test_twenty_domains_need_hardly_more_calls_than_three(domains):
    bowls, simplex = Bowls(domains), Simplex.free(range(domains))
    stage = _follow(bowls, simplex)
    best_K = simplex.maximise(lambda w: (-bowls(w)[0].mean(), -bowls(w)[1].mean(axis=0)), simplex.uniform[None])
    low, found, first = (float(bowls.losses(w).mean()) for w in (best_K, stage.weight_K, simplex.uniform))
    assert len(stage.calls) <= 6
    assert found - low < 0.01 * (first - low)


def test_what_slopes_say_off_the_simplex_does_not_matter():
    bowls, simplex = Bowls(4), Simplex.free("abcd")

    def shifted(weight_K):
        loss_G, slope_GK = bowls(weight_K)
        return loss_G, slope_GK + 7.0

    assert _follow(shifted, simplex).weight_K == pytest.approx(_follow(bowls, simplex).weight_K, abs=1e-6)


def test_the_order_of_the_domains_does_not_matter():
    bowls, order = Bowls(5), np.array([3, 0, 4, 1, 2])

    def shuffled(weight_K):
        loss_G, slope_GK = bowls(weight_K[np.argsort(order)])
        return loss_G, slope_GK[:, order]

    plain_K = _follow(bowls, Simplex.free("abcde")).weight_K
    assert _follow(shuffled, Simplex.free("abcde")).weight_K == pytest.approx(plain_K[order], abs=1e-4)


def test_losses_in_other_units_lead_to_the_same_mixture():
    bowls, simplex = Bowls(4), Simplex.free("abcd")
    thousandth = _follow(lambda w: tuple(array / 1000 for array in bowls(w)), simplex)
    assert thousandth.weight_K == pytest.approx(_follow(bowls, simplex).weight_K, abs=1e-4)


def test_a_loss_that_is_no_quadratic_is_followed_to_its_optimum():
    rng = np.random.default_rng(0)
    steep_GIK = rng.normal(0, 2, (2, 30, 6))

    def slopes(weight_K):
        score_GI = steep_GIK @ weight_K
        share_GI = np.exp(score_GI - logsumexp(score_GI, axis=1, keepdims=True))
        return logsumexp(score_GI, axis=1), np.einsum("gi,gik->gk", share_GI, steep_GIK)

    simplex = Simplex.free("abcdef")
    stage = _follow(slopes, simplex)
    best_K = simplex.maximise(lambda w: (-slopes(w)[0].mean(), -slopes(w)[1].mean(axis=0)), simplex.uniform[None])
    low, found, first = (float(slopes(w)[0].mean()) for w in (best_K, stage.weight_K, simplex.uniform))
    assert found - low < 0.02 * (first - low)


def test_limits_bind_every_call_and_the_optimum():
    bowls = Bowls(4)
    simplex = Simplex("abcd", np.array([0.1, 0, 0, 0]), np.array([1, 0.2, 1, 1]), (Group(("c", "d"), 0.1, 0.3),))
    stage = _follow(bowls, simplex)
    assert all(simplex.contains(weight_K, 1e-6) for weight_K in [*bowls.called, stage.weight_K])


def test_the_worst_target_is_lifted():
    bowls, simplex = Bowls(4, seed=3), Simplex.free("abcd")
    by_mean, by_worst = (_follow(bowls, simplex, _mean(kind=kind)).weight_K for kind in ("mean", "worst"))
    assert bowls.losses(by_worst).max() < bowls.losses(by_mean).max() - 1e-4


def test_guard_rails_hold_in_negated_losses():
    bowls, simplex = Bowls(4, seed=3), Simplex.free("abcd")
    free_K = _follow(bowls, simplex).weight_K
    worse = int(bowls.losses(free_K)[0].argmax())
    rail_G = np.where(np.arange(2) == worse, 0.0, np.inf)
    base_G = -bowls.losses(free_K)[0] + 0.005
    railed_K = _follow(bowls, simplex, _mean(base_G=base_G, max_fall_G=rail_G)).weight_K
    assert -bowls.losses(railed_K)[0][worse] >= base_G[worse] - 1e-3
    assert -bowls.losses(free_K)[0][worse] < base_G[worse] - 4e-3


def test_calls_stop_at_their_number_and_where_nothing_is_promised():
    simplex = Simplex.free(range(8))
    assert len(_follow(Bowls(8), simplex, calls=2, tolerance=0.0).calls) == 2
    at_the_best = Bowls(3)
    at_the_best.best_GK[:] = 1 / 3
    assert len(_follow(at_the_best, Simplex.free("abc")).calls) <= 3  # the second shows that there is nothing to gain


def test_the_error_says_how_far_the_promise_was_kept():
    simplex = Simplex.free("abcd")
    assert _follow(Bowls(4), simplex, calls=1).error is None
    assert _follow(Bowls(4), simplex).error < 0.15
    rng = np.random.default_rng(0)
    noise = _follow(lambda _: (rng.normal(size=2), rng.normal(size=(2, 4))), simplex, calls=4, tolerance=0.0)
    assert noise.error > 0.2


def test_errors_are_none_at_the_calls_and_grow_away_from_them():
    bowls, simplex = Bowls(4), Simplex.free("abcd")
    fit = fit_quadratics([bowls.call(simplex.uniform)], simplex.uniform)
    near, far = (fit.standard_errors(simplex.uniform + t * (np.eye(4)[0] - simplex.uniform))[0] for t in (0.1, 1.0))
    assert fit.standard_errors(simplex.uniform).max() < 1e-4
    assert (near < far).all()


def test_drawn_quadratics_pass_through_the_calls_and_part_elsewhere():
    bowls, simplex = Bowls(4), Simplex.free("abcd")
    fit = fit_quadratics([bowls.call(simplex.uniform)], simplex.uniform)
    probe_MK = np.vstack([simplex.uniform, np.eye(4)])
    drawn_SMG = np.array([drawn.losses(probe_MK) for drawn in fit.draw(400, seed=0)])
    assert drawn_SMG[:, 0].std(axis=0).max() < 1e-3
    assert drawn_SMG[:, 1:].std(axis=0) == pytest.approx(fit.standard_errors(probe_MK)[1:], rel=0.2)


@pytest.mark.parametrize("broken", [0, 1])
def test_answers_that_are_not_finite_are_refused_with_their_mixture(broken):
    def slopes(_):
        arrays = [np.ones(2), np.ones((2, 4))]
        arrays[broken] = arrays[broken] * np.nan
        return tuple(arrays)

    with pytest.raises(ModelError, match=r"not finite at the mixture \[0.25, 0.25, 0.25, 0.25\]"):
        _follow(slopes, Simplex.free("abcd"))
