"""An opening and sections in, one self-contained page out: no request leaves it, and nothing but its own script runs.

The policy names the one style and the one script by their hashes, and allows pictures inside the page alone; so a
text of the user's data that slipped through the escaping would still not run. Price: no inline style or handler
anywhere, which is why sizes in charts are attributes and colours classes. A page is made to be passed on, so keys and
tokens in it are hidden as they are in the log.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from datalloy.display import without_secrets
from datalloy.report.markup import text

FAVICON = "data:,"  # none: a browser that opens the page from a server would ask for one


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its title, what to take away in a sentence, and its content as markup."""

    name: str
    title: str
    takeaway: str
    body: str


@cache
def asset(name: str) -> str:
    """The page's style or script."""
    return files("datalloy.report").joinpath(name).read_text(encoding="utf-8")


def policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    """A content security policy for a page of exactly these styles and scripts, with pictures inside the page."""
    return (
        f"default-src 'none'; img-src data:; style-src {_hashes(styles)}; script-src {_hashes(scripts)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hashes(sources: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def render(*, title: str, heading: str, opening: str, sections: Sequence[Section]) -> str:
    """The page as HTML. `title` and `heading` are text, `opening` is markup."""
    style, script = asset("page.css"), asset("page.js")
    links = "".join(f'<li><a href="#{s.name}">{text(s.title)}</a></li>' for s in sections)
    drawn = "\n".join(
        f'<section id="{s.name}" aria-labelledby="{s.name}-title"><h2 id="{s.name}-title">{text(s.title)}</h2>'
        f'<p class="takeaway">{text(s.takeaway)}</p>{s.body}</section>'
        for s in sections
    )
    header = without_secrets(f"<header><h1>{text(heading)}</h1>{opening}</header>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy([style], [script])}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="{FAVICON}">'
        f"<title>{text(title)}</title><style>{style}</style></head>\n"
        '<body><a class="skip" href="#sections">To the sections</a><div class="frame">'
        f"{header}\n"
        f'<div class="columns"><nav class="contents" aria-label="Contents"><ul>{links}</ul></nav>'
        f'<main id="sections">{without_secrets(drawn)}</main></div></div>\n<script>{script}</script></body></html>\n'
    )
