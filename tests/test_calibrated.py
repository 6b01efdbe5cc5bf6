import dataclasses

import numpy as np
import pytest

from datalloy.errors import AgreementError
from datalloy.scorers import ScoreBlock
from datalloy.scorers.calibrated import MIN_PROBES, CalibratedScorer
from datalloy.scorers.step import StepRule
from datalloy.scorers.taps import Taps
from datalloy.uncertainty import rank_agreement

ERROR = 0.25  # of exact utility, as it comes from the choice of target items


@pytest.fixture(scope="module")
def probes(drawn):
    return drawn[8:]


@pytest.fixture(scope="module")
def norm_N(proxy, probes):
    """Norms of the gradients, about 1."""
    norm_N = np.sqrt(Taps(proxy).measure_all(probes, [], batch_size=8).squared_norm_N)
    return norm_N / norm_N.mean()


def block_of(utility_NG, weight_G):
    count = len(utility_NG)
    return ScoreBlock(np.zeros(count), utility_NG, utility_NG @ weight_G, np.full(count, ERROR))


@pytest.fixture(scope="module")
def exact(norm_N, items):
    """Utilities that curve with the norm of the gradient: what it gains in slope it loses in curvature."""
    return block_of(np.column_stack([norm_N, norm_N - 0.4 * norm_N**2]), items.weight_G)


@pytest.fixture(scope="module")
def noise(probes, items):
    return block_of(np.random.default_rng(1).normal(size=(len(probes), 2)), items.weight_G)


@pytest.fixture(scope="module")
def fit(proxy, items, targets, probes):
    def fit(exact, count=None, min_agreement=0.6):
        columns = (exact.loss_N, exact.utility_NG, exact.utility_N, exact.error_N)
        return CalibratedScorer(
            Taps(proxy),
            items,
            list(targets.values()),
            probes[:count],
            ScoreBlock(*(column[:count] for column in columns)),
            replayed=None,
            rule=StepRule("sgd"),
            step=0.04,
            batch_size=8,
            min_agreement=min_agreement,
            seed=0,
        )

    return fit


@pytest.fixture(scope="module")
def fitted(fit, exact):
    return fit(exact, count=26)


def test_utilities_that_gradients_explain_are_predicted_for_samples_never_fitted(fitted, probes, exact):
    found = fitted.score(probes[26:])
    for g in range(2):
        assert rank_agreement(found.utility_NG[:, g], exact.utility_NG[26:, g]) > 0.9
    assert found.utility_NG == pytest.approx(exact.utility_NG[26:], abs=0.1 * np.ptp(exact.utility_NG))


def test_agreement_on_held_out_probes_is_high_where_it_should_be(fitted):
    low, high = fitted.agreement.interval
    assert fitted.agreement.probes == 26
    assert fitted.agreement.spearman > 0.9
    assert low <= fitted.agreement.spearman <= high


def test_agreement_is_that_of_the_weighted_utility(proxy, items, targets, probes, exact, noise):
    """A target that hardly counts may be as unpredictable as it likes."""
    lopsided = dataclasses.replace(items, weight_G=np.array([1.0, 0.0]))
    utility_NG = np.column_stack([exact.utility_NG[:, 0], noise.utility_NG[:, 1]])
    scorer = CalibratedScorer(
        Taps(proxy),
        lopsided,
        list(targets.values()),
        probes,
        block_of(utility_NG, lopsided.weight_G),
        replayed=None,
        rule=StepRule("sgd"),
        step=0.04,
        batch_size=8,
        min_agreement=0.6,
        seed=0,
    )
    assert scorer.agreement.spearman > 0.9


def test_no_prediction_lies_outside_what_was_measured(fitted, exact, probes):
    found = fitted.score(probes).utility_NG
    assert (found <= exact.utility_NG[:26].max(0) + 1e-12).all()
    assert (found >= exact.utility_NG[:26].min(0) - 1e-12).all()


def test_the_error_of_a_good_prediction_is_that_of_exact(fitted, probes):
    (error,) = set(fitted.score(probes[:3]).error_N)
    assert ERROR < error < 1.1 * ERROR


def test_the_error_of_a_bad_prediction_is_that_of_the_prediction(fit, noise, probes):
    (error,) = set(fit(noise, min_agreement=-1).score(probes[:3]).error_N)
    assert error == pytest.approx(np.hypot(ERROR, noise.utility_N.std()), rel=0.3)


def test_utilities_that_nothing_explains_are_refused(fit, exact, items):
    shuffled = np.random.default_rng(0).permutation(exact.utility_NG)
    with pytest.raises(AgreementError, match=r"Spearman -?0\.\d\d .* 32 probes.*min_agreement is 0\.6.*tail or exact"):
        fit(block_of(shuffled, items.weight_G))


def test_held_out_agreement_does_not_use_fitted_points(fit, noise, probes):
    """Fitted to noise, a regression does well on its own points and no better than chance on those held out."""
    scorer = fit(noise, min_agreement=-1)
    assert rank_agreement(scorer.score(probes).utility_N, noise.utility_N) > 0.45
    assert scorer.agreement.spearman < 0.18  # one standard deviation of a Spearman of 32 unrelated pairs


def test_probes_without_finite_utility_are_left_out(fit, exact, items, probes):
    utility_NG = exact.utility_NG.copy()
    utility_NG[[3, 7]] = np.nan
    scorer = fit(block_of(utility_NG, items.weight_G))
    assert scorer.agreement.probes == len(probes) - 2
    assert scorer.score(probes[:8]).finite_N.all()


def test_too_few_probes_are_refused(fit, exact):
    with pytest.raises(AgreementError, match=f"at least {MIN_PROBES} probes .* found 23 of 23; raise score.probes"):
        fit(exact, count=23)


def test_a_threshold_that_is_just_met_is_enough(fit, exact, fitted):
    reached = fitted.agreement.spearman
    assert fit(exact, count=26, min_agreement=reached).agreement == fitted.agreement
    with pytest.raises(AgreementError):
        fit(exact, count=26, min_agreement=np.nextafter(reached, 1))


def test_a_target_with_one_item_leaves_the_error_unknown(fit, exact, probes):
    unknown = dataclasses.replace(exact, error_N=np.full(len(probes), np.nan))
    block = fit(unknown).score(probes[:2])
    assert np.isnan(block.error_N).all()
    assert block.finite_N.all()
