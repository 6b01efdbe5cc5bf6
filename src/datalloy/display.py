"""A value or a message in, text fit for a terminal, a log and a report out.

Data come from strangers. A value that stands in a message goes through `shown`: quoted, cut, with control characters
and the marks that turn text around (bidirectional overrides) escaped, so that no data set can forge a line of the log
or clear the screen. What is printed goes through `printable` once more, as the second line: that keeps our own line
breaks and nothing else.

Keys and tokens are taken out of everything that is printed: those that the environment holds under names such as
HF_TOKEN, and whatever has the shape of a well-known kind. Trap: a short password, or one that is given in another
way, is not recognised; keep secrets in environment variables.
"""

import logging
import os
import re
import reprlib
import unicodedata
from collections.abc import Mapping
from typing import Any

SHOWN_LENGTH = 200
HIDDEN = "***"
LEAST_SECRET = 8  # characters; a shorter value would be found in ordinary words

_SECRET_NAME = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
_SECRET_SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{16,}"  # OpenAI and those that follow it
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|AKIA[0-9A-Z]{16}"
    r"|AIza[A-Za-z0-9_-]{30,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})"  # a signed JSON web token
    r"|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)"  # user:password@host
    r"|(?<=Bearer )\S{8,}"
)
_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}

_excerpt = reprlib.Repr()
_excerpt.maxstring = _excerpt.maxother = 80


def shown(value: Any) -> str:
    """A value of the user's data, fit for a message: quoted, cut short, control and bidirectional marks escaped."""
    try:
        text = _excerpt.repr(value)
    except ValueError:  # Python's limit on the digits of an integer
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN_LENGTH else f"{text[: SHOWN_LENGTH - 3]}..."


def printable(text: str) -> str:
    """The text with every character escaped that could move the cursor or turn the line around; line breaks stay."""
    if text.isprintable():
        return text
    return "".join(_escaped(c) if c != "\n" and unicodedata.category(c) in _UNSAFE else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def as_cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would run as a formula gets a leading apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The text with `***` in the place of every secret that can be told: see the head of the file."""
    for name, value in environment.items():
        if len(value) >= LEAST_SECRET and _SECRET_NAME.search(name) and value in text:
            text = text.replace(value, HIDDEN)
    return _SECRET_SHAPES.sub(HIDDEN, text)


def holds_secret(text: str) -> bool:
    """Whether the text has the shape of a well-known kind of key or token."""
    return _SECRET_SHAPES.search(text) is not None


class SafeFormatter(logging.Formatter):
    """Lines of the log without secrets and without control characters, tracebacks included; `prefix` stays as it is.

    A formatter and not a filter: a filter sees the message before the traceback is added to it, and a filter of the
    root logger sees no message of any other logger.
    """

    def __init__(self, prefix: str = "") -> None:
        super().__init__("%(message)s")
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        return self._prefix + printable(without_secrets(super().format(record)))
