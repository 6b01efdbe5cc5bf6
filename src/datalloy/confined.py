"""A function of plain data in, the same function in a process of its own with limits on time and memory out.

For code that comes with data and models, such as chat templates: the sandbox of jinja keeps a template from reaching
out, not from looping for ever or from asking for all memory there is. A child is forked at the first call and answers
all further ones, so a call costs the way through two pipes (about a tenth of a millisecond; requests that are known
together go there together). What goes through them is JSON, never pickle: a child that was taken over can lie about its
answer and do no more.

Price: the child keeps the memory that the process had when it was forked, as far as the process changes or frees it
later. So call first, load weights afterwards. Trap: memory is limited on Linux only; elsewhere time alone is.
"""

import contextlib
import gc
import json
import math
import os
import resource
import select
import signal
import struct
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

CPU_SECONDS = 5  # for one call, whatever else the machine does
WALL_SECONDS = 60.0  # for one call, should it sleep
MEMORY_BYTES = 512 * 1024**2  # beyond what the process had
ANSWER_BYTES = 64 * 1024**2

_LENGTH = struct.Struct(">Q")


class ConfinedError(Exception):
    """The function raised; the text is its error's."""


class LimitError(ConfinedError):
    """The function needed more time or memory than it may have."""


class Confined:
    """`function` takes and returns plain data, and runs in a child of the process that calls."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._child: _Child | None = None
        self._lock = threading.Lock()
        self.stopped = 0  # calls that ended in LimitError

    def __call__(self, request: Any) -> Any:
        """What the function gives for `request`. Raises ConfinedError, or LimitError where it had to be stopped."""
        (answer,) = self.each([request])
        if isinstance(answer, ConfinedError):
            raise answer
        return answer

    def each(self, requests: Sequence[Any]) -> Iterator[Any]:
        """What the function gives for each request, in order; where it raises or is stopped, the ConfinedError.

        Limits are those of one call, for each request. What follows one that had to be stopped is asked of a new child,
        and not before the error has been taken: who has seen enough of them goes no further.
        """
        left = requests
        while left:
            answers = self._ask(left)
            yield from answers
            left = left[len(answers) :]

    def _ask(self, requests: Sequence[Any]) -> list[Any]:
        """Answers to the first of the requests, to all unless one had to be stopped; that one's error is the last."""
        answers: list[Any] = []
        with self._lock:
            if self._child is None or self._child.owner != os.getpid():  # a fork of ours must not share the pipes
                self._child = _Child(self._function)
            try:
                for answer in self._child.ask(json.dumps(requests).encode(), len(requests)):
                    answers.append(_value_or_error(answer))
                    self.stopped += isinstance(answers[-1], LimitError)
            except BaseException as error:  # also an interrupt: half an answer may be on its way
                self._child.end()
                self._child = None
                if not isinstance(error, LimitError):
                    raise
                self.stopped += 1
                answers.append(error)
        return answers


def _value_or_error(answer: dict[str, Any]) -> Any:
    if "limit" in answer:
        return LimitError(answer["limit"])
    return ConfinedError(answer["error"]) if "error" in answer else answer["value"]


class _Child:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.owner = os.getpid()
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child starts none
            self._process = os.fork()
        if self._process == 0:
            _serve(function, requests, answers)
        os.close(requests)
        os.close(answers)
        self._finalizer = weakref.finalize(self, _end, self.owner, self._process, self._requests, self._answers)

    def ask(self, requests: bytes, count: int) -> Iterator[dict[str, Any]]:
        """The answers to `count` requests, as they come."""
        try:
            _write(self._requests, _LENGTH.pack(len(requests)) + requests)
            for _ in range(count):
                deadline = time.monotonic() + WALL_SECONDS
                (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
                if length > ANSWER_BYTES:
                    raise LimitError(f"its answer has more than {ANSWER_BYTES:,} bytes")
                yield json.loads(self._read(length, deadline))
        except (BrokenPipeError, EOFError):
            raise LimitError(f"it took more than {CPU_SECONDS} s or died of what it asked for") from None

    def _read(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        while len(data) < length:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise LimitError(f"it took more than {WALL_SECONDS:.0f} s")
            part = os.read(self._answers, min(length - len(data), 1 << 20))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def end(self) -> None:
        self._finalizer()


def _end(owner: int, process: int, *pipes: int) -> None:
    for pipe in pipes:
        with contextlib.suppress(OSError):
            os.close(pipe)
    if owner == os.getpid():
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _write(pipe: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def _serve(function: Callable[[Any], Any], requests: int, answers: int) -> NoReturn:
    """The child: answer until the parent is gone, then end without any of its clean-up."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
        _keep_only(requests, answers)
        gc.freeze()  # or the collector would touch, and so copy, every page of the parent's
        _limit(resource.RLIMIT_CORE, 0)
        if (statm := Path("/proc/self/statm")).exists():
            _limit(resource.RLIMIT_AS, int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES)
        for request in _requests(3):
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + CPU_SECONDS)
            answer = _answer(function, request)
            _write(4, _LENGTH.pack(len(answer)) + answer)
    finally:
        os._exit(0)


def _keep_only(requests: int, answers: int) -> None:
    """The two pipes as descriptors 3 and 4, and nothing else of the parent's: its lock on the run folder least."""
    high = max(requests, answers, 4) + 1
    os.dup2(requests, high)
    os.dup2(answers, high + 1)
    os.dup2(high, 3)
    os.dup2(high + 1, 4)
    os.closerange(5, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    if nowhere > 2:
        os.close(nowhere)


def _limit(kind: int, value: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # not allowed or not known here
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _requests(pipe: int) -> Iterator[Any]:
    with os.fdopen(pipe, "rb") as file:
        while head := file.read(_LENGTH.size):
            yield from json.loads(file.read(_LENGTH.unpack(head)[0]))


def _answer(function: Callable[[Any], Any], request: Any) -> bytes:
    try:
        return json.dumps({"value": function(request)}).encode()
    except MemoryError:
        return json.dumps({"limit": f"it asked for more than {MEMORY_BYTES:,} bytes"}).encode()
    except Exception as error:  # noqa: BLE001 - code of strangers raises anything
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]}).encode()
