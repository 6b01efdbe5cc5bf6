"""Beliefs about surfaces that are known."""

import numpy as np
import pytest

from datalloy.posterior import Posterior
from datalloy.simplex import Simplex
from datalloy.slope_stage import SlopeCall, fit_quadratics

SIMPLEX = Simplex.free("abcd")
BEST_GK = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
PROBE_MK = SIMPLEX.sample(30, 99)


def losses(weight_MK):
    return 2 * ((np.atleast_2d(weight_MK)[:, None] - BEST_GK) ** 2).sum(axis=2)


def _quadratics():
    calls = [SlopeCall(w, losses(w)[0], 4 * (w - BEST_GK), None) for w in SIMPLEX.sample(4, 1)]
    return fit_quadratics(calls, SIMPLEX.uniform)


QUADRATICS = _quadratics()


def agreeing(weight_MK):
    """The metric is a line of the loss, another one for each target."""
    return np.array([0.8, 0.6]) - np.array([0.3, 0.1]) * losses(weight_MK)


def contrary(weight_MK):
    """The metric has nothing to do with the loss."""
    best_GK = np.array([[0.0, 0.1, 0.1, 0.8], [0.8, 0.1, 0.1, 0.0]])
    return 0.7 - 0.3 * ((np.atleast_2d(weight_MK)[:, None] - best_GK) ** 2).sum(axis=2)


def believe(values, count=8, noise=1e-4, seed=0, scale=1.0):
    """What is believed after so many evaluations with noise of that standard deviation."""
    weight_NK = SIMPLEX.spread(count, seed)
    noise_NG = np.full((count, 2), noise**2)
    value_NG = values(weight_NK) + np.random.default_rng(seed).normal(0, noise, (count, 2))
    return Posterior(weight_NK, scale * value_NG, scale**2 * noise_NG, QUADRATICS), weight_NK


@pytest.mark.parametrize("values", [agreeing, contrary])
def test_what_was_measured_without_noise_is_believed(values):
    belief, weight_NK = believe(values)
    mean_NG, error_NG = belief.predict(weight_NK)
    assert mean_NG == pytest.approx(values(weight_NK), abs=1e-3)
    assert error_NG.max() < 1e-3


def test_a_loss_that_agrees_tells_of_mixtures_never_evaluated():
    belief, _ = believe(agreeing, count=5)
    off_MG = belief.predict(PROBE_MK)[0] - agreeing(PROBE_MK)
    assert np.abs(off_MG).max() < 0.15 * np.ptp(agreeing(PROBE_MK), axis=0).max()


def test_a_loss_that_misleads_is_unlearned_by_evaluations():
    rough, fine = (believe(contrary, count=count)[0].predict(PROBE_MK)[0] for count in (5, 40))
    truth_MG = contrary(PROBE_MK)
    assert np.abs(fine - truth_MG).mean() < 0.25 * np.abs(rough - truth_MG).mean()
    assert np.abs(fine - truth_MG).max() < 0.1 * np.ptp(truth_MG)


@pytest.mark.parametrize("values", [agreeing, contrary])
def test_errors_hold_the_truth_about_as_often_as_they_say(values):
    inside = []
    for seed in range(6):
        mean_MG, error_MG = believe(values, count=10, noise=0.02, seed=seed)[0].predict(PROBE_MK)
        inside.append(np.abs(mean_MG - values(PROBE_MK)) < 2 * error_MG)
    assert np.mean(inside) > 0.85


def test_noisy_evaluations_are_believed_less():
    sure, unsure = (believe(agreeing, noise=noise)[0].predict(PROBE_MK)[1].mean() for noise in (0.001, 0.05))
    assert sure < 0.5 * unsure


def test_a_metric_in_other_units_gives_the_same_belief_in_those_units():
    plain, percent = (believe(agreeing, noise=0.01, scale=scale)[0].predict(PROBE_MK) for scale in (1.0, 100.0))
    for one, hundred in zip(plain, percent, strict=True):
        assert hundred == pytest.approx(100 * one, rel=1e-6)


@pytest.mark.parametrize("values", [agreeing, contrary])
def test_slopes_of_the_mean_and_of_draws_agree_with_differences(values):
    belief, _ = believe(values, noise=0.01)
    draws = belief.surfaces(9, seed=3)
    at_K, step_K = PROBE_MK[0], np.array([1e-5, 0, 0, -1e-5])
    for surface in (belief.mean, lambda w: draws.at(8, w)):
        rise_G = surface(at_K + step_K)[0] - surface(at_K - step_K)[0]
        assert 2 * surface(at_K)[1] @ step_K == pytest.approx(rise_G, rel=1e-4, abs=1e-9)


def test_one_mixture_and_many_are_told_alike():
    belief, _ = believe(contrary, noise=0.01)
    draws = belief.surfaces(10, seed=3)
    assert belief.mean(PROBE_MK[4])[0] == pytest.approx(belief.predict(PROBE_MK)[0][4])
    values_SMG = draws.values(PROBE_MK)
    assert len(draws) == len(values_SMG) == 10
    for s in (0, 1, 9):
        assert draws.at(s, PROBE_MK[4])[0] == pytest.approx(values_SMG[s, 4])


def test_draws_spread_as_the_errors_say():
    belief, _ = believe(contrary, noise=0.01)
    mean_MG, error_MG = belief.predict(PROBE_MK[:4])
    drawn_SMG = belief.draw(PROBE_MK[:4], 4000, seed=1)
    assert drawn_SMG.mean(axis=0) == pytest.approx(mean_MG, abs=0.1 * error_MG.max())
    assert drawn_SMG.std(axis=0) == pytest.approx(error_MG, rel=0.12)


def test_a_draw_is_a_surface_that_answers_alike_whoever_asks():
    belief, _ = believe(contrary, noise=0.01)
    alone_SMG, among_SMG = belief.draw(PROBE_MK[:1], 20, seed=5), belief.draw(PROBE_MK, 20, seed=5)
    assert alone_SMG[:, 0] == pytest.approx(among_SMG[:, 0])


def test_mixtures_that_were_all_equal_leave_no_opinion_but_the_level():
    weight_NK = SIMPLEX.spread(6, 0)
    belief = Posterior(weight_NK, np.full((6, 2), 0.5), np.zeros((6, 2)), QUADRATICS)
    assert belief.predict(PROBE_MK)[0] == pytest.approx(0.5, abs=1e-6)
