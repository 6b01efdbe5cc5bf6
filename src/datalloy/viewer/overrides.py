"""What a person decided against the selection: keys in, `overrides.json` in the run folder out.

A file of its own, so that `selection.parquet` stays what was measured. It says what was decided, not by whom or when.
Every change reads the file, changes it and writes it whole under a lock, so two viewers of one run lose nothing of
each other's; the price is one small file written for each change, which is why their number is limited.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from datalloy.errors import DataError
from datalloy.run import write_json

OVERRIDES, LOCK = "overrides.json", "overrides.lock"
SCHEMA_VERSION = 1
MAX_OVERRIDES = 100_000

Key = tuple[str, str]


class Overrides:
    """The decisions on single samples, by domain and id, of the run with this fingerprint."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def read(self) -> dict[Key, bool]:
        """Whether each overruled sample is kept. Raises DataError where the file is damaged or of another run."""
        path = self.folder / OVERRIDES
        if not path.exists():
            return {}
        try:
            about = json.loads(path.read_bytes())
            decisions = {(row["domain"], row["id"]): row["kept"] for row in about["overrides"]}
            version, fingerprint = about["schema_version"], about["fingerprint"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} is damaged; delete it and decide again") from None
        if version != SCHEMA_VERSION:
            raise DataError(f"{path} has schema version {version}, this Datalloy reads {SCHEMA_VERSION}")
        if fingerprint != self.fingerprint:
            raise DataError(f"{path} belongs to another run; move it away, or view the run it was made for")
        if not all(isinstance(text, str) for key in decisions for text in key):
            raise DataError(f"{path} is damaged: a domain or an id is no text; delete it and decide again")
        if not all(isinstance(kept, bool) for kept in decisions.values()):
            raise DataError(f"{path} is damaged: `kept` must be true or false; delete it and decide again")
        return decisions

    def change(self, changes: Iterable[tuple[Key, bool | None]]) -> dict[Key, bool]:
        """Decide on some samples, None takes a decision back; all decisions afterwards. Raises DataError."""
        with self._lock():
            decisions = self.read()
            for key, kept in changes:
                decisions.pop(key, None)
                if kept is not None:
                    decisions[key] = kept
            if len(decisions) > MAX_OVERRIDES:
                raise DataError(
                    f"{len(decisions):,} samples would be overruled, at most {MAX_OVERRIDES:,} can be; "
                    "another selection is made by another recipe (select.keep_fraction, select.budget_samples)"
                )
            rows = [{"domain": domain, "id": name, "kept": kept} for (domain, name), kept in sorted(decisions.items())]
            about = {"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint, "overrides": rows}
            write_json(self.folder / OVERRIDES, about)
        return decisions

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        descriptor = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
