"""A function in a process of its own: its answers, its errors, its limits, and that nothing of it stays behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from datalloy import confined
from datalloy.confined import Confined, ConfinedError, LimitError


def work(request):
    match request:
        case "raise":
            raise ValueError("that way \ud800 not")
        case "loop":
            while True:
                pass
        case "sleep":
            time.sleep(60)
        case "memory":
            return len("a" * 10**9)
        case "flood":
            return "a" * 10**7
        case "die":
            os._exit(3)
        case "process":
            return os.getpid()
        case "descriptors":
            return [path.name for path in Path("/proc/self/fd").iterdir()]
    return [request, request]


@pytest.fixture
def call():
    return Confined(work)


def test_answers_are_those_of_the_function(call):
    for request in ({"a": [1, None, "é\u2028"]}, "x" * 10**6, []):
        assert call(request) == [request, request]


def test_all_calls_are_answered_by_one_child(call):
    assert call("process") == call("process") != os.getpid()


def test_an_error_comes_back_as_text_and_the_child_goes_on(call):
    child = call("process")
    with pytest.raises(ConfinedError, match="ValueError: that way"):
        call("raise")
    assert call("process") == child


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("loop", "more than 1 s or died"),
        ("sleep", "more than 2 s"),
        ("memory", "asked for more than"),
        ("flood", "answer has more than"),
        ("die", "or died"),
    ],
)
def test_what_needs_too_much_is_stopped_and_the_next_call_is_answered(call, monkeypatch, request_, message):
    monkeypatch.setattr(confined, "CPU_SECONDS", 1)
    monkeypatch.setattr(confined, "WALL_SECONDS", 2.0 if request_ == "sleep" else 120.0)
    monkeypatch.setattr(confined, "ANSWER_BYTES", 10**6)
    with pytest.raises(LimitError, match=message):
        call(request_)
    assert call.stopped == 1
    assert call(1) == [1, 1]


def test_requests_that_go_together_are_answered_as_if_they_went_alone(call, monkeypatch):
    monkeypatch.setattr(confined, "CPU_SECONDS", 1)
    first, error, second, stopped, last = call.each([1, "raise", "é" * 10**6, "die", 2])
    assert (first, second, last) == ([1, 1], ["é" * 10**6, "é" * 10**6], [2, 2])
    assert type(error) is ConfinedError
    assert isinstance(stopped, LimitError)
    assert call.stopped == 1


def test_nothing_more_is_asked_after_a_stop_that_is_not_gone_beyond(call):
    answers = call.each(["die"] * 100)
    next(answers)
    answers.close()
    assert call.stopped == 1


def test_limits_are_for_one_call_not_for_all(call, monkeypatch):
    monkeypatch.setattr(confined, "CPU_SECONDS", 1)
    child = call("process")
    for _ in range(200):
        call("x" * 10**5)
    assert call("process") == child


def test_the_child_keeps_no_file_of_its_parent_open(call, tmp_path):
    with (tmp_path / "lock").open("w"):
        assert len(call("descriptors")) <= 6  # three standard ones, two pipes, the folder that is listed


def test_threads_may_call_at_once(call):
    answers = {}

    def ask(i: int) -> None:
        answers[i] = call(i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: [i, i] for i in range(20)}


def test_a_fork_has_a_child_of_its_own(call):
    mine = call("process")
    if (forked := os.fork()) == 0:
        os._exit(0 if call("process") != mine and call(1) == [1, 1] else 1)
    assert os.waitpid(forked, 0)[1] == 0
    assert call("process") == mine


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_child_ends_with_its_parent(end):
    code = (
        "import os, signal; from datalloy.confined import Confined\n"
        f"call = Confined(lambda _: os.getpid()); print(call(0), flush=True); {end}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    for _ in range(1000):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        with contextlib.suppress(FileNotFoundError):  # it ended just now
            if Path(f"/proc/{int(done.stdout)}/stat").read_text().split()[2] == "Z":
                return
        time.sleep(0.01)
    pytest.fail("the child is still there")


@pytest.fixture
def interruptible():
    """Where the tests are started in the background of a script, interrupts are ignored; here they are not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_the_call_and_not_the_next_one(call):
    call(0)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        call("sleep")
    assert call(1) == [1, 1]
