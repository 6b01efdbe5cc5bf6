import numpy as np
import pytest
import scipy.stats

from datalloy import uncertainty
from datalloy.errors import DataError
from datalloy.uncertainty import bootstrap_interval, paired_interval, rank_agreement, rank_agreement_interval

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
