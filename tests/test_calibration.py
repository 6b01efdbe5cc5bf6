"""Surfaces whose interaction is known: by formula, or by really training quadratic domains."""

from dataclasses import replace

import numpy as np
import pytest

from datalloy.calibration import (
    DISTINCT,
    DRIFT_FRACTION,
    PAIR_FRACTION,
    TrainedMixtures,
    calibrate,
    interaction_scale,
    plan_runs,
    recommend,
)
from datalloy.errors import DataError, RecipeError
from datalloy.simplex import Group, Simplex, dirichlet
from linear_merges import HALF, NO_RUNS, NO_RUNS_3, SCALE_G, SIZE_K, TARGETS, THIRD_K, flat, objective, run_results

UNIT = 1 + PAIR_FRACTION**2 + DRIFT_FRACTION**2  # prior variance of one pair's interaction, in scales squared


# --- the posterior ---------------------------------------------------------------------------------------------------


def test_no_run_leaves_the_merged_values_with_the_priors_error():
    mean_MG, se_MG = calibrate(flat, NO_RUNS, SCALE_G, doubt=0).predict(np.array([[0.5, 0.5], [0.8, 0.2]]))
    np.testing.assert_allclose(mean_MG, flat(np.array([[0.5, 0.5], [0.8, 0.2]]))[0])
    np.testing.assert_allclose(se_MG, np.outer([0.25, 0.16], SCALE_G) * np.sqrt(UNIT))


def test_doubt_of_the_scale_widens_the_prior():
    known, doubted = (calibrate(flat, NO_RUNS, SCALE_G, doubt=doubt).predict(HALF)[1] for doubt in (0, 1.0))
    assert (doubted > 2 * known).all()  # the mean of a log-normal's square is e^2


@pytest.mark.parametrize("doubt", [0, 1.0])
def test_vertices_are_their_experts_whatever_the_runs_say(doubt):
    calibration = calibrate(flat, run_results(HALF, [[0.3, -0.2]]), SCALE_G, doubt=doubt)
    mean_MG, se_MG = calibration.predict(np.eye(2))
    np.testing.assert_allclose(mean_MG, flat(np.eye(2))[0], atol=1e-12)
    np.testing.assert_allclose(se_MG, 0, atol=1e-12)


def test_one_run_of_two_domains_gives_the_posterior_that_is_found_by_hand():
    """One unknown, `b w_1 w_2` plus drift; the noise of a mean of 50 items has a variance of var / 49."""
    trained = run_results([[0.6, 0.4]], [[0.05, -0.1]], noise=0.3)
    calibration = calibrate(flat, trained, SCALE_G, doubt=0)
    noise_G = (trained.true_NV - trained.merged_NV).reshape(2, 50).var(axis=1) / 49
    prior_G = SCALE_G**2 * UNIT * 0.24**2
    share_G = prior_G / (prior_G + noise_G)
    mean_MG, se_MG = calibration.predict(trained.weight_NK)
    np.testing.assert_allclose(mean_MG - flat(trained.weight_NK)[0], [share_G * [0.05, -0.1]], rtol=1e-6)
    np.testing.assert_allclose(se_MG, [np.sqrt(prior_G * (1 - share_G))], rtol=1e-6)
    slope_G = SCALE_G**2 * (1 + PAIR_FRACTION**2) * 0.24 / (prior_G + noise_G)
    np.testing.assert_allclose(calibration.interactions()[:, 0, 1], slope_G * [0.05, -0.1], rtol=1e-6)


def test_a_run_without_noise_is_believed_and_a_noisy_one_less():
    quiet, noisy = (
        calibrate(flat, run_results(HALF, [[0.1, 0.1]], noise=noise), SCALE_G).predict(HALF)[0] - flat(HALF)[0]
        for noise in (0.0, 3.0)
    )
    np.testing.assert_allclose(quiet, 0.1, rtol=1e-4)
    assert (noisy < 0.07).all()
    assert (noisy > 0).all()


def test_spread_between_seeds_is_noise_too():
    believed, doubted = (
        calibrate(flat, run_results(HALF, [[0.1, 0.1]], seed_sd=sd), SCALE_G).predict(HALF)[0] - flat(HALF)[0]
        for sd in (0.0, 0.3)
    )
    assert (doubted < 0.7 * believed).all()


def test_an_interaction_much_larger_than_expected_widens_what_is_not_yet_seen():
    """That is what averaging over the scale is for."""
    elsewhere = np.array([[0.9, 0.1]])
    small, large = (
        calibrate(flat, run_results(HALF, [[gain, gain]]), SCALE_G).predict(elsewhere)[1] for gain in (0.01, 1.0)
    )
    assert (large > 3 * small).all()


def test_runs_at_vertices_teach_nothing():
    with_vertices = run_results([[1, 0], [0.5, 0.5], [0, 1]], [[0, 0], [0.1, 0.2], [0, 0]])
    for a, b in zip(
        calibrate(flat, with_vertices, SCALE_G).predict(np.array([[0.7, 0.3]])),
        calibrate(flat, with_vertices.take(np.array([1])), SCALE_G).predict(np.array([[0.7, 0.3]])),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_errors_of_the_merged_surface_add_to_those_of_the_interaction():
    known, unsure = (
        calibrate(lambda w, e=error: flat(w, e), NO_RUNS, SCALE_G).predict(HALF)[1] for error in (0.0, 0.3)
    )
    np.testing.assert_allclose(unsure**2, known**2 + 0.09)


def test_the_order_of_the_runs_does_not_matter():
    weight_NK, gain_NG = dirichlet(3, 5, 0), np.random.default_rng(1).normal(0, 0.1, (5, 2))
    trained = run_results(weight_NK, gain_NG, noise=0.1)
    asked = dirichlet(3, 4, 1)
    forth = calibrate(flat, trained, SCALE_G).predict(asked)
    back = calibrate(flat, trained.take(np.arange(5)[::-1]), SCALE_G).predict(asked)
    np.testing.assert_allclose(forth, back, rtol=1e-7)


def test_the_same_mixture_trained_twice_without_noise_is_borne():
    calibration = calibrate(flat, run_results([[0.5, 0.5], [0.5, 0.5]], [[0.1, 0.1], [0.1, 0.1]]), SCALE_G)
    np.testing.assert_allclose(calibration.predict(HALF)[0] - flat(HALF)[0], 0.1, rtol=1e-3)


def test_many_runs_find_the_interactions_of_all_pairs():
    b_KK = np.array([[0, 1.0, 0.2], [1.0, 0, 0.6], [0.2, 0.6, 0]])
    weight_NK = dirichlet(3, 40, 2)
    gain_N = np.einsum("nk,kj,nj->n", weight_NK, b_KK, weight_NK) / 2
    trained = run_results(weight_NK, np.stack([gain_N, 2 * gain_N], axis=1))
    b_GKK = calibrate(flat, trained, SCALE_G).interactions()
    np.testing.assert_allclose(b_GKK[0], b_KK, atol=0.2)  # a part of what all pairs share counts as drift
    np.testing.assert_allclose(b_GKK[0, 0, 1] - b_GKK[0, 0, 2], 0.8, atol=0.15)
    np.testing.assert_allclose(b_GKK[1], 2 * b_GKK[0], atol=0.05)


def test_covariance_has_the_standard_errors_on_its_diagonal():
    calibration = calibrate(lambda w: flat(w, 0.05), run_results(dirichlet(3, 3, 0), noise=0.1), SCALE_G)
    asked = dirichlet(3, 6, 1)
    covariance_GMM = calibration.covariance(asked)
    np.testing.assert_allclose(np.sqrt(np.diagonal(covariance_GMM, axis1=1, axis2=2)).T, calibration.predict(asked)[1])


def test_draws_have_the_means_and_the_covariance_that_are_predicted():
    calibration = calibrate(lambda w: flat(w, 0.02), run_results(HALF, [[0.1, 0.2]], noise=0.5), SCALE_G, doubt=0.3)
    asked = np.array([[0.5, 0.5], [0.7, 0.3], [1.0, 0.0]])
    value_CMG = calibration.draw(asked, 20_000, seed=0)
    assert value_CMG.shape == (20_000, 3, 2)
    np.testing.assert_allclose(value_CMG.mean(axis=0), calibration.predict(asked)[0], atol=0.003)
    for target in range(2):
        np.testing.assert_allclose(
            np.cov(value_CMG[:, :, target].T), calibration.covariance(asked)[target], rtol=0.1, atol=3e-5
        )


def test_draws_come_from_the_seed():
    calibration = calibrate(flat, NO_RUNS, SCALE_G)
    first, again, other = (calibration.draw(HALF, 5, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_the_expected_interaction_is_the_spread_of_merged_values():
    merged_NG = np.array([[0.1, 0.5, 0.5], [0.4, 0.5, 0.7], [0.2, 0.5, 0.6]])
    assert interaction_scale(merged_NG) == pytest.approx([0.3, 0.03, 0.2])  # a tenth of the widest where all are alike


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"true_NV": np.zeros((1, 99))}, r"true_NV of 1 mixtures and 100 items has the shape \(1, 99\)"),
        ({"merged_NV": np.full((1, 100), np.nan)}, "merged_NV is not finite for mixture 0 on item 0"),
        ({"weight_NK": np.array([[0.5, 0.4]])}, "add up to one"),
        ({"weight_NK": np.array([[1.5, -0.5]])}, "add up to one"),
        ({"target_V": np.append(np.zeros(99, int), 1)}, "target docvqa has 1 items"),
        ({"target_V": np.repeat([0, 2], 50)}, "other targets"),
        ({"seed_sd_G": np.zeros(3)}, "other targets"),
    ],
)
def test_runs_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        replace(run_results(HALF), **change)


# --- which mixture ---------------------------------------------------------------------------------------------------


class Trainer:
    """Three quadratic domains, really trained by gradient descent on mixtures, and targets that are blends of them.

    Their curvatures do not commute, so that merged experts and trained mixtures part as real ones do.
    """

    def __init__(self, seed, domains=3, dimensions=12, rank=5, time=1.0, items=80):
        rng = np.random.default_rng(seed)
        self.items, self.time = items, time
        root_KRD = rng.normal(size=(domains, rank, dimensions)) / np.sqrt(rank)
        self.curvature_KDD = root_KRD.transpose(0, 2, 1) @ root_KRD + 0.05 * np.eye(dimensions)
        best_KD = rng.normal(size=dimensions) + 0.8 * rng.normal(size=(domains, dimensions))
        self.pull_KD = np.einsum("kij,kj->ki", self.curvature_KDD, best_KD)
        domain_V = rng.choice(domains, size=2 * items)
        self.input_VD = np.einsum("vr,vrd->vd", rng.normal(size=(2 * items, rank)), root_KRD[domain_V])
        self.answer_V = (self.input_VD * best_KD[domain_V]).sum(axis=1) + 0.3 * rng.normal(size=2 * items)
        self.expert_KD = np.array([self.train(vertex_K) for vertex_K in np.eye(domains)])

    def train(self, weight_K):
        eigen_D, axis_DD = np.linalg.eigh(np.einsum("k,kij->ij", weight_K, self.curvature_KDD))
        return axis_DD @ ((1 - np.exp(-self.time * eigen_D)) / eigen_D * (axis_DD.T @ (weight_K @ self.pull_KD)))

    def values(self, theta_MD):
        return -0.5 * (theta_MD @ self.input_VD.T - self.answer_V) ** 2

    def trained_values(self, weight_MK):
        return self.values(np.array([self.train(weight_K) for weight_K in weight_MK]))

    def true(self, weight_MK):
        return self.trained_values(weight_MK).reshape(len(weight_MK), 2, -1).mean(axis=2)

    def merged(self, weight_MK):
        value_MG = self.values(weight_MK @ self.expert_KD).reshape(len(weight_MK), 2, -1).mean(axis=2)
        return value_MG, np.zeros_like(value_MG)

    def run(self, weight_NK):
        return TrainedMixtures(
            TARGETS,
            weight_NK,
            self.trained_values(weight_NK),
            self.values(weight_NK @ self.expert_KD),
            np.repeat([0, 1], self.items),
            np.zeros(2),
        )


SIMPLEX = Simplex.free(("chart", "table", "count"))


def regrets(world):
    """Of the pick before any run, and after runs at that pick and at uniform weights."""
    scale_G = interaction_scale(world.merged(np.vstack([np.eye(3), THIRD_K]))[0])
    pick_K = recommend(calibrate(world.merged, NO_RUNS_3, scale_G), SIMPLEX, objective(), seed=0)
    trained = world.run(np.array([pick_K, THIRD_K]))
    again_K = recommend(calibrate(world.merged, trained, scale_G), SIMPLEX, objective(), seed=0)
    best = world.true(SIMPLEX.sample(300, seed=9)).mean(axis=1).max()
    return [best - world.true(weight_K[None]).mean() for weight_K in (pick_K, again_K)]


def test_two_runs_take_most_of_the_regret_from_picks_that_lean_to_corners():
    before, after = np.mean([regrets(Trainer(seed)) for seed in range(6)], axis=0)
    assert before > 0.05
    assert after < 0.3 * before


def test_a_surface_that_favours_corners_is_mended_by_one_run():
    """Merged: a valley between two equal corners. Trained: the best is half way."""

    def valley(weight_MK):
        mean_MG = np.repeat(0.5 - 0.8 * weight_MK.prod(axis=1, keepdims=True), 2, axis=1)
        return mean_MG, np.zeros_like(mean_MG)

    two = Simplex.free(("chart", "table"))
    corner_K = recommend(calibrate(valley, NO_RUNS, SCALE_G), two, objective(), seed=0)
    assert corner_K.max() == pytest.approx(1)
    merged_NV = np.full((1, 100), 0.3)
    trained = TrainedMixtures(TARGETS, HALF, merged_NV + 0.4, merged_NV, np.repeat([0, 1], 50), np.zeros(2))
    mended_K = recommend(calibrate(valley, trained, SCALE_G), two, objective(), seed=0)
    np.testing.assert_allclose(mended_K, 0.5, atol=0.02)


def test_the_pick_is_the_best_feasible_mixture_of_the_objective():
    calibration = calibrate(flat, NO_RUNS_3, SCALE_G)
    capped = replace(SIMPLEX, cap_K=np.array([0.5, 0.4, 0.6]))
    mean_K = recommend(calibration, capped, objective(), seed=0)
    np.testing.assert_allclose(mean_K, [0.5, 0.4, 0.1], atol=1e-6)  # MERGED.mean(axis=0) is .4, .35, .3
    worst_K = recommend(calibration, SIMPLEX, objective("worst"), seed=0)
    np.testing.assert_allclose(worst_K, [5 / 7, 2 / 7, 0], atol=1e-3)  # .5 a + .1 b = .3 a + .6 b


def test_the_pick_keeps_its_guard_rails():
    calibration = calibrate(flat, NO_RUNS_3, SCALE_G)
    railed = objective(weight_G=(1.0, 0.0), kind="weighted", base_G=(0.0, 0.5), max_fall_G=(np.inf, 0.05))
    pick_K = recommend(calibration, SIMPLEX, railed, seed=0)
    np.testing.assert_allclose(pick_K, [0.5, 0.5, 0], atol=1e-3)  # docvqa .3 a + .6 b >= .45
    assert railed.allowed(flat(pick_K[None])[0][0])


def test_guard_rails_that_no_mixture_keeps_are_refused_by_target():
    railed = objective(base_G=(0.0, 0.9), max_fall_G=(np.inf, 0.1))
    with pytest.raises(RecipeError, match=r"docvqa falls by 0\.2 more than mixture\.guard_rails allows"):
        recommend(calibrate(flat, NO_RUNS_3, SCALE_G), SIMPLEX, railed, seed=0)


# --- which runs ------------------------------------------------------------------------------------------------------


def plan(pick=(0.5, 0.4, 0.1), size=SIZE_K, count=6, simplex=SIMPLEX, **changes):
    calibration = calibrate(flat, NO_RUNS_3, SCALE_G)
    return plan_runs(
        calibration, simplex, objective(), pick_K=np.array(pick), size_K=size, count=count, seed=0, **changes
    )


def test_the_pick_is_trained_first_then_what_it_is_held_against():
    runs = plan()
    assert [run.role for run in runs] == ["pick", "uniform", "size_proportional", *["promising"] * 3]
    np.testing.assert_allclose([run.weight_K for run in runs[:3]], [[0.5, 0.4, 0.1], THIRD_K, SIZE_K])


def test_planned_mixtures_are_feasible_and_distinct_from_each_other_and_from_experts():
    weight_NK = np.vstack([[run.weight_K for run in plan()], np.eye(3)])
    apart_NN = np.abs(weight_NK[:, None] - weight_NK[None]).sum(axis=2) / 2 + np.eye(len(weight_NK))
    assert apart_NN.min() > DISTINCT
    assert all(SIMPLEX.contains(weight_K) for weight_K in weight_NK)


def test_a_shorter_plan_is_the_start_of_a_longer_one():
    short, long = plan(count=4), plan(count=6)
    assert len(short) == 4
    np.testing.assert_array_equal([run.weight_K for run in short], [run.weight_K for run in long[:4]])


def test_sizes_that_are_nearly_uniform_are_not_trained_beside_uniform():
    assert "size_proportional" not in [run.role for run in plan(size=np.array([0.34, 0.34, 0.32]))]


def test_what_was_trained_before_is_not_planned_again():
    runs = plan(trained_NK=np.array([[0.5, 0.4, 0.1], THIRD_K]))
    assert [run.role for run in runs[:2]] == ["size_proportional", "promising"]


def test_a_pick_that_is_an_expert_is_there_already_and_one_beside_it_is_not():
    assert plan(pick=(1.0, 0.0, 0.0))[0].role == "uniform"
    assert plan(pick=(0.99, 0.01, 0.0))[0].role == "pick"


def test_uniform_and_sizes_are_brought_into_the_feasible_set():
    simplex = Simplex(SIMPLEX.names, np.zeros(3), np.array([0.2, 1.0, 1.0]), (Group(("table",), 0.0, 0.3),))
    for run in plan(pick=(0.2, 0.2, 0.6), simplex=simplex):
        assert simplex.contains(run.weight_K, 1e-6), run.role


def test_a_small_feasible_set_has_room_for_few_runs():
    simplex = Simplex(SIMPLEX.names, np.array([0.3, 0.3, 0.3]), np.full(3, 0.4))
    runs = plan(pick=(0.4, 0.3, 0.3), simplex=simplex, count=8)
    assert 1 <= len(runs) < 8


def test_promising_runs_are_where_the_objective_may_be_high():
    simplex_values = flat(np.array([run.weight_K for run in plan(count=6)]))[0].mean(axis=1)
    assert simplex_values[3:].min() > 0.3  # the lowest vertex
