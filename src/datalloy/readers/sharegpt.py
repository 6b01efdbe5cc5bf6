"""A record of the sharegpt format in, turns out: `{"conversations": [{"from", "value"}], "images": [path]}`.

LLaMA-Factory's name for it. `from` is human, gpt or system; `value` is a string with an `<image>` placeholder for each
image. A string under `system` beside the conversation is a system turn before it; an empty one is none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datalloy.readers.conversation import build_turns, find_images, split_placeholders
from datalloy.readers.records import RecordError, shown
from datalloy.sample import ImageRef, Part, Role, Turn

_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


def read_turns(fields: dict[str, Any], root: Path) -> tuple[Turn, ...]:
    """The turns of one record, image paths relative to `root`. Raises RecordError."""
    return read_conversation(fields, find_images(fields, "images", root))


def read_conversation(fields: dict[str, Any], images: Sequence[ImageRef]) -> tuple[Turn, ...]:
    """The turns under `system` and `conversations` with these images in their placeholders. Raises RecordError."""
    conversation = fields.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise RecordError("missing_messages", f"'conversations' is {shown(conversation)}; a list of turns is wanted")
    drafts = [_draft(message) for message in conversation]
    system = fields.get("system")
    if system not in (None, ""):
        drafts.insert(0, _draft({"from": "system", "value": system}))
    return build_turns(drafts, images)


def _draft(message: Any) -> tuple[Role, list[Part | None]]:
    if not isinstance(message, dict):
        raise RecordError("bad_content", f"found {shown(message)}; a turn is an object with 'from' and 'value'")
    speaker, value = message.get("from"), message.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise RecordError("unknown_role", f"found {shown(speaker)}; allowed: {', '.join(_ROLES)}")
    if not isinstance(value, str):
        raise RecordError("bad_content", f"the value of {speaker} is {shown(value)}; a string is wanted")
    return _ROLES[speaker], [*split_placeholders(value)]
