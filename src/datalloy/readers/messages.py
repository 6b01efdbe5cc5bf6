"""A record of the messages format in, turns out: `{"messages": [{"role", "content"}], "images": [path]}`.

The format of OpenAI, ms-swift, TRL and axolotl. Content is a string with an `<image>` placeholder for each path in
`images`, or a list of typed blocks: `{"type": "text", "text"}` and `{"type": "image"}`. A block that names its own file
under `image`, `path` or `url`, or as OpenAI's `{"type": "image_url", "image_url": {"url"}}`, takes that one, any other
takes the next of `images`. Keys of the record that change nothing in training are ignored, others refused (`unread`).
"""

from pathlib import Path
from typing import Any, get_args

from datalloy.readers.conversation import SLOT, Draft, build_turns, find_image_file, find_images, split_placeholders
from datalloy.readers.records import RecordError, shown
from datalloy.readers.unread import refuse_unread, refuse_unread_in_turn
from datalloy.sample import Part, Role, Turn

_ROLES: dict[str, Role] = {role: role for role in get_args(Role)}
_PATH_KEYS = ("image", "path", "url")


def read_turns(fields: dict[str, Any], root: Path) -> tuple[Turn, ...]:
    """The turns of one record, image paths relative to `root`. Raises RecordError."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RecordError("missing_messages", f"'messages' is {shown(messages)}; a list of turns is wanted")
    refuse_unread(fields)
    drafts = [draft(message, root) for message in messages]
    return build_turns(drafts, find_images(fields, "images", root))


def draft(message: Any, root: Path) -> Draft:
    """The role and the parts of one turn. Raises RecordError."""
    role = _role(message)
    refuse_unread_in_turn(message, role)
    return role, _parts(message.get("content"), root)


def _role(message: Any) -> Role:
    if not isinstance(message, dict):
        raise RecordError("bad_content", f"found {shown(message)}; a turn is an object with 'role' and 'content'")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordError("unknown_role", f"found {shown(role)}; allowed: {', '.join(_ROLES)}")
    return _ROLES[role]


def _parts(content: Any, root: Path) -> list[Part | None]:
    if isinstance(content, str):
        return [*split_placeholders(content)]
    if isinstance(content, list):
        return [_block_part(block, root) for block in content]
    raise RecordError("bad_content", f"content is {shown(content)}; a string or a list of typed blocks is wanted")


def _block_part(block: Any, root: Path) -> Part | None:
    match block:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image_url", "image_url": {"url": file}}:
            return find_image_file(file, root)
        case {"type": "image", **rest} if rest.get("base64") or rest.get("source"):
            raise RecordError("image_inline", "the picture stands in the text; write it to a file and give its path")
        case {"type": "image"}:
            named = [block[key] for key in _PATH_KEYS if block.get(key) is not None]
            if len(named) > 1:
                raise RecordError("bad_content", f"found {shown(block)}; an image block names one file")
            return find_image_file(named[0], root) if named else SLOT
        case {"type": "image_url"}:
            raise RecordError("image_url", f"found {shown(block)}; nothing is fetched: download it and give a path")
    raise RecordError("bad_content", f"found {shown(block)}; allowed: blocks of type text (with 'text') or image")
