"""A record of the alpaca layout in, turns out: `{"instruction", "input", "output", "history", "system", "images"}`.

The question is instruction and input with a newline between, as LLaMA-Factory and ms-swift join them; `history` is a
list of earlier pairs of question and answer. `query` and `response`, ms-swift's older names, are read as well.
Pictures take the place of `<image>` in any of the texts.
"""

from pathlib import Path
from typing import Any

from datalloy.readers.conversation import Draft, build_turns, find_images, split_placeholders
from datalloy.readers.records import RecordError, shown
from datalloy.readers.unread import refuse_unread
from datalloy.sample import Turn


def read_turns(fields: dict[str, Any], root: Path) -> tuple[Turn, ...]:
    """The turns of one record, image paths relative to `root`. Raises RecordError."""
    refuse_unread(fields)
    drafts: list[Draft] = []
    if system := _text(fields, "system"):
        drafts.append(("system", [*split_placeholders(system)]))
    for question, answer in _history(fields.get("history")):
        drafts += [("user", [*split_placeholders(question)]), ("assistant", [*split_placeholders(answer)])]
    asked = [_text(fields, key) for key in ("instruction", "query", "input")]
    answer = _text(fields, "output") or _text(fields, "response")
    drafts.append(("user", [*split_placeholders("\n".join(filter(None, asked)))]))
    drafts.append(("assistant", [*split_placeholders(answer)]))
    key = "image" if "image" in fields else "images"
    return build_turns(drafts, find_images(fields, key, root))


def _text(fields: dict[str, Any], key: str) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecordError("bad_content", f"{key!r} is {shown(value)}; a string is wanted")
    return value


def _history(value: Any) -> list[tuple[str, str]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecordError("bad_content", f"'history' is {shown(value)}; a list of pairs is wanted")
    pairs = []
    for pair in value:
        match pair:
            case [str(question), str(answer)]:
                pairs.append((question, answer))
            case _:
                raise RecordError("bad_content", f"'history' holds {shown(pair)}; a pair of texts is wanted")
    return pairs
