"""Chosen samples in, files of their original rows out, in the format they were read from.

Nothing is converted, so nothing is lost: a row of JSONL is copied byte for byte, an element of a JSON array likewise,
a row of Parquet with its schema. A trainer that read the original reads the export. Image paths stay as they are,
relative to the original media root; `media_roots.json` beside the files says which that is.

The files must still be those that were read: an edit that keeps the number of rows is not seen here (the run's
fingerprint sees it). JSON rows are held in memory until they are written, pictures of Parquet a few hundred at a time.
"""

import codecs
import contextlib
import itertools
import json
import os
import re
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from datalloy.errors import DataError
from datalloy.run import sync_folder, write_json
from datalloy.sample import FileImage, Sample

MEDIA_ROOTS = "media_roots.json"
ROW_GROUP_ROWS = 256

_BETWEEN_ELEMENTS = re.compile(r"[ \t\n\r,]*")


def export_rows(
    samples: Sequence[Sample], out: Path, *, media_roots: Mapping[str, str | None] | None = None
) -> list[Path]:
    """Write the samples' rows to `out/DOMAIN.SUFFIX`, one file a domain, in the order given and as often as given.

    Args:
        media_roots: `media_root` of each domain as in its DataSource. A domain that is missing, or None, has the
            folder of its file, as in a recipe.

    Returns: the files written, `media_roots.json` last; each is complete or not there. Raises DataError.
    """
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    root_by_file: dict[str, str] = {}
    for domain, chosen in _by_domain(samples).items():
        source = _only_file(domain, chosen)
        root = Path((media_roots or {}).get(domain) or source.parent).resolve()
        _check_root(chosen, root)
        path = out / f"{domain}{source.suffix}"
        if path.name in (MEDIA_ROOTS, *root_by_file) or path.resolve() == source.resolve():
            raise DataError(f"{path} would be written over; name another folder, or rename the domain {domain}")
        try:
            with _complete_file(path) as file:
                _write_rows(source, chosen, file)
        except (ValueError, LookupError, pyarrow.ArrowException) as error:
            raise DataError(f"{source} is not the file that was read ({error!r}); run again from its check") from error
        written.append(path)
        root_by_file[path.name] = str(root)
    write_json(out / MEDIA_ROOTS, root_by_file)
    return [*written, out / MEDIA_ROOTS]


def _by_domain(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.domain, []).append(sample)
    return groups


def _only_file(domain: str, samples: Sequence[Sample]) -> Path:
    files = {sample.origin.path for sample in samples}
    if len(files) > 1:
        raise DataError(f"domain {domain} comes from {', '.join(sorted(map(str, files)))}; a domain has one file")
    return files.pop()


def _check_root(samples: Sequence[Sample], root: Path) -> None:
    for sample in samples:
        for image in sample.images:
            if isinstance(image, FileImage) and not image.path.is_relative_to(root):
                raise DataError(
                    f"{sample.id}: {image} is not in {root}; give export the media_root that it was read with"
                )


@contextlib.contextmanager
def _complete_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when all is written and on disk; nothing is left behind where that fails."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise
    sync_folder(path.parent)


def _write_rows(source: Path, samples: Sequence[Sample], file: BinaryIO) -> None:
    if samples[0].origin.line:
        _write_lines(source, [sample.origin.line for sample in samples], file)
        return
    with source.open("rb") as original:
        is_parquet = original.read(4) == b"PAR1"
    write = _write_table if is_parquet else _write_array
    write(source, [sample.origin.row for sample in samples], file)


def _write_lines(source: Path, lines: Sequence[int], file: BinaryIO) -> None:
    wanted = set(lines)
    with source.open("rb") as original:
        text_by_line = {number: line for number, line in enumerate(original, start=1) if number in wanted}
    for number in lines:
        line = text_by_line[number]
        if number == 1:  # the mark belongs to the file, not to the row, which may now stand anywhere
            line = line.removeprefix(codecs.BOM_UTF8)
        file.write(line if line.endswith(b"\n") else line + b"\n")


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
