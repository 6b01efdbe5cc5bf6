"""A record of the LLaVA format in, turns out: `{"id", "image": path, "conversations": [{"from", "value"}]}`.

The conversation is that of sharegpt; the mark of the format is the key `image`, one path or a list of them. Records
without it, as in LLaVA's own mixture, are text only.
"""

from pathlib import Path
from typing import Any

from datalloy.readers.conversation import find_images
from datalloy.readers.sharegpt import read_conversation
from datalloy.sample import Turn


def read_turns(fields: dict[str, Any], root: Path) -> tuple[Turn, ...]:
    """The turns of one record, image paths relative to `root`. Raises RecordError."""
    return read_conversation(fields, find_images(fields, "image", root))
