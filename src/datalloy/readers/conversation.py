"""Texts and images of one record in, checked turns out: the rules that all formats share.

Text is kept exactly as it is, with one exception. The placeholder `<image>` is cut out of a string and the next of
the record's images takes its place; one newline directly before and one directly after it go with it, since LLaVA's
"<image>\\n" only parts the picture from the question. In typed blocks there are no placeholders: text is text.

Image paths are resolved and looked at (inside the media root, a regular file), the pictures are not decoded. A path
is compared with the root after all symbolic links, so neither `..` nor a link leads out of it.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datalloy.readers.records import RecordError, shown
from datalloy.sample import MAX_IMAGE_BYTES, FileImage, ImageRef, Part, Role, Turn

# Far beyond what any model takes: what is longer would cost minutes of tokenising or gigabytes of pixels to refuse.
MAX_TEXT_CHARACTERS = 1_000_000
MAX_TURNS = 2_000
MAX_IMAGES = 256

MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")

# Stands in a turn for "the next of the record's images".
SLOT = None
Draft = tuple[Role, list[Part | None]]

_PLACEHOLDER = re.compile(r"\n?<image>\n?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")


def split_placeholders(text: str) -> list[str | None]:
    """The pieces of a string, with SLOT where a placeholder stood; empty pieces are left out."""
    pieces: list[str | None] = []
    for piece in _PLACEHOLDER.split(text):
        pieces += [piece, SLOT]
    return [piece for piece in pieces[:-1] if piece != ""]


def find_images(fields: dict[str, Any], key: str, root: Path) -> list[ImageRef]:
    """The record's images in order, under `image` or `images` as its format has it; none where the key is missing.

    Raises RecordError, also for media under other keys: to ignore them would train on questions without their picture.
    """
    for other in MEDIA_KEYS:
        if other != key and fields.get(other):
            raise RecordError(
                "unsupported_media", f"found the key {other!r}; this format reads images under {key!r} only"
            )
    value = fields.get(key)
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [item if isinstance(item, ImageRef) else find_image_file(_path_of(item), root) for item in values]


def _path_of(item: Any) -> Any:
    """The path in an object of bytes and path, as Hugging Face datasets and ms-swift write a picture that is a file."""
    match item:
        case {"path": str(path), **rest} if not rest.get("bytes"):
            return path
    return item


def find_image_file(value: Any, root: Path) -> FileImage:
    """The regular file at `value`, a path inside `root` (resolved) or relative to it. Raises RecordError."""
    if not isinstance(value, str) or not value:
        raise RecordError("bad_images", f"found {shown(value)}; an image is a path")
    if _SCHEME.match(value):
        raise RecordError("image_url", f"found {shown(value)}; nothing is fetched: download it and give a path")
    try:
        path = Path(os.path.realpath(root / value))  # Path.resolve raises RuntimeError on a loop of links
        if not path.is_relative_to(root):
            raise RecordError("image_outside_root", f"{shown(value)} lies outside the media root {root}")
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise RecordError("image_missing", f"{shown(value)} is not in the media root {root}") from None
    except OSError as error:  # a loop of links, a name too long, no permission
        raise RecordError("image_unreadable", f"{shown(value)}: {error.strerror}") from None
    except ValueError:
        raise RecordError("image_unreadable", f"{shown(value)} holds a NUL, which no path can") from None
    if not stat.S_ISREG(status.st_mode):
        raise RecordError("image_unreadable", f"{shown(value)} is not a regular file")
    if status.st_size > MAX_IMAGE_BYTES:
        raise RecordError(
            "image_too_large", f"{shown(value)} has {status.st_size:,} bytes, at most {MAX_IMAGE_BYTES:,}"
        )
    return FileImage(path)


def build_turns(drafts: Sequence[Draft], images: Sequence[ImageRef]) -> tuple[Turn, ...]:
    """The turns with the images in their slots, in order. Raises RecordError where a conversation breaks a rule."""
    _check_size(drafts, images)
    slots = sum(part is SLOT for _, parts in drafts for part in parts)
    if slots != len(images):
        raise RecordError("image_count_mismatch", f"{slots} placeholders for {len(images)} images")
    waiting = iter(images)
    turns = tuple(
        Turn(role, tuple(next(waiting) if part is SLOT else part for part in parts if part != ""))
        for role, parts in drafts
    )
    _check_order([turn.role for turn in turns])
    for number, turn in enumerate(turns, start=1):
        if turn.images and turn.role != "user":
            raise RecordError(
                "image_outside_user_turn", f"turn {number} ({turn.role}) has an image; images belong to user turns"
            )
        if not turn.images and not _is_visible(turn.text):
            raise RecordError("empty_content", f"turn {number} ({turn.role}) has no visible text")
    return turns


def _check_size(drafts: Sequence[tuple[Role, Sequence[Part | None]]], images: Sequence[ImageRef]) -> None:
    characters = sum(len(part) for _, parts in drafts for part in parts if isinstance(part, str))
    for reason, found, most in (
        ("text_too_long", characters, MAX_TEXT_CHARACTERS),
        ("too_many_turns", len(drafts), MAX_TURNS),
        ("too_many_images", len(images), MAX_IMAGES),
    ):
        if found > most:
            raise RecordError(reason, f"found {found:,}, at most {most:,} are read")


def _check_order(roles: list[Role]) -> None:
    body = roles[1:] if roles[:1] == ["system"] else roles
    if not body or body != ["user", "assistant"] * (len(body) // 2):
        raise RecordError(
            "bad_turn_order",
            f"found {shown(roles)}; wanted: a system turn or none, then user and assistant in turn, assistant last",
        )


def _is_visible(text: str) -> bool:
    return any(unicodedata.category(character) not in _INVISIBLE for character in text)
