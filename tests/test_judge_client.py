"""A judge whose server fails in every way: nothing is paid twice, no score is invented, and it always ends."""

import json
import logging
import pickle

import numpy as np
import pytest

from datalloy.config import Judge
from datalloy.errors import EnvironmentFault, RecipeError
from datalloy.scorers.judge import JudgeRater
from datalloy.scorers.judge_client import ApiKey, retry_after
from drawn import draw_samples
from faulty_judge import KEY, WITHOUT_VERDICT, serving

SAMPLES = draw_samples(6)


@pytest.fixture
def judge():
    with serving() as server:
        yield server


@pytest.fixture
def make(judge, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_TEST_KEY", KEY)

    def make(**settings):
        defaults = {"max_concurrency": 1, "retry_seconds": 0.01, "timeout_seconds": 60.0, "retries": 2}
        settings = {"url": judge.url, "model": "judge", "api_key_env": "JUDGE_TEST_KEY", **defaults, **settings}
        return JudgeRater(Judge(**settings), tmp_path / "judge.sqlite", run="run")

    return make


def rate(rater, samples=SAMPLES[:1]):
    ratings = rater.rate(samples)
    return ratings.rating_N.tolist(), ratings.state_N.tolist()


def test_a_verdict_is_asked_for_once_and_kept(judge, make):
    assert rate(make()) == ([4.0], ["ok"])
    assert rate(make()) == ([4.0], ["ok"])
    assert judge.asked == 1
    assert judge.keys == {f"Bearer {KEY}"}


MAY_PASS = ["408", "409", "425", "429", "429 0", "500", "502", "503 0", "504", "529", "drop", "cut_body", "no_http"]


@pytest.mark.parametrize("fault", MAY_PASS)
def test_what_may_pass_is_tried_again_under_the_same_name(fault, judge, make):
    judge.script = [fault, fault, "ok"]
    assert rate(make()) == ([4.0], ["ok"])
    assert judge.asked == 3
    assert len(set(judge.names)) == 1


@pytest.mark.parametrize("fault", ["hang", "drip_headers", "drip_body"])
def test_a_reply_that_does_not_come_to_an_end_is_given_up(fault, judge, make):
    judge.script = [fault, "ok"]
    assert rate(make(timeout_seconds=2.0))[0] == [4.0]
    assert judge.asked >= 2


@pytest.mark.parametrize("fault", [*MAY_PASS[::4], "hang"])
def test_what_does_not_pass_is_no_score(fault, judge, make):
    judge.script = [fault]
    rating, state = rate(make(retries=1, timeout_seconds=1.0 if fault == "hang" else 60.0))
    assert np.isnan(rating).all()
    assert state == ["judge_failed"]
    assert judge.asked == 2


@pytest.mark.parametrize("fault", [*WITHOUT_VERDICT, "too_large", "204"])
def test_a_reply_without_a_verdict_is_paid_for_as_often_as_allowed_and_is_no_score(fault, judge, make):
    judge.script = [fault]
    rating, state = rate(make(tries=2))
    assert np.isnan(rating).all()
    assert state == ["judge_unparsable"]
    assert judge.asked == 2
    assert rate(make(tries=2))[1] == ["judge_unparsable"]
    assert judge.asked == 2  # also after a restart


def test_a_verdict_after_one_without_is_taken(judge, make):
    judge.script = ["prose", "ok"]
    assert rate(make()) == ([4.0], ["ok"])
    assert judge.asked == 2
    assert len(set(judge.names)) == 2


@pytest.mark.parametrize("status", ["400", "413", "415", "422"])
def test_a_request_that_the_server_refuses_is_not_repeated_and_others_go_on(status, judge, make, caplog):
    judge.script = [status, "ok"]
    with caplog.at_level(logging.WARNING):
        rating, state = rate(make(), SAMPLES[:3])
    assert state == ["judge_refused", "ok", "ok"]
    assert np.isnan(rating).tolist() == [True, False, False]
    assert judge.asked == 3
    assert f"{SAMPLES[0].id!r} of {SAMPLES[0].domain} is not judged: {status}" in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize("status", ["401", "402", "403", "404", "405", "410"])
def test_what_concerns_all_requests_stops_at_once_and_shows_no_key(status, judge, make):
    judge.script = ["ok", status]
    with pytest.raises(EnvironmentFault, match=rf"answers by {status}.*Answers so far are kept; run again") as raised:
        rate(make(), SAMPLES)
    assert judge.asked == 2
    assert KEY not in str(raised.value)
    judge.script = ["ok"]
    assert rate(make(), SAMPLES) == ([4.0] * 6, ["ok"] * 6)
    assert judge.asked == 2 + 5


@pytest.mark.parametrize("fault", ["redirect", "see_other"])
def test_redirects_are_not_followed(fault, judge, make):
    judge.script = [fault]
    with pytest.raises(
        EnvironmentFault, match=r"a redirect, and none is followed; put the final address into judge\.url"
    ):
        rate(make())
    assert (judge.asked, judge.elsewhere) == (1, 0)


def test_failures_in_a_row_open_the_circuit_and_what_is_paid_for_is_kept(judge, make):
    judge.script = ["ok", "ok", "503"]
    with pytest.raises(EnvironmentFault, match="failed 4 times in a row, the last time by status 503"):
        rate(make(breaker_failures=4), SAMPLES)
    assert judge.asked == 2 + 4
    judge.script = ["ok"]
    assert rate(make(), SAMPLES)[1] == ["ok"] * 6
    assert judge.asked == 6 + 4


def test_a_success_closes_the_circuit_again(judge, make):
    judge.script = ["503", "503", "ok", "503", "503", "ok"]
    assert rate(make(breaker_failures=3), SAMPLES[:2])[1] == ["ok", "ok"]


def test_a_server_that_is_not_there_is_an_outage_and_no_score(judge, make):
    with pytest.raises(EnvironmentFault, match="failed 3 times in a row, the last time by ConnectError"):
        rate(make(url="http://127.0.0.1:1/v1", breaker_failures=3), SAMPLES)


def test_a_pause_longer_than_the_deadline_is_not_waited_for(judge, make):
    judge.script = ["429 3600"]
    assert rate(make(deadline_seconds=60.0))[1] == ["judge_failed"]
    assert judge.asked == 1


def test_no_more_requests_are_under_way_than_allowed(judge, make):
    samples = draw_samples(24)
    assert rate(make(max_concurrency=3), samples)[1] == ["ok"] * 24
    assert judge.asked == 24
    assert judge.most_at_once <= 3


def test_copies_are_asked_for_once(judge, make):
    assert rate(make(max_concurrency=4), [SAMPLES[0]] * 5 + [SAMPLES[1]]) == ([4.0] * 6, ["ok"] * 6)
    assert judge.asked == 2


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0),
        ("0", 0),
        ("7", 7),
        (" 12 ", 12),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0),
        ("soon", 0),
        ("-5", 0),
        ("1e9", 0),
        ("9" * 400, 0),
        ("\uff17", 0),
        ("nan", 0),
    ],
)
def test_pauses_are_read_in_seconds_or_as_a_date(value, seconds):
    assert retry_after(value, now=10.0) == seconds


def test_a_key_shows_itself_to_nobody(monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    key = ApiKey.from_environment("SOME_KEY")
    assert KEY not in f"{key} {key!r} {[key]}"
    with pytest.raises(TypeError, match="a key is not written anywhere"):
        pickle.dumps(key)
    assert ApiKey.from_environment(None) is None


@pytest.mark.parametrize(
    ("value", "message"), [("", "is not set"), ("a\u00e9b", "holds no key"), ("a\nb", "holds no key")]
)
def test_a_key_that_is_none_is_refused_without_showing_it(value, message, monkeypatch):
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(RecipeError, match=message) as raised:
        ApiKey.from_environment("SOME_KEY")
    assert not value or value not in str(raised.value)


def test_the_key_is_in_no_file_and_no_request_body(judge, make, tmp_path):
    rater = make()
    rate(rater)
    rater.write_details(tmp_path / "judge.parquet", SAMPLES[:1])
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in json.dumps(judge.bodies)
