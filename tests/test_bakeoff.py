"""The race on made-up arms whose quality is known."""

import itertools
import random
import zlib

import numpy as np
import pytest

from datalloy.bakeoff import FINALISTS, FULL, LONGER, MIN_STEPS, Arm, make_arms, race
from datalloy.errors import ModelError, RecipeError

RANDOM = Arm("random", 0.5, "domain")
TAIL, LOW, LONG, DOT = (Arm(scorer, 0.5, "domain") for scorer in ("tail", "low_loss", "length", "first_order"))
ARMS = [FULL, RANDOM, TAIL, LOW, LONG, DOT, Arm("tail", 0.3, "global"), Arm("tail", 0.7, "global")]
V = 40
BASE_V = np.random.default_rng(0).normal(-3, 1, V)
UNIFORM_V = np.full(V, 1 / V)


class Track:
    """Runs arms whose value after n steps is the base's plus gain * n, with noise of every item's own."""

    def __init__(self, gains, noise=0.02):
        self.gains, self.noise, self.runs = gains, noise, []

    def __call__(self, arm, steps, number):
        self.runs.append((arm, steps, number))
        rng = np.random.default_rng([zlib.crc32(arm.name.encode()), number])
        return BASE_V + self.gains.get(arm, 0.0) * steps + rng.normal(0, self.noise, V)


def run(track, arms=ARMS, budget_steps=400, longest_steps=100, weight_V=UNIFORM_V, seed=0):
    return race(
        arms,
        track,
        base_V=BASE_V,
        weight_V=weight_V,
        budget_steps=budget_steps,
        longest_steps=longest_steps,
        seed=seed,
    )


@pytest.mark.parametrize("best", [arm for arm in ARMS if arm != RANDOM], ids=lambda arm: arm.name)
def test_the_best_arm_wins_whichever_it_is(best):
    assert run(Track({best: 0.02})).winner == best


def test_everything_is_kept_where_random_samples_lead():
    """No score has shown that it helps then, and a random half is no advice."""
    outcome = run(Track({RANDOM: 0.02, TAIL: 0.01}))
    assert outcome.winner == FULL
    assert min(margin.mean for margin in outcome.margins) < 0


def test_a_near_tie_does_not_go_to_random_samples():
    small = Arm("tail", 0.2, "domain")
    noise_V = np.random.default_rng(0).normal(0, 0.3, V)  # a standard error of 0.047
    noise_V -= noise_V.mean()

    def track(arm, steps, number):
        return BASE_V + {small: 0.51, RANDOM: 0.5 + noise_V}.get(arm, 0)

    assert run(track, [FULL, RANDOM, small]).winner == small


def test_keeping_everything_wins_when_selection_harms():
    outcome = run(Track({arm: -0.02 for arm in ARMS if arm != FULL}))
    assert outcome.winner == FULL
    assert all(margin.interval.low > 0 for margin in outcome.margins)


LOWS = [Arm("low_loss", fraction, "domain") for fraction in (0.2, 0.5, 0.8)]
TAILS = [Arm("tail", fraction, "domain") for fraction in (0.2, 0.5, 0.8)]


def test_two_rounds_whose_longest_runs_take_half_of_the_final_training_are_affordable_or_not():
    track = Track({}, noise=1.0)
    arms = [FULL, RANDOM, *LOWS, *TAILS]
    run(track, arms, budget_steps=460, longest_steps=120)  # 8 of 20 steps, then at most 5 of 60
    assert track.runs[:8] == [(arm, 20, 1) for arm in arms]
    assert {(steps, number) for _, steps, number in track.runs[8:]} == {(60, 2)}


@pytest.mark.parametrize(("budget_steps", "raced", "steps"), [(459, 7, 65), (240, 4, 60), (179, 2, 89), (60, 2, 30)])
def test_where_they_are_not_fewer_arms_run_and_not_shorter_ones(budget_steps, raced, steps):
    track = Track({}, noise=1.0)
    run(track, [FULL, RANDOM, *LOWS, *TAILS], budget_steps=budget_steps, longest_steps=120)
    by_risk = [FULL, *LOWS[::-1], *TAILS[::-1], RANDOM]
    assert track.runs == [(arm, steps, 1) for arm in by_risk[:raced]]


def test_what_the_budget_was_too_small_for_is_said():
    arms = [FULL, RANDOM, *LOWS]
    some = run(Track({}), arms, budget_steps=180, longest_steps=120).caution
    assert some.startswith("the bake-off's budget was too small to try random 50% domain, low_loss 20% domain. ")
    assert some.endswith("raise select.bakeoff_epochs 1.7 times")  # 5 runs of 60 steps instead of 3
    early = run(Track({}), [FULL, LOWS[2]], budget_steps=60, longest_steps=120).caution
    assert early.startswith(
        "the runs of the bake-off took 30 of the final training's 120 steps; a selection that leads"
    )
    assert early.endswith("raise select.bakeoff_epochs 2.0 times")
    assert run(Track({}), [FULL, LOWS[2]], budget_steps=120, longest_steps=120).caution is None
    assert run(Track({}), arms, budget_steps=400, longest_steps=120).caution is None


@pytest.mark.parametrize(
    ("leads", "winner"),
    [
        ({0.8: 0.19}, FULL),
        ({0.8: 0.21}, LOWS[2]),
        ({0.8: 0.21, 0.5: 0.25}, LOWS[1]),
        ({0.8: 0.3, 0.5: 0.6, 0.2: 0.9}, LOWS[2]),  # 0.1, -0.2 and -0.3 at the lower end
        ({0.8: -0.3}, FULL),
    ],
)
def test_in_the_one_round_a_selection_wins_by_the_surest_lead_over_the_full_pool(leads, winner):
    error = {0.8: 0.1, 0.5: 0.1, 0.2: 0.6} if len(leads) < 3 else {0.8: 0.1, 0.5: 0.4, 0.2: 0.6}
    noise_V = np.random.default_rng(0).normal(0, 1, V)
    noise_V = (noise_V - noise_V.mean()) / (noise_V.std(ddof=1) / np.sqrt(V))  # a standard error of 1

    def track(arm, steps, number):
        if arm.scorer != "low_loss" or arm.fraction not in leads:
            return BASE_V
        return BASE_V + leads[arm.fraction] + error[arm.fraction] * noise_V

    assert run(track, [FULL, RANDOM, *LOWS], budget_steps=240, longest_steps=120).winner == winner


def test_random_samples_do_not_win_the_one_round_either():
    track = Track({RANDOM: 0.02}, noise=0.0)
    assert run(track, [FULL, RANDOM, LOWS[2]], budget_steps=200, longest_steps=120).winner == FULL
    assert (RANDOM, 66, 1) in track.runs


def test_margins_tell_how_much_better_the_winner_does():
    gains = {TAIL: 0.02, LOW: 0.015, LONG: 0.012, RANDOM: 0.01}
    outcome = run(Track(gains, noise=0.0), budget_steps=230, longest_steps=60)  # rounds of 10 and 30 steps
    margins = {margin.over: margin for margin in outcome.margins}
    assert margins["full"].mean == pytest.approx(0.6)
    assert margins["full"].interval == pytest.approx((0.6, 0.6))  # the same for every item
    assert margins[RANDOM.name].mean == pytest.approx(0.1)  # by the longest run of both
    assert set(margins) == {"full", LOW.name, LONG.name, RANDOM.name}


def test_the_winner_is_held_against_training_on_nothing():
    helped = run(Track({TAIL: 0.02}, noise=0.0), budget_steps=230, longest_steps=60).over_base
    assert (helped.over, helped.mean) == ("the base", pytest.approx(0.6))
    harmed = run(Track(dict.fromkeys(ARMS, -0.02) | {TAIL: -0.01}))
    assert harmed.winner == TAIL
    assert harmed.over_base.interval.high < 0


def test_margins_are_uncertain_where_items_disagree():
    (margin, _) = run(Track({TAIL: 0.02, RANDOM: 0.02}, noise=0.3), [FULL, RANDOM, TAIL]).margins
    # differences of two noises of 0.3 on 40 items: a standard error of 0.3 * sqrt(2 / 40) = 0.067
    assert margin.interval.high - margin.interval.low == pytest.approx(2 * 1.96 * 0.067, rel=0.3)
    assert margin.interval.low < margin.mean < margin.interval.high


def test_arms_that_differ_by_noise_alone_have_margins_that_reach_zero():
    outcome = run(Track({}, noise=1.0))
    lows = [margin.interval.low for margin in outcome.margins]
    assert min(margin.mean for margin in outcome.margins) >= 0
    assert sum(low > 0 for low in lows) <= 1  # at 95 %, of at most five


def test_items_count_by_their_weight():
    """The arm that is good at the first item alone wins only if that item has all the weight."""
    first_V = np.zeros(V)
    first_V[0] = 1

    def track(arm, steps, number):
        return BASE_V + {TAIL: 2 * first_V, LOW: 1 - first_V}.get(arm, 0)

    arms = [FULL, RANDOM, TAIL, LOW]
    assert run(track, arms).winner == LOW
    assert run(track, arms, weight_V=first_V).winner == TAIL


@pytest.mark.parametrize(("budget_steps", "longest_steps"), [(92, 12), (150, 1000), (997, 1000), (5000, 33)])
def test_neither_the_budget_nor_the_longest_run_is_exceeded(budget_steps, longest_steps):
    track = Track({TAIL: 0.01})
    outcome = run(track, budget_steps=budget_steps, longest_steps=longest_steps)
    lengths = [steps for _, steps, _ in track.runs]
    assert sum(lengths) == outcome.steps_spent <= budget_steps
    assert MIN_STEPS <= min(lengths) <= max(lengths) <= longest_steps


def test_the_budget_is_used_as_far_as_whole_steps_go():
    track = Track({}, noise=1.0)  # nobody is ruled out
    # 8 arms of 10 steps, and 30 for the best three, the full pool and a larger selection, which may be among the best
    assert run(track, budget_steps=230, longest_steps=60).steps_spent in (170, 200, 230)
    assert run(track, budget_steps=230, longest_steps=100).steps_spent == 228  # four arms of 57


def test_all_arms_run_the_same_number_of_steps_in_a_round():
    track = Track({TAIL: 0.02, LOW: 0.02})
    run(track)
    (first,), (last,) = [{steps for _, steps, number in track.runs if number == n} for n in (1, 2)]
    assert last == LONGER * first


def finalists(track):
    return {arm for arm, _, number in track.runs if number == 2}


def test_every_arm_runs_in_the_first_round():
    track = Track({TAIL: 0.05})
    run(track)
    assert [arm for arm, _, number in track.runs if number == 1] == ARMS


def test_the_best_three_and_the_full_pool_run_longest_however_bad_that_is():
    track = Track({TAIL: 0.05, LOW: 0.01, LONG: 0.005, FULL: -0.1})
    outcome = run(track)
    assert finalists(track) == {TAIL, LOW, LONG, FULL}
    assert {"full", RANDOM.name} <= {margin.over for margin in outcome.margins}


def test_the_best_meets_its_own_next_larger_selection_in_the_last_round():
    """However badly that did in the short runs: a small selection leads early."""
    arms = [*ARMS, *(Arm("tail", fraction, "domain") for fraction in (0.2, 0.4, 0.6))]
    small, larger = Arm("tail", 0.2, "domain"), Arm("tail", 0.4, "domain")
    track = Track({small: 0.05, LOW: 0.01, LONG: 0.005, larger: -0.01})
    outcome = run(track, arms, budget_steps=900)
    assert finalists(track) == {small, LOW, LONG, larger, FULL}
    assert len(finalists(track)) == FINALISTS
    assert larger.name in {margin.over for margin in outcome.margins}


def test_the_larger_selection_is_that_of_the_best_score_where_random_leads():
    arms = [FULL, RANDOM, LOW, TAIL, DOT, Arm("low_loss", 0.8, "domain")]
    track = Track({RANDOM: 0.05, LOW: 0.01, TAIL: 0.005, Arm("low_loss", 0.8, "domain"): -0.01})
    run(track, arms)
    assert finalists(track) == {RANDOM, LOW, TAIL, FULL, Arm("low_loss", 0.8, "domain")}


def test_a_larger_selection_that_only_the_last_round_shows_to_be_best_wins():
    larger = Arm("low_loss", 0.8, "domain")

    def track(arm, steps, number):
        gain = {LOW: 0.2, TAIL: 0.1, LONG: 0.05, larger: 0.5 if number == 2 else 0.0}.get(arm, 0)
        return BASE_V + gain

    outcome = run(track, [*ARMS, larger], budget_steps=460)
    assert outcome.winner == larger
    assert {"full", LOW.name, TAIL.name, LONG.name, RANDOM.name} == {margin.over for margin in outcome.margins}


@pytest.mark.parametrize(("lead", "winner"), [(0.01, "full"), (0.2, "tail 50% domain")])
def test_a_selection_nearly_tied_with_the_full_pool_loses_to_it(lead, winner):
    noise_V = np.random.default_rng(0).normal(0, 0.3, V)  # a standard error of 0.047
    noise_V -= noise_V.mean()

    def track(arm, steps, number):
        return BASE_V + {TAIL: 0.5 + lead, FULL: 0.5 + noise_V}.get(arm, 0)

    assert run(track).winner.name == winner


def test_an_early_leader_can_be_overtaken_in_the_last_round():
    def track(arm, steps, number):
        gain = {TAIL: 0.2, LOW: 0.19 if number == 1 else 0.5}.get(arm, 0)
        return BASE_V + gain + np.random.default_rng(zlib.crc32(arm.name.encode())).normal(0, 0.3, V)

    assert run(track).winner == LOW


def test_every_run_is_reported_with_its_weighted_value():
    track = Track({TAIL: 0.02})
    outcome = run(track)
    assert [(result.arm, result.steps, result.round) for result in outcome.results] == track.runs
    arm, steps, number = track.runs[-1]
    assert outcome.results[-1].value == pytest.approx(track(arm, steps, number).mean())


@pytest.mark.parametrize("gains", [{TAIL: 0.02, LOW: 0.019}, {}], ids=["close", "all equal"])
def test_the_order_of_the_arms_does_not_matter(gains):
    shuffled = random.Random(1).sample(ARMS, len(ARMS))
    outcomes = [run(Track(gains, noise=0.0 if not gains else 0.05), arms) for arms in (ARMS, ARMS[::-1], shuffled)]
    assert len({outcome.winner for outcome in outcomes}) == 1
    assert all(outcome.margins == outcomes[0].margins for outcome in outcomes)
    assert all(set(outcome.results) == set(outcomes[0].results) for outcome in outcomes)


def test_the_same_seed_gives_the_same_outcome():
    assert run(Track({TAIL: 0.02})) == run(Track({TAIL: 0.02}))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"budget_steps": 7}, r"select\.bakeoff_epochs allows 7 steps for 2 of its arms"),
        ({"longest_steps": 3}, r"train\.samples or train\.epochs give the final training 3"),
    ],
)
def test_a_race_too_short_to_tell_arms_apart_is_refused_by_its_keys(sizes, message):
    with pytest.raises(RecipeError, match=rf"{message}.*set score\.method and select\.keep_fraction"):
        run(Track({}), **sizes)


def test_a_budget_pays_only_for_arms_that_there_are():
    arms = [FULL, RANDOM, TAIL]  # three at most in both rounds
    assert run(Track({}, noise=1.0), arms, budget_steps=MIN_STEPS * 3 * (1 + LONGER)).steps_spent in (36, 48)


def test_an_arm_that_breaks_the_model_stops_the_race_by_name():
    def track(arm, steps, number):
        return np.full(V, np.nan) if arm == TAIL else BASE_V

    with pytest.raises(ModelError, match=f"arm '{TAIL.name}': 40 of 40 target items have no finite value after"):
        run(track)


def test_arms_are_all_combinations_and_the_two_references():
    arms = make_arms(["tail", "random", "low_loss"], [0.3, 0.7, 1.0], "global")
    assert arms[:2] == [FULL, Arm("random", 0.7, "domain")]
    assert set(arms[2:]) == set(itertools.starmap(Arm, itertools.product(["tail", "low_loss"], [0.3, 0.7], ["global"])))


def test_random_is_a_reference_even_where_everything_is_to_be_kept():
    assert make_arms(["tail"], [1.0]) == [FULL, Arm("random", 0.5, "domain")]


def test_arms_have_names_of_their_own():
    """Runs are found again by these names: 12.5 % and 12 % must not be one."""
    fractions = [0.07, 0.12, 0.125, 0.3, 0.5]
    names = [arm.name for w in ("domain", "global") for arm in make_arms(["tail", "low_loss"], fractions, w)[2:]]
    assert len(set(names)) == len(names)
    assert {"tail 12.5% domain", "tail 7% global", "low_loss 30% domain"} <= set(names)
