"""The contract for every surrogate and every rival, and what each of them alone promises."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from datalloy.errors import DataError, EnvironmentFault
from datalloy.simplex import Simplex, dirichlet
from datalloy.surrogates import SURROGATES, proposals
from datalloy.surrogates.proposals import RIVALS, Evidence
from datalloy.surrogates.ridge import Ridge, scheffe_features
from datalloy.surrogates.rows import distinct, folds
from surrogate_contract import DOMAINS, FEASIBLE, RivalContract, SurrogateContract, evidence, fitted, smooth

ABCD = Simplex.free("abcd")


class TestLinear(SurrogateContract):
    @pytest.fixture
    def make(self):
        return SURROGATES["linear"]


class TestRidgeSqrt(SurrogateContract):
    @pytest.fixture
    def make(self):
        return SURROGATES["ridge_sqrt"]


class TestScheffe(SurrogateContract):
    learns = 0.99

    @pytest.fixture
    def make(self):
        return SURROGATES["scheffe"]


class TestLogLinear(SurrogateContract):
    @pytest.fixture
    def make(self):
        return SURROGATES["log_linear"]


class TestGaussianProcess(SurrogateContract):
    learns = 0.999

    @pytest.fixture
    def make(self):
        return SURROGATES["gaussian_process"]


NO_TREES = "LightGBM is not installed; pip install 'datalloy[regmix]'"


class TestRegMix(SurrogateContract):
    domains_are_alike = False

    @pytest.fixture
    def make(self):
        pytest.importorskip("lightgbm", reason=NO_TREES)
        return SURROGATES["regmix"]


class TestRegMixTuned(SurrogateContract):
    domains_are_alike = False

    @pytest.fixture
    def make(self):
        pytest.importorskip("lightgbm", reason=NO_TREES)
        return SURROGATES["regmix_tuned"]


@pytest.mark.parametrize("rival", RIVALS)
class TestRivals(RivalContract):
    @pytest.fixture(autouse=True)
    def _small(self, rival, monkeypatch):
        """Trees are slow to ask 100,000 times."""
        if rival in proposals.PIECEWISE_CONSTANT:
            pytest.importorskip("lightgbm", reason=NO_TREES)
        monkeypatch.setattr(proposals, "TREE_DRAWS", 1000)
        monkeypatch.setattr(proposals, "DRAWS", 500)


def test_there_is_a_contract_class_for_every_surrogate():
    assert len([name for name in globals() if name.startswith("Test") and name != "TestRivals"]) == len(SURROGATES)


# --- rows ----------------------------------------------------------------------------------------------------------


def test_replicates_of_a_mixture_become_their_mean():
    rows = distinct(np.array([[0.5, 0.5], [1, 0], [0.5, 0.5], [0.5, 0.5]]), np.array([1.0, 5.0, 2.0, 6.0]))
    assert rows.weight_NK.tolist() == [[0.5, 0.5], [1, 0]]
    assert rows.value_N.tolist() == [3, 5]
    assert rows.count_N.tolist() == [3, 1]


@given(st.integers(3, 60), st.integers(0, 99))
def test_every_row_is_left_out_once_and_never_kept_then(rows, seed):
    parts = folds(rows, seed)
    assert sorted(np.concatenate([left for _, left in parts])) == list(range(rows))
    assert all(sorted([*kept, *left]) == list(range(rows)) for kept, left in parts)


def test_few_rows_are_left_out_one_by_one():
    assert [len(left) for _, left in folds(4, 0)] == [1, 1, 1, 1]


def test_a_value_too_many_is_refused():
    with pytest.raises(DataError, match=r"3 mixtures need one value each, found values of shape \(4,\)"):
        distinct(dirichlet(2, 3, 0), np.zeros(4))


# --- what each can express, it recovers ----------------------------------------------------------------------------


def recovered(name, truth):
    """Largest miss on unseen mixtures, as a share of the range of the truth there."""
    weight_NK, held_out_MK = dirichlet(DOMAINS, 60, 0), dirichlet(DOMAINS, 100, 1)
    predicted_M = fitted(SURROGATES[name], weight_NK, truth(weight_NK)).predict(held_out_MK)
    return np.abs(predicted_M - truth(held_out_MK)).max() / np.ptp(truth(held_out_MK))


SLOPE_K = np.array([3.0, -1.0, 0.5, 2.0])


@pytest.mark.parametrize(
    ("name", "truth", "miss"),
    [
        ("linear", lambda w: w @ SLOPE_K, 1e-4),
        ("ridge_sqrt", lambda w: np.sqrt(w) @ SLOPE_K, 1e-4),
        ("scheffe", lambda w: w @ SLOPE_K + 4 * w[:, 0] * w[:, 1] - 3 * w[:, 2] * w[:, 3], 1e-3),
        ("log_linear", lambda w: -(2 + np.exp(w @ SLOPE_K - 1)), 0.01),
        ("log_linear", lambda w: w @ SLOPE_K, 0.03),
        ("gaussian_process", lambda w: np.sin(w @ SLOPE_K), 0.02),
        ("gaussian_process", lambda w: np.sin(np.sqrt(w) @ SLOPE_K), 0.06),
        ("gaussian_process", smooth, 0.02),
    ],
)
def test_a_truth_of_its_own_shape_is_recovered(name, truth, miss):
    assert recovered(name, truth) < miss


def test_the_gaussian_process_takes_the_coordinates_that_fit():
    """Each truth turns evenly in its own coordinates and steeply at the borders of the other's."""
    weight_NK = dirichlet(DOMAINS, 50, 0, 0.5)
    models = [fitted(SURROGATES["gaussian_process"], weight_NK, np.sin(4 * f(weight_NK) @ SLOPE_K))
              for f in (np.asarray, np.sqrt)]  # fmt: skip
    assert [model._coordinates for model in models] == [np.asarray, np.sqrt]


def test_scheffe_finds_corners_better_for_shrinking_them_less_than_products():
    misses = {"scheffe": 0.0, "equally": 0.0}
    for seed in range(3):
        weight_NK, slope_K = np.vstack([np.eye(8), dirichlet(8, 12, seed)]), np.arange(8.0)
        value_N = weight_NK @ slope_K + np.random.default_rng(seed).normal(0, 0.3, 20)
        for name, make in (("scheffe", SURROGATES["scheffe"]), ("equally", lambda: Ridge([scheffe_features(1.0)]))):
            misses[name] += np.abs(fitted(make, weight_NK, value_N).predict(np.eye(8)) - slope_K).mean()
    assert misses["scheffe"] < 0.98 * misses["equally"]


def test_one_wild_run_moves_the_law_little():
    weight_NK, held_out_MK = dirichlet(DOMAINS, 40, 0), dirichlet(DOMAINS, 100, 1)
    value_N = -(2 + np.exp(weight_NK @ SLOPE_K - 1))
    wild_N = value_N.copy()
    wild_N[7] += 3 * np.ptp(value_N)
    truth_M = -(2 + np.exp(held_out_MK @ SLOPE_K - 1))
    misses = {
        name: np.abs(fitted(SURROGATES[name], weight_NK, wild_N).predict(held_out_MK) - truth_M).mean()
        for name in ("log_linear", "scheffe")
    }
    assert misses["log_linear"] < 0.5 * misses["scheffe"]


def test_noise_is_not_fitted():
    """Of values that are noise of spread one, ridges and processes keep little: their strength is chosen for that."""
    weight_NK, held_out_MK = dirichlet(12, 20, 0), dirichlet(12, 100, 1)
    value_N = np.random.default_rng(0).normal(size=20)
    for name in ("linear", "ridge_sqrt", "scheffe", "gaussian_process"):
        assert fitted(SURROGATES[name], weight_NK, value_N).predict(held_out_MK).std() < 0.6


# --- trees ---------------------------------------------------------------------------------------------------------


def test_regmix_as_published_predicts_a_constant_below_forty_runs():
    pytest.importorskip("lightgbm", reason=NO_TREES)
    weight_NK = dirichlet(DOMAINS, 50, 0)
    spreads = [
        np.ptp(fitted(SURROGATES["regmix"], weight_NK[:rows], smooth(weight_NK[:rows])).predict(weight_NK))
        for rows in (39, 50)
    ]
    assert spreads[0] == 0
    assert spreads[1] > 0


def test_tuned_trees_find_a_step_among_a_dozen_runs():
    """Which takes leaves of 2 rows and bins of one: with the library's bins of three the edge is off by some runs."""
    pytest.importorskip("lightgbm", reason=NO_TREES)
    weight_NK, held_out_MK = dirichlet(3, 12, 0), dirichlet(3, 200, 1)
    model = fitted(SURROGATES["regmix_tuned"], weight_NK, (weight_NK[:, 1] > 0.3).astype(float))
    assert spearmanr(model.predict(held_out_MK), held_out_MK[:, 1] > 0.3).statistic > 0.95


@pytest.mark.parametrize("name", ["regmix", "regmix_tuned"])
def test_trees_without_their_library_say_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'datalloy\[regmix\]'"):
        fitted(SURROGATES[name], np.eye(3), np.arange(3.0))


# --- proposals -----------------------------------------------------------------------------------------------------


def test_without_limits_the_proposals_that_need_no_model_are_the_textbook_ones():
    known = evidence(ABCD)
    assert RIVALS["uniform"](known, ABCD, 0).tolist() == [0.25] * 4
    assert RIVALS["size_proportional"](known, ABCD, 0) == pytest.approx(known.size_K / known.size_K.sum())
    assert RIVALS["best_expert"](known, ABCD, 0).tolist() == np.eye(4)[np.argmax(smooth(np.eye(4)))].tolist()
    assert np.array_equal(RIVALS["best_of_runs"](known, ABCD, 0), known.weight_NK[np.argmax(known.value_N)])


def test_the_best_of_runs_is_the_best_that_is_feasible():
    weight_NK = np.array([[0.1, 0.9, 0, 0], [0.5, 0.3, 0.1, 0.1], [0.4, 0.2, 0.2, 0.2]])
    known = Evidence(weight_NK, np.array([9.0, 2.0, 3.0]))
    assert RIVALS["best_of_runs"](known, FEASIBLE["limited"], 0).tolist() == [0.4, 0.2, 0.2, 0.2]


def test_the_best_expert_is_the_best_corner_however_good_other_runs_are():
    known = Evidence(np.vstack([np.eye(4), np.full((1, 4), 0.25)]), np.array([1.0, 3.0, 2.0, 0.0, 9.0]))
    assert RIVALS["best_expert"](known, ABCD, 0).tolist() == [0, 1, 0, 0]


def test_a_linear_surface_is_highest_at_the_corner_of_the_feasible_set():
    weight_NK = dirichlet(DOMAINS, 20, 0)
    for feasible in FEASIBLE.values():
        proposal_K = RIVALS["linear"](Evidence(weight_NK, weight_NK @ SLOPE_K), feasible, 0)
        assert proposal_K == pytest.approx(feasible.maximise_linear(SLOPE_K), abs=1e-6)


def test_a_surface_in_square_roots_is_highest_where_weights_are_its_squares():
    """sum a_k sqrt(w_k) with a >= 0 has its maximum at w_k = a_k^2 / sum a^2 (Cauchy and Schwarz)."""
    weight_NK, steep_K = dirichlet(DOMAINS, 40, 0), np.array([1.0, 2.0, 0.5, 3.0])
    proposal_K = RIVALS["ridge_sqrt"](Evidence(weight_NK, np.sqrt(weight_NK) @ steep_K), ABCD, 0)
    assert proposal_K == pytest.approx(steep_K**2 / (steep_K @ steep_K), abs=1e-3)


def test_a_quadratic_is_climbed_to_its_top():
    top_K = np.array([0.1, 0.4, 0.3, 0.2])
    weight_NK = dirichlet(DOMAINS, 60, 0)
    known = Evidence(weight_NK, -((weight_NK - top_K) ** 2).sum(axis=1))
    assert RIVALS["scheffe"](known, ABCD, 0) == pytest.approx(top_K, abs=2e-3)
    assert RIVALS["gaussian_process"](known, ABCD, 0) == pytest.approx(top_K, abs=2e-2)


def test_a_corner_of_many_domains_is_found():
    """Draws that are uniform over the simplex of twelve domains never come near one."""
    weight_NK = dirichlet(12, 60, 0, 0.3)
    slope_K = np.random.default_rng(0).normal(size=12)
    proposal_K = RIVALS["log_linear"](
        Evidence(weight_NK, -np.exp(-weight_NK @ slope_K)), Simplex.free("abcdefghijkl"), 0
    )
    assert proposal_K == pytest.approx(np.eye(12)[np.argmax(slope_K)], abs=1e-6)


def test_trees_that_cannot_split_propose_the_middle(monkeypatch):
    pytest.importorskip("lightgbm", reason=NO_TREES)
    monkeypatch.setattr(proposals, "TREE_DRAWS", 10_000)
    weight_NK = dirichlet(3, 39, 0)
    proposal_K = RIVALS["regmix"](Evidence(weight_NK, weight_NK[:, 0]), Simplex.free("abc"), 0)
    assert proposal_K == pytest.approx([1 / 3] * 3, abs=0.02)


def test_trees_propose_the_middle_of_their_best_region(monkeypatch):
    pytest.importorskip("lightgbm", reason=NO_TREES)
    monkeypatch.setattr(proposals, "TREE_DRAWS", 10_000)
    weight_NK = dirichlet(3, 60, 0)
    known = Evidence(weight_NK, (weight_NK[:, 1] > 0.5).astype(float) - (weight_NK[:, 1] > 0.8))
    proposal_K = RIVALS["regmix_tuned"](known, Simplex.free("abc"), 0)
    assert 0.55 < proposal_K[1] < 0.75


@pytest.mark.parametrize(
    ("rival", "message"),
    [
        ("size_proportional", "needs the number of samples of each domain"),
        ("mixmin", "needs the experts' log-probabilities"),
        ("best_expert", "needs a run on one domain alone, found none among 5"),
        ("best_of_runs", "needs a run on a feasible mixture, found none among 5"),
    ],
)
def test_a_rival_without_what_it_needs_says_so(rival, message):
    far = Simplex(tuple("abcd"), np.array([0.97, 0, 0, 0]), np.ones(4))
    known = Evidence(dirichlet(DOMAINS, 5, 0, 5.0), np.arange(5.0))
    with pytest.raises(DataError, match=message):
        RIVALS[rival](known, far, 0)
