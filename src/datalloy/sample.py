"""The one record that travels: a sample is one SFT conversation with its images.

Readers make samples; every later stage reads them and none changes them. Images are references: nothing is
decoded before a model needs the pixels, so a pool of a million samples is a list of small objects.
"""

import hashlib
import io
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import PIL.Image
import PIL.ImageOps

Role = Literal["system", "user", "assistant"]

# Formats a training picture comes in. Anything else (EPS calls Ghostscript, PSD, FITS ...) is not worth its decoder.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_IMAGE_PIXELS = 64_000_000


class ImageRef(Protocol):
    """Where the bytes of one picture are. Opened on demand, never at scan time."""

    def read(self) -> bytes:
        """The encoded file, as it is on disk. Raises OSError when it cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class FileImage:
    """A picture in a file of its own."""

    path: Path

    def read(self) -> bytes:
        return self.path.read_bytes()

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """A picture whose bytes stand in a column of a Parquet file: row `row`, the `index`-th image of that row."""

    path: Path
    column: str
    row: int
    index: int

    def read(self) -> bytes:
        return _parquet_image_bytes(self.path, self.column, self.row)[self.index]

    def __str__(self) -> str:
        return f"{self.path}#{self.column}[{self.row}][{self.index}]"


@lru_cache(maxsize=8)
def _parquet_row_group(path: Path, column: str, group: int):
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[column]).column(column)


@lru_cache(maxsize=64)
def _parquet_group_starts(path: Path) -> tuple[int, ...]:
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(path)
    starts = [0]
    for group in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return tuple(starts)


def _parquet_image_bytes(path: Path, column: str, row: int) -> list[bytes]:
    starts = _parquet_group_starts(path)
    group = next(g for g in range(len(starts) - 1) if starts[g] <= row < starts[g + 1])
    cell = _parquet_row_group(path, column, group)[row - starts[group]].as_py()
    cells = cell if isinstance(cell, list) else [cell]
    return [item["bytes"] if isinstance(item, dict) else item for item in cells]


def open_image(image: ImageRef) -> PIL.Image.Image:
    """The picture as 8-bit RGB: EXIF orientation applied, first frame only, transparency on white.

    Raises OSError or ValueError with a plain reason when the bytes are not a picture we accept.
    """
    try:
        picture = _decode(image.read())
    except (PIL.Image.DecompressionBombError, SyntaxError) as error:  # Pillow's words for some damaged PNGs
        raise ValueError(str(error)) from error
    if picture.mode.startswith("I"):  # 16-bit greys: Pillow would clip, not scale
        picture = picture.point(lambda value: value / 256).convert("L")
    if picture.mode in ("F", "LAB"):
        raise ValueError(f"picture mode {picture.mode} has no agreed meaning in RGB")
    if picture.has_transparency_data:
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def _decode(data: bytes) -> PIL.Image.Image:
    """The first frame, upright. The size is checked before any pixel is decoded."""
    with PIL.Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as opened:
        width, height = opened.size
        if width * height > MAX_IMAGE_PIXELS:
            raise ValueError(f"picture of {width}x{height} pixels, at most {MAX_IMAGE_PIXELS:,} are allowed")
        opened.load()
        return PIL.ImageOps.exif_transpose(opened)


Part = str | ImageRef


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: its role and its parts in order, each a piece of text or an image."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The turn's text alone, images left out."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[ImageRef, ...]:
        return tuple(part for part in self.parts if not isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Origin:
    """The place in the user's file that a sample came from; the exporters write that row back byte for byte.

    `row` counts records from 0. `line` is the physical line, from 1, in JSONL files, and 0 elsewhere.
    """

    path: Path
    row: int
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else f"{self.path}[{self.row}]"


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation. `id` is the user's own, or a content hash where the file has none; unique in its domain."""

    id: str
    domain: str
    turns: tuple[Turn, ...]
    origin: Origin
    content_hash: str = field(repr=False)

    @property
    def images(self) -> tuple[ImageRef, ...]:
        return tuple(image for turn in self.turns for image in turn.images)

    @property
    def answer(self) -> str:
        """Text of the last assistant turn: what the metrics compare a generated answer with."""
        return next(turn.text for turn in reversed(self.turns) if turn.role == "assistant")

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the last assistant turn: what a model is given when it is asked to answer."""
        last = max(i for i, turn in enumerate(self.turns) if turn.role == "assistant")
        return self.turns[:last]


def content_hash(turns: tuple[Turn, ...]) -> str:
    """SHA-256, in hex, of the roles, the texts and the bytes of the images, in order.

    Two samples have the same hash exactly when a model would be given the same conversation, whatever their
    files, formats, ids or paths. Reads every image once (bytes only, nothing is decoded).
    """
    canonical = [
        [turn.role, [part if isinstance(part, str) else {"image": image_hash(part)} for part in turn.parts]]
        for turn in turns
    ]
    return hashlib.sha256(json.dumps(canonical, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def image_hash(image: ImageRef) -> str:
    """SHA-256, in hex, of the encoded bytes of one image."""
    return hashlib.sha256(image.read()).hexdigest()
