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
PLAIN_SECONDS = 10.0  # between two lines where stderr is not a terminal

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
    terminal = sys.stderr.isatty()
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - started > QUIET_SECONDS and (now - last > (0.2 if terminal else PLAIN_SECONDS) or done == total):
            last = now
            left = (now - started) / done * (total - done)
            line = f"{label}: {done}/{total} ({100 * done // max(total, 1)} %), {_duration(left)} left"
            print(f"\r\x1b[2K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
    if terminal and last != started:
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
