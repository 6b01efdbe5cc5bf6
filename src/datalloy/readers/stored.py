"""A data source in, its samples as columns out: eighty bytes a row; it is read again when its turns are asked for.

What names a sample (id, file, row, content hash) is held in columns; what it says stays on disk. A sample is a small
handle that looks both up. So a pool may be larger than memory, where its files are JSONL. In other files (JSON arrays,
Parquet, Arrow, tars) a row cannot be had alone at a place and a price known beforehand, and their samples are held as
they were read: their texts, never their pictures.

A row is checked against a checksum of its bytes when it is read again. The price: reading and parsing it once more,
some fifty microseconds, and once more a look at its picture files; the last few hundred rows are remembered. The trap:
handles that are kept need the file as it was, so a file must not change while its samples are in use.
"""

import os
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datalloy.errors import DataError
from datalloy.readers.origins import Origins
from datalloy.readers.records import Place, RecordError, parse_record
from datalloy.regular_files import open_regular
from datalloy.sample import Origin, Sample, Turn

REMEMBERED = 256  # rows that were parsed last
OPEN_FILES = 16
HASH_BYTES = 32
CHUNK_ROWS = 1 << 16

Reread = Callable[[dict[str, Any]], tuple[Turn, ...]]


class StoredSample(Sample):
    """A sample that stands in columns; equal to the one that was read."""

    __slots__ = ("_number", "_source")
    _source: "StoredSamples"
    _number: int

    def __init__(self, source: "StoredSamples", number: int) -> None:
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_number", number)

    @property
    def id(self) -> str:
        return self._source.id(self._number)

    @property
    def domain(self) -> str:
        return self._source.domain

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self._source.turns(self._number)

    @property
    def origin(self) -> Origin:
        return self._source.origin(self._number)

    @property
    def content_hash(self) -> str:
        return self._source.content_hash(self._number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sample) and _fields(self) == _fields(other)

    def __hash__(self) -> int:
        return hash(_fields(self))

    def __reduce__(self) -> tuple[type[Sample], tuple[Any, ...]]:
        return Sample, _fields(self)


def _fields(sample: Sample) -> tuple[Any, ...]:
    return sample.id, sample.domain, sample.turns, sample.origin, sample.content_hash


class StoredSamples(Sequence[Sample]):
    """The samples of a source whose files are JSONL. `reread` makes turns of a record again."""

    def __init__(self, domain: str, origins: Origins, reread: Reread, *, skip: int = 0) -> None:
        self.domain = domain
        self._origins, self._reread, self._skip = origins, reread, skip
        self._hashes = bytearray()
        self._starts, self._sizes, self._checksums = array("Q"), array("I"), array("I")
        self.turns = lru_cache(REMEMBERED)(self._read_turns)
        self._file = lru_cache(OPEN_FILES)(_open)

    def add(self, content_hash: str, place: Place) -> None:
        """Note what was read of the id that was added to the origins last."""
        self._hashes += bytes.fromhex(content_hash)
        self._starts.append(place.start)
        self._sizes.append(place.size)
        self._checksums.append(place.checksum)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        numbers = range(len(self))[index]
        return StoredSample(self, numbers) if isinstance(numbers, int) else [StoredSample(self, n) for n in numbers]

    def id(self, number: int) -> str:
        return self._origins.id(self._skip + number)

    def origin(self, number: int) -> Origin:
        return self._origins.origin(self._skip + number)

    def content_hash(self, number: int) -> str:
        return self._hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES].hex()

    def ids(self) -> pa.LargeStringArray:
        return self._origins.ids()[self._skip :]

    def hashes(self) -> np.ndarray:
        """Content hashes, [N, 32] bytes."""
        return np.frombuffer(self._hashes, dtype=np.uint8).reshape(-1, HASH_BYTES)

    def _read_turns(self, number: int) -> tuple[Turn, ...]:
        origin = self.origin(number)
        try:
            file = self._file(
                origin.path
            )  # held: what another thread drives out of the cache closes with its last holder
            raw = os.pread(file.fileno(), self._sizes[number], self._starts[number])
        except OSError as error:
            raise DataError(f"{origin} cannot be read again: {error}; put the file back and start again") from error
        if zlib.crc32(raw) != self._checksums[number]:
            raise DataError(f"{origin} is not what was read there; the file changed. Put it back, or start a new run")
        fields = parse_record(raw)
        try:
            if isinstance(fields, RecordError):
                raise fields
            return self._reread(fields)
        except RecordError as fault:
            raise DataError(
                f"{origin} was a sample and is none any more ({fault}); put back what it names, or start a new run"
            ) from fault


def _open(path: Path) -> BinaryIO:
    return open_regular(path)


class Samples(Sequence[Sample]):
    """Samples of one or several sources in any order, by their numbers alone: four bytes a sample."""

    def __init__(self, sources: Sequence[Sequence[Sample]], row_N: np.ndarray) -> None:
        self._sources, self._row_N = sources, row_N.astype(np.uint32, copy=False)
        self._starts = [0]
        for source in sources:
            self._starts.append(self._starts[-1] + len(source))

    @classmethod
    def of(cls, source: Sequence[Sample]) -> "Samples":
        """All samples of one source in its order."""
        return cls([source], np.arange(len(source), dtype=np.uint32))

    @classmethod
    def joined(cls, parts: "Iterable[Samples]") -> "Samples":
        """The samples of all parts, one part after another."""
        sources: list[Sequence[Sample]] = []
        rows: list[np.ndarray] = [np.empty(0, np.uint32)]
        before = 0
        for part in parts:
            rows.append(part._row_N + np.uint32(before))
            sources += part._sources
            before += part._starts[-1]
        return cls(sources, np.concatenate(rows))

    def __len__(self) -> int:
        return len(self._row_N)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Samples": ...
    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return Samples(self._sources, self._row_N[index])
        row = int(self._row_N[index])
        number = bisect_right(self._starts, row) - 1
        return self._sources[number][row - self._starts[number]]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def take(self, index_N: np.ndarray) -> "Samples":
        """Those at some positions, or where a mask of bool is true."""
        return Samples(self._sources, self._row_N[index_N])

    def by_id(self) -> "Samples":
        """The same in the order of ids."""
        return self.take(pc.sort_indices(self.ids()).to_numpy())

    def ids(self) -> pa.LargeStringArray:
        parts = [s.ids() if isinstance(s, StoredSamples) else _text([x.id for x in s]) for s in self._sources]
        return pa.concat_arrays([_text([]), *parts]).take(pa.array(self._row_N))

    def domains(self) -> pa.LargeStringArray:
        names = [source[0].domain if len(source) else "" for source in self._sources]
        source_N = np.searchsorted(self._starts, self._row_N, side="right") - 1
        return _text(names).take(pa.array(source_N))

    def hashes(self) -> np.ndarray:
        """Content hashes, [N, 32] bytes."""
        parts = [
            s.hashes() if isinstance(s, StoredSamples) else _hash_bytes([x.content_hash for x in s])
            for s in self._sources
        ]
        return np.concatenate([_hash_bytes([]), *parts])[self._row_N]

    def content_hashes(self) -> Iterator[str]:
        """Content hashes in hex, a few at a time in memory."""
        return (sample.content_hash for sample in self)


def _text(values: Sequence[str]) -> pa.LargeStringArray:
    return pa.array(values, pa.large_string())


def _hash_bytes(digests: Sequence[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(digests)), dtype=np.uint8).reshape(-1, HASH_BYTES)
