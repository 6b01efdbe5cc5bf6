"""Arguments in, one workflow call, an exit code out. The only file that prints.

Results go to stdout, progress and log to stderr; the last line of a success is the path of the artefact. Nothing
heavy is imported before a command needs it, so that `--help` answers at once.
"""

import errno
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from datalloy import progress
from datalloy.config import Recipe, load_recipe
from datalloy.errors import DatalloyError

if TYPE_CHECKING:
    from datalloy.workflows import Workflow

log = logging.getLogger("datalloy")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Datalloy tells you **what to train a multimodal model on**: which samples to keep, which to throw out, and "
    "how sure that is.\n\nStart with `datalloy demo`, or `datalloy init my.yaml` and `datalloy run my.yaml --dry-run`.",
)

RecipePath = Annotated[Path, typer.Argument(help="The recipe, a YAML file. `datalloy init` writes a commented one.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. `--set score.method=exact`. Repeatable.", show_default=False),
]
RunFolder = Annotated[Path | None, typer.Option("--run", metavar="DIR", help="The run folder itself; default: runs/NAME-FINGERPRINT.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe, counts and a cost estimate, and stop.")]

ENVIRONMENT_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EACCES}
EXIT_ENVIRONMENT = 4


@app.command()
def check(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Read all data, list what is rejected and why, look for leaks between pool, targets and evaluation sets."""
    _execute("check", recipe, sets, run, dry_run)


@app.command()
def score(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Give every sample of the pool its utility: how much one training step on it helps the targets."""
    _execute("score", recipe, sets, run, dry_run)


@app.command()
def select(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Decide what to keep; where the recipe says auto, by a bake-off of short measured runs."""
    _execute("select", recipe, sets, run, dry_run)


@app.command()
def train(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Tune the base model on what was kept."""
    _execute("train", recipe, sets, run, dry_run)


@app.command()
def evaluate(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Measure the base and the tuned model on the targets and on the held-out evaluation sets."""
    _execute("evaluate", recipe, sets, run, dry_run)


@app.command()
def export(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Write the kept rows, byte for byte in their own format, for any other trainer."""
    _execute("export", recipe, sets, run, dry_run)


@app.command(name="run")
def run_command(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """The whole chain: check, score, select, train, evaluate, export."""
    _execute("run", recipe, sets, run, dry_run)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe to start from."""
    from datalloy.template import RECIPE_TEMPLATE

    if path.exists():
        _fail(f"{path} exists already; give another name", 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE_TEMPLATE, encoding="utf-8")
    print(path)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where the drawn data and the run go.")] = Path("datalloy-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the drawn pool.")] = 0,
) -> None:
    """Run the main job on the embedded model and a drawn pool with known faults: a few minutes on a laptop."""
    from datalloy.tiny.demo import run_demo

    for line in run_demo(folder, seed):
        print(line, flush=True)


def _execute(verb: str, path: Path, sets: list[str] | None, folder: Path | None, dry_run: bool) -> None:
    recipe = load_recipe(path, tuple(sets or ()))
    if dry_run:
        _dry_run(recipe)
        return
    from datalloy.run import Run
    from datalloy.summary import summarise
    from datalloy.workflows import Workflow

    with Run(recipe, folder) as run:
        log.info("run folder: %s", run.folder)
        artefact = _stage(verb, Workflow(run))
        for line in summarise(verb, run.folder):
            print(line)
        print(artefact)


def _stage(verb: str, workflow: "Workflow") -> Path:
    """Run one verb; the path of its artefact."""
    getattr(workflow, {"run": "run_all"}.get(verb, verb))()
    artefact = {
        "check": "check.json",
        "score": "scores.parquet",
        "select": "selection.parquet",
        "train": "model",
        "evaluate": "metrics.json",
        "export": "export",
        "run": "",
    }
    return workflow.run.path(artefact[verb])


def _dry_run(recipe: Recipe) -> None:
    from datalloy.config import dump_yaml
    from datalloy.costs import estimate

    print(dump_yaml(recipe.dump()))
    for line in estimate(recipe):
        print(line)


class _Stopped(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


def _stop(number: int, _: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends us at once
    raise _Stopped(number)


def main() -> None:
    """Entry point: run the command line and end with the exit codes of DESIGN section 4."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "transformers", "accelerate", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    progress.show(True)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    try:
        app(standalone_mode=False)
    except typer.Exit as exit_:
        sys.exit(exit_.exit_code)
    except DatalloyError as error:
        _fail(str(error), error.exit_code)
    except _Stopped as stopped:
        _fail(f"stopped by {signal.Signals(stopped.number).name}; run the same command again to go on", 128 + stopped.number)
    except OSError as error:
        if error.errno in ENVIRONMENT_FAULTS:
            _fail(f"the system refused: {error}. What is finished is kept; mend this and run the same command again", EXIT_ENVIRONMENT)
        raise


def _fail(message: str, code: int) -> NoReturn:
    print(f"datalloy: {message}", file=sys.stderr)
    sys.stderr.flush()
    if code > 128:
        os._exit(code)  # no waiting for threads of libraries: every file is either complete or not there
    sys.exit(code)
