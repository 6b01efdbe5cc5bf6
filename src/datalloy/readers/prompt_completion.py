"""A record of TRL's prompt-completion layout in, turns out: `{"prompt", "completion", "images"}`.

Both are lists of messages, or both strings; a string is one turn of the user, or of the assistant. As in TRL, pictures
that no block and no placeholder asks for stand at the start of the first user turn.

Trap: TRL trains on raw strings without a chat template. Here, as in every trainer of chat models, a conversation is a
conversation; export to another trainer keeps that.
"""

from pathlib import Path
from typing import Any

from datalloy.readers import messages
from datalloy.readers.conversation import SLOT, Draft, build_turns, find_images
from datalloy.readers.records import RecordError, shown
from datalloy.readers.unread import refuse_unread
from datalloy.sample import Role, Turn


def read_turns(fields: dict[str, Any], root: Path) -> tuple[Turn, ...]:
    """The turns of one record, image paths relative to `root`. Raises RecordError."""
    refuse_unread(fields)
    prompt = _messages(fields.get("prompt"), "user", root)
    completion = _messages(fields.get("completion"), "assistant", root)
    if wrong := [role for role, _ in completion if role != "assistant"]:
        raise RecordError("bad_turn_order", f"the completion has a turn of {wrong[0]}; it is the assistant's alone")
    drafts = [*prompt, *completion]
    images = find_images(fields, "image" if "image" in fields else "images", root)
    if not any(part is None or not isinstance(part, str) for _, parts in drafts for part in parts):
        drafts = _images_first(drafts, len(images))
    return build_turns(drafts, images)


def _messages(value: Any, role: Role, root: Path) -> list[Draft]:
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise RecordError("missing_messages", f"found {shown(value)}; a text or a list of turns is wanted")
    return [messages.draft(message, root) for message in value]


def _images_first(drafts: list[Draft], count: int) -> list[Draft]:
    first = next((number for number, (role, _) in enumerate(drafts) if role == "user"), None)
    return [
        (role, [*([SLOT] * count), *parts]) if number == first else (role, parts)
        for number, (role, parts) in enumerate(drafts)
    ]
