"""What judges answered in, kept for good: an answer that was paid for is never asked for again.

One SQLite file; every answer is on disk before the slot that asked for it asks for anything else. Answers without a
verdict are kept as well: they were paid for too, and count as tries after a restart. A row that does not match its
own checksum is not believed; it is asked for again, and the log says so.
"""

import json
import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datalloy.errors import EnvironmentFault
from datalloy.run import digest

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
VERDICT = "verdict"


@dataclass(frozen=True)
class Answer:
    """One paid answer. `outcome` is "verdict" or the word for why there is none; `score` goes with a verdict alone."""

    outcome: str
    score: float | None
    probability_L: tuple[float, ...] | None
    text: str
    served_by: str
    prompt_tokens: int | None
    completion_tokens: int | None


class AnswerStore:
    """Answers by key, in the order they came. Use it as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection

    def __enter__(self) -> "AnswerStore":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # the event loop may run in another thread than the one that opens and closes; never in two at once
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise self._fault(error) from error
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def _prepare(self) -> None:
        self._execute("PRAGMA synchronous = EXTRA")  # a commit is on disk, its folder entry included
        ((version,),) = self._execute("PRAGMA user_version")
        if version not in (0, SCHEMA_VERSION):
            raise EnvironmentFault(
                f"{self.path} was written in schema {version}, this version reads {SCHEMA_VERSION}; "
                "name another file in judge.cache"
            )
        self._execute(
            "CREATE TABLE IF NOT EXISTS answers (key TEXT NOT NULL, answer TEXT NOT NULL, sha256 TEXT NOT NULL)"
        )
        self._execute("CREATE INDEX IF NOT EXISTS by_key ON answers (key)")
        self._execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is on disk when this returns. Raises EnvironmentFault."""
        text = json.dumps(asdict(answer), sort_keys=True, allow_nan=False)
        self._execute("INSERT INTO answers VALUES (?, ?, ?)", (key, text, digest([key, text])))

    def answers(self, key: str) -> list[Answer]:
        """All answers to a request, the oldest first."""
        found = []
        for row, text, sha256 in self._execute(
            "SELECT rowid, answer, sha256 FROM answers WHERE key = ? ORDER BY rowid", (key,)
        ):
            if sha256 != digest([key, text]):
                log.warning("%s: answer %d does not match its checksum and is not used", self.path, row)
                continue
            data = json.loads(text)
            probabilities = data.pop("probability_L")
            found.append(Answer(**data, probability_L=None if probabilities is None else tuple(probabilities)))
        return found

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._fault(error) from error

    def _fault(self, error: sqlite3.Error) -> EnvironmentFault:
        return EnvironmentFault(
            f"the judge's answers cannot be kept in {self.path}: {error}. Free the disk, or, if the file is damaged, "
            "move it away: what it holds would be asked and paid for again"
        )
