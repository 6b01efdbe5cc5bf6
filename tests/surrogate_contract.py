"""What every surrogate and every rival guarantees, as two suites; a test class subclasses one and gives its fixture.

A surrogate: `make`, which gives a fresh one. A rival: `rival`, a name of `proposals.RIVALS`.
"""

import functools
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import spearmanr

from datalloy.errors import DataError
from datalloy.simplex import Group, Simplex, dirichlet
from datalloy.surrogates import Surrogate
from datalloy.surrogates.proposals import RIVALS, Evidence

DOMAINS = 4
MakeSurrogate = Callable[[], Surrogate]

GAIN_K = np.array([0.2, 1.0, 0.6, -0.3])


def smooth(weight_MK: np.ndarray) -> np.ndarray:
    """A made-up truth: returns of every domain diminish, two domains are worth more together, one harms."""
    together_M = weight_MK[:, 1] * weight_MK[:, 2]
    return np.log(weight_MK + 0.1) @ np.array([0.1, 0.4, 0.3, 0.05]) + weight_MK @ GAIN_K + together_M


def fitted(make: MakeSurrogate, weight_NK: np.ndarray, value_N: np.ndarray, seed: int = 0) -> Surrogate:
    surrogate = make()
    surrogate.fit(weight_NK, value_N, seed)
    return surrogate


def design() -> np.ndarray:
    return np.vstack([np.eye(DOMAINS), dirichlet(DOMAINS, 56, seed=1)])


@functools.cache
def taught(make: MakeSurrogate) -> Surrogate:
    return fitted(make, design(), smooth(design()))


class SurrogateContract:
    learns = 0.9  # Spearman with the smooth truth after 60 rows without noise
    domains_are_alike = True  # False: ties between domains go by their order

    @pytest.fixture
    def weight_NK(self) -> np.ndarray:
        return design()

    @pytest.fixture
    def held_out_MK(self) -> np.ndarray:
        return dirichlet(DOMAINS, 80, seed=2)

    @pytest.fixture
    def surrogate(self, make: MakeSurrogate) -> Surrogate:
        return taught(make)

    def test_it_ranks_unseen_mixtures_of_a_smooth_truth(self, surrogate: Surrogate, held_out_MK: np.ndarray):
        assert spearmanr(surrogate.predict(held_out_MK), smooth(held_out_MK)).statistic > self.learns

    def test_predictions_are_finite_on_corners_edges_and_between(self, surrogate: Surrogate, held_out_MK: np.ndarray):
        edges_MK = np.array([(a + b) / 2 for a in np.eye(DOMAINS) for b in np.eye(DOMAINS)])
        value_M = surrogate.predict(np.vstack([edges_MK, held_out_MK]))
        assert value_M.shape == (len(edges_MK) + len(held_out_MK),)
        assert np.isfinite(value_M).all()

    def test_a_mixture_is_predicted_as_if_it_were_alone(self, surrogate: Surrogate, held_out_MK: np.ndarray):
        """So nothing is learnt from the mixtures that are asked for, be it their company or earlier ones."""
        together_M = surrogate.predict(held_out_MK)
        alone_M = [surrogate.predict(weight_K[None])[0] for weight_K in held_out_MK[::-1]][::-1]
        assert alone_M == pytest.approx(together_M, rel=1e-9, abs=1e-12)
        assert np.array_equal(surrogate.predict(held_out_MK), together_M)

    def test_the_same_rows_and_seed_give_the_same_bits(
        self, make: MakeSurrogate, weight_NK: np.ndarray, held_out_MK: np.ndarray
    ):
        first, second = (fitted(make, weight_NK[:12], smooth(weight_NK[:12]), seed=7) for _ in range(2))
        assert np.array_equal(first.predict(held_out_MK), second.predict(held_out_MK))

    def test_the_order_of_rows_does_not_change_a_bit(
        self, make: MakeSurrogate, weight_NK: np.ndarray, held_out_MK: np.ndarray
    ):
        rows_NK = np.vstack([weight_NK[:16], weight_NK[:4]])  # with replicates
        value_N = smooth(rows_NK) + np.random.default_rng(0).normal(0, 0.1, len(rows_NK))
        order_N = np.random.default_rng(1).permutation(len(rows_NK))
        one, other = fitted(make, rows_NK, value_N), fitted(make, rows_NK[order_N], value_N[order_N])
        assert np.array_equal(one.predict(held_out_MK), other.predict(held_out_MK))

    def test_the_order_of_domains_does_not_matter(
        self, make: MakeSurrogate, weight_NK: np.ndarray, held_out_MK: np.ndarray
    ):
        if not self.domains_are_alike:
            pytest.skip(
                "trees split on the first of equally good domains, so their order may change a prediction by design"
            )
        one = fitted(make, weight_NK[:12], smooth(weight_NK[:12]))
        other = fitted(make, weight_NK[:12, ::-1], smooth(weight_NK[:12]))
        agreement = spearmanr(one.predict(held_out_MK), other.predict(held_out_MK[:, ::-1])).statistic
        assert agreement > 0.99  # folds and restarts fall otherwise

    def test_the_unit_of_values_does_not_matter(
        self, make: MakeSurrogate, surrogate: Surrogate, weight_NK: np.ndarray, held_out_MK: np.ndarray
    ):
        scaled = fitted(make, weight_NK, 100 * smooth(weight_NK) - 300).predict(held_out_MK)
        plain = surrogate.predict(held_out_MK)
        assert scaled == pytest.approx(100 * plain - 300, abs=0.02 * np.ptp(scaled))

    def test_rows_and_values_are_left_as_they_were(self, make: MakeSurrogate, weight_NK: np.ndarray):
        rows_NK, value_N = weight_NK[:12].copy(), smooth(weight_NK[:12])
        fitted(make, rows_NK, value_N)
        assert np.array_equal(rows_NK, weight_NK[:12])
        assert np.array_equal(value_N, smooth(weight_NK[:12]))

    @pytest.mark.parametrize("domains", [2, 9])
    def test_three_runs_are_enough_to_predict_something_finite(self, domains: int, make: MakeSurrogate):
        rows_NK = dirichlet(domains, 3, seed=0)
        value_M = fitted(make, rows_NK, np.array([0.1, 0.3, 0.2])).predict(dirichlet(domains, 10, seed=1))
        assert np.isfinite(value_M).all()

    def test_runs_of_one_value_predict_that_value(
        self, make: MakeSurrogate, weight_NK: np.ndarray, held_out_MK: np.ndarray
    ):
        assert fitted(make, weight_NK[:9], np.full(9, 0.7)).predict(held_out_MK) == pytest.approx(0.7, abs=1e-6)

    def test_two_mixtures_are_refused_however_often_they_ran(self, make: MakeSurrogate, weight_NK: np.ndarray):
        with pytest.raises(DataError, match="at least 3 different mixtures, found 2"):
            fitted(make, weight_NK[[0, 1, 0, 1, 0]], np.arange(5.0))

    def test_a_run_without_a_value_is_refused(self, make: MakeSurrogate, weight_NK: np.ndarray):
        with pytest.raises(DataError, match="1 of 4 runs have no finite value, the first is row 2"):
            fitted(make, weight_NK[:4], np.array([1, 2, np.nan, 4]))

    def test_what_is_no_mixture_is_refused(self, make: MakeSurrogate, surrogate: Surrogate, weight_NK: np.ndarray):
        with pytest.raises(DataError, match=r"1 of 4 rows are no mixtures.*row 0"):
            fitted(make, weight_NK[:4] * np.array([[2], [1], [1], [1]]), np.arange(4.0))
        with pytest.raises(DataError, match="rows are no mixtures"):
            surrogate.predict(np.array([[1.5, -0.5, 0, 0]]))


FEASIBLE = {
    "free": Simplex.free("abcd"),
    "limited": Simplex(
        tuple("abcd"),
        np.array([0, 0.05, 0, 0]),
        np.array([0.7, 0.4, 0.5, 1]),
        (Group(("b", "c"), 0.2, 0.6), Group(("d",), 0.1, 1.0)),
    ),
}


def evidence(feasible: Simplex, runs: int = 12) -> Evidence:
    """Corners, feasible runs and runs that may not be; experts that each know some items best."""
    weight_NK = np.vstack([np.eye(DOMAINS), feasible.sample(runs // 2, seed=3), dirichlet(DOMAINS, runs // 2, seed=4)])
    log_prob_KT = -np.random.default_rng(5).exponential(3, (DOMAINS, 40))
    return Evidence(weight_NK, smooth(weight_NK), np.array([500, 2000, 1000, 100]), log_prob_KT, np.arange(1.0, 41))


def reordered(known: Evidence, seed: int) -> Evidence:
    order_N = np.random.default_rng(seed).permutation(len(known.value_N))
    return Evidence(
        known.weight_NK[order_N], known.value_N[order_N], known.size_K, known.log_prob_KT, known.item_weight_T
    )


@functools.cache
def proposed(rival: str, limits: str) -> np.ndarray:
    return RIVALS[rival](evidence(FEASIBLE[limits]), FEASIBLE[limits], 0)


@pytest.mark.parametrize("limits", FEASIBLE)
class RivalContract:
    def test_the_proposal_is_feasible(self, rival: str, limits: str):
        proposal_K = proposed(rival, limits)
        assert proposal_K.shape == (DOMAINS,)
        assert FEASIBLE[limits].contains(proposal_K)

    def test_the_same_evidence_and_seed_give_the_same_bits_in_any_order(self, rival: str, limits: str):
        feasible = FEASIBLE[limits]
        again_K = RIVALS[rival](reordered(evidence(feasible), 1), feasible, 0)
        assert np.array_equal(again_K, proposed(rival, limits))
