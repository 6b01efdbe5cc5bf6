"""Chosen samples in, files of their original rows out, in the format they were read from.

Nothing is converted, so nothing is lost: a row of JSONL is copied byte for byte, an element of a JSON array likewise,
a row of Parquet or Arrow with its schema, the members of a WebDataset sample with their headers. A trainer that read
the original reads the export. Image paths stay as they are, relative to the original media root; `media_roots.json`
beside the files says which that is. For what came from a list of LLaMA-Factory a new list says how to read it.

The files must still be those that were read: an edit that keeps the number of rows is not seen here (the run's
fingerprint sees it). Of lines only the places are held in memory, of a JSON array all of it, of Parquet a few hundred
rows at a time.
"""

import codecs
import itertools
import json
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from datalloy.config import DataSource
from datalloy.durable import complete_file, write_json
from datalloy.errors import DataError
from datalloy.locations import ENTRY_FILE, locate
from datalloy.readers import Samples
from datalloy.readers.arrow import FILE_MAGIC, STREAM_MAGIC, read_arrow
from datalloy.readers.webdataset import tar_groups
from datalloy.sample import FileImage, Sample

K = TypeVar("K", bound=Hashable)

MEDIA_ROOTS = "media_roots.json"
RESERVED = (MEDIA_ROOTS, ENTRY_FILE)
ROW_GROUP_ROWS = 256
CHUNK = 1 << 20

_BETWEEN_ELEMENTS = re.compile(r"[ \t\n\r,]*")


def export_rows(samples: Sequence[Sample], out: Path, *, sources: Mapping[str, DataSource] | None = None) -> list[Path]:
    """Write the samples' rows to `out/DOMAIN.SUFFIX`, one file a domain, in the order given and as often as given.

    A domain that was read from several files becomes a folder `out/DOMAIN/` with one file for each of them.

    Args:
        sources: where each domain was read from, as in a recipe. A domain that is missing was one file whose image
            paths start from its folder.

    Returns: the files written, `media_roots.json` last; each is complete or not there. Raises DataError.
    """
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    root_by_file: dict[str, str] = {}
    entries: dict[str, dict[str, Any]] = {}
    for domain, chosen in by_domain(samples).items():
        root, entry = _root_and_entry(chosen, (sources or {}).get(domain))
        _check_root(chosen, root)
        for path, rows in _targets(out, domain, chosen):
            source = rows[0].origin.path
            name = path.relative_to(out).as_posix()
            if name in (*RESERVED, *root_by_file) or path.resolve() == source.resolve():
                raise DataError(f"{path} would be written over; name another folder, or rename the domain {domain}")
            try:
                with complete_file(path) as file:
                    _write_rows(source, rows, file)
            except (ValueError, LookupError, pyarrow.ArrowException, tarfile.TarError) as error:
                raise DataError(
                    f"{source} is not the file that was read ({error!r}); run again from its check"
                ) from error
            written.append(path)
            root_by_file[name] = str(root)
        if entry:
            of_one_file = path.parent == out
            kept = {key: value for key, value in entry.items() if key != "num_samples"}  # the counts are in the rows
            entries[domain] = {**kept, "file_name": path.name if of_one_file else domain}
    if entries:
        write_json(out / ENTRY_FILE, entries)
        written.append(out / ENTRY_FILE)
    write_json(out / MEDIA_ROOTS, root_by_file)
    return [*written, out / MEDIA_ROOTS]


def by_domain(samples: Sequence[Sample]) -> dict[str, Sequence[Sample]]:
    """The samples of each domain, in their order."""
    return _groups(samples, lambda sample: sample.domain)


def _groups(samples: Sequence[Sample], key: Callable[[Sample], K]) -> dict[K, Sequence[Sample]]:
    """The samples with each key, in their order; of samples that are known by number, no more than that."""
    positions: dict[K, array[int]] = {}
    for position, sample in enumerate(samples):
        positions.setdefault(key(sample), array("q")).append(position)
    if isinstance(samples, Samples):
        return {name: samples.take(np.array(chosen)) for name, chosen in positions.items()}
    return {name: [samples[i] for i in chosen] for name, chosen in positions.items()}


def _root_and_entry(samples: Sequence[Sample], source: DataSource | None) -> tuple[Path, dict[str, Any]]:
    """Where image paths of a domain start, and what LLaMA-Factory's list says about it, if it came from one."""
    if source is None:
        return samples[0].origin.path.parent.resolve(), {}
    located = locate(source.path)
    return Path(source.media_root or located.root).resolve(), located.entry


def _targets(out: Path, domain: str, samples: Sequence[Sample]) -> Iterator[tuple[Path, Sequence[Sample]]]:
    """The file to write for each file that the samples come from, and its samples."""
    files = _groups(samples, lambda sample: sample.origin.path)
    if len(files) == 1:
        ((source, rows),) = files.items()
        yield out / f"{domain}{source.suffix}", rows
        return
    (out / domain).mkdir(exist_ok=True)
    for number, source in enumerate(sorted(files)):
        yield out / domain / f"{number:05d}{source.suffix}", files[source]


def _check_root(samples: Sequence[Sample], root: Path) -> None:
    for sample in samples:
        for image in sample.images:
            if isinstance(image, FileImage) and not image.path.is_relative_to(root):
                raise DataError(f"{sample.id}: {image} is not in {root}; give export the source that it was read with")


def _write_rows(source: Path, samples: Sequence[Sample], file: BinaryIO) -> None:
    if samples[0].origin.line:
        lines = (sample.origin.line for sample in samples)
        _write_lines(source, np.fromiter(lines, np.int64, len(samples)), file)
        return
    write = _write_array
    with source.open("rb") as original:
        head = original.read(512)
    if head.startswith(b"PAR1"):
        write = _write_table
    elif head.startswith((FILE_MAGIC, STREAM_MAGIC)):
        write = _write_stream
    elif head[257:262] == b"ustar":
        write = _write_members
    write(source, [sample.origin.row for sample in samples], file)


def _write_lines(source: Path, line_N: np.ndarray, file: BinaryIO) -> None:
    wanted_M, wanted_N = np.unique(line_N, return_inverse=True)
    with source.open("rb") as original:
        start_M, end_M = _places_of(wanted_M, original)
        for wanted in wanted_N:
            original.seek(start_M[wanted])
            line = original.read(end_M[wanted] - start_M[wanted])
            if wanted_M[wanted] == 1:  # the mark belongs to the file, not to the row, which may now stand anywhere
                line = line.removeprefix(codecs.BOM_UTF8)
            file.write(line if line.endswith(b"\n") else line + b"\n")


def _places_of(line_M: np.ndarray, file: BinaryIO) -> tuple[np.ndarray, np.ndarray]:
    """Where lines of ascending numbers, from 1, begin and end. Raises LookupError where there are fewer."""
    start_M, end_M = np.zeros(len(line_M), np.int64), np.zeros(len(line_M), np.int64)
    lines = enumerate(file, start=1)
    end = 0
    for i, wanted in enumerate(line_M):
        for number, line in lines:
            start, end = end, end + len(line)
            if number == wanted:
                start_M[i], end_M[i] = start, end
                break
        else:
            raise LookupError(f"line {wanted} is not there")
    return start_M, end_M


def _write_array(source: Path, rows: Sequence[int], file: BinaryIO) -> None:
    elements = list(_array_elements(source.read_bytes().decode("utf-8-sig")))
    file.write(b"[\n" + ",\n".join(elements[row] for row in rows).encode() + b"\n]\n")


def _array_elements(text: str) -> Iterator[str]:
    """The text of each element of an array that a reader has accepted."""
    decoder = json.JSONDecoder(parse_int=str)  # rejected elements are passed by, endless integers among them
    position = _skip(text, text.index("[") + 1)
    while text[position] != "]":
        end = decoder.raw_decode(text, position)[1]
        yield text[position:end]
        position = _skip(text, end)


def _skip(text: str, position: int) -> int:
    match = _BETWEEN_ELEMENTS.match(text, position)
    return match.end() if match else position


def _write_table(source: Path, rows: Sequence[int], file: BinaryIO) -> None:
    parquet = pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)
    with pyarrow.parquet.ParquetWriter(file, parquet.schema_arrow, write_page_checksum=True) as writer:
        for start in range(0, len(rows), ROW_GROUP_ROWS):
            writer.write_table(_take(parquet, rows[start : start + ROW_GROUP_ROWS]))


def _take(parquet: pyarrow.parquet.ParquetFile, rows: Sequence[int]) -> pyarrow.Table:
    """The rows in this order. Each row group is read once and only its wanted rows are kept."""
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    starts = [0, *itertools.accumulate(sizes)]
    distinct = sorted(set(rows))
    tables = [
        parquet.read_row_group(group).take([row - starts[group] for row in members])
        for group, members in itertools.groupby(distinct, key=lambda row: bisect_right(starts, row) - 1)
    ]
    position = {row: index for index, row in enumerate(distinct)}
    return pyarrow.concat_tables(tables).take([position[row] for row in rows])


def _write_stream(source: Path, rows: Sequence[int], file: BinaryIO) -> None:
    table = read_arrow(source)
    with pyarrow.ipc.new_stream(file, table.schema) as writer:
        for start in range(0, len(rows), ROW_GROUP_ROWS):
            writer.write_table(table.take(rows[start : start + ROW_GROUP_ROWS]))


def _write_members(source: Path, rows: Sequence[int], file: BinaryIO) -> None:
    """The members' headers and bytes as they are; a sample that repeats gets a key of its own, `KEY~2`, `KEY~3` ..."""
    wanted = set(rows)
    groups = {row: members for row, members in enumerate(tar_groups(source)) if row in wanted}
    times: Counter[int] = Counter()
    with source.open("rb") as original:
        for row in rows:
            times[row] += 1
            for member in groups[row]:
                start = member.start if times[row] == 1 else member.offset
                if times[row] > 1:
                    again = tarfile.TarInfo(f"{member.key}~{times[row]}.{member.extension}")
                    again.size = member.size
                    file.write(again.tobuf(tarfile.PAX_FORMAT))
                original.seek(start)
                _copy(original, file, member.end - start)
    file.write(bytes(2 * tarfile.BLOCKSIZE))


def _copy(original: BinaryIO, file: BinaryIO, size: int) -> None:
    while size > 0:
        chunk = original.read(min(size, CHUNK))
        if not chunk:
            raise ValueError("it ends before its last member does")
        file.write(chunk)
        size -= len(chunk)
