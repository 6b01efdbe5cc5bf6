"""A tar of WebDataset in, its records out; members are read where they lie, never extracted.

Members that share a name up to its first dot are one sample: `0001.json` holds the record in any layout, `0001.jpg` or
`0001.0.jpg`, `0001.1.jpg` ... its pictures. The record may name them, by the member's name or by what follows the
first dot; pictures that it does not name are its pictures in the tar's order.

Trap: names in a tar can point anywhere. None of them is ever used as a path, links are refused, and a picture is a
range of bytes in the tar. Compressed tars are refused: a picture in them cannot be reached without all before it.
"""

import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from datalloy.errors import DataError
from datalloy.readers.conversation import MAX_IMAGE_BYTES
from datalloy.readers.records import MAX_LINE_BYTES, Record, RecordError, open_data_file, parse_record, shown
from datalloy.regular_files import open_regular

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
OTHER_MEDIA = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".wav", ".mp3", ".flac", ".ogg", ".m4a")

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


@dataclass(frozen=True, slots=True)
class TarImage:
    """A picture that is a member of a tar: `size` bytes from `offset` on."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open_regular(self.path) as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise OSError(f"{self}: the tar ends before its member does")
        return data

    def __str__(self) -> str:
        return f"{self.path}@{self.offset}"


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar. `start` is where its header begins, `end` where the next one may."""

    key: str
    extension: str
    start: int
    offset: int
    size: int
    is_file: bool

    @property
    def suffix(self) -> str:
        return PurePosixPath(f"x.{self.extension}").suffix.lower()

    @property
    def end(self) -> int:
        return self.offset + -(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def tar_records(path: Path) -> Iterator[Record]:
    """All samples of the tar in order. Raises DataError where it is no tar that can be read."""
    for row, members in enumerate(tar_groups(path)):
        try:
            yield Record(row, 0, _fields(path, members))
        except RecordError as fault:
            yield Record(row, 0, fault)


def tar_groups(path: Path) -> Iterator[list[Member]]:
    """The members of each sample in order; members whose name has no dot belong to none. Raises DataError."""
    for _, members in itertools.groupby(_members(path), key=lambda member: member.key):
        yield list(members)


def _members(path: Path) -> Iterator[Member]:
    with open_data_file(path) as file:
        try:
            with tarfile.open(fileobj=cast("BinaryIO", _Bounded(file)), mode="r:") as tar:
                behind = 0
                while (info := tar.next()) is not None:
                    vars(tar)["members"].clear()  # the library would keep every header
                    if info.size < 0 or info.offset < behind:  # it would go round in circles for ever (CVE-2025-8194)
                        raise ValueError(f"the member at byte {info.offset} claims {info.size} bytes")
                    behind = info.offset_data
                    if (match := _NAME.fullmatch(info.name)) and not info.isdir():
                        key, extension = match.groups()
                        yield Member(key, extension, info.offset, info.offset_data, info.size, info.isreg())
        except (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise DataError(f"{path} is not a tar that can be read: {error}; write or download it anew") from error


class _Bounded:
    """A file for tarfile, which allocates as many bytes as a header claims to have."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_LINE_BYTES:
            raise ValueError(f"a header claims {size} bytes, at most {MAX_LINE_BYTES:,} are read")
        return self._file.read(size)


def _fields(path: Path, members: Sequence[Member]) -> dict[str, Any]:
    """The record of one sample, its pictures as references. Raises RecordError."""
    for member in members:
        if not member.is_file:
            raise RecordError("bad_member", f"{shown(member.key)}.{member.extension} is no regular file")
        if member.suffix in OTHER_MEDIA:
            raise RecordError("unsupported_media", f"found {member.extension!r} of {shown(member.key)}")
    records = [member for member in members if member.suffix == ".json"]
    if len(records) != 1:
        raise RecordError(
            "missing_messages", f"{shown(members[0].key)} has {len(records)} .json members, one is wanted"
        )
    fields = _record(path, records[0])
    images = [member for member in members if member.suffix in IMAGE_SUFFIXES]
    if too_large := [member for member in images if member.size > MAX_IMAGE_BYTES]:
        raise RecordError("image_too_large", f"{too_large[0].size:,} bytes, at most {MAX_IMAGE_BYTES:,}")
    key = "image" if "image" in fields else "images"
    return {**fields, key: [_reference(path, member) for member in _in_order(fields.get(key), images)]}


def _record(path: Path, member: Member) -> dict[str, Any]:
    if member.size > MAX_LINE_BYTES:
        raise RecordError("line_too_long", f"a record may have at most {MAX_LINE_BYTES:,} bytes")
    fields = parse_record(_reference(path, member).read())
    if isinstance(fields, RecordError):
        raise fields
    return fields


def _reference(path: Path, member: Member) -> TarImage:
    return TarImage(path, member.offset, member.size)


def _in_order(names: Any, images: Sequence[Member]) -> list[Member]:
    """The pictures as the record names them; all of them in the tar's order where it names none."""
    if not names:
        return list(images)
    by_name = {member.extension: member for member in images}
    by_name |= {f"{PurePosixPath(member.key).name}.{member.extension}": member for member in images}
    by_name |= {f"{member.key}.{member.extension}": member for member in images}
    wanted = names if isinstance(names, list) else [names]
    if len(wanted) == len(images) == 1:
        return list(images)  # often named as it was before it came into the tar
    if missing := [name for name in wanted if not isinstance(name, str) or name not in by_name]:
        raise RecordError("image_missing", f"{shown(missing[0])} is not in the sample; it has {shown([*by_name])}")
    return [by_name[name] for name in wanted]
