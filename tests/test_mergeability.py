"""Experts whose sizes and directions are chosen by hand."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from datalloy.errors import ModelError
from datalloy.mergeability import Expert, diagnose

LEARNT = {"own_before": [1.0, 1.2, 0.9, 1.1], "own_after": [0.5, 0.6, 0.5, 0.4]}
BASE_NORM = 100.0


def experts(count=3, **changes):
    """Of equal settings; changes go to the first."""
    facts = {"steps": 60, "settings": {"base": "tiny", "learning_rate": 1e-4}, **LEARNT}
    return [Expert(f"e{k}", **(facts | changes if k == 0 else facts)) for k in range(count)]


def gram(*norms, cosine=0.5):
    norm_K = np.array(norms)
    return np.outer(norm_K, norm_K) * np.where(np.eye(len(norms)), 1, cosine)


def found(report):
    return [warning.found for warning in report.warnings]


def test_small_alike_experts_that_learnt_raise_no_warning():
    report = diagnose(experts(), gram(3.0, 3.0, 3.0), BASE_NORM)
    assert report.warnings == report.notes == ()
    assert report.names == ("e0", "e1", "e2")


def test_the_relative_update_is_half_of_the_update_over_the_base_where_small():
    report = diagnose(experts(2), gram(1.0, 2.0), BASE_NORM)
    assert report.relative_update == pytest.approx({"e0": 0.005, "e1": 0.01}, rel=1e-3)


def test_the_relative_update_of_one_as_long_as_the_base_uses_both_norms():
    report = diagnose(experts(1), gram(100.0), BASE_NORM)
    assert report.relative_update["e0"] == pytest.approx(1 / (1 + np.sqrt(2)))


@pytest.mark.parametrize(("norm", "warned"), [(9.9, False), (10.3, True)])
def test_a_large_update_is_warned_of_by_name(norm, warned):
    report = diagnose(experts(2), gram(norm, 8.0), BASE_NORM)
    assert (found(report) == ["expert e0 moved the weights by 5.1%, above 5%"]) == warned
    assert bool(report.warnings) == warned


@pytest.mark.parametrize(("norm", "warned"), [(1.9, False), (2.1, True)])
def test_an_update_twice_as_long_as_another_is_warned_of(norm, warned):
    report = diagnose(experts(2), gram(1.0, norm), BASE_NORM)
    assert report.norm_ratio == pytest.approx(norm)
    assert found(report) == (["the update of expert e1 is 2.1 times as long as that of e0"] if warned else [])


def test_experts_of_nearly_one_domain_are_warned_of():
    gram_KK = gram(1.0, 2.0, 1.0)
    gram_KK[0, 1] = gram_KK[1, 0] = 0.95 * 2
    report = diagnose(experts(), gram_KK, BASE_NORM)
    assert found(report) == ["experts e0 and e1 went the same way (cosine 0.95)"]
    assert report.cosine[0][1] == pytest.approx(0.95)
    assert report.cosine[0][2] == pytest.approx(0.5)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_orthogonal_updates_shrink_by_the_root_of_their_number_and_are_noted(count):
    report = diagnose(experts(count), gram(*[2.0] * count, cosine=0.0), BASE_NORM)
    assert report.shrinkage == pytest.approx(1 / np.sqrt(count))
    assert not report.warnings
    assert "nearly orthogonal (mean cosine 0.00)" in report.notes[0].found


def test_updates_of_one_direction_do_not_shrink():
    assert diagnose(experts(), gram(2.0, 2.0, 2.0, cosine=1.0), BASE_NORM).shrinkage == pytest.approx(1)


def test_an_expert_that_may_not_have_learnt_its_domain_is_warned_of_with_numbers():
    report = diagnose(
        experts(own_before=[1.0, 1.0, 1.0, 1.0], own_after=[0.5, 1.4, 0.6, 1.3]), gram(1, 1, 1), BASE_NORM
    )
    (warning,) = report.warnings
    gain = report.own_gain["e0"]
    assert gain.mean == pytest.approx(0.05)
    assert gain.interval.low < 0 < gain.interval.high
    assert warning.found.startswith("expert e0 gained 0.05 nats a token on 4 items of its own domain, 95% interval -0.")


def test_an_expert_without_items_of_its_own_is_warned_of():
    report = diagnose(experts(own_before=[], own_after=[]), gram(1, 1, 1), BASE_NORM)
    assert report.own_gain["e0"] is None
    assert found(report) == ["expert e0 has no items of its own domain that it was not trained on"]


def test_unequal_steps_are_warned_of():
    assert found(diagnose(experts(steps=40), gram(1, 1, 1), BASE_NORM)) == ["experts were trained for 40 to 60 steps"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": "other", "learning_rate": 1e-4}, "e0 and e1 cannot be merged: base is other for the one and tiny"),
        ({"base": "tiny"}, "learning_rate is absent for the one and 0.0001 for the other"),
    ],
)
def test_unequal_settings_are_refused_by_name(settings, message):
    with pytest.raises(ModelError, match=message):
        diagnose(experts(settings=settings), gram(1, 1, 1), BASE_NORM)


def test_an_expert_that_did_not_move_is_refused_by_name():
    with pytest.raises(ModelError, match="expert e1 is equal to the base"):
        diagnose(experts(), gram(1.0, 0.0, 1.0), BASE_NORM)


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(ModelError, match="not finite"):
        diagnose(experts(), gram(1.0, np.nan, 1.0), BASE_NORM)


def test_a_warning_says_what_it_means_and_what_to_do():
    (warning,) = diagnose(experts(steps=40), gram(1, 1, 1), BASE_NORM).warnings
    assert str(warning) == f"{warning.found}: {warning.means}. To do: {warning.advice}"


def test_the_report_is_plain_data():
    report = diagnose(experts(steps=40), gram(1.0, 1.0, 4.0, cosine=0.0), BASE_NORM)
    data = json.loads(json.dumps(asdict(report), allow_nan=False))
    assert data["warnings"][0]["found"] == report.warnings[0].found
    assert data["cosine"][0] == [1, 0, 0]
