"""A unit of work that may kill its process in, what its earlier attempts tell about it out.

A sample that makes the system kill the process (the host's memory, a crash in a library) leaves no exception behind.
So an attempt at a unit writes a small file when it begins and removes it when it ends, in success or with an
exception: a file that is found belongs to an attempt that was killed. The next attempt then works on one sample at a
time, naming each in the file before it is touched. A sample under whose name two attempts died is isolated.

Two, because anybody can kill a process at any time: a sample is not to be lost for having been there once. So the unit
is retried twice at most: killed in a batch, killed at the sample, killed at the sample again.

Price: one small durable write a unit; after a kill, one more pass over the unit and one durable write a sample.
"""

import json
from collections import Counter
from pathlib import Path
from types import TracebackType

from datalloy.durable import write_json

DEATHS_AT_ONE = 2  # of attempts at work on one sample, before it is isolated
DEATHS_IN_BATCHES = 4  # although each sample alone is harmless, before the unit is done one sample at a time for good


class Attempt:
    """One attempt at a unit. A context manager: the unit is under way while it is open.

    `isolated`: keys of samples that are not to be touched again. `suspects`: those to be tried first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._batch_deaths, self._accused = 0, Counter[str]()
        try:
            before = json.loads(path.read_bytes())
            self._batch_deaths, self._accused = int(before["batch_deaths"]), Counter(before["accused"])
            if before["at"] is None:
                self._batch_deaths += 1
            else:
                self._accused[before["at"]] += 1
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):  # not ours, or torn by the disk: nothing is known
            self._batch_deaths = 1

    @property
    def isolated(self) -> set[str]:
        return {key for key, deaths in self._accused.items() if deaths >= DEATHS_AT_ONE}

    @property
    def suspects(self) -> set[str]:
        return {key for key, deaths in self._accused.items() if deaths < DEATHS_AT_ONE}

    @property
    def is_careful(self) -> bool:
        """Samples are to be tried one at a time before they are worked on together."""
        return bool(self.suspects) or self.never_together or (self._batch_deaths > 0 and not self.isolated)

    @property
    def never_together(self) -> bool:
        """Working on several samples at once kills the process again and again, none of them alone does."""
        return self._batch_deaths >= DEATHS_IN_BATCHES

    def working_on(self, key: str | None) -> None:
        """Say, durably, which sample is touched next; None: several at once."""
        state = {"at": key, "batch_deaths": self._batch_deaths, "accused": dict(self._accused)}
        write_json(self._path, state)

    def survived(self, key: str) -> None:
        """A suspect was worked on alone and did no harm."""
        if key not in self.isolated:
            del self._accused[key]

    def __enter__(self) -> "Attempt":
        self.working_on(None)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._path.unlink(missing_ok=True)
