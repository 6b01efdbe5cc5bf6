"""Values in, HTML out: the only place where text of the user's data becomes part of a page.

Every value passes through `text`, which escapes what HTML would read and shows what a reader could not see: control,
bidirectional and invisible characters come out as their code point, so that a text cannot rearrange the line it stands
in. No function here or in a chart takes markup from data; strings that are markup already are those that these
functions return. A page carries no inline style or handler, because its policy allows none (`page.py`).
"""

import html
import unicodedata
from collections.abc import Iterable, Sequence

MINUS = "\u2212"  # as wide as the plus
JOINERS = "\u200c\u200d\u00ad"  # format characters that plain text of many languages needs
Interval = Sequence[float]


def text(value: object, limit: int | None = None) -> str:
    """A value as HTML text, also fit for an attribute in quotes; cut after `limit` characters, which is shown."""
    plain = str(value)
    if limit is not None and len(plain) > limit:
        plain = plain[: limit - 1] + "…"
    return html.escape("".join(map(_visible, plain)), quote=True)


def _visible(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cc" and character in "\n\t":
        return character
    if kind in ("Cc", "Cs", "Zl", "Zp") or (kind == "Cf" and character not in JOINERS):
        return f"\\u{ord(character):04x}"
    return character


def quoted(value: object, limit: int) -> str:
    """A text of the user's data: its own direction of writing, apart from the line around it."""
    return f'<bdi dir="auto">{text(value, limit)}</bdi>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[int] = (), label: str) -> str:
    """Rows of cells that are markup already. A wide table scrolls, with the keyboard too: `label` says what scrolls."""
    kind = [' class="n"' if i in numeric else "" for i in range(len(head))]
    top = "".join(f'<th scope="col"{kind[i]}>{text(cell)}</th>' for i, cell in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind[i]}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    inside = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">{inside}</div>'


def details(summary: str, content: str) -> str:
    """What a first reading can do without."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def paragraph(content: str, kind: str = "") -> str:
    return f'<p class="{kind}">{content}</p>' if kind else f"<p>{content}</p>"


def chip(word: str, kind: str = "") -> str:
    return f'<span class="chip {kind}">{text(word)}</span>'


def command(line: str, name: str) -> str:
    """A command to copy; `name` is unique on the page."""
    return (
        f'<div class="command"><pre id="{text(name)}">{text(line)}</pre>'
        f'<button type="button" data-copies="{text(name)}" hidden>Copy</button></div>'
    )


# --- numbers in words --------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share without decimals; what is not quite nothing or all is not called so."""
    if 0 < share < 0.005:
        return "under 1 %"
    return "over 99 %" if 0.995 < share < 1 else f"{100 * share:.0f} %"


def number(value: float, digits: int = 3) -> str:
    """Fixed decimals for what is near one, powers of ten for what is far from it."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}".replace("-", MINUS)
    return f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def bracket(interval: Interval, *, plus: bool = False, digits: int = 3) -> str:
    low, high = interval
    show = signed if plus else number
    return f"[{show(low, digits)}, {show(high, digits)}]"


def measured(mean: float, interval: Interval, digits: int = 3) -> str:
    return f"{number(mean, digits)} {bracket(interval, digits=digits)}"


def gained(mean: float, interval: Interval, digits: int = 3) -> str:
    return f"{signed(mean, digits)} {bracket(interval, plus=True, digits=digits)}"


def listed(words: Sequence[str]) -> str:
    """One, two and three."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
