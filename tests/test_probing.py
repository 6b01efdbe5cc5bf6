import json

import numpy as np
import pytest

from datalloy.errors import ModelError
from datalloy.scorers.probing import GRID, VISIBLE_EFFECT, StepRow, noise_floor, scan_steps, step_of_effect
from quadratic import Point, Quadratic

TARGET = [Point((1.0,), 1.0), Point((1.0,), 1.5), Point((1.0,), 0.5), Point((1.0,), 2.0)]


@pytest.fixture
def scorer():
    return Quadratic(0.0).scorer(TARGET)


def scan(scorer, probes, wanted=None):
    return scan_steps(scorer, probes, wanted=wanted, seed=0)


def row(step, effect):
    return StepRow(step, step, 0.5, 0.0, effect, 0.0, 0.0)


def test_the_step_of_an_effect_lies_between_the_rows_around_it():
    rows = [row(0.1, 0.02), row(1.0, 0.2), row(10.0, 2.0)]
    assert step_of_effect(rows, 0.2) == pytest.approx(1.0)
    assert step_of_effect(rows, 0.02 * 10**0.5) == pytest.approx(0.1 * 10**0.5)


def test_the_step_of_an_effect_never_leaves_the_grid():
    rows = [row(0.1, 0.02), row(1.0, 0.2)]
    assert step_of_effect(rows, 0.001) == 0.1
    assert step_of_effect(rows, 5.0) == 1.0


def test_the_scan_tries_multiples_of_the_median_polyak_step(scorer):
    # Polyak steps 1 / (2 x^2): 0.5, 0.125, 2
    probes = [Point((1.0,), 3.0), Point((2.0,), 1.0), Point((0.5,), -1.0)]
    found = scan(scorer, probes)
    assert [row.multiple for row in found.rows] == list(GRID)
    assert [row.step for row in found.rows] == pytest.approx([multiple * 0.5 for multiple in GRID])
    assert found.chosen == step_of_effect(found.rows, VISIBLE_EFFECT)
    assert found.reason == "the median of 3 probes changes the targets' loss by 200%"


def test_a_wanted_step_is_chosen_and_stands_among_the_rows_in_its_place(scorer):
    found = scan(scorer, [Point((1.0,), 3.0), Point((1.0,), 1.0)], wanted=0.15)
    assert (found.chosen, found.reason) == (0.15, "given in the recipe")
    steps = [row.step for row in found.rows]
    assert len(steps) == len(GRID) + 1
    assert steps == sorted(steps)
    assert sum(step == pytest.approx(0.15) for step in steps) == 1


def test_rows_tell_the_utilities_at_their_step(scorer):
    # Polyak step 1 / 2. After it w is half the sample's answer: 0.5, -1 or 2.5, and the mean target 1.25, variance 5/16
    found = scan(scorer, [Point((1.0,), 1.0), Point((1.0,), -2.0), Point((1.0,), 5.0)])
    (row,) = [row for row in found.rows if row.multiple == 1]
    utilities = [(1.25**2 - (w - 1.25) ** 2) / 2 for w in (0.5, -1, 2.5)]
    assert row.negative_fraction == pytest.approx(1 / 3)
    assert row.median_utility == pytest.approx(np.median(utilities), abs=1e-6)


def test_a_ranking_that_turns_with_the_step_does_not_agree_with_the_smallest_step(scorer):
    found = scan(scorer, [Point((1.0,), answer) for answer in (2.0, 3.0, 4.0, 5.0)])
    agreements = {row.multiple: row.smallest_step_agreement for row in found.rows}
    assert agreements[GRID[0]] == pytest.approx(1)
    assert agreements[4] == pytest.approx(-1)  # w lands at twice the answer, and all are past the target


def test_halves_of_the_same_target_agree(scorer):
    found = scan(scorer, [Point((1.0,), answer) for answer in (-1.0, 0.1, 0.5)])
    assert found.rows[0].half_agreement == pytest.approx(1)


def test_halves_that_want_opposite_things_do_not_agree():
    found = scan(
        Quadratic(0.0).scorer([Point((1.0,), 5.0), Point((1.0,), -5.0)]), [Point((1.0,), y) for y in (1, 2, 3)]
    )
    assert found.rows[0].half_agreement == pytest.approx(-1)


def test_one_item_has_no_halves_that_could_agree():
    found = scan(Quadratic(0.0).scorer(TARGET[:1]), [Point((1.0,), 1.0), Point((1.0,), 2.0)])
    assert {row.half_agreement for row in found.rows} == {0}


def test_one_probe_is_enough_for_a_step(scorer):
    found = scan(scorer, [Point((1.0,), 1.0)])
    assert found.chosen == step_of_effect(found.rows, VISIBLE_EFFECT)
    assert {row.smallest_step_agreement for row in found.rows} == {0}


def test_probes_without_number_or_gradient_are_left_out(scorer):
    good = [Point((1.0,), 1.0), Point((1.0,), 3.0)]
    bad = [Point((np.nan,), 1.0), Point((1.0,), 0.0)]
    found = scan(scorer, good + bad)
    assert found.rows == scan(scorer, good).rows
    assert "median of 2 probes" in found.reason


def test_no_usable_probe_is_refused(scorer):
    with pytest.raises(ModelError, match="none of the 1 probes has a finite loss and a gradient under quadratic"):
        scan(scorer, [Point((1.0,), 0.0)])


def test_a_step_that_breaks_the_model_has_no_row(scorer):
    found = scan(scorer, [Point((1.0,), 1.0), Point((1.0,), 3.0)], wanted=1e30)
    assert [row.multiple for row in found.rows] == list(GRID)


def test_a_scan_is_plain_json_data(scorer):
    metadata = scan(scorer, [Point((1.0,), 1.0)]).as_metadata()
    assert json.loads(json.dumps(metadata, allow_nan=False))["chosen"] == metadata["chosen"]


def test_the_noise_floor_is_the_root_mean_square_difference():
    toy, probes = Quadratic(0.0), [Point((1.0,), 1.0), Point((1.0,), 2.0)]
    one, other = toy.scorer(TARGET[:1], step=0.5), toy.scorer(TARGET[:1], step=1.0)
    # w 0.5 and 1, after a step twice as long 1 and 2; losses (w - 1)^2 / 2
    assert noise_floor(one, other, probes) == pytest.approx(np.sqrt((0.125**2 + 0.5**2) / 2))
    assert noise_floor(one, one, probes) == 0
