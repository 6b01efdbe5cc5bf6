"""Units that kill their process: who is suspected, who is isolated, and that chance is not taken for guilt."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from datalloy.attempts import DEATHS_IN_BATCHES, Attempt

KEYS = ["a", "b", "c"]


def attempt(path: Path, work: Callable[[Attempt], None]) -> bool:
    """One attempt in a process of its own; whether it ended by itself."""
    child = os.fork()
    if not child:  # pragma: no cover - the child
        try:
            with Attempt(path) as opened:
                work(opened)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def careful(poison: str, seen: Path) -> Callable[[Attempt], None]:
    """Work as isolation does; `poison` kills the process. What is touched is noted in the file `seen`."""

    def touch(key: str) -> None:
        with seen.open("a") as file:
            file.write(key)
        if key == poison:
            os.kill(os.getpid(), signal.SIGKILL)

    def work(opened: Attempt) -> None:
        todo = [key for key in KEYS if key not in opened.isolated]
        if opened.is_careful:
            for key in sorted(todo, key=lambda key: key not in opened.suspects):
                opened.working_on(key)
                touch(key)
                opened.survived(key)
            opened.working_on(None)
        for key in todo:
            touch(key)

    return work


def test_a_sample_that_kills_is_isolated_after_two_retries(tmp_path):
    path, seen = tmp_path / "attempt.json", tmp_path / "seen"
    ended = [attempt(path, careful("b", seen)) for _ in range(4)]
    assert ended == [False, False, False, True]
    assert seen.read_text() == "ab" + "ab" + "b" + "ac"  # together; one by one; the suspect first; without it
    assert not path.exists()


def test_a_first_attempt_works_on_all_at_once(tmp_path):
    with Attempt(tmp_path / "attempt.json") as opened:
        assert not opened.is_careful
        assert not opened.isolated


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_attempt_that_ends_with_an_exception_is_no_death(error, tmp_path):
    def fail() -> None:
        with Attempt(tmp_path / "attempt.json") as opened:
            opened.working_on("a")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_sample_is_not_lost_for_having_been_there_once(tmp_path):
    """Killed from outside while working on b; b is tried first, and does no harm."""
    path, seen = tmp_path / "attempt.json", tmp_path / "seen"
    for at in (None, "b"):
        assert not attempt(path, lambda opened, at=at: (opened.working_on(at), os.kill(os.getpid(), signal.SIGKILL)))
    assert Attempt(path).suspects == {"b"}
    assert attempt(path, careful("none", seen))
    assert seen.read_text() == "bac" + "abc"


def test_what_dies_only_together_is_done_one_at_a_time_in_the_end(tmp_path):
    path = tmp_path / "attempt.json"
    kill = lambda opened: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    for _ in range(DEATHS_IN_BATCHES):
        assert not Attempt(path).never_together
        assert not attempt(path, kill)
    assert Attempt(path).never_together
    assert not Attempt(path).isolated


@pytest.mark.parametrize("content", ["", "[]", '{"at": 1}', '{"at": null, "batch_deaths": "x", "accused": {}}'])
def test_a_damaged_record_of_an_attempt_accuses_nobody(content, tmp_path):
    (tmp_path / "attempt.json").write_text(content)
    opened = Attempt(tmp_path / "attempt.json")
    assert opened.is_careful
    assert not opened.isolated | opened.suspects
