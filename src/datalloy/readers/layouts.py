"""A record in, its turns out, whatever its layout: chosen by its keys, or said by an entry of LLaMA-Factory's list.

An entry renames: `columns` says which column holds what, `tags` how turns are written inside it. LLaMA-Factory's own
rule is kept, with its trap: where `columns` (or `tags`) stands in the entry, what it leaves out is not there at all,
so an entry with columns but without `images` trains on questions without their pictures. That ends as a mismatch of
placeholders here, not as training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datalloy.errors import DataError
from datalloy.readers import alpaca, llava, messages, prompt_completion, sharegpt
from datalloy.readers.records import RecordError, shown
from datalloy.sample import Turn

ReadTurns = Callable[[dict[str, Any], Path], tuple[Turn, ...]]

LAYOUTS: dict[str, ReadTurns] = {
    "messages": messages.read_turns,
    "sharegpt": sharegpt.read_turns,
    "llava": llava.read_turns,
    "alpaca": alpaca.read_turns,
    "prompt_completion": prompt_completion.read_turns,
}
# What a record of each layout has, in the order in which they are tried; llava is sharegpt with the key `image`.
MARKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "prompt_completion": (("prompt", "completion"),),
    "alpaca": (("instruction", "output"), ("query", "response")),
}
TEXT_COLUMNS = (
    *("messages", "conversations", "prompt", "completion"),
    *("instruction", "input", "output", "query", "response", "history"),
    *("id", "system", "tools", "objects"),
)

_SHAREGPT_COLUMNS = {"messages": "conversations", "system": "system", "tools": "tools"}
_ALPACA_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "tools": "tools",
}
_MEDIA_COLUMNS = {"images": "images", "videos": "videos", "audios": "audios"}
_SHAREGPT_DEFAULTS = {"messages": "conversations"}
_ALPACA_DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output"}


def layout_of(fields: dict[str, Any]) -> str | None:
    """The layout of a record by its keys, None where it has those of no layout."""
    for name, marks in MARKS.items():
        if any(all(key in fields for key in mark) for mark in marks):
            return "llava" if name == "sharegpt" and "image" in fields else name
    return None


def read_by_keys(fields: dict[str, Any], root: Path) -> tuple[Turn, ...]:
    """The turns of a record of any layout. Raises RecordError."""
    layout = layout_of(fields)
    if layout is None:
        raise RecordError("missing_messages", f"found the keys {shown(list(fields))}; none of them holds turns")
    return LAYOUTS[layout](fields, root)


@dataclass(frozen=True)
class Listed:
    """How the records of one LLaMA-Factory entry are read: their columns under our names, then the layout."""

    columns: dict[str, str]  # its column -> the name that the layout reads
    read_turns: ReadTurns

    @classmethod
    def from_entry(cls, where: str, entry: dict[str, Any]) -> "Listed":
        """Raises DataError for what is no supervised data, or written in a way that LLaMA-Factory does not know."""
        formatting = entry.get("formatting", "alpaca")
        if formatting not in ("alpaca", "sharegpt", "openai"):
            raise DataError(f"{where}: formatting is {shown(formatting)}; known: alpaca, sharegpt, openai")
        if entry.get("ranking"):
            raise DataError(f"{where} is preference data (ranking: true); supervised data is wanted")
        is_alpaca = formatting == "alpaca"
        ours = {**(_ALPACA_COLUMNS if is_alpaca else _SHAREGPT_COLUMNS), **_MEDIA_COLUMNS}
        named = entry.get("columns", _ALPACA_DEFAULTS if is_alpaca else _SHAREGPT_DEFAULTS)
        if not isinstance(named, dict) or not all(isinstance(column, str | None) for column in named.values()):
            raise DataError(f"{where}: columns is {shown(named)}; an object of column names is wanted")
        if "kto_tag" in named:
            raise DataError(f"{where} is preference data (kto_tag); supervised data is wanted")
        columns = {column: ours[key] for key, column in named.items() if key in ours and column}
        if is_alpaca:
            return cls(columns, alpaca.read_turns)
        tags = sharegpt.Tags.from_entry(where, entry.get("tags"))
        return cls(columns, partial(sharegpt.read_tagged, tags=tags))

    def rename(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The record under our names; columns that the entry does not name are left out, but for its id."""
        named = {ours: fields[column] for column, ours in self.columns.items() if column in fields}
        return {**named, "id": fields["id"]} if "id" in fields else named
