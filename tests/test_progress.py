"""Progress: the items pass through unchanged, and what is shown depends on the time and the terminal only."""

import io

import pytest

from datalloy import progress
from datalloy.progress import CLEAR, format_duration, show, track


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves on by hand."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def shown():
    show(True)
    yield
    show(False)


def _work(screen: Screen, clock: list[float], monkeypatch, seconds: float, count: int = 4) -> str:
    monkeypatch.setattr(progress.sys, "stderr", screen)
    for _ in track(range(count), "score", count):
        clock[0] += seconds
    return screen.getvalue()


def test_the_items_come_unchanged(shown, capsys):
    assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_nothing_is_shown_until_the_command_line_asks_for_it(clock, monkeypatch):
    assert _work(Screen(is_terminal=True), clock, monkeypatch, seconds=100) == ""


@pytest.mark.parametrize("is_terminal", [True, False])
def test_nothing_is_shown_for_work_that_ends_soon(is_terminal, shown, clock, monkeypatch):
    assert _work(Screen(is_terminal), clock, monkeypatch, seconds=0.4) == ""


def test_a_log_gets_a_plain_line_now_and_then_and_at_the_end(shown, clock, monkeypatch):
    assert _work(Screen(is_terminal=False), clock, monkeypatch, seconds=8) == (
        "score: 2/4 (50 %), 16 s left\nscore: 4/4 (100 %), 0 s left\n"
    )


def test_a_terminal_gets_a_bar_that_is_wiped_at_the_end(shown, clock, monkeypatch):
    text = _work(Screen(is_terminal=True), clock, monkeypatch, seconds=30)
    assert text.startswith(f"{CLEAR}score: 1/4 (25 %), 1 min 30 s left\r{CLEAR}score: 2/4 (50 %), 1 min 00 s left\r")
    assert text.endswith(f"\r{CLEAR}")
    assert "\n" not in text


def test_the_bar_is_wiped_when_the_work_fails(shown, clock, monkeypatch):
    screen = Screen(is_terminal=True)
    monkeypatch.setattr(progress.sys, "stderr", screen)

    def work() -> None:
        for item in track(range(4), "score", 4):
            clock[0] += 5
            if item == 2:
                raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert screen.getvalue().endswith(f"2/4 (50 %), 10 s left\r{CLEAR}")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (90061, "25 h 01 min"),
    ],
)
def test_durations_are_written_in_two_units_at_most(seconds, text):
    assert format_duration(seconds) == text
