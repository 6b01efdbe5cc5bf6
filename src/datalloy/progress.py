"""Progress with time left: an iterable in, the same items out, a line on stderr.

A bar where stderr is a terminal, a plain line now and then where it is not. Nothing is shown for work that ends
within two seconds. Library code calls `track`; only the command line decides whether it is shown (`show`).
"""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

QUIET_SECONDS = 2.0  # shorter work shows nothing
BAR_SECONDS = 0.2  # between two looks of the bar
PLAIN_SECONDS = 10.0  # between two lines where stderr is not a terminal
CLEAR = "\r\x1b[2K"  # on a terminal: whatever is written next takes the bar's place

_shown = False


def show(enabled: bool) -> None:
    """Turn the display on or off for this process; it is off until the command line turns it on."""
    global _shown
    _shown = enabled


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """The items unchanged, with `label`, share done and time left shown on stderr while they are worked on."""
    if not _shown:
        yield from items
        return
    is_terminal = sys.stderr.isatty()
    interval, before, after = (BAR_SECONDS, CLEAR, "\r") if is_terminal else (PLAIN_SECONDS, "", "\n")
    started = last = time.monotonic()
    try:
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - started > QUIET_SECONDS and (now - last > interval or done == total):
                last = now
                left = format_duration((now - started) / done * (total - done))
                line = f"{before}{label}: {done}/{total} ({100 * done // total} %), {left} left"
                print(line, end=after, file=sys.stderr, flush=True)
    finally:
        if is_terminal and last != started:
            print(CLEAR, end="", file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
