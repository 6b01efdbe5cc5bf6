"""A record of the sharegpt format in, turns out: `{"conversations": [{"from", "value"}], "images": [path]}`.

LLaMA-Factory's name for it. `from` is human, gpt or system; `value` is a string with an `<image>` placeholder for each
image. A string under `system` beside the conversation is a system turn before it; an empty one is none. Other words
for speaker, text and roles are `Tags`, which an entry of LLaMA-Factory's list may name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datalloy.errors import DataError
from datalloy.readers.conversation import Draft, build_turns, find_images, split_placeholders
from datalloy.readers.records import RecordError, shown
from datalloy.readers.unread import refuse_unread, refuse_unread_in_turn
from datalloy.sample import ImageRef, Role, Turn


@dataclass(frozen=True)
class Tags:
    """The keys of a turn and the words for its roles, under LLaMA-Factory's names; None is a word not in use."""

    role_tag: str | None = "from"
    content_tag: str | None = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    system_tag: str | None = "system"

    @classmethod
    def from_entry(cls, where: str, tags: Any) -> "Tags":
        """LLaMA-Factory's rule: its own words without `tags`; with it, only the words in it."""
        if tags is None:
            return cls()
        if not isinstance(tags, dict) or not all(isinstance(tag, str) for tag in tags.values()):
            raise DataError(f"{where}: tags is {shown(tags)}; an object of texts is wanted")
        chosen = cls(**{field.name: tags.get(field.name) for field in fields(cls)})
        if missing := [key for key in ("role_tag", "content_tag", "user_tag", "assistant_tag") if key not in tags]:
            raise DataError(f"{where}: tags lacks {', '.join(missing)}; what is left out has no default there")
        return chosen

    @property
    def roles(self) -> dict[str, Role]:
        words: list[tuple[str | None, Role]] = [
            (self.user_tag, "user"),
            (self.assistant_tag, "assistant"),
            (self.system_tag, "system"),
        ]
        return {word: role for word, role in words if word is not None}


def read_turns(fields: dict[str, Any], root: Path) -> tuple[Turn, ...]:
    """The turns of one record, image paths relative to `root`. Raises RecordError."""
    return read_tagged(fields, root, Tags())


def read_tagged(fields: dict[str, Any], root: Path, tags: Tags) -> tuple[Turn, ...]:
    """The turns of one record whose turns are written with these tags. Raises RecordError."""
    return read_conversation(fields, find_images(fields, "images", root), tags)


def read_conversation(fields: dict[str, Any], images: Sequence[ImageRef], tags: Tags | None = None) -> tuple[Turn, ...]:
    """The turns under `system` and `conversations` with these images in their placeholders. Raises RecordError."""
    refuse_unread(fields)
    conversation = fields.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise RecordError("missing_messages", f"'conversations' is {shown(conversation)}; a list of turns is wanted")
    drafts = [_draft(message, tags or Tags()) for message in conversation]
    system = fields.get("system")
    if system not in (None, ""):
        drafts.insert(0, _draft({"from": "system", "value": system}, Tags()))
    return build_turns(drafts, images)


def _draft(message: Any, tags: Tags) -> Draft:
    if not isinstance(message, dict):
        raise RecordError(
            "bad_content",
            f"found {shown(message)}; a turn is an object with {tags.role_tag!r} and {tags.content_tag!r}",
        )
    speaker, value = message.get(tags.role_tag), message.get(tags.content_tag)
    if not isinstance(speaker, str) or speaker not in tags.roles:
        raise RecordError("unknown_role", f"found {shown(speaker)}; allowed: {', '.join(tags.roles)}")
    if not isinstance(value, str):
        raise RecordError("bad_content", f"the value of {speaker} is {shown(value)}; a string is wanted")
    refuse_unread_in_turn(message, tags.roles[speaker])
    return tags.roles[speaker], [*split_placeholders(value)]
