"""The verbs of the command line as functions: a recipe in, the artefact out.

`recipe` is a Recipe or the path of a YAML file; `run` names the run folder, default `runs/NAME-FINGERPRINT`. What a
run folder already holds is read, not computed again. Raises the errors of `datalloy.errors`. The whole chain is
`run_all`: a name `run` would be that of the module `datalloy.run` as well.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datalloy.config import Recipe, load_recipe
from datalloy.mixture import Mixture
from datalloy.run import Run
from datalloy.scores import Scores
from datalloy.search import Found
from datalloy.selection import Selection
from datalloy.workflows import Workflow, open_workflow


def check(recipe: Recipe | str | Path, run: str | Path | None = None) -> dict[str, Any]:
    """Read all data and look for leaks; the counts of what is usable and what was rejected."""
    with _open(recipe, run) as workflow:
        return workflow.check()


def score(recipe: Recipe | str | Path, run: str | Path | None = None) -> Scores:
    """The utility of every sample, in nats per token of target loss; positive helps."""
    with _open(recipe, run) as workflow:
        return workflow.score()


def select(recipe: Recipe | str | Path, run: str | Path | None = None) -> Selection:
    """What to keep."""
    with _open(recipe, run) as workflow:
        return workflow.select()


def mix(recipe: Recipe | str | Path, run: str | Path | None = None) -> Found:
    """Search the domains' shares on merged models; the mixture expected to be best, with its surrogate."""
    with _open(recipe, run) as workflow:
        return workflow.mix()


def verify(recipe: Recipe | str | Path, run: str | Path | None = None) -> Mixture:
    """Really train a few mixtures; the recommendation with its gain and verdict."""
    with _open(recipe, run) as workflow:
        return workflow.verify()


def train(recipe: Recipe | str | Path, run: str | Path | None = None) -> Path:
    """Tune the base model on what was kept, in the shares that were found; the folder of the checkpoint."""
    with _open(recipe, run) as workflow:
        return workflow.train()


def evaluate(recipe: Recipe | str | Path, run: str | Path | None = None) -> dict[str, Any]:
    """Metrics of the base and the tuned model on every set, with intervals."""
    with _open(recipe, run) as workflow:
        return workflow.evaluate()


def export(recipe: Recipe | str | Path, run: str | Path | None = None) -> Path:
    """Write the kept rows in their own format; the folder."""
    with _open(recipe, run) as workflow:
        return workflow.export()


def run_all(recipe: Recipe | str | Path, run: str | Path | None = None) -> dict[str, Any]:
    """The whole chain; the contents of `status.json`."""
    with _open(recipe, run) as workflow:
        return workflow.run_all()


@contextlib.contextmanager
def _open(recipe: Recipe | str | Path, folder: str | Path | None) -> Iterator[Workflow]:
    opened = Run(recipe if isinstance(recipe, Recipe) else load_recipe(recipe), folder)
    with opened as run, open_workflow(run) as workflow:
        yield workflow
