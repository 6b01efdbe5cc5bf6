"""A JSON or JSONL file in, its records out, one strict JSON object each.

A file is split at byte 0x0A and nowhere else, so that U+2028 inside a text does not move line numbers and a damaged
line costs one record, not the file. JSON is read strictly: what Python's parser lets through (duplicate keys, NaN,
lone surrogates) would fail or change meaning in the trainer that gets the row later. JSONL is streamed; a JSON array
is held in memory whole, and since its records have no lines of their own, a fault in its syntax refuses the file.

A file named .jsonl or .ndjson is JSONL; any other is an array if it begins with `[`, else JSONL.
"""

import codecs
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from datalloy.display import shown
from datalloy.errors import DataError
from datalloy.regular_files import NotRegularError, open_regular

MAX_LINE_BYTES = 16 * 1024 * 1024

_LINE_SUFFIXES = (".jsonl", ".ndjson")
_SPACE = re.compile(r"[ \t\n\r]*")
_DISGUISES = (
    (b"version https://git-lfs.github.com/", "a Git LFS pointer, not the data; run `git lfs pull`"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (codecs.BOM_UTF16_LE, "UTF-16 text; convert it to UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text; convert it to UTF-8"),
    (b"{\x00", "UTF-16 text; convert it to UTF-8"),
    (b"[\x00", "UTF-16 text; convert it to UTF-8"),
    (b"\x00{", "UTF-16 text; convert it to UTF-8"),
    (b"\x00[", "UTF-16 text; convert it to UTF-8"),
    (b"<?xml", "an XML document; the download went wrong"),
    (b"<!doctype html", "an HTML page; the download went wrong"),
    (b"<html", "an HTML page; the download went wrong"),
)


class RecordError(Exception):
    """One record cannot become a sample; the reading goes on. `reason` is a word to count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Place(NamedTuple):
    """Where a record of JSONL stands in its file, so that it can be read again alone."""

    start: int
    size: int
    checksum: int  # CRC-32 of these bytes


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file, `row` from 0. `line` is the physical line from 1 in JSONL, and 0 elsewhere."""

    row: int
    line: int
    fields: dict[str, Any] | RecordError
    place: Place | None = None


def open_data_file(path: Path) -> BinaryIO:
    """The file, open for reading. Raises DataError for what is no data file: a folder, a pipe, an archive ..."""
    try:
        file = open_regular(path)
    except NotRegularError as error:
        raise DataError(f"{path} {error}") from None
    except OSError as error:
        raise DataError(f"cannot open {path}: {error.strerror}; check the path in the recipe") from None
    head = os.pread(file.fileno(), 512, 0)
    for mark, what in _DISGUISES:
        if head.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(mark.lower()):
            file.close()
            raise DataError(f"{path} is {what}")
    return file


def json_records(path: Path) -> Iterator[Record]:
    """All records of a JSONL or JSON array file in order, faulty ones included. Raises DataError."""
    with open_data_file(path) as file:
        head = os.pread(file.fileno(), 4096, 0)
        if head.startswith(b"PAR1"):
            raise DataError(f"{path} is a Parquet file; set `format: parquet` or `format: auto`")
        if head[257:262] == b"ustar":
            raise DataError(f"{path} is a tar archive; set `format: webdataset` or `format: auto`")
        if _is_lines(path, head):
            yield from _line_records(file)
        else:
            yield from _array_records(file.read(), path)


def is_jsonl(path: Path) -> bool:
    """Whether `json_records` reads the file line by line. Raises DataError as it does."""
    with open_data_file(path) as file:
        return _is_lines(path, os.pread(file.fileno(), 4096, 0))


def _is_lines(path: Path, head: bytes) -> bool:
    is_array = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n").startswith(b"[")
    return not is_array or path.suffix.lower() in _LINE_SUFFIXES


def _line_records(file: BinaryIO) -> Iterator[Record]:
    row = number = end = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        start, end = end, end + len(line)
        if len(line) > MAX_LINE_BYTES:
            while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                end += len(line)  # the rest of the line is passed by, never held
            yield Record(row, number, RecordError("line_too_long", f"a line may have at most {MAX_LINE_BYTES:,} bytes"))
        else:
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line = line.removeprefix(codecs.BOM_UTF8)
                start += len(codecs.BOM_UTF8)
            if not line.strip():
                continue
            raw = line.removesuffix(b"\n").removesuffix(b"\r")
            yield Record(row, number, parse_record(raw), Place(start, len(raw), zlib.crc32(raw)))
        row += 1


def _array_records(data: bytes, path: Path) -> Iterator[Record]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    del data  # the price of an array is its text once, not its bytes as well
    try:
        for row, element in enumerate(_array_elements(text)):
            yield Record(row, 0, parse_record(element))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}:{error.colno}: malformed JSON array: {error.msg}; where records end cannot be told "
            "behind a fault: repair the file, or write it as JSONL"
        ) from None


def _array_elements(text: str) -> Iterator[str]:
    """The text of each element of a JSON array. Raises JSONDecodeError.

    Finds where elements end, no more: parsed leniently here, so that what is strict can refuse elements one by one.
    """
    decoder = json.JSONDecoder(parse_int=str)  # as text: Python refuses to convert very long integers
    position = _after_space(text, _after_space(text, 0) + 1)
    while not text.startswith("]", position):
        try:
            end = decoder.raw_decode(text, position)[1]
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, position) from None
        yield text[position:end]
        position = _after_space(text, end)
        if text.startswith(",", position):
            position = _after_space(text, position + 1)
            if text.startswith("]", position):
                raise json.JSONDecodeError("a comma before the closing bracket", text, position)
        elif not text.startswith("]", position):
            raise json.JSONDecodeError("a comma or the closing bracket is wanted", text, position)
    end = _after_space(text, position + 1)
    if end != len(text):
        raise json.JSONDecodeError("text after the closing bracket", text, end)


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def parse_record(raw: bytes | str) -> dict[str, Any] | RecordError:
    """One strict JSON object, or why it is none."""
    try:
        return _parse_object(raw if isinstance(raw, str) else raw.decode())
    except RecordError as fault:
        return fault
    except UnicodeDecodeError as error:
        return RecordError("bad_encoding", f"byte {error.start} of the line is not UTF-8")
    except UnicodeEncodeError:
        return RecordError("bad_encoding", "a \\u escape is half of a surrogate pair; no text can hold it")
    except json.JSONDecodeError as error:
        return RecordError("malformed_json", f"{error.msg} at character {error.pos + 1}")
    except RecursionError:
        return RecordError("malformed_json", "nested too deeply")
    except ValueError:  # the only one left: Python's limit on the digits of an integer
        return RecordError("malformed_json", "an integer of thousands of digits")


def _parse_object(text: str) -> dict[str, Any]:
    value = _STRICT.decode(text)
    if "\\u" in text:  # lone surrogates come from escapes only; json accepts them and every later write fails
        json.dumps(value, ensure_ascii=False).encode()
    if not isinstance(value, dict):
        raise RecordError("not_an_object", f"found {shown(value)}; a record is a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise RecordError("duplicate_key", f"key {shown(key)} is given twice")
        fields[key] = value
    return fields


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise RecordError("malformed_json", f"{shown(digits)} is not a finite number")
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_finite)
