"""Progress with time left: an iterable in, the same items out, a line on stderr.

A bar where stderr is a terminal, a plain line now and then where it is not. Nothing is shown for work that ends
within two seconds. Library code calls `track`; only the command line decides whether it is shown (`show`), and an open
run listens, for its `events.jsonl`.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

QUIET_SECONDS = 2.0  # shorter work shows nothing
BAR_SECONDS = 0.2  # between two looks of the bar
PLAIN_SECONDS = 10.0  # between two lines where stderr is not a terminal
CLEAR = "\r\x1b[2K"  # on a terminal: whatever is written next takes the bar's place

Listener = Callable[[str, int, int], None]

_shown = False
_listeners: list[Listener] = []


def show(enabled: bool) -> None:
    """Turn the display on or off for this process; it is off until the command line turns it on."""
    global _shown
    _shown = enabled


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Meanwhile `listener(label, done, total)` is called at the beginning and after every item of what is tracked."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """The items unchanged, with `label`, share done and time left shown on stderr while they are worked on."""
    if not (_shown or _listeners):
        yield from items
        return
    is_terminal = sys.stderr.isatty()
    interval, before, after = (BAR_SECONDS, CLEAR, "\r") if is_terminal else (PLAIN_SECONDS, "", "\n")
    started = last = time.monotonic()
    _tell(label, 0, total)
    try:
        for done, item in enumerate(items, start=1):
            yield item
            _tell(label, done, total)
            now = time.monotonic()
            if _shown and now - started > QUIET_SECONDS and (now - last > interval or done == total):
                last = now
                left = format_duration((now - started) / done * (total - done))
                line = f"{before}{label}: {done}/{total} ({100 * done // total} %), {left} left"
                print(line, end=after, file=sys.stderr, flush=True)
    finally:
        if is_terminal and last != started:
            print(CLEAR, end="", file=sys.stderr, flush=True)


def _tell(label: str, done: int, total: int) -> None:
    for listener in _listeners:
        listener(label, done, total)


def format_duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
