"""Datalloy: what to train a multimodal model on.

The verbs of the command line as functions, and the nouns as small classes. Importing this package imports nothing
heavy; torch is loaded when a verb is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datalloy.api import check, evaluate, export, mix, run_all, score, select, train, verify
    from datalloy.checkpoints import merge_checkpoints
    from datalloy.config import Recipe, load_recipe
    from datalloy.errors import DatalloyError
    from datalloy.mixture import Mixture
    from datalloy.sample import Sample
    from datalloy.scores import Scores
    from datalloy.selection import Selection

_HOME = {
    "check": "api",
    "score": "api",
    "select": "api",
    "mix": "api",
    "verify": "api",
    "merge_checkpoints": "checkpoints",
    "train": "api",
    "evaluate": "api",
    "export": "api",
    "run_all": "api",
    "Recipe": "config",
    "load_recipe": "config",
    "DatalloyError": "errors",
    "Mixture": "mixture",
    "Sample": "sample",
    "Scores": "scores",
    "Selection": "selection",
}

__all__ = [
    "DatalloyError",
    "Mixture",
    "Recipe",
    "Sample",
    "Scores",
    "Selection",
    "check",
    "evaluate",
    "export",
    "load_recipe",
    "merge_checkpoints",
    "mix",
    "run_all",
    "score",
    "select",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'datalloy' has no attribute {name!r}")
    return getattr(import_module(f"datalloy.{_HOME[name]}"), name)
