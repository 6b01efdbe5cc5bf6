"""Progress in, lines of `events.jsonl` in the run folder out, for whoever watches a run from outside.

A line is one JSON object: `time` (UTC), `stage`, `done`, `total`. A stage has one when it begins, one when it ends and
at most one a second between. The file is only ever appended to; what a killed process has left of a line is cut off
before the next one is written. Nothing reads it back: no result and no decision depends on it or on the clock.
"""

import json
import time
from pathlib import Path

EVENTS = "events.jsonl"
SECONDS = 1.0  # between two lines of one stage


class EventLog:
    """Appends to one file; called by `progress.track`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._written: dict[str, float] = {}
        _cut_torn_line(path)

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if 0 < done < total and now - self._written.get(stage, -SECONDS) < SECONDS:
            return
        self._written[stage] = now
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        event = {"time": stamp, "stage": stage, "done": done, "total": total}
        with self._path.open("ab") as file:
            file.write(json.dumps(event, ensure_ascii=False).encode() + b"\n")


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
