"""The documentation against the code: commands parse, recipes load, names exist, links lead somewhere."""

import ast
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from datalloy import cli
from datalloy.config import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READ = [ROOT / "README.md", *PAGES]
# pages that the navigation names before they are written
SKIP = re.compile(r"<!-- not tested: (.+?) -->\s*$")  # the line before a block that no test can read; says why
FENCE = re.compile(r"^(?P<indent> *)```(?P<kind>[a-z]*)\n(?P<text>.*?)^(?P=indent)```", re.M | re.S)
SHELL = ("", "bash", "sh", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(kinds: tuple[str, ...]) -> list[Block]:
    found = []
    for path in READ:
        text = path.read_text()
        for match in FENCE.finditer(text):
            if match["kind"] in kinds and not SKIP.search(text[: match.start()].rstrip("\n")):
                line = text[: match.start()].count("\n") + 1
                found.append(Block(str(path.relative_to(ROOT)), line, match["kind"], textwrap.dedent(match["text"])))
    return found


def named(found: list[Block]) -> Any:
    return pytest.mark.parametrize("block", found, ids=map(str, found))


# --- shell -----------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The simple commands of a shell block, as words; comments, pipes and redirections end one."""
    joined = re.sub(r"\\\n\s*", " ", text)
    words = []
    for line in joined.splitlines():
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        current: list[str] = []
        for word in lexer:
            if set(word) <= set("|&;<>"):
                words.append(current)
                current = []
            else:
                current.append(word)
        words.append(current)
    return [command for command in words if command]


def parse(arguments: list[str]) -> None:
    """Parse a command line of datalloy without running it. Raises what the command line would say."""
    command: Any = typer.main.get_command(cli.app)
    context = command.make_context("datalloy", list(arguments), resilient_parsing=not arguments)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
        context = command.make_context(name, list(arguments), parent=context)


@named(blocks(SHELL))
def test_shell_commands_are_ones_that_exist(block):
    for command in commands(block.text):
        match command:
            case ["datalloy", *arguments]:
                parse(arguments)
            case ["make", *targets]:
                known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
                assert {target for target in targets if "=" not in target} <= known
            case ["pip", "install", *names]:
                extras = {extra for name in names for extra in re.findall(r"datalloy\[(\w+)\]", name)}
                assert extras <= _extras()
            case ["python", path, *_] if path.endswith(".py"):
                assert (ROOT / path).is_file()


def _extras() -> set[str]:
    import tomllib

    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


@pytest.mark.parametrize("wrong", ["datalloy fly", "datalloy check a.yaml --fast", "datalloy merge", "datalloy view"])
def test_a_wrong_command_would_be_found(wrong):
    with pytest.raises((KeyError, typer.TyperException)):
        parse(wrong.split()[1:])


# --- recipes ---------------------------------------------------------------------------------------------------------

LEAST = {"name": "page", "base": "tiny", "domains": {}, "targets": {}}
DOMAINS = {"chart": {"path": "a.jsonl"}, "table": {"path": "b.jsonl"}}


@named(blocks(("yaml",)))
def test_recipes_and_parts_of_recipes_load(block, tmp_path):
    """A part is completed by the least that a recipe needs. What is no recipe is marked as not tested."""
    part = yaml.safe_load(block.text)
    assert set(part) <= set(Recipe.model_fields), f"{block} is no recipe; mark it: <!-- not tested: why -->"
    whole = {**LEAST, **part}
    whole["domains"] = whole["domains"] or DOMAINS
    whole["targets"] = whole["targets"] or {"goal": {"path": "goal.jsonl"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole))
    assert load_recipe(path).name == whole["name"]


# --- Python ----------------------------------------------------------------------------------------------------------


@named(blocks(("python",)))
def test_python_compiles_and_every_name_of_ours_exists(block):
    tree = ast.parse(block.text)
    ours: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours |= {a.asname or a.name: importlib.import_module(a.name) for a in node.names if _is_ours(a.name)}
        elif isinstance(node, ast.ImportFrom) and _is_ours(node.module or ""):
            ours |= {a.asname or a.name: _imported(str(node.module), a.name) for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            assert hasattr(ours[node.value.id], node.attr), f"{block}: {node.value.id} has no {node.attr}"
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = _called(call.func, ours)
        if called is not None:
            given = [keyword.arg for keyword in call.keywords if keyword.arg]
            inspect.signature(called).bind(*call.args, **dict.fromkeys(given))


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == "datalloy"


def _imported(module: str, name: str) -> Any:
    """What `from module import name` gives: a name of the module, or a module inside it."""
    if importlib.util.find_spec(module).submodule_search_locations and importlib.util.find_spec(f"{module}.{name}"):
        return importlib.import_module(f"{module}.{name}")
    return getattr(importlib.import_module(module), name)


def _called(function: ast.expr, ours: dict[str, Any]) -> Any:
    """The object behind `name(...)` or `name.attribute(...)`, where the name is one of ours."""
    match function:
        case ast.Name(id=name):
            return ours.get(name)
        case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name in ours:
            return getattr(ours[name], attribute)
    return None


def test_the_example_runs(tmp_path):
    command = [sys.executable, str(ROOT / "examples/score_and_select.py"), str(tmp_path), "--samples", "24"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    scored, kept, dropped = finished.stdout.splitlines()
    assert scored == "48 samples scored by loss, 24 kept"
    assert kept.startswith("kept: ")
    assert dropped.startswith("dropped: ")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_example_recipes_load(path):
    assert load_recipe(path).domains


# --- pages and links -------------------------------------------------------------------------------------------------


class _Settings(yaml.SafeLoader):
    """mkdocs.yml without the tags of its plugins."""


def nav_pages() -> list[str]:
    def leaves(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [page for item in (node if isinstance(node, list) else node.values()) for page in leaves(item)]

    return leaves(yaml.load((ROOT / "mkdocs.yml").read_text(), _Settings)["nav"])


def test_every_page_is_in_the_navigation_once():
    pages = [str(path.relative_to(DOCS)) for path in PAGES]
    assert sorted(set(pages) - set(nav_pages())) == [], "add the page to nav in mkdocs.yml"
    assert len(nav_pages()) == len(set(nav_pages()))
    assert set(nav_pages()) == set(pages)


def anchors(path: Path) -> set[str]:
    """The anchors that headings of a page get."""
    text = FENCE.sub("", path.read_text())
    headings = [heading.strip() for heading in re.findall(r"^#{1,6} (.+)$", text, re.M)]
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


@pytest.mark.parametrize("page", READ, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(path), f"{page.name} links to {target}; {path.name} has {anchors(path)}"


def test_the_reference_pages_are_what_the_code_says():
    finished = subprocess.run(
        [sys.executable, str(ROOT / "scripts/build_reference.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_the_site_builds_and_asks_nobody_for_anything(tmp_path):
    pytest.importorskip("mkdocs", reason="MkDocs is not installed; pip install 'datalloy[docs]'")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed; pip install 'datalloy[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    warnings = [line for line in finished.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))]
    assert warnings == []
    api = (tmp_path / "site/api.html").read_text()
    assert "nats per token of target loss" in api
    pages = {path.name: path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert [name for name, page in pages.items() if re.search(r"<code>(?:bash|yaml|python|text)\n|```", page)] == []
    loaded = re.compile(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]+)\"")
    assert {name: found for name, page in pages.items() if (found := loaded.findall(page))} == {}
