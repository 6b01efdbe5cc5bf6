import numpy as np
import pytest
import scipy.stats

from datalloy import uncertainty
from datalloy.errors import DataError
from datalloy.uncertainty import (
    NOTHING_KNOWN,
    bootstrap_interval,
    mixture_agreement,
    paired_interval,
    rank_agreement,
    rank_agreement_interval,
    resampled_means,
    top_1_regret,
    top_1_regret_interval,
)

SETTINGS = {"confidence": 0.9, "resamples": 4000, "seed": 0}


def test_interval_of_a_mean_agrees_with_the_normal_approximation():
    values_V = np.random.default_rng(1).normal(size=400)
    half = 1.645 * values_V.std() / 20
    # the percentiles of 4000 resamples scatter by about 3 % of the half width
    assert bootstrap_interval(values_V, **SETTINGS) == pytest.approx(
        (values_V.mean() - half, values_V.mean() + half), abs=0.1 * half
    )


def test_interval_is_the_same_for_the_same_seed_only():
    values_V = np.arange(10.0)
    assert bootstrap_interval(values_V, **SETTINGS) == bootstrap_interval(values_V, **SETTINGS)
    assert bootstrap_interval(values_V, **SETTINGS) != bootstrap_interval(values_V, **{**SETTINGS, "seed": 1})


def test_draws_do_not_depend_on_the_size_of_the_blocks(monkeypatch):
    values_V = np.arange(10.0)
    whole = bootstrap_interval(values_V, **SETTINGS)
    monkeypatch.setattr(uncertainty, "BLOCK_DRAWS", 70)
    assert bootstrap_interval(values_V, **SETTINGS) == whole


def test_nominal_coverage_is_nearly_reached():
    rng = np.random.default_rng(2)
    covered = 0
    for i in range(300):
        low, high = bootstrap_interval(rng.exponential(size=60), confidence=0.9, resamples=300, seed=i)
        covered += low <= 1 <= high
    # 270 expected; the binomial spread is 5, and skewed data cost the percentile interval some coverage
    assert 250 <= covered <= 290


def test_pairing_removes_what_is_common_to_both():
    common_V = np.random.default_rng(3).normal(size=50) * 100
    assert paired_interval(common_V + 1, common_V, **SETTINGS) == pytest.approx((1, 1))


def test_paired_interval_changes_sign_with_the_order():
    a_V, b_V = np.random.default_rng(4).normal(size=(2, 30))
    forth, back = paired_interval(a_V, b_V, **SETTINGS), paired_interval(b_V, a_V, **SETTINGS)
    assert forth == pytest.approx((-back.high, -back.low))


def test_paired_values_of_different_items_are_refused():
    with pytest.raises(DataError, match="same items, found 3 and 2"):
        paired_interval(np.ones(3), np.ones(2), **SETTINGS)


def test_values_that_are_not_finite_are_refused_by_position():
    with pytest.raises(DataError, match="1 of 3 are not finite, the first is item 1"):
        bootstrap_interval(np.array([0, np.nan, 1]), **SETTINGS)


def test_no_items_have_no_interval():
    with pytest.raises(DataError, match=r"shape \(0,\)"):
        bootstrap_interval(np.array([]), **SETTINGS)


def test_rank_agreement_is_spearmans_with_ties():
    a_N, b_N = np.random.default_rng(5).integers(6, size=(2, 40))
    assert rank_agreement(a_N, b_N) == pytest.approx(scipy.stats.spearmanr(a_N, b_N).statistic)


def test_rank_agreement_sees_the_order_only():
    a_N = np.array([1.0, 2, 5, 9])
    assert rank_agreement(a_N, np.exp(a_N)) == pytest.approx(1)
    assert rank_agreement(a_N, -(a_N**3)) == pytest.approx(-1)


def test_rank_agreement_of_equal_values_is_refused():
    with pytest.raises(DataError, match="of 3 samples is not defined: all have the value 2"):
        rank_agreement(np.arange(3), np.full(3, 2.0))


def test_rank_agreement_interval_holds_the_estimate_and_narrows_with_samples():
    rng = np.random.default_rng(6)
    widths = []
    for count in (20, 200):
        a_N = rng.normal(size=count)
        b_N = a_N + rng.normal(size=count)
        low, high = rank_agreement_interval(a_N, b_N, seed=0)
        assert low < rank_agreement(a_N, b_N) < high
        widths.append(high - low)
    assert widths[1] < 0.5 * widths[0]


def test_resamples_without_spread_are_left_out():
    low, high = rank_agreement_interval(np.array([0.0, 0, 1]), np.array([0.0, 1, 2]), seed=0)
    assert -1 <= low <= high <= 1


# --- over few mixtures -----------------------------------------------------------------------------------------------

COEFFICIENTS = ("spearman", "kendall")


def agreement(a_N, b_N, coefficient="spearman", **draws):
    return mixture_agreement(np.asarray(a_N, float), np.asarray(b_N, float), coefficient, confidence=0.95, **draws)


def test_mixture_agreement_is_scipys_with_ties():
    a_N, b_N = np.random.default_rng(7).integers(5, size=(2, 12))
    assert agreement(a_N, b_N, "spearman").value == pytest.approx(scipy.stats.spearmanr(a_N, b_N).statistic)
    assert agreement(a_N, b_N, "kendall").value == pytest.approx(scipy.stats.kendalltau(a_N, b_N).statistic)


def test_the_interval_over_mixtures_is_that_of_bonett_and_wright():
    a_N, b_N = np.arange(7), np.array([0, 1, 3, 2, 6, 4, 5])
    spearman, kendall = agreement(a_N, b_N, "spearman"), agreement(a_N, b_N, "kendall")
    for found, variance in ((spearman, (1 + spearman.value**2 / 2) / 4), (kendall, 0.437 / 3)):
        z, half = np.arctanh(found.value), 1.959964 * np.sqrt(variance)
        assert found.interval == pytest.approx(tuple(np.tanh([z - half, z + half])), rel=1e-5)


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_three_mixtures_say_nothing_however_well_they_agree(coefficient):
    found = agreement([1, 2, 3], [1, 2, 3], coefficient)
    assert (found.value, found.interval, found.mixtures) == (pytest.approx(1), NOTHING_KNOWN, 3)


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_five_mixtures_in_perfect_order_are_not_certain(coefficient):
    low, high = agreement(range(5), range(5), coefficient).interval
    assert -0.5 < low < 0.3
    assert high == pytest.approx(1)


@pytest.mark.parametrize("values", [([], []), ([1.0], [2.0]), ([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])])
def test_agreement_that_is_not_defined_has_no_value_and_the_widest_interval(values):
    found = agreement(*values)
    assert (found.value, found.interval) == (None, NOTHING_KNOWN)


def strongly_correlated(count):
    """Rows of five Gaussian pairs of correlation 0.95."""
    rng = np.random.default_rng(8)
    a_RN = rng.normal(size=(count, 5))
    return zip(a_RN, 0.95 * a_RN + np.sqrt(1 - 0.95**2) * rng.normal(size=(count, 5)), strict=True)


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


SPEARMAN, KENDALL = 6 / np.pi * np.arcsin(0.95 / 2), 2 / np.pi * np.arcsin(0.95)  # of the whole population


@pytest.mark.parametrize(("coefficient", "truth"), [("spearman", SPEARMAN), ("kendall", KENDALL)])
def test_intervals_over_five_mixtures_cover_the_truth(coefficient, truth):
    assert coverage([agreement(a, b, coefficient).interval for a, b in strongly_correlated(300)], truth) >= 0.94


def test_bootstrap_intervals_over_five_mixtures_do_not():
    """Why mixtures have an interval of their own."""
    pairs = strongly_correlated(100)
    assert coverage([rank_agreement_interval(a, b, seed=0, resamples=200) for a, b in pairs], SPEARMAN) < 0.85


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_noise_of_the_items_widens_the_agreement(coefficient):
    a_N, b_N = np.arange(8.0), np.array([0.0, 1, 3, 2, 4, 6, 5, 7])
    noise_RN = np.random.default_rng(9).normal(size=(500, 8))
    without = agreement(a_N, b_N, coefficient).interval
    same = agreement(a_N, b_N, coefficient, a_RN=np.tile(a_N, (500, 1)), b_RN=np.tile(b_N, (500, 1))).interval
    noisy = agreement(a_N, b_N, coefficient, a_RN=a_N + noise_RN, b_RN=b_N - noise_RN).interval
    assert same == pytest.approx(without)
    assert noisy.low < without.low - 0.02
    assert noisy.high > without.high


def test_resampled_means_are_those_of_the_mean_of_each_target():
    value_NV = np.random.default_rng(10).normal(size=(2, 90))
    target_V = np.arange(90) % 3
    mean_RNG = resampled_means(value_NV, target_V, resamples=4000, seed=0)
    assert mean_RNG.shape == (4000, 2, 3)
    for target in range(3):
        items = value_NV[:, target_V == target]
        assert mean_RNG[:, :, target].mean(axis=0) == pytest.approx(items.mean(axis=1), abs=0.02)
        assert mean_RNG[:, :, target].std(axis=0) == pytest.approx(items.std(axis=1) / np.sqrt(30), rel=0.06)


def test_all_mixtures_are_resampled_on_the_same_items():
    value_V = np.random.default_rng(11).normal(size=20)
    mean_RNG = resampled_means(np.stack([value_V, value_V + 3]), np.zeros(20, int), resamples=50, seed=0)
    np.testing.assert_allclose(mean_RNG[:, 1] - mean_RNG[:, 0], 3)


def test_resampled_means_do_not_depend_on_the_size_of_the_blocks(monkeypatch):
    value_NV, target_V = np.random.default_rng(12).normal(size=(3, 10)), np.arange(10) % 2
    whole = resampled_means(value_NV, target_V, resamples=40, seed=0)
    monkeypatch.setattr(uncertainty, "BLOCK_DRAWS", 35)
    np.testing.assert_allclose(resampled_means(value_NV, target_V, resamples=40, seed=0), whole, rtol=1e-12)


def test_regret_is_what_the_pick_misses():
    assert top_1_regret(np.array([1.0, 3.0, 2.0]), np.array([0.5, 0.2, 0.9])) == pytest.approx(0.7)
    assert top_1_regret(np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.2, 0.9])) == 0


def test_several_best_of_the_surrogate_count_by_their_mean():
    assert top_1_regret(np.array([3.0, 3.0, 2.0]), np.array([0.5, 0.3, 0.9])) == pytest.approx(0.5)


def test_regret_of_a_pick_that_could_as_well_be_another_reaches_that_others():
    """The surrogate's two best are apart by a tenth of their noise; one has regret 0, the other 1."""
    surrogate_N, true_N = np.array([0.1, 0.0, -9.0]), np.array([1.0, 0.0, 0.5])
    noise_RN = np.random.default_rng(13).normal(size=(1000, 3))
    interval = top_1_regret_interval(
        surrogate_N,
        true_N,
        surrogate_RN=surrogate_N + noise_RN,
        true_RN=np.tile(true_N, (1000, 1)),
        confidence=0.95,
    )
    assert top_1_regret(surrogate_N, true_N) == 0
    assert interval == pytest.approx((0, 1))


def test_the_interval_holds_the_regret_itself():
    """Of equally good mixtures every draw has a best by luck, the regret itself being 0."""
    true_RN = np.random.default_rng(14).normal(size=(1000, 5))
    same_N = np.zeros(5)
    low, high = top_1_regret_interval(
        same_N, same_N, surrogate_RN=np.tile(np.arange(5.0), (1000, 1)), true_RN=true_RN, confidence=0.9
    )
    assert low == 0
    assert high > 1
