"""The one record that travels: a sample is one SFT conversation with its images.

Readers make samples; every later stage reads them and none changes them. Images are references: nothing is
decoded before a model needs the pixels, so a pool of a million samples is a list of small objects.
"""

import hashlib
import io
import json
import threading
import warnings
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import PIL.Image
import PIL.ImageFile
import PIL.ImageOps

from datalloy.errors import EnvironmentFault
from datalloy.regular_files import read_regular

Role = Literal["system", "user", "assistant"]

# Formats a training picture comes in. Anything else (EPS calls Ghostscript, PSD, FITS ...) is not worth its decoder.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_IMAGE_PIXELS = 64_000_000
MAX_IMAGE_BYTES = 256 * 1024 * 1024
MAX_GREY = 65_535  # of 16 bits; what lies beyond has no agreed white

_FILTERS_OF_WARNINGS = threading.Lock()  # they are the process's, and samples are encoded in threads


@runtime_checkable
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
        # the path was resolved when it was looked at; what became a link or a pipe since is refused
        return read_regular(self.path, max_bytes=MAX_IMAGE_BYTES, follow_links=False)

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
        import pyarrow

        try:
            return _parquet_image_bytes(self.path, self.column, self.row)[self.index]
        except (pyarrow.ArrowException, LookupError, StopIteration, ValueError) as error:
            raise OSError(f"{self} cannot be read any more: {error}") from error

    def __str__(self) -> str:
        return f"{self.path}#{self.column}[{self.row}][{self.index}]"


@lru_cache(maxsize=8)
def _parquet_row_group(path: Path, column: str, group: int):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        column_of_group = file.read_row_group(group, columns=[column]).column(column)
    column_of_group.validate(full=True)
    return column_of_group


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
    """The picture as 8-bit RGB: EXIF orientation applied, first frame only, transparency on white, 16-bit grey scaled.

    Nothing about a picture raises anything but OSError (its bytes cannot be had) and ValueError with a plain reason
    (they are not a picture that we accept).
    """
    picture = _decode(image.read())
    try:
        return to_rgb(picture)
    except (MemoryError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"its colours cannot be read: {error or type(error).__name__}") from error


def has_further_frames(image: ImageRef) -> bool:
    """Whether the picture is an animation or a document of several pages, of which only the first is ever used.

    Looks at headers. False for what is no picture, cannot be read, or is damaged behind its first frame.
    """
    try:
        with _opened(image.read()) as opened:
            return bool(getattr(opened, "is_animated", False))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - as in decoding
        return False


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A decoded picture of any mode as 8-bit RGB, by one rule for all stages. Raises ValueError.

    16-bit greys are scaled (Pillow would clip them: 300 and 40,000 would both be white), transparency is laid on
    white, CMYK and YCbCr are converted by Pillow without colour profiles. Floats and LAB have no agreed meaning.
    """
    if picture.mode.startswith("I"):
        picture = picture.convert("I")
        extrema: Any = picture.getextrema()
        darkest, brightest = extrema
        if darkest < 0 or brightest > MAX_GREY:
            raise ValueError(f"grey values from {darkest} to {brightest}; those of 8 or 16 bits are accepted")
        picture = picture.point(lambda value: value / 256).convert("L")
    if picture.mode in ("F", "LAB"):
        raise ValueError(f"picture mode {picture.mode} has no agreed meaning in RGB")
    if picture.has_transparency_data:
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def _decode(data: bytes) -> PIL.Image.Image:
    """The first frame, upright. The size is checked before any pixel is decoded."""
    if PIL.ImageFile.LOAD_TRUNCATED_IMAGES:
        raise EnvironmentFault(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is switched on in this process, so that half a picture would pass for "
            "a whole one; switch it off"
        )
    with _opened(data) as opened:
        try:
            opened.load()
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"it cannot be decoded: {error or type(error).__name__}") from error
        try:
            return PIL.ImageOps.exif_transpose(opened)
        except Exception:  # noqa: BLE001 - EXIF that cannot be read turns nothing
            return opened.copy()


def _opened(data: bytes) -> PIL.Image.Image:
    """The picture with nothing but its header read, of an accepted format and size. Raises ValueError."""
    try:
        with _FILTERS_OF_WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            opened = PIL.Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except MemoryError:
        raise
    except PIL.UnidentifiedImageError:
        raise ValueError(f"it is no picture of the formats {', '.join(IMAGE_FORMATS)}") from None
    except Exception as error:
        raise ValueError(f"it cannot be decoded: {error or type(error).__name__}") from error
    width, height = opened.size
    if width < 1 or height < 1 or width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"picture of {width}x{height} pixels, 1 to {MAX_IMAGE_PIXELS:,} are allowed")
    return opened


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
