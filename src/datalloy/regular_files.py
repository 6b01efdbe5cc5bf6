"""A path from anywhere in, an open regular file out.

What a path names is looked at after it was opened, without waiting: a pipe without a writer would hang a plain `open`
for ever, a device would never end, and a check before opening can be overtaken by a change of the file.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class NotRegularError(OSError):
    """What the path names is no regular file, or too large; `strerror` goes on where the path ends: "is a folder"."""

    def __str__(self) -> str:
        return str(self.strerror)


def open_regular(path: str | Path, *, max_bytes: int | None = None, follow_links: bool = True) -> BinaryIO:
    """The regular file at `path`, open for reading, of at most `max_bytes` bytes when it was opened.

    Without `follow_links` a symbolic link at the path itself is refused: for paths that were resolved before. Raises
    OSError, also for paths that no file system takes.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # a NUL, half of a surrogate pair
        raise NotRegularError(errno.EINVAL, "is a path that no file can have") from error
    try:
        status = os.fstat(descriptor)
        kind = stat.S_IFMT(status.st_mode)
        if kind != stat.S_IFREG:
            found = _KINDS.get(kind, "a special file")
            raise NotRegularError(errno.EINVAL, f"is {found}; a regular file is wanted")
        if max_bytes is not None and status.st_size > max_bytes:
            raise NotRegularError(errno.EFBIG, f"has {status.st_size:,} bytes, at most {max_bytes:,} are read")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, *, max_bytes: int, follow_links: bool = True) -> bytes:
    """The bytes of a regular file of at most `max_bytes`, also when it grows while it is read. Raises OSError."""
    with open_regular(path, max_bytes=max_bytes, follow_links=follow_links) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise NotRegularError(errno.EFBIG, f"has more than {max_bytes:,} bytes")
    return data
