"""What stands in events.jsonl of a run folder."""

import json

import pytest

from datalloy import events, progress
from datalloy.config import load_recipe
from datalloy.events import EventLog
from datalloy.progress import track
from datalloy.run import Run


@pytest.fixture
def log(tmp_path):
    return tmp_path / "events.jsonl"


def read(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def told(log):
    return [(event["stage"], event["done"], event["total"]) for event in read(log)]


def test_a_stage_has_an_event_when_it_begins_and_one_when_it_ends(log):
    with progress.listening(EventLog(log)):
        assert list(track("abc", "score", 3)) == ["a", "b", "c"]
        assert list(track([], "empty", 0)) == []
    assert told(log) == [("score", 0, 3), ("score", 3, 3), ("empty", 0, 0)]
    assert all(event["time"].endswith("Z") for event in read(log))


def test_between_two_events_of_a_stage_some_time_passes(log, monkeypatch):
    clock = iter([0.0, 0.4, 0.8, 1.2, 1.6])
    monkeypatch.setattr(events.time, "monotonic", lambda: next(clock))
    told_of = EventLog(log)
    for done in range(5):
        told_of("score", done, 9)
    assert [done for _, done, _ in told(log)] == [0, 3]


def test_nothing_is_written_when_nobody_listens(log):
    with progress.listening(EventLog(log)):
        pass
    assert list(track("abc", "score", 3)) == ["a", "b", "c"]
    assert not log.exists()


@pytest.mark.parametrize("torn", [b'{"time": "2', b'{"stage": "a"}\n{"sta', b""])
def test_a_torn_line_is_cut_off_and_what_is_whole_stays(log, torn):
    log.write_bytes(torn)
    EventLog(log)("check", 0, 1)
    whole = torn[: torn.rfind(b"\n") + 1]
    assert log.read_bytes().startswith(whole)
    assert len(read(log)) == whole.count(b"\n") + 1


def test_an_open_run_notes_its_progress_and_a_closed_one_does_not(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: n\nbase: tiny\ndomains: {a: {path: a}}\ntargets: {b: {path: b}}\n")
    with Run(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run") as run:
        list(track("ab", "check", 2))
    list(track("ab", "later", 2))
    assert told(run.path("events.jsonl")) == [("check", 0, 2), ("check", 2, 2)]
