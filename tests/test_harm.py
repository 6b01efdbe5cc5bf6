"""Harm is judged against clean samples: what the target items themselves do at the same step."""

import numpy as np
import pytest

from datalloy.scorers import harm_below
from datalloy.scores import Scores
from datalloy.selection import toxic_mask
from quadratic import Point, Quadratic

TARGET = [Point((1.0,), 1.0), Point((1.0,), 1.5), Point((1.0,), 0.5), Point((1.0,), 2.0)]


def scores(utility, error, **metadata):
    count = len(utility)
    return Scores.from_columns(
        id=[str(i) for i in range(count)],
        domain=["d"] * count,
        supervised_tokens=[1] * count,
        length_tokens=[1] * count,
        loss=[1.0] * count,
        utility=utility,
        utility_by_target={},
        utility_se=[error] * count,
        state=["ok"] * count,
        metadata={"method": "tail", "signed": True, **metadata},
    )


def test_a_clean_utility_leaves_its_own_item_out():
    # one step of size 0.5 from w = 0 lands at half the item's answer y; the others' mean loss is sum (y' - w)^2 / 2 / 3
    scorer = Quadratic(0.0).scorer(TARGET)
    scorer.step = 0.5
    answers = np.array([1.0, 1.5, 0.5, 2.0])
    expected = []
    for v, y in enumerate(answers):
        others = np.delete(answers, v)
        expected.append(np.mean((others**2 - (others - y / 2) ** 2) / 2))
    assert scorer.clean_utilities(TARGET) == pytest.approx(expected, abs=1e-6)


def test_harm_is_what_clean_samples_hardly_ever_do():
    table = scores([-0.1, -0.5, -0.9], 0.0, harm_below=-0.6)
    assert toxic_mask(table, 0.95).tolist() == [False, False, True]


def test_harm_is_beyond_the_interval():
    table = scores([-0.7, -0.9], 0.1, harm_below=-0.6)  # 1.645 x 0.1 above: -0.54 and -0.74
    assert toxic_mask(table, 0.95).tolist() == [False, True]


def test_without_a_measured_threshold_harm_starts_at_zero():
    assert toxic_mask(scores([-0.1, 0.1], 0.0), 0.95).tolist() == [True, False]


def test_harm_begins_below_nearly_all_clean_samples_and_never_above_zero():
    scorer = Quadratic(0.0).scorer(TARGET)
    scorer.step = 0.1  # every item pulls towards all others: all clean utilities are positive
    assert harm_below(scorer, {"0": TARGET}) == 0.0
    scorer.step = 4.0  # far beyond every target
    clean_V = scorer.clean_utilities(TARGET)
    assert harm_below(scorer, {"0": TARGET}) == pytest.approx(np.quantile(clean_V, 0.05))
    assert clean_V.min() < harm_below(scorer, {"0": TARGET}) < 0
