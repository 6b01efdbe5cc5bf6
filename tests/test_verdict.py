"""Verdicts on picks whose worth is known: by formula, or drawn with the luck of items and of training."""

from statistics import NormalDist

import numpy as np
import pytest

from datalloy.calibration import TrainedMixtures, calibrate
from datalloy.errors import DataError
from datalloy.uncertainty import NOTHING_KNOWN
from datalloy.verdict import USUAL_CORRELATION, USUAL_TRAININGS, Confirmation, judge
from linear_merges import NO_RUNS_3, SCALE_G, SIZE_K, TARGETS, THIRD_K, flat, objective, run_results

PICK_K = np.array([0.6, 0.2, 0.2])


def verdict_on(gains, *, noise=0.05, trained=None, wish=None, merged=0.0, confidence=0.95, **changes):
    """`gains`: objective by name of mixture, above that of uniform; `merged`: of merges, above trained, at the pick."""
    weights = {"pick": PICK_K, "uniform": THIRD_K, "size": SIZE_K}
    weight_NK = np.vstack([*(weights[name] for name in gains), np.eye(3)])
    rng = np.random.default_rng(0)
    hard_V = rng.normal(0.5, 0.3, 100)
    value_N = np.array([*gains.values(), -0.2, -0.3, -0.4])
    true_NV = hard_V + value_N[:, None] + rng.normal(0, noise, (len(weight_NK), 100))
    merged_NV = true_NV + rng.normal(0, noise, true_NV.shape) + merged
    merged_NV[len(gains) :] = true_NV[len(gains) :]
    trained = TrainedMixtures(
        TARGETS, weight_NK, true_NV, merged_NV, np.repeat([0, 1], 50), changes.pop("seed_sd_G", np.zeros(2))
    )
    return judge(
        trained,
        calibrate(flat, trained, SCALE_G),
        wish or objective(),
        pick_K=PICK_K,
        uniform_K=THIRD_K,
        size_K=SIZE_K,
        confidence=confidence,
        seed=0,
        **changes,
    )


def test_a_gain_beyond_its_interval_is_trusted():
    verdict = verdict_on({"pick": 0.1, "uniform": 0.0, "size": 0.05})
    assert (verdict.verdict, verdict.trusted, verdict.merge_score) == ("trust", True, None)
    assert verdict.gain_vs_uniform.source == verdict.gain_vs_size_proportional.source == "measured"
    assert verdict.gain_vs_uniform.mean == pytest.approx(0.1, abs=0.03)
    assert verdict.gain_vs_uniform.interval.low > 0
    assert verdict.gain_vs_size_proportional.mean == pytest.approx(0.05, abs=0.03)


def test_a_gain_within_its_interval_is_not():
    verdict = verdict_on({"pick": 0.005, "uniform": 0.0, "size": 0.0}, noise=0.2)
    assert (verdict.verdict, verdict.trusted) == ("use uniform", False)
    assert verdict.gain_vs_uniform.interval.low < 0
    assert verdict.reason.startswith("A gain over uniform weights is not shown: it is ")


def test_a_pick_that_is_worse_than_uniform_is_said_to_be():
    verdict = verdict_on({"pick": -0.1, "uniform": 0.0})
    assert (verdict.verdict, verdict.trusted) == ("use uniform", False)
    assert verdict.reason.startswith("Training on the pick loses against uniform weights: -0.")


def test_gains_are_paired_over_items():
    """Items differ by 0.3, answers to one item by 0.05: unpaired, a gain of 0.05 on 100 items would be lost."""
    gain = verdict_on({"pick": 0.05, "uniform": 0.0}).gain_vs_uniform
    assert gain.interval.high - gain.interval.low == pytest.approx(2 * 1.96 * 0.05 * np.sqrt(2 / 100), rel=0.25)


def test_a_higher_confidence_asks_for_more():
    gains = {"pick": 0.03, "uniform": 0.0}
    assert verdict_on(gains, noise=0.1, confidence=0.8).trusted
    assert not verdict_on(gains, noise=0.1, confidence=0.999).trusted


def test_a_pick_chosen_among_many_has_to_gain_more():
    gains = {"pick": 0.03, "uniform": 0.0}
    one, many = (verdict_on(gains, noise=0.15, confidence=0.8, chosen_among=count) for count in (1, 100))
    assert many.gain_vs_uniform == verdict_on(gains, noise=0.15, confidence=0.998).gain_vs_uniform
    assert many.confidence == 0.8
    assert (one.trusted, many.trusted) == (True, False)


def test_a_known_spread_between_seeds_widens_the_gain():
    gains = {"pick": 0.06, "uniform": 0.0}
    assert verdict_on(gains).trusted
    doubted = verdict_on(gains, seed_sd_G=np.full(2, 0.1))
    assert not doubted.trusted
    assert doubted.gain_vs_uniform.mean == verdict_on(gains).gain_vs_uniform.mean


def test_a_gain_that_was_not_measured_is_predicted_and_said_to_be():
    verdict = verdict_on({"pick": 0.1})
    assert verdict.gain_vs_uniform.source == "predicted"
    assert "predicted from 1 real run)" in verdict.reason
    low, high = verdict.gain_vs_uniform.interval
    assert high - low > 0.1  # the interaction is known at the pick alone


def test_without_any_run_nothing_is_trusted():
    verdict = verdict_on({})
    assert (verdict.verdict, verdict.gain_vs_uniform.source) == ("use uniform", "predicted")
    assert verdict.agreement.spearman.value == pytest.approx(1)  # of experts with themselves
    assert verdict.agreement.spearman_without_vertices.value is None


def test_without_experts_either_there_is_no_regret_to_tell():
    verdict = judge(
        NO_RUNS_3,
        calibrate(flat, NO_RUNS_3, SCALE_G),
        objective(),
        pick_K=PICK_K,
        uniform_K=THIRD_K,
        size_K=SIZE_K,
        confidence=0.95,
        seed=0,
    )
    assert verdict.agreement.regret is None
    assert verdict.agreement.spearman.interval == NOTHING_KNOWN


def test_the_uniform_mixture_has_no_gain_over_itself():
    trained = run_results([THIRD_K], [[0.1, 0.1]])
    verdict = judge(
        trained,
        calibrate(flat, trained, SCALE_G),
        objective(),
        pick_K=THIRD_K,
        uniform_K=THIRD_K,
        size_K=SIZE_K,
        confidence=0.95,
        seed=0,
    )
    assert (verdict.verdict, verdict.trusted) == ("use uniform", False)
    assert verdict.gain_vs_uniform.interval == (0, 0)
    assert verdict.reason == "The pick is the uniform mixture itself."
    assert verdict.gain_vs_uniform.chance is None


def test_a_merge_above_every_trained_model_is_offered_with_its_score():
    verdict = verdict_on({"pick": 0.1, "uniform": 0.0}, merged=0.2)
    assert (verdict.verdict, verdict.trusted) == ("deploy the merge", True)
    assert verdict.merge_score == pytest.approx(0.5 + 0.3, abs=0.06)
    assert "Training on the pick gains" in verdict.reason


def test_a_merge_within_the_interval_of_one_trained_model_is_not():
    verdict = verdict_on({"pick": 0.0, "uniform": 0.2}, merged=0.2)
    assert (verdict.verdict, verdict.merge_score) == ("use uniform", None)


def test_a_merge_can_be_the_best_where_training_on_the_pick_is_not_trusted():
    verdict = verdict_on({"pick": -0.1, "uniform": 0.0}, merged=0.3)
    assert (verdict.verdict, verdict.trusted) == ("deploy the merge", False)


def test_a_pick_that_breaks_a_guard_rail_is_not_trusted_however_much_it_gains():
    wish = objective(base_G=(0.0, 0.9), max_fall_G=(np.inf, 0.1))
    verdict = verdict_on({"pick": 0.1, "uniform": 0.0}, wish=wish)
    assert (verdict.verdict, verdict.trusted) == ("use uniform", False)
    assert verdict.gain_vs_uniform.interval.low > 0
    assert verdict.reason.startswith("Training on the pick lets docvqa fall 0.")
    assert verdict.reason.endswith("its guard rail allows 0.1000.")


def test_agreement_is_told_with_and_without_vertices():
    agreement = verdict_on({"pick": 0.1, "uniform": 0.0, "size": -0.1}).agreement
    assert (agreement.spearman.mixtures, agreement.spearman_without_vertices.mixtures) == (6, 3)
    assert agreement.spearman.value == agreement.kendall.value == pytest.approx(1)
    assert agreement.spearman_without_vertices.value == pytest.approx(1)
    assert agreement.spearman_without_vertices.interval == NOTHING_KNOWN  # of three
    assert agreement.kendall.interval.low < 0.7
    assert agreement.spearman.interval.low < 0.7


def test_regret_is_that_of_the_best_merge_among_the_trained():
    """The pick's merge shines, training on it does not."""
    trained = verdict_on({"pick": -0.1, "uniform": 0.05, "size": 0.0}, merged=np.array([[0.5], *[[0.0]] * 5]))
    assert trained.agreement.regret.value == pytest.approx(0.15, abs=0.03)
    low, high = trained.agreement.regret.interval
    assert 0 < low < trained.agreement.regret.value < high


def test_the_objective_of_the_verdict_is_the_users():
    """Far better on one target, a little worse on the other."""
    rng = np.random.default_rng(0)
    uniform_V = rng.normal(0.5, 0.1, 100)
    pick_V = uniform_V + np.repeat([0.3, -0.05], 50) + rng.normal(0, 0.02, 100)
    true_NV = np.stack([pick_V, uniform_V])
    trained = TrainedMixtures(
        TARGETS, np.stack([PICK_K, THIRD_K]), true_NV, true_NV, np.repeat([0, 1], 50), np.zeros(2)
    )

    def trusted(wish):
        return judge(
            trained,
            calibrate(flat, trained, SCALE_G),
            wish,
            pick_K=PICK_K,
            uniform_K=THIRD_K,
            size_K=SIZE_K,
            confidence=0.95,
            seed=0,
        ).trusted

    assert trusted(objective("mean"))
    assert trusted(objective("weighted", weight_G=(0.5, 0.5)))
    assert not trusted(objective("worst"))
    assert not trusted(objective("weighted", weight_G=(0.0, 1.0)))


def test_the_same_seed_gives_the_same_verdict():
    assert verdict_on({"pick": 0.1}) == verdict_on({"pick": 0.1})


# --- confirmed by further trainings ----------------------------------------------------------------------------------


def trainings(gain, *, further=1, items=50, item_sd=0.1, luck_sd=0.0, chosen_luck=0.0, seed=0):
    """The pick and uniform weights trained again, on two targets: one luck for all items of a target and training."""
    rng = np.random.default_rng(seed)
    hard_V = rng.normal(0.5, 0.3, 2 * items)

    def values(mean, luck_of_the_first):
        luck_RG = rng.normal(0, luck_sd, (1 + further, 2))
        luck_RG[0] += luck_of_the_first
        return hard_V + mean + np.repeat(luck_RG, items, axis=1) + rng.normal(0, item_sd, (1 + further, 2 * items))

    return Confirmation(values(gain, chosen_luck), values(0.0, 0.0), np.repeat([0, 1], items))


def confirmed(confirmation, wish=None, confidence=0.95):
    return confirmation.gain(wish or objective(), confidence=confidence, seed=0)


def test_a_confirmed_gain_is_that_of_the_further_trainings_alone():
    """However lucky the training was that chose the pick."""
    confirmation = trainings(0.02, further=2, item_sd=0.0, chosen_luck=5.0)
    assert confirmed(confirmation).mean == pytest.approx(0.02)


def test_the_luck_of_training_is_what_further_trainings_show_and_what_is_usual():
    """By hand: items without noise of their own, so that all there is between trainings is their luck."""
    values = {"pick": [0.6, 0.5, 0.7], "uniform": [0.4, 0.4, 0.4]}
    pick_RV, uniform_RV = (np.repeat(np.array(row)[:, None], 100, axis=1) for row in values.values())
    variance, freedom = Confirmation(pick_RV, uniform_RV, np.repeat([0, 1], 50)).luck(objective())
    of_item = (np.var(values["pick"], ddof=1) + 0) / 2  # on average over pick and uniform weights
    of_objective = 0.5 * of_item  # two targets, each with half the weight, were they independent
    measured = of_item - of_objective / 50
    usual = USUAL_CORRELATION * of_objective
    assert freedom == 4 + USUAL_TRAININGS
    assert variance == pytest.approx((4 * measured + USUAL_TRAININGS * usual) / freedom)


def test_noise_of_items_is_not_taken_for_luck():
    lucks = [trainings(0.0, items=200, item_sd=0.3, further=3, seed=seed).luck(objective())[0] for seed in range(40)]
    of_items = 0.3**2 / 400
    assert np.mean(lucks) < USUAL_CORRELATION * 0.3**2 / 2 + 0.5 * of_items


def test_intervals_of_confirmed_gains_hold_what_trainings_without_end_would_give():
    """The luck drawn is the usual one; of one training each, an interval over items alone holds the truth far less."""
    luck_sd = np.sqrt(USUAL_CORRELATION * 0.2**2)
    held, plain = 0, 0
    for seed in range(300):
        confirmation = trainings(0.02, item_sd=0.2, luck_sd=luck_sd, items=100, seed=seed)
        low, high = confirmed(confirmation).interval
        held += low <= 0.02 <= high
        difference_V = confirmation.pick_RV[1] - confirmation.uniform_RV[1]
        half = 1.96 * difference_V.std() / np.sqrt(len(difference_V))
        plain += abs(difference_V.mean() - 0.02) <= half
    assert held / 300 > 0.92
    assert plain / 300 < 0.85


def test_more_trainings_narrow_the_interval():
    def width(further):
        low, high = confirmed(trainings(0.0, further=further, item_sd=0.2, luck_sd=0.03, items=400)).interval
        return high - low

    assert width(8) < 0.6 * width(1)


def test_the_lowest_target_has_the_luck_of_the_luckiest():
    def luck(wish):
        values_RV = np.repeat([[0.5, 0.5], [0.5, 0.7]], 50, axis=1)
        return Confirmation(values_RV, values_RV, np.repeat([0, 1], 50)).luck(wish)[0]

    usual = USUAL_CORRELATION * 0.02
    assert luck(objective("worst")) == pytest.approx(USUAL_TRAININGS * usual / (2 + USUAL_TRAININGS))
    alone = luck(objective("weighted", weight_G=(0.0, 1.0)))
    assert alone == pytest.approx((2 * (0.02 - 0.02 / 50) + USUAL_TRAININGS * usual) / (2 + USUAL_TRAININGS))


@pytest.mark.parametrize(
    ("pick", "uniform", "message"),
    [
        ((2, 4), (3, 4), r"\(2, 4\), those of uniform weights \(3, 4\)"),
        ((1, 4), (1, 4), "beside the one that chose it"),
    ],
)
def test_trainings_that_do_not_fit_or_are_none_are_refused(pick, uniform, message):
    with pytest.raises(DataError, match=message):
        Confirmation(np.zeros(pick), np.zeros(uniform), np.repeat([0, 1], 2))


def test_a_gain_that_further_trainings_do_not_show_is_not_trusted():
    """The run that chose the pick gains a tenth; the next one nothing."""
    gains = {"pick": 0.1, "uniform": 0.0}
    assert verdict_on(gains).trusted
    verdict = verdict_on(gains, confirmation=trainings(0.0))
    assert (verdict.verdict, verdict.gain_vs_uniform.source) == ("use uniform", "confirmed")
    assert "confirmed by 1 further training of each on 100 items that decided nothing" in verdict.reason


FOLLOWED, OPEN = 0.045, 0.035  # as told to `trainings`, whose draw of items takes .015 off


def test_a_confirmed_gain_of_nine_chances_in_ten_is_followed_and_not_trusted():
    gains = {"pick": 0.1, "uniform": 0.0}
    followed = verdict_on(gains, confirmation=trainings(FOLLOWED))
    assert followed.gain_vs_uniform.interval.low < 0
    assert 0.9 <= followed.gain_vs_uniform.chance < 0.975
    assert (followed.verdict, followed.trusted) == ("follow", False)
    assert "is likely (93%), but not shown" in followed.reason


def test_a_confirmed_gain_of_fewer_chances_is_not_followed():
    verdict = verdict_on({"pick": 0.1, "uniform": 0.0}, confirmation=trainings(OPEN))
    assert 0.8 < verdict.gain_vs_uniform.chance < 0.9
    assert verdict.gain_vs_uniform.mean > 0
    assert verdict.verdict == "use uniform"


def test_the_chance_of_a_gain_is_the_part_of_its_draws_above_zero():
    """Gains of .035 with a standard error of .02 are normal nearly: 96 of a hundred are above zero."""
    gain = confirmed(trainings(0.05))
    error = (gain.interval.high - gain.interval.low) / (2 * 1.96)
    assert gain.chance == pytest.approx(NormalDist().cdf(gain.mean / error), abs=0.01)


def test_a_gain_by_the_runs_that_chose_the_pick_is_not_followed_where_it_is_not_shown():
    verdict = verdict_on({"pick": 0.01, "uniform": 0.0}, noise=0.1)
    assert verdict.gain_vs_uniform.interval.low < 0 < verdict.gain_vs_uniform.mean
    assert (verdict.verdict, verdict.gain_vs_uniform.source) == ("use uniform", "measured")


def test_a_pick_that_breaks_a_guard_rail_is_not_followed():
    wish = objective(base_G=(0.0, 0.9), max_fall_G=(np.inf, 0.1))
    verdict = verdict_on({"pick": 0.1, "uniform": 0.0}, wish=wish, confirmation=trainings(FOLLOWED))
    assert verdict.gain_vs_uniform.chance > 0.9
    assert verdict.verdict == "use uniform"


def test_a_gain_that_they_show_is_trusted_without_a_price_for_the_choice():
    confirmation = trainings(0.1, further=2)
    verdict = verdict_on({"pick": 0.1, "uniform": 0.0}, confirmation=confirmation, chosen_among=100)
    assert verdict.trusted
    assert verdict.gain_vs_uniform == confirmed(confirmation)
    assert verdict.gain_vs_uniform.training_sd == pytest.approx(confirmation.luck(objective())[0] ** 0.5)
