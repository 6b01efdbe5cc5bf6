"""MkDocs hooks: links of a page to files of the repository outside docs/ lead to copies of them in the site.

On a code host such links work as they are; a site has nothing above its own root.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FOLDER = "repository"  # of the site, where the copies go
LINK = re.compile(r"\]\(((?:\.\./)+)([\w./-]+)")


def _outside(page: str) -> int:
    """How many steps up lead a page of docs/ out of it."""
    return page.count("/") + 1


def on_files(files: Files, config: Any) -> Files:
    """Add the linked files of the repository to the site."""
    wanted = set()
    for page in files.documentation_pages():
        for up, path in LINK.findall(page.content_string):
            if up.count("../") == _outside(page.src_uri) and (ROOT / path).is_file():
                wanted.add(path)
    for path in sorted(wanted):
        # a page of its own would need a place in the navigation, so Markdown is copied as text
        name = f"{FOLDER}/{path}.txt" if path.endswith(".md") else f"{FOLDER}/{path}"
        files.append(File.generated(config, name, content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point such links at the copies."""
    depth = _outside(page.file.src_uri)

    def copy(match: re.Match[str]) -> str:
        up, path = match.groups()
        if up.count("../") != depth or not (ROOT / path).is_file():
            return match[0]
        return f"]({'../' * (depth - 1)}{FOLDER}/{path}" + (".txt" if path.endswith(".md") else "")

    return LINK.sub(copy, markdown)
