"""Bytes in, files that are complete and on disk, or not there at all, out.

The one protocol for everything that Datalloy leaves behind: a hidden temporary name in the same folder, all bytes,
fsync, rename, fsync of the folder. A kill, a full disk or a power loss at any point leaves the old file or the new
one under the name, and beside it at most a leftover that `clear_leftovers` knows by its own name.

Price: two fsyncs a file, some milliseconds on a disk. Trap: a rename is atomic inside one file system only, hence the
temporary name beside the final one; and a file that was renamed without fsync may come back empty after a power loss.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from datalloy.errors import DatalloyError, EnvironmentFault

LEFTOVERS = (".*.tmp", ".*.partial")  # names that nothing but an unfinished write has
ONLY_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # what no read can fail with


@contextlib.contextmanager
def complete_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which gets the name `path` when the block ends well, synced; else it is removed.

    Raises EnvironmentFault, with needed and free bytes, where the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        fault = write_fault(path, error, _size(temporary)) if isinstance(error, OSError) else None
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if fault is None:
            raise
        raise fault from error


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which gets its name when all is written and on disk."""
    with complete_path(path) as temporary, temporary.open("xb") as file:
        yield file


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either complete under its name or not there at all, power loss included."""
    with complete_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def complete_files(folder: Path) -> Iterator[Path]:
    """A hidden folder to write any number of files to; each gets its name in `folder` when all are on disk.

    Files that were in `folder` before and are not written stay.
    """
    staging = folder / ".saving.tmp"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        sync_tree(staging)
        for file in sorted(path for path in staging.rglob("*") if path.is_file()):
            place = folder / file.relative_to(staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
        shutil.rmtree(staging)
        sync_tree(folder, files=False)
    except BaseException as error:
        fault = write_fault(folder, error, _size(staging)) if isinstance(error, OSError) else None
        shutil.rmtree(staging, ignore_errors=True)
        if fault is None:
            raise
        raise fault from error


def sync_file(path: Path) -> None:
    """Make the bytes of a file survive a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path, *, files: bool = True) -> None:
    """Sync a folder with all that is in it, or only its folders."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        elif files:
            sync_file(path)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed writers left, at any depth. Nobody else may be writing into the folder."""
    for pattern in LEFTOVERS:
        for path in list(folder.rglob(pattern)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)  # it may have been inside a folder that is gone


@contextlib.contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Faults of the disk inside the block name `path`, which is being made."""
    try:
        yield
    except OSError as error:
        if fault := write_fault(path, error):
            raise fault from error
        raise


def write_fault(path: Path, error: Exception, needed: int = 0) -> EnvironmentFault | None:
    """What to tell the user where `path` could not be written; None where the error says itself what it is."""
    if isinstance(error, DatalloyError):
        return None
    if isinstance(error, OSError) and error.errno not in ONLY_WRITING:
        named = error.filename
        if named is not None and not str(named).startswith(str(path.parent)):
            return None  # another file's trouble, which its own message names
    free = free_bytes(path.parent)
    return EnvironmentFault(
        f"{path} could not be written: {error}. {needed:,} bytes were to be written, {free:,} are free there; what was "
        "finished before is kept"
    )


def free_bytes(place: Path) -> int:
    """Free bytes where `place` is, or will be."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(place: Path, needed: int, what: str) -> None:
    """Raise EnvironmentFault where `what` needs more bytes than are free at `place`: before anything is spent."""
    if (free := free_bytes(place)) < needed:
        raise EnvironmentFault(
            f"{what} needs {needed:,} bytes at {place}, {free:,} are free there; free some, or name another disk"
        )


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    return 0


def file_hash(path: Path) -> str:
    """SHA-256, in hex, of a file. Raises EnvironmentFault where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be read: {error}") from error


def digest(value: Any) -> str:
    """SHA-256, in hex, of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
