"""A data source in, samples and rejects out, in the order of its files.

Each layout is a module with one function, `read_turns(fields, root)`: one record's fields in, its turns out, or
RecordError with a reason word. Each container (JSON, Parquet, Arrow, tar) is a function from a file to its records.
All else is here, once: origins, ids, content hashes, counting. Nothing vanishes: samples and rejects together are the
records of the files, and a record is never repaired.

The content hash reads every image once, so reading costs about what hashing the pictures costs.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datalloy.config import DataSource
from datalloy.errors import DataError
from datalloy.locations import Located, locate
from datalloy.readers.arrow import FILE_MAGIC, STREAM_MAGIC, arrow_records
from datalloy.readers.layouts import LAYOUTS, Listed, ReadTurns, layout_of, read_by_keys
from datalloy.readers.origins import Origins
from datalloy.readers.parquet import parquet_records
from datalloy.readers.records import Record, RecordError, is_jsonl, json_records, open_data_file, shown
from datalloy.readers.stored import Samples, StoredSamples
from datalloy.readers.tables import Columns
from datalloy.readers.webdataset import tar_records
from datalloy.sample import Origin, Sample, Turn, content_hash

log = logging.getLogger(__name__)

# Containers, where the layout follows from the keys or from an entry of a list; LAYOUTS are JSON files.
CONTAINERS = ("parquet", "hf", "webdataset", "llama_factory")
FORMATS = (*LAYOUTS, *CONTAINERS)

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
    return (item for item, _ in _Reading(source, domain).items())


def read_all(source: DataSource, domain: str) -> tuple[list[Sample], list[Reject]]:
    """The samples and the rejects of a source, each in file order. Raises DataError."""
    samples: list[Sample] = []
    rejects: list[Reject] = []
    for item in read(source, domain):
        if isinstance(item, Sample):
            samples.append(item)
        else:
            rejects.append(item)
    _say(source, samples, rejects)
    return samples, rejects


def read_stored(source: DataSource, domain: str) -> tuple[Samples, list[Reject]]:
    """As `read_all`, the samples of JSONL not held but read again when they are asked for (`stored`). Raises DataError.

    What is rejected is held.
    """
    reading = _Reading(source, domain)
    if not reading.is_jsonl:
        held, rejects = read_all(source, domain)
        return Samples.of(held), rejects
    stored = StoredSamples(domain, reading.origins, reading.reread, skip=source.skip)
    rejects = []
    for item, record in reading.items():
        if isinstance(item, Reject):
            rejects.append(item)
        elif record.place is not None:
            stored.add(item.content_hash, record.place)
    reading.origins.close()
    _say(source, stored, rejects)
    return Samples.of(stored), rejects


class _Reading:
    """One pass over a source."""

    def __init__(self, source: DataSource, domain: str) -> None:
        self.source, self.domain = source, domain
        self.located = locate(source.path)
        self.read_turns = _read_turns(source, self.located)
        self.root = _media_root(source, self.located)
        self.origins = Origins()

    @property
    def is_jsonl(self) -> bool:
        """Whether every record stands in a line of its own."""
        if self.source.format in ("parquet", "webdataset"):
            return False
        return all(_container(path) == "json" and is_jsonl(path) for path in self.located.files)

    def reread(self, fields: dict[str, Any]) -> tuple[Turn, ...]:
        return self.read_turns(fields, self.root)

    def items(self) -> Iterator[tuple[Sample | Reject, Record]]:
        source, origins = self.source, self.origins
        copies: Counter[str] = Counter()
        for path, record in _records(source, self.located):
            origin = Origin(path, record.row, record.line)
            given_id = ""
            try:
                fields = _accepted_fields(record)
                given_id = _given_id(fields)
                if given_id and (first := origins.get(given_id)):
                    raise RecordError("duplicate_id", f"{first} has the same id")
                turns = self.read_turns(fields, self.root)
                digest = _readable_content_hash(turns)
            except RecordError as fault:
                yield Reject(path, record.row, record.line, given_id, fault.reason, fault.detail), record
                continue
            sample_id = given_id or _unused_hash_id(digest, copies, origins)
            origins.add(sample_id, origin)
            if len(origins) > source.skip:
                yield Sample(sample_id, self.domain, turns, origin, digest), record
            if source.limit is not None and len(origins) == source.skip + source.limit:
                return


def _say(source: DataSource, samples: Sequence[Sample], rejects: Sequence[Reject]) -> None:
    reasons = dict(Counter(reject.reason for reject in rejects))
    log.info("%s: %d samples, %d rejected %s", source.path, len(samples), len(rejects), reasons)


def detect_format(source: str | Path) -> str:
    """The format of a path: by what it names, by the first bytes of a file, of JSON by the keys of 100 records.

    Raises DataError that names what was found and what is allowed.
    """
    return _detect(locate(str(source)))


def _detect(located: Located) -> str:
    path = located.files[0]
    if located.entry:
        return "llama_factory"
    container = _container(path)
    if container == "tar":
        return "webdataset"
    if located.is_folder or container == "arrow":
        return "hf"
    return "parquet" if container == "parquet" else _detect_layout(path)


def _container(path: Path) -> str:
    """What a file is by its first bytes: parquet, arrow or tar, else json. Raises DataError."""
    with open_data_file(path) as file:
        head = file.read(512)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((FILE_MAGIC, STREAM_MAGIC)):
        return "arrow"
    return "tar" if head[257:262] == b"ustar" else "json"


def _detect_layout(path: Path) -> str:
    if path.suffix.lower() not in JSON_SUFFIXES:
        raise DataError(
            f"cannot tell the format of {path}: its content is not Parquet and its name does not end in "
            f"{', '.join(JSON_SUFFIXES)}; set `format` to one of {', '.join(FORMATS)}"
        )
    first = [record.fields for record in itertools.islice(json_records(path), DETECTION_RECORDS)]
    objects = [fields for fields in first if isinstance(fields, dict)]
    layouts = [layout for fields in objects if (layout := layout_of(fields))]
    if layouts:
        return "llava" if layouts[0] == "sharegpt" and "llava" in layouts else layouts[0]
    if objects:
        found = f"the first record has the keys {shown(list(objects[0]))}"
    else:
        found = f"the first record is refused ({first[0]})" if first else "it holds no record"
    raise DataError(
        f"cannot tell the format of {path}: {found}; wanted: JSONL or a JSON array of objects with 'messages' "
        "(format messages), 'conversations' (sharegpt, or llava with 'image'), 'prompt' and 'completion' "
        "(prompt_completion), 'instruction' and 'output' (alpaca), or Parquet; any other keys can be named in a "
        "dataset_info.json of LLaMA-Factory: path dataset_info.json#NAME"
    )


def _read_turns(source: DataSource, located: Located) -> ReadTurns:
    """How the records of a source become turns. Raises DataError where its format is not what its path names."""
    format_name = _detect(located) if source.format == "auto" else source.format
    if (format_name == "llama_factory") != bool(located.entry):
        raise DataError(
            f"{source.path} has the format {format_name}; an entry of LLaMA-Factory's list is written as "
            "PATH/dataset_info.json#NAME, with format llama_factory or auto"
        )
    if located.entry:
        listed = Listed.from_entry(source.path, located.entry)
        return lambda fields, root: listed.read_turns(listed.rename(fields), root)
    return LAYOUTS.get(format_name, read_by_keys)


def _records(source: DataSource, located: Located) -> Iterator[tuple[Path, Record]]:
    """The records of all files, each with its file."""
    for path in located.files:
        if source.format in LAYOUTS:
            records = json_records(path)
        elif source.format in ("parquet", "webdataset"):
            records = parquet_records(path) if source.format == "parquet" else tar_records(path)
        else:
            records = _by_container(path, source, located)
        for record in records:
            yield path, record


def _by_container(path: Path, source: DataSource, located: Located) -> Iterator[Record]:
    columns = Columns(Listed.from_entry(source.path, located.entry).columns) if located.entry else Columns()
    match _container(path):
        case "parquet":
            return parquet_records(path, columns)
        case "arrow":
            return arrow_records(path, columns)
        case "tar":
            return tar_records(path)
    return json_records(path)


def _media_root(source: DataSource, located: Located) -> Path:
    root = Path(source.media_root) if source.media_root else located.root
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


def _unused_hash_id(digest: str, copies: Counter[str], used: Origins) -> str:
    """`copies` counts contents that stand there twice or more, from the second on."""
    stem = digest[:HASH_ID_LENGTH]
    if stem not in used:
        return stem
    while True:
        copies[stem] += 1
        if (candidate := f"{stem}-{copies[stem] + 1}") not in used:
            return candidate
