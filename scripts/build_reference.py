"""The schema of recipes and the command line in, docs/recipe.md and docs/cli.md out.

    python scripts/build_reference.py            write both pages
    python scripts/build_reference.py --check    exit 1 where a page is not what would be written

Nothing of them is written by hand: a key, its range, its default and its meaning stand in `config.py` once.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from datalloy import cli, config

DOCS = Path(__file__).parent.parent / "docs"
MADE = "<!-- made by scripts/build_reference.py; `make reference` writes it again -->\n"


def recipe_page() -> str:
    """One table a section: key, what is allowed, default, meaning."""
    schema = config.Recipe.model_json_schema()
    parts = [
        "# Recipe reference\n\n" + MADE,
        "A recipe is a YAML file. Unknown keys are refused with the nearest valid one, values are never converted, "
        "and `--set key.sub=value` overrides one key on the command line. Data paths start from the recipe's folder, "
        "or from `data_root`.\n",
    ]
    for name, section in [("the recipe", schema), *sorted(schema["$defs"].items())]:
        if section.get("properties"):
            parts.append(_section(name, section, schema))
    return "\n".join(parts)


def _section(name: str, section: dict[str, Any], root: dict[str, Any]) -> str:
    about = " ".join(section.get("description", "").split())
    rows = [_row(key, field, root, section.get("required", [])) for key, field in section["properties"].items()]
    head = "| key | allowed | default | meaning |\n|---|---|---|---|"
    return f"## {_title(name)}\n\n{about}\n\n{head}\n" + "\n".join(rows) + "\n"


def _title(name: str) -> str:
    return "Top level" if name == "the recipe" else name


def _row(key: str, field: dict[str, Any], root: dict[str, Any], required: list[str]) -> str:
    default = "required" if key in required else f"`{json.dumps(field.get('default'))}`"
    if ("default" not in field and key not in required) or isinstance(field.get("default"), dict):
        default = "see there"
    cells = [f"`{key}`", _allowed(field, root), default, field.get("description", "")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _allowed(field: dict[str, Any], root: dict[str, Any]) -> str:
    """The allowed values in the words of the error messages; another section as a link to its table."""
    match field:
        case {"$ref": reference}:
            return _reference(reference, root)
        case {"anyOf": members}:
            return " or ".join(_allowed(member, root) for member in members)
        case {"type": "object"} if inner := next(iter(field.get("patternProperties", {}).values()), None):
            return f"NAME: {_allowed(inner, root)}"
        case {"type": "array", "items": {"$ref": reference}}:
            return f"a list of {_reference(reference, root)}"
    return config._allowed(field)


def _reference(reference: str, root: dict[str, Any]) -> str:
    name = reference.removeprefix("#/$defs/")
    definition = root["$defs"][name]
    return f"[{name}](#{name.lower()})" if definition.get("properties") else config._allowed(definition)


def cli_page() -> str:
    """Every command with its arguments and options."""
    group: Any = typer.main.get_command(cli.app)
    parts = [
        "# Command line\n\n" + MADE,
        "Results go to stdout, progress and log to stderr; the last line of a success is the path of the artefact. "
        "Exit codes: 0 done, 2 usage or recipe, 3 input refused, 4 environment (disk, memory, network), 75 run folder "
        "in use, 130 and 143 stopped by a signal.\n",
    ]
    parts += [_command(name, command) for name, command in _commands(group)]
    return "\n".join(parts)


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(f"[{_metavar(p)}]" if not p.required else _metavar(p) for p in arguments)
    about = inspect.cleandoc(command.help or "")
    rows = list(_parameters(command))
    table = "\n| | | default |\n|---|---|---|\n" + "\n".join(rows) + "\n" if rows else ""
    return f"## {name}\n\n```text\ndatalloy {name} {usage} [OPTIONS]\n```\n\n{about}\n{table}"


def _parameters(command: Any) -> Iterator[str]:
    for parameter in command.params:
        if parameter.name == "help":
            continue
        is_argument = parameter.param_type_name == "argument"
        names = _metavar(parameter) if is_argument else ", ".join(parameter.opts)
        if not is_argument and not parameter.is_flag:
            names += f" {_metavar(parameter)}"
        yield f"| `{names}` | {parameter.help or ''} | {_default(parameter)} |".replace("\n", " ")


def _metavar(parameter: Any) -> str:
    return parameter.metavar or (parameter.name or "").upper()


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value in (None, False, (), []) else f"`{value}`"


PAGES = {"recipe.md": recipe_page, "cli.md": cli_page}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    stale = []
    for name, build in PAGES.items():
        text = re.sub(r"[ \t]+\n", "\n", build()).rstrip("\n") + "\n"
        path = DOCS / name
        if is_check and (not path.exists() or path.read_text() != text):
            stale.append(name)
        elif not is_check:
            path.write_text(text)
    if stale:
        print(f"{', '.join(stale)}: not what the code says; run `make reference` and commit the pages")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
