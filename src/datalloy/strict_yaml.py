"""YAML text in, plain data out, and back: the strict part of YAML that a recipe is written in.

Scalars are read by the core schema of YAML 1.2, not by PyYAML's 1.1: `no` is text, `1e-5` is a number, and `010` and
`1:30` are not. Keys are text and given once. Tags and aliases are refused, so that no text of a few lines unfolds
into objects or gigabytes.
"""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from datalloy.errors import RecipeError

# By type: the pattern of a plain scalar, and the characters it may begin with. `100_000` is kept from YAML 1.1.
SCALARS = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", tuple("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", tuple("-+0123456789")),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?", tuple("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", tuple("-+.")),
)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _fault("an alias (*name) is not accepted; write the value out", event.start_mark)
        if event.tag is not None:
            raise _fault("a tag (!name) is not accepted; write the plain value", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        given = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _fault(f"a key is text, found {key!r}; put it in quotes", key_node.start_mark)
            if key in given:
                raise _fault(f"key {key!r} is given twice", key_node.start_mark)
            given.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    # PyYAML writes the other line breaks of Unicode as they are and reads spaces; in double quotes it escapes them
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
_Loader.yaml_implicit_resolvers = {}
for _type, _pattern, _first in SCALARS:
    for _language in (_Loader, _Dumper):
        _language.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(rf"^(?:{_pattern})$"), _first)


def parse_yaml(text: str, where: str) -> Any:
    """Plain data from YAML: dicts with text keys, lists, text, numbers, truth values and None.

    Raises RecipeError with `where` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        fault = ", ".join(part for part in (error.context, error.problem) if part)
    except yaml.YAMLError as error:  # a character that YAML does not allow
        line, fault = "", " ".join(str(error).split())
    except RecursionError:
        line, fault = "", "nested too deeply"
    except ValueError:  # Python's limit on the digits of an integer
        line, fault = "", "a number of thousands of digits"
    raise RecipeError(f"{where}{line}: malformed YAML: {fault}")


def dump_yaml(data: dict[str, Any]) -> str:
    """Plain data as YAML in the order given; `parse_yaml` reads it back to equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _fault(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
