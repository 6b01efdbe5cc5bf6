"""Ids in, where each was first read out: a mapping of some forty bytes an id, where a dict of them takes four hundred.

The ids of the last few thousand records are held as they are. Those before are known by the hash that Python gives
them, in sorted arrays that are merged two by two as they grow, so that looking one up costs a few binary searches. A
hash only leads to the id, which is compared: two ids with one hash are still two.
"""

from array import array
from bisect import bisect_right
from pathlib import Path

import numpy as np
import pyarrow as pa

from datalloy.sample import Origin

RECENT = 1 << 16  # ids that are held as they are


class Origins:
    """The distinct ids of a source in the order in which they were added, each with its origin."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._starts = array("q", [0])  # of each id in the text, and its end
        self._rows, self._lines = array("I"), array("I")
        self._files: list[Path] = []
        self._first_of_file: list[int] = []
        self._recent: dict[str, int] = {}
        self._older: list[tuple[np.ndarray, np.ndarray]] = []  # hashes, sorted, and the numbers of their ids

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: str) -> bool:
        return self._number_of(name) is not None

    def add(self, name: str, origin: Origin) -> None:
        """Note an id that is not there yet. The records of one file come one after another."""
        if not self._files or self._files[-1] != origin.path:
            self._files.append(origin.path)
            self._first_of_file.append(len(self))
        self._recent[name] = len(self)
        self._text += name.encode()
        self._starts.append(len(self._text))
        self._rows.append(origin.row)
        self._lines.append(origin.line)
        if len(self._recent) == RECENT:
            self._settle()

    def get(self, name: str) -> Origin | None:
        """Where an id was first read; None where it was not."""
        number = self._number_of(name)
        return None if number is None else self.origin(number)

    def id(self, number: int) -> str:
        return self._bytes(number).decode()

    def origin(self, number: int) -> Origin:
        path = self._files[bisect_right(self._first_of_file, number) - 1]
        return Origin(path, self._rows[number], self._lines[number])

    def ids(self) -> pa.LargeStringArray:
        """All ids in order, without a copy. Nothing can be added while the array is in use."""
        return pa.LargeStringArray.from_buffers(len(self), pa.py_buffer(self._starts), pa.py_buffer(self._text))

    def close(self) -> None:
        """Forget how ids are found; what was noted about each stays."""
        self._recent, self._older = {}, []

    def _bytes(self, number: int) -> bytes:
        return bytes(memoryview(self._text)[self._starts[number] : self._starts[number + 1]])

    def _number_of(self, name: str) -> int | None:
        if name in self._recent:
            return self._recent[name]
        wanted, key = name.encode(), hash(name)
        for hash_N, number_N in self._older:
            at = int(hash_N.searchsorted(key))
            while at < len(hash_N) and hash_N[at] == key:
                if self._bytes(int(number_N[at])) == wanted:
                    return int(number_N[at])
                at += 1
        return None

    def _settle(self) -> None:
        hash_N = np.fromiter(map(hash, self._recent), np.int64, len(self._recent))
        number_N = np.fromiter(self._recent.values(), np.uint32, len(self._recent))
        while self._older and len(self._older[-1][0]) <= len(hash_N):
            older_hash_N, older_number_N = self._older.pop()
            hash_N, number_N = np.concatenate([older_hash_N, hash_N]), np.concatenate([older_number_N, number_N])
        order = np.argsort(hash_N, kind="stable")
        self._older.append((hash_N[order], number_N[order]))
        self._recent = {}
