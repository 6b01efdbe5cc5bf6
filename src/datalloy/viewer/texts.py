"""The data files of a run in, the conversation of any row out, and the rows that contain a text.

The files are read once, by the readers that the run used, in a thread of its own and a few hundred samples at a time;
what is needed later goes into `viewer/texts.sqlite` in the run folder. Memory does not grow with the pool. A search
is one pass over that file, some seconds for a gigabyte of text. Pictures stay where they are.

Trap: a data file that changed since the run would show other texts beside the same scores. Its hash is compared with
the one in `provenance.json` before it is read, and before rows are exported.
"""

import contextlib
import itertools
import json
import logging
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from datalloy import readers
from datalloy.config import Recipe
from datalloy.errors import DataError, DatalloyError
from datalloy.locations import locate_or_missing
from datalloy.readers.arrow import ArrowImage
from datalloy.readers.webdataset import TarImage
from datalloy.run import source_hash
from datalloy.sample import FileImage, Origin, ParquetImage, Part, Sample, Turn
from datalloy.viewer.table import RunTable

log = logging.getLogger(__name__)

FILE = "viewer/texts.sqlite"
SCHEMA_VERSION = 2
BATCH = 512
IMAGE_KINDS: dict[str, type] = {kind.__name__: kind for kind in (FileImage, ParquetImage, ArrowImage, TarImage)}


@dataclass(frozen=True)
class Progress:
    """How far the reading has come: rows read of all rows, and what stopped it, if anything did."""

    read: int
    of: int
    is_complete: bool = False
    fault: str = ""


class Texts:
    """The conversations of a run. `parts` are those of its provenance: the hashes of the files that were scored."""

    def __init__(self, table: RunTable, recipe: Recipe, parts: dict[str, Any], fingerprint: str) -> None:
        self.table, self.recipe, self.parts = table, recipe, parts
        self.path = table.folder / FILE
        self._made_for = json.dumps([SCHEMA_VERSION, fingerprint, len(table)])
        self.progress = Progress(0, len(table))

    def start(self) -> threading.Thread:
        """Begin to read in the background; `progress` says how far it is."""
        thread = threading.Thread(target=self.read_all, daemon=True, name="texts")
        thread.start()
        return thread

    def read_all(self) -> None:
        """Read all data files, unless that was done before. A fault is kept in `progress` and said in the log."""
        try:
            if not self._is_made():
                self.path.parent.mkdir(exist_ok=True)
                self.path.unlink(missing_ok=True)
                self._make()
            self.progress = Progress(len(self.table), len(self.table), is_complete=True)
        except (DatalloyError, OSError, sqlite3.Error) as error:
            log.warning("texts cannot be shown: %s", error)
            self.progress = Progress(self.progress.read, len(self.table), fault=str(error))

    def _is_made(self) -> bool:
        if not self.path.exists():
            return False
        try:
            with self._open() as file:
                return file.execute("SELECT made_for FROM complete").fetchall() == [(self._made_for,)]
        except sqlite3.Error:
            return False

    def _make(self) -> None:
        with self._open() as file:
            file.execute(
                "CREATE TABLE texts (row INTEGER PRIMARY KEY, file TEXT, place INTEGER, line INTEGER, hash TEXT, turns "
                "TEXT, folded TEXT)"
            )
            for domain in self.table.span:
                self._check_unchanged(domain)
                samples = self._samples_of(domain)
                while batch := list(itertools.islice(samples, BATCH)):
                    rows = self.table.rows_of(domain, [sample.id for sample in batch])
                    lines = [_line(int(row), sample) for row, sample in zip(rows, batch, strict=True) if row >= 0]
                    file.executemany("INSERT INTO texts VALUES (?, ?, ?, ?, ?, ?, ?)", lines)
                    file.commit()
                    self.progress = Progress(self.progress.read + len(lines), len(self.table))
            if self.progress.read != len(self.table):
                raise DataError(
                    f"the data files hold {self.progress.read} of the {len(self.table)} scored samples; "
                    "they are not those of the run"
                )
            file.execute("CREATE TABLE complete (made_for TEXT)")
            file.execute("INSERT INTO complete VALUES (?)", (self._made_for,))
            file.commit()

    def _samples_of(self, domain: str) -> Iterator[Sample]:
        if domain not in self.recipe.domains:
            raise DataError(f"the run's recipe has no domain {domain!r:.200}")
        items = readers.read(self.recipe.domains[domain], domain)
        return (item for item in items if isinstance(item, Sample))

    def _check_unchanged(self, domain: str) -> None:
        path = self.recipe.domains[domain].path if domain in self.recipe.domains else "."
        known = self.parts["inputs"].get(f"domains.{domain}")
        if missing := [file for file in locate_or_missing(path).files if not file.is_file()]:
            raise DataError(f"{missing[0]}, of domain {domain}, is not there; put it back where the run read it")
        if known != source_hash(path):
            raise DataError(f"{path} has changed since the run; its texts may belong to other scores. Run again")

    def sample(self, row: int) -> Sample | None:
        """The sample of a row; None where it has not been read (yet)."""
        return next((sample for _, sample in self.samples([row])), None)

    def samples(self, rows: Sequence[int]) -> Iterator[tuple[int, Sample]]:
        """Those of some rows that have been read, with their samples, by domain and in the order of their file."""
        if not self.progress.read:
            return
        with self._open() as file:
            file.execute("CREATE TEMP TABLE wanted (row INTEGER PRIMARY KEY)")
            file.executemany("INSERT INTO wanted VALUES (?)", ((int(row),) for row in rows))
            found = "SELECT row, file, place, line, hash, turns FROM texts JOIN wanted USING (row)"
            for domain, (first, last) in self.table.span.items():
                inside = f"{found} WHERE row >= ? AND row < ? ORDER BY file, place"
                for row, file_name, place, line, digest, turns in file.execute(inside, (first, last)):
                    name = self.table.key(row)[1]
                    yield row, Sample(name, domain, _turns(turns), Origin(Path(file_name), place, line), digest)

    def unchanged_samples(self, rows: np.ndarray) -> list[Sample]:
        """The samples of rows that are to be copied from their files. Raises DataError where these have changed."""
        self._check_complete()
        for domain, (first, last) in self.table.span.items():
            if ((rows >= first) & (rows < last)).any():
                self._check_unchanged(domain)
        return [sample for _, sample in self.samples(rows.tolist())]

    def search(self, text: str) -> np.ndarray:
        """Numbers of the rows whose id or conversation contains the text, whatever its case. Raises DataError."""
        self._check_complete()
        with self._open() as file:
            found = file.execute("SELECT row FROM texts WHERE instr(folded, ?)", (text.casefold(),)).fetchall()
        return np.array([row for (row,) in found], dtype=np.int64)

    def _check_complete(self) -> None:
        if not self.progress.is_complete:
            raise DataError(f"the texts are not all read: {self.progress.fault or 'wait until they are'}")

    def _open(self) -> contextlib.closing[sqlite3.Connection]:
        return contextlib.closing(sqlite3.connect(self.path, timeout=30))


def _line(row: int, sample: Sample) -> tuple[int, str, int, int, str, str, str]:
    turns = json.dumps([[turn.role, [_written(part) for part in turn.parts]] for turn in sample.turns])
    folded = "\n".join([sample.id, *(turn.text for turn in sample.turns)]).casefold()
    return row, str(sample.origin.path), sample.origin.row, sample.origin.line, sample.content_hash, turns, folded


def _written(part: Part) -> str | dict[str, Any]:
    if isinstance(part, str):
        return part
    kind: Any = type(part)
    if kind.__name__ not in IMAGE_KINDS:
        raise DataError(f"pictures of the kind {kind.__name__} cannot be shown yet")
    values = {field.name: getattr(part, field.name) for field in fields(kind)}
    return {"kind": kind.__name__} | {key: str(v) if isinstance(v, Path) else v for key, v in values.items()}


def _turns(text: str) -> tuple[Turn, ...]:
    return tuple(Turn(role, tuple(map(_part, parts))) for role, parts in json.loads(text))


def _part(written: str | dict[str, Any]) -> Part:
    if isinstance(written, str):
        return written
    kind = IMAGE_KINDS[written.pop("kind")]
    paths = {field.name for field in fields(kind) if field.type is Path}
    return kind(**{name: Path(value) if name in paths else value for name, value in written.items()})
