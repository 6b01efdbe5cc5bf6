"""Turns in, what trainers write them as; pictures in, paths.

A string has `<image>` where a picture stands. Readers take one newline on each side of it away, so a text that has
one there gets a second: what is written is read back to the letter. A text that itself says "<image>" cannot be told
from a picture in such formats and is refused; typed blocks have no such trouble.

Pictures that are files stay where they are and are named by absolute paths. Pictures inside Parquet, Arrow or tar files
are written to `media/`, named by their content, each once.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from datalloy.errors import DataError
from datalloy.exporters.rows import complete_file
from datalloy.run import write_atomically
from datalloy.sample import IMAGE_FORMATS, FileImage, ImageRef, Sample, Turn, image_hash

MEDIA = "media"
PLACEHOLDER = "<image>"
_SUFFIXES = (
    (b"\x89PNG", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II", ".tif"),
    (b"MM", ".tif"),
    (b"RIFF", ".webp"),
)


def text_with_placeholders(sample: Sample, turn: Turn) -> str:
    """The turn as one string. Raises DataError where its text says "<image>"."""
    pieces: list[str] = []
    for number, part in enumerate(turn.parts):
        if isinstance(part, str):
            if PLACEHOLDER in part:
                raise DataError(
                    f"{sample.origin} ({sample.id}): its text says {PLACEHOLDER!r} where no picture is, which this "
                    "format cannot tell from a picture; use typed blocks (trl, axolotl, webdataset), or drop the sample"
                )
            pieces.append(part)
            continue
        before, after = _neighbour(turn, number - 1), _neighbour(turn, number + 1)
        pieces.append("\n" * before.endswith("\n") + PLACEHOLDER + "\n" * after.startswith("\n"))
    return "".join(pieces)


def _neighbour(turn: Turn, number: int) -> str:
    part = turn.parts[number] if 0 <= number < len(turn.parts) else ""
    return part if isinstance(part, str) else ""


class PictureFiles:
    """The absolute path of any picture; one that is no file of its own is written to `folder/media/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve() / MEDIA
        self._written: dict[str, str] = {}

    def path(self, image: ImageRef) -> str:
        if isinstance(image, FileImage):
            return str(image.path)
        name = image_hash(image)
        if name not in self._written:
            data = image.read()
            target = self.folder / f"{name}{picture_suffix(data)}"
            write_atomically(target, data)
            self._written[name] = str(target)
        return self._written[name]

    @property
    def written(self) -> list[Path]:
        return [Path(path) for path in self._written.values()]


def picture_suffix(data: bytes) -> str:
    """The usual suffix of a picture's format, by its first bytes. Raises DataError for what `check` would refuse."""
    for mark, suffix in _SUFFIXES:
        if data.startswith(mark):
            return suffix
    raise DataError(f"a picture begins with {data[:8]!r}, which is none of {', '.join(IMAGE_FORMATS)}; run check again")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSONL, one row a line; one row at a time is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    return path


def write_yaml(path: Path, about: str, content: Mapping[str, Any]) -> Path:
    """YAML in the order given, with a comment before it."""
    comment = "".join(f"# {line}\n" for line in about.splitlines())
    write_atomically(path, (comment + yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)).encode())
    return path
