"""Arguments in, one workflow call, an exit code out. The only file that prints.

Results go to stdout, progress and log to stderr; the last line of a success is the path of the artefact. Nothing
heavy is imported before a command needs it, so that `--help` answers at once.
"""

import errno
import logging
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from datalloy import progress
from datalloy.display import SafeFormatter, printable, without_secrets
from datalloy.errors import DatalloyError, RecipeError, RunError

if TYPE_CHECKING:
    from datalloy.config import Recipe
    from datalloy.workflows import Workflow

log = logging.getLogger(__name__)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Datalloy tells you **what to train a multimodal model on**: which samples to keep, which to throw out, and "
    "how sure that is.\n\nStart with `datalloy demo`, or `datalloy init my.yaml` and `datalloy run my.yaml --dry-run`.",
)

RecipePath = Annotated[
    Path, typer.Argument(help="The recipe, a YAML file. `datalloy init` writes a commented one.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in `score.method=exact`. Repeatable."),
]
RunFolder = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="The run folder itself; default: runs/NAME-FINGERPRINT.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe, counts and a cost estimate, and stop.")
]

COMPARISON = Path("comparison.html")
STOPPING = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 20.0  # from the first signal to the end, whatever is under way; schedulers kill after 30
EXIT_USAGE, EXIT_ENVIRONMENT, EXIT_SIGNAL = 2, 4, 128
ENVIRONMENT_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EACCES, errno.ENOTDIR}


@app.command()
def check(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Read all data, list what is rejected and why, look for leaks between pool, targets and evaluation sets."""
    _run_verb("check", recipe, sets, run, dry_run)


@app.command()
def score(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Give every sample of the pool its utility: how much one training step on it helps the targets."""
    _run_verb("score", recipe, sets, run, dry_run)


@app.command()
def select(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Decide what to keep; where the recipe says auto, by a bake-off of short measured runs."""
    _run_verb("select", recipe, sets, run, dry_run)


@app.command()
def mix(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Search the domains' shares: one expert a domain, merged models evaluated, none of them written to disk."""
    _run_verb("mix", recipe, sets, run, dry_run)


@app.command()
def verify(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Really train a few mixtures: calibrate the search, measure the gain over uniform shares, give a verdict."""
    _run_verb("verify", recipe, sets, run, dry_run)


@app.command()
def train(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Tune the base model on what was kept, in the shares that were found where the recipe has a mixture."""
    _run_verb("train", recipe, sets, run, dry_run)


@app.command()
def evaluate(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """Measure the base and the tuned model on the targets and on the held-out evaluation sets."""
    _run_verb("evaluate", recipe, sets, run, dry_run)


@app.command()
def export(
    recipe: RecipePath,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="rows, llama-factory, ms-swift, trl, axolotl, energon, webdataset or ids. Repeatable.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="exact: rows repeated as trained on. native: the trainer's own shares, counts may drift."),
    ] = None,
    sets: Overrides = None,
    run: RunFolder = None,
    dry_run: DryRun = False,
) -> None:
    """Write what is trained on: byte for byte in its own format, or as a folder that another trainer starts from."""
    chosen = [f"export.formats=[{', '.join(to)}]"] if to else []
    chosen += [f"export.weights={weights}"] if weights else []
    _run_verb("export", recipe, [*(sets or ()), *chosen], run, dry_run)


@app.command(name="run")
def run_command(recipe: RecipePath, sets: Overrides = None, run: RunFolder = None, dry_run: DryRun = False) -> None:
    """The whole chain: check, score, select, mix and verify if the recipe says so, train, evaluate, export, report."""
    _run_verb("run", recipe, sets, run, dry_run)


@app.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of finished runs; or one recipe, whose run folder is then named by --run.",
            show_default=False,
        ),
    ],
    sets: Overrides = None,
    run: RunFolder = None,
    out: Annotated[Path, typer.Option(help="Where the page about several runs goes.")] = COMPARISON,
) -> None:
    """Write the page about a finished run again, or one page that sets several runs side by side.

    `datalloy report runs/a`; `datalloy report runs/a runs/b --out both.html`; `datalloy report my.yaml --run runs/a`.
    """
    from datalloy.report import write_comparison, write_report

    if len(paths) == 1 and not paths[0].is_dir():
        print(_report_of_recipe(paths[0], sets, run))
    elif sets or run:
        raise RecipeError("--set and --run belong to a recipe; the folder of a run knows its own")
    else:
        print(write_report(paths[0]) if len(paths) == 1 else write_comparison(paths, out))


def _report_of_recipe(recipe: Path, sets: Sequence[str] | None, run: Path | None) -> Path:
    from datalloy.config import load_recipe
    from datalloy.report import write_report
    from datalloy.run import Run

    opened = Run(load_recipe(recipe, sets or ()), run)
    if not opened.path("status.json").exists():
        raise RunError(f"{opened.folder} holds no finished run; `datalloy run {recipe}` makes one, report included")
    with opened:
        return write_report(opened.folder)


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="The folder of a run, as `datalloy run` printed it.", show_default=False)],
    other: Annotated[Path | None, typer.Argument(help="A second run to compare with.", show_default=False)] = None,
    port: Annotated[int, typer.Option(help="Of 127.0.0.1; 0 is any free one.", min=0, max=65535)] = 0,
    open_page: Annotated[bool, typer.Option("--open", help="Also open the page in the browser.")] = False,
) -> None:
    """Look at a run's samples in the browser: sort, filter, search, compare two runs, overrule, export the edit.

    Needs `pip install 'datalloy[serve]'`. The address carries a token; it ends with Ctrl-C.
    """
    from datalloy.viewer import serve

    serve(run, other, port=port, open_page=open_page, say=lambda address: print(address, flush=True))


@app.command()
def ask(
    recipe: RecipePath,
    count: Annotated[int, typer.Option(min=1, help="How many mixtures shall be open for measuring.")] = 4,
    verify: Annotated[bool, typer.Option("--verify", help="Mixtures to really train on, not to merge.")] = False,
    experts: Annotated[Path, typer.Option(metavar="DIR", help="Holds one checkpoint a domain.")] = Path("experts"),
    sets: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Name the mixtures whose numbers are wanted next; you merge or train and evaluate them, anywhere."""
    from datalloy import asktell
    from datalloy.told_recipe import load_told

    told = load_told(recipe, sets or ())
    for proposal in asktell.ask(told, run, count=count, verify=verify, experts=experts):
        shares = ", ".join(f"{name} {w:.2%}" for name, w in zip(told.domains, proposal.weight_K, strict=False) if w)
        print(f"{proposal.candidate:<18}{proposal.role:<18}{shares}")
    print((Path(run) if run else asktell.default_folder(told)) / "mixture" / "proposals.jsonl")


@app.command()
def tell(
    recipe: RecipePath,
    results: Annotated[list[Path], typer.Argument(help="Own tables, or result files of evaluators.")],
    candidate: Annotated[str | None, typer.Option(help="Whose results they are, as `ask` named it; or base.")] = None,
    kind: Annotated[
        Literal["merged", "trained"] | None, typer.Option(help="Of mixtures that were not asked for.")
    ] = None,
    sets: Overrides = None,
    run: RunFolder = None,
) -> None:
    """Take in numbers of mixtures; the recommendation so far with its interval and verdict."""
    from datalloy import asktell
    from datalloy.summary import summarise
    from datalloy.told_recipe import load_told

    told = load_told(recipe, sets or ())
    folder = Path(run) if run else asktell.default_folder(told)
    new, advice = asktell.tell(told, results, run, candidate=candidate, kind=kind)
    print(f"{new} new mixtures, all others were known")
    if advice is None:
        print(f"at least {asktell.LEAST} mixtures of one kind are needed for a recommendation")
        print(folder / "mixture" / "told.jsonl")
        return
    for line in [*summarise("tell", folder), *asktell.advice_lines(advice)]:
        print(line)
    print(folder / "mixture" / "mixture.json")


@app.command()
def results(
    files: Annotated[list[Path], typer.Argument(help="Of lmms-eval, lm-evaluation-harness or VLMEvalKit.")],
) -> None:
    """Print result files of other evaluators as one tidy CSV table: value, standard error and n of each metric."""
    from datalloy.evaluators import read_results, table_text

    print(table_text([measure for file in files for measure in read_results(file)]), end="")


@app.command()
def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH=WEIGHT...", help="Checkpoints or LoRA adapters, each with its weight.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; must not exist or be empty.", show_default=False)],
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of adapters: write a whole checkpoint of this base instead.")
    ] = None,
) -> None:
    """Merge models of one base by weights that sum to one, exactly and in float32, into a folder that loads as usual.

    `datalloy merge experts/chart=0.7 experts/table=0.3 --out merged`. Adapters become one adapter, ranks added up.
    """
    from datalloy.checkpoints import merge_checkpoints

    merged = merge_checkpoints([_weighted(model) for model in models], out, base=base)
    print(f"{merged.kind}: {merged.tensors} tensors of {merged.dtype}, {merged.bytes / 1e6:.1f} MB")
    print(out)


def _weighted(model: str) -> tuple[Path, float]:
    path, separator, weight = model.rpartition("=")
    try:
        if separator and path:
            return Path(path), float(weight)
    except ValueError:
        pass  # refused below, like a missing weight
    raise RecipeError(f"{model!r} is not PATH=WEIGHT, as in experts/chart=0.7")


@app.command()
def init(path: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.yaml")) -> None:
    """Write a commented recipe to start from."""
    from datalloy.template import RECIPE_TEMPLATE

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(RECIPE_TEMPLATE)
    except FileExistsError as error:
        raise RecipeError(f"{error.filename} exists already; give another name") from None
    print(path)


DEMO_FOLDER = Path("datalloy-demo")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the drawn data and the run go.")] = DEMO_FOLDER,
    seed: Annotated[int, typer.Option(help="Seed of the drawn pool.")] = 0,
    grid: Annotated[
        bool, typer.Option("--grid", help="Also train a grid of mixtures, to hold the search against.")
    ] = False,
) -> None:
    """Run the main job on the embedded model and a drawn pool with known faults: ten minutes on a laptop."""
    from datalloy.tiny.demo import run_demo

    for line in run_demo(folder, seed, with_grid=grid):
        print(line, flush=True)


def _run_verb(verb: str, path: Path, sets: Sequence[str] | None, folder: Path | None, dry_run: bool) -> None:
    from datalloy.config import load_recipe

    recipe = load_recipe(path, sets or ())
    if dry_run:
        _dry_run(recipe)
        return
    from datalloy.engines import processes
    from datalloy.run import Run
    from datalloy.summary import summarise
    from datalloy.workflows import open_workflow, serve_workflow

    if processes.number() > 0:  # of torchrun; the first does the talking
        serve_workflow(recipe, folder)
        return
    with Run(recipe, folder) as run, open_workflow(run) as workflow:
        log.info("run folder: %s", run.folder)
        artefact = _stage(verb, workflow)
        for line in summarise(verb, run.folder):
            print(line)
        print(artefact)


def _stage(verb: str, workflow: "Workflow") -> Path:
    """Run one verb; the path of its artefact."""
    from datalloy.report import write_report

    work, artefact = {
        "check": (workflow.check, "check.json"),
        "score": (workflow.score, "scores.parquet"),
        "select": (workflow.select, "selection.parquet"),
        "mix": (workflow.mix, "mixture/candidates.parquet"),
        "verify": (workflow.verify, "mixture/mixture.json"),
        "train": (workflow.train, "model"),
        "evaluate": (workflow.evaluate, "metrics.json"),
        "export": (workflow.export, "export"),
        "run": (workflow.run_all, "report.html"),
    }[verb]
    made = work()
    if verb == "run":
        write_report(workflow.run.folder)
    return made if isinstance(made, Path) else workflow.run.path(artefact)


def _dry_run(recipe: "Recipe") -> None:
    from datalloy.costs import estimate
    from datalloy.strict_yaml import dump_yaml

    print(dump_yaml(recipe.dump()))
    for line in estimate(recipe):
        print(line)


class _Stopped(BaseException):
    """A signal asks us to end. No library's `except Exception` may keep it."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stop(number: int, _: object) -> NoReturn:
    for stopping in STOPPING:
        signal.signal(stopping, signal.SIG_DFL)  # a second signal ends us at once
    raise _Stopped(number)


def _listen_to_signals() -> None:
    """The first signal drops the unit under way and ends the process in order, the second at once.

    Python looks at signals between two of its own instructions. Where a library computes on, or swallows `_Stopped` in
    a place that nothing can be raised from, a thread that the kernel wakes ends the process after `GRACE_SECONDS`:
    every file is complete or not there at any time, so nothing is lost by it.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_after_grace, args=(reader,), daemon=True).start()
    for stopping in STOPPING:
        signal.signal(stopping, _stop)


def _end_after_grace(reader: int) -> None:
    """Ends the process some time after the first signal. It says how to go on, as nobody else has by then."""
    while (number := os.read(reader, 1)[0]) not in STOPPING:
        pass  # a library listens to a signal of its own
    time.sleep(GRACE_SECONDS)
    os._exit(_refuse(_stopped_by(number, sys.argv[1:]), EXIT_SIGNAL + number))


def main() -> None:
    """Entry point: set the process up, answer the command line, end with its exit code."""
    prefix = progress.CLEAR if sys.stderr.isatty() else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter(prefix))
    logging.basicConfig(level=logging.ERROR, handlers=[handler])
    sys.excepthook = _report_bug
    logging.getLogger("datalloy").setLevel(logging.INFO)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    progress.show(True)
    _listen_to_signals()
    code = answer(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # our reader has gone, as in `datalloy check my.yaml | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    sys.stderr.flush()
    if code > EXIT_SIGNAL:
        os._exit(code)  # no waiting for threads of libraries: every file is either complete or not there
    sys.exit(code)


def answer(arguments: Sequence[str]) -> int:
    """Run one command line; its exit code (DESIGN, section 4). What went wrong is said on stderr."""
    try:
        return app(arguments or ["--help"], prog_name="datalloy", standalone_mode=False) or 0
    except typer.TyperException as error:
        return _refuse(f"{error.format_message()} (`datalloy --help` lists what there is)", EXIT_USAGE)
    except DatalloyError as error:
        return _refuse(str(error), error.exit_code)
    except _Stopped as stopped:
        return _refuse(_stopped_by(stopped.number, arguments), EXIT_SIGNAL + stopped.number)
    except MemoryError:
        kept = f"what is finished is kept; resume with: {_command(arguments)}"
        return _refuse(f"out of memory; {kept}", EXIT_ENVIRONMENT)
    except OSError as error:
        if error.errno not in ENVIRONMENT_FAULTS:
            raise
        mend = f"What is finished is kept; mend this and resume with: {_command(arguments)}"
        return _refuse(f"the system refused: {error}. {mend}", EXIT_ENVIRONMENT)


def _stopped_by(number: int, arguments: Sequence[str]) -> str:
    return f"stopped by {signal.Signals(number).name}; resume with: {_command(arguments)}"


def _command(arguments: Sequence[str]) -> str:
    return shlex.join(["datalloy", *arguments])


def _refuse(message: str, code: int) -> int:
    print(printable(without_secrets(f"datalloy: {message}")), file=sys.stderr)
    return code


def _report_bug(*fault: Any) -> None:
    """The traceback of what nobody foresaw, without secrets."""
    print(printable(without_secrets("".join(traceback.format_exception(*fault)))), file=sys.stderr)


if __name__ == "__main__":
    main()
