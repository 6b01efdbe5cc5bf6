"""The import direction of ARCHITECTURE.md, checked by reading the sources. Nothing is imported here.

Every part of the package stands in one layer and imports parts of lower layers only; so stages, which share a layer,
do not import each other, and there is no cycle. A new module has to be given its place in `LAYERS`.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "datalloy"
LAYERS = (
    {"confined", "display", "diversity", "errors", "events", "regular_files", "similarity", "template", "tiny.world"},
    {"durable", "locations", "objective", "progress", "simplex"},
    {
        "accounts",
        "attempts",
        "metrics",
        "sample",
        "strata",
        "strict_yaml",
        "tiny.model",
        "tiny.pools",
        "uncertainty",
        "vision_features",
    },
    {"config", "mergeability", "optimum", "surrogates"},
    {"calibration", "racing", "run", "slope_stage"},
    {"checkpoints", "engines", "posterior", "scores", "verdict", "vlm"},
    {"evaluators", "encoding", "mixture", "search", "sharding", "surface", "target_items"},
    {"bakeoff", "evaluation", "leakage", "merging", "readers", "scorers", "selection", "training"},
    {"checking", "told_recipe", "embeddings", "exporters", "mixing"},
    {"told", "costs", "report", "summary", "viewer", "workflows"},
    {"asktell"},
    {"api", "tiny.demo"},
    {"cli"},
    {"__main__"},
    {""},  # the package itself: names that are looked up when they are first used
)
FAMILIES = (
    "engines",
    "evaluators",
    "exporters",
    "readers",
    "report",
    "scorers",
    "surrogates",
    "viewer",
)  # folders whose modules import each other
MODEL_LIBRARIES = {"torch", "transformers", "peft", "accelerate", "safetensors"}
PRINTERS = {"cli", "progress"}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        yield name, ast.parse(path.read_text())


MODULES = dict(_modules())


def _part(module: str) -> str:
    """What stands in `LAYERS`: the module, or the family that it belongs to."""
    family = module.split(".")[0]
    return family if family in FAMILIES else module


def _imports(tree: ast.AST) -> Iterator[str]:
    """Full names of imported modules; of `from package import module`, the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.removeprefix("datalloy.") in MODULES else str(node.module)


def _own_imports(module: str) -> set[str]:
    own = {
        name.removeprefix("datalloy").lstrip(".") for name in _imports(MODULES[module]) if name.startswith("datalloy")
    }
    return {_part(name) for name in own} - {_part(module)}


LAYER = {part: number for number, layer in enumerate(LAYERS) for part in layer}


@pytest.mark.parametrize("module", [name for name in MODULES if name != "tiny"])
def test_a_module_imports_lower_layers_only(module):
    assert _part(module) in LAYER, "give the new module its place in LAYERS"
    assert {name for name in _own_imports(module) if LAYER[name] >= LAYER[_part(module)]} == set()


def test_every_part_named_in_the_layers_exists():
    assert set(LAYER) == {_part(name) for name in MODULES} - {"tiny"}


def _importers(library: str) -> set[str]:
    return {_part(name) for name, tree in MODULES.items() if library in {full.split(".")[0] for full in _imports(tree)}}


def test_model_families_are_known_to_one_module():
    """Beside it, training drives transformers' Trainer and the embedded model builds its own architecture."""
    assert _importers("transformers") == {"vlm", "training", "tiny.model"}


def test_recipes_data_and_selections_are_handled_without_a_model_library():
    light = {"config", "sample", "run", "readers", "selection", "scores", "exporters", "report", "summary", "cli"}
    light |= {"simplex", "objective", "surrogates", "search", "calibration", "mergeability", "mixture", "surface"}
    light |= {"viewer", "told_recipe", "told"}
    top_level = {
        name: {full.split(".")[0] for node in tree.body for full in _imports(node) if _is_import(node)}
        for name, tree in MODULES.items()
        if _part(name) in light
    }
    assert {name for name, libraries in top_level.items() if libraries & MODEL_LIBRARIES} == set()


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def test_only_the_command_line_and_progress_print():
    def prints(tree: ast.AST) -> bool:
        return any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(tree))

    assert {name for name, tree in MODULES.items() if prints(tree)} == PRINTERS


def test_every_module_has_a_docstring():
    assert [name for name, tree in MODULES.items() if name != "tiny" and not ast.get_docstring(tree)] == []
