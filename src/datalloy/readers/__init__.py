"""A dataset file in, samples and rejects out, in file order.

Each format is a module with one function, `read_turns(fields, root)`: one record's fields in, its turns out, or
RecordError with a reason word. All else is here, once: origins, ids, content hashes, counting. Nothing vanishes:
samples and rejects together are the records of the file, and a record is never repaired.

The content hash reads every image once, so reading costs about what hashing the pictures costs.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datalloy.config import DataSource
from datalloy.errors import DataError
from datalloy.readers import llava, messages, parquet, sharegpt
from datalloy.readers.parquet import parquet_records
from datalloy.readers.records import Record, RecordError, json_records, open_data_file, shown
from datalloy.sample import Origin, Sample, Turn, content_hash

log = logging.getLogger(__name__)

FORMATS: dict[str, Callable[[dict[str, Any], Path], tuple[Turn, ...]]] = {
    "messages": messages.read_turns,
    "sharegpt": sharegpt.read_turns,
    "llava": llava.read_turns,
    "parquet": parquet.read_turns,
}

DETECTION_RECORDS = 100
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
HASH_ID_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Reject:
    """One record that is not a sample: where it is and why. `id` is empty where the record gives none."""

    path: Path
    row: int
    line: int
    id: str
    reason: str
    detail: str


def read(source: DataSource, domain: str) -> Iterator[Sample | Reject]:
    """Every record of the source in file order, as a sample or a reject, until `source.limit` samples are read.

    The first `source.skip` samples are passed over: one file can serve as a target and as a held-out set.

    A sample's id is the record's own; without one, the first 16 hex digits of its content hash, and for the n-th exact
    copy the same with "-n". A second record with the same id is rejected. Raises DataError where the file as a whole
    cannot be read.
    """
    path = Path(source.path)
    format_name = detect_format(path) if source.format == "auto" else source.format
    records = parquet_records(path) if format_name == "parquet" else json_records(path)
    root = _media_root(source)
    origins: dict[str, Origin] = {}
    copies: Counter[str] = Counter()
    for record in records:
        origin = Origin(path, record.row, record.line)
        given_id = ""
        try:
            fields = _accepted_fields(record)
            given_id = _given_id(fields)
            if given_id in origins:
                raise RecordError("duplicate_id", f"{origins[given_id]} has the same id")
            turns = FORMATS[format_name](fields, root)
            digest = _readable_content_hash(turns)
        except RecordError as fault:
            yield Reject(path, record.row, record.line, given_id, fault.reason, fault.detail)
            continue
        sample_id = given_id or _unused_hash_id(digest, copies, origins)
        origins[sample_id] = origin
        if len(origins) > source.skip:
            yield Sample(sample_id, domain, turns, origin, digest)
        if source.limit is not None and len(origins) == source.skip + source.limit:
            return


def read_all(source: DataSource, domain: str) -> tuple[list[Sample], list[Reject]]:
    """The samples and the rejects of a source, each in file order. Raises DataError."""
    samples: list[Sample] = []
    rejects: list[Reject] = []
    for item in read(source, domain):
        if isinstance(item, Sample):
            samples.append(item)
        else:
            rejects.append(item)
    reasons = dict(Counter(reject.reason for reject in rejects))
    log.info("%s: %d samples, %d rejected %s", source.path, len(samples), len(rejects), reasons)
    return samples, rejects


def detect_format(path: Path) -> str:
    """The format of a file: Parquet by its first bytes, the JSON formats by the keys of its first 100 records.

    Raises DataError that names what was found and what is allowed.
    """
    with open_data_file(path) as file:
        head = file.read(4)
    if head == b"PAR1":
        return "parquet"
    if path.suffix.lower() not in JSON_SUFFIXES:
        raise DataError(
            f"cannot tell the format of {path}: its content is not Parquet and its name does not end in "
            f"{', '.join(JSON_SUFFIXES)}; set `format` to one of {', '.join(FORMATS)}"
        )
    first = [record.fields for record in itertools.islice(json_records(path), DETECTION_RECORDS)]
    objects = [fields for fields in first if isinstance(fields, dict)]
    if any("messages" in fields for fields in objects):
        return "messages"
    if any("conversations" in fields for fields in objects):
        return "llava" if any("image" in fields for fields in objects) else "sharegpt"
    if objects:
        found = f"the first record has the keys {shown(list(objects[0]))}"
    else:
        found = f"the first record is refused ({first[0]})" if first else "it holds no record"
    raise DataError(
        f"cannot tell the format of {path}: {found}; wanted: JSONL or a JSON array of objects with 'messages' "
        "(format messages) or 'conversations' (format sharegpt, or llava with 'image'), or Parquet"
    )


def _media_root(source: DataSource) -> Path:
    root = Path(source.media_root) if source.media_root else Path(source.path).parent
    if source.media_root and not root.is_dir():
        raise DataError(f"the media_root {root} of {source.path} is not a folder; image paths start from it")
    return root.resolve()


def _accepted_fields(record: Record) -> dict[str, Any]:
    if isinstance(record.fields, RecordError):
        raise record.fields
    return record.fields


def _given_id(fields: dict[str, Any]) -> str:
    """The record's own id, or an empty string where it has none."""
    given = fields.get("id")
    if given is None:
        return ""
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise RecordError("bad_id", f"found {shown(given)}; an id is a string or an integer")
    return str(given)


def _readable_content_hash(turns: tuple[Turn, ...]) -> str:
    try:
        return content_hash(turns)
    except OSError as error:
        raise RecordError("image_unreadable", str(error)) from None


def _unused_hash_id(digest: str, copies: Counter[str], used: dict[str, Origin]) -> str:
    stem = digest[:HASH_ID_LENGTH]
    while True:
        copies[stem] += 1
        candidate = stem if copies[stem] == 1 else f"{stem}-{copies[stem]}"
        if candidate not in used:
            return candidate
