"""The command line: exit codes, what goes to stdout and what to stderr. Stages are stand-ins: no model is loaded."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from datalloy import cli, config, workflows
from datalloy.errors import AgreementError, DataError, EnvironmentFault, LeakageError, ModelError, RecipeError
from datalloy.run import Run, write_json
from datalloy.template import RECIPE_TEMPLATE

RECIPE = """\
name: small
base: tiny
domains: {chart: {path: chart.jsonl}}
targets: {goal: {path: goal.jsonl}}
"""
WARNING = "warning: 1 records cannot be used and are left out; file, line and reason of each are in out/rejected.jsonl"
VERBS = ("check", "score", "select", "mix", "verify", "train", "evaluate", "export", "run")
COUNTS = {
    "domains": {"chart": 3},
    "targets": {"goal": 2},
    "evaluation": {},
    "rejected": 1,
    "rejected_by_reason": {"too_long": 1},
    "duplicates": {"exact": 0, "near": 0},
}


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return "recipe.yaml"


@pytest.fixture
def check(monkeypatch):
    """Put a function in the place of the stage `check`."""

    def replace(stage) -> None:
        monkeypatch.setattr(workflows.Workflow, "check", stage)

    replace(lambda workflow: write_json(workflow.run.path("check.json"), COUNTS))
    return replace


# --- answers ---------------------------------------------------------------------------------------------------------


def test_results_go_to_stdout_and_the_last_line_is_the_artefact(recipe, check, capsys):
    assert cli.answer(["check", recipe, "--run", "out"]) == 0
    output = capsys.readouterr()
    assert [line.split() for line in output.out.splitlines()] == [
        ["domains", "chart", "3", "samples"],
        ["targets", "goal", "2", "samples"],
        ["rejected:", "1"],
        ["too_long", "1"],
        ["duplicates", "in", "the", "pool:", "0", "exact,", "0", "near"],
        WARNING.split(),
        ["out/check.json"],
    ]
    assert output.err == ""


def test_without_run_the_folder_is_named_by_recipe_and_fingerprint(recipe, check, capsys):
    assert cli.answer(["check", recipe]) == 0
    folder = Run(config.load_recipe(recipe)).folder
    assert capsys.readouterr().out.endswith(f"\n{folder}/check.json\n")


def test_set_reaches_the_recipe(recipe, check):
    assert cli.answer(["check", recipe, "--run", "out", "--set", "score.seed=3", "--set", "train.rank=2"]) == 0
    resolved = config.load_recipe("out")
    assert (resolved.score.seed, resolved.train.rank) == (3, 2)


@pytest.mark.parametrize(
    ("verb", "stage", "artefact"),
    [
        ("check", "check", "check.json"),
        ("score", "score", "scores.parquet"),
        ("select", "select", "selection.parquet"),
        ("mix", "mix", "mixture/candidates.parquet"),
        ("verify", "verify", "mixture/mixture.json"),
        ("train", "train", "model"),
        ("evaluate", "evaluate", "metrics.json"),
        ("export", "export", "export"),
        ("run", "run_all", "report.html"),
    ],
)
def test_each_verb_calls_its_stage_and_names_its_artefact(verb, stage, artefact, recipe, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(workflows.Workflow, stage, lambda _: called.append(stage))
    monkeypatch.setattr("datalloy.report.write_report", lambda _: called.append("report"))
    monkeypatch.setattr("datalloy.summary.summarise", lambda verb, _: [f"about {verb}"])
    assert cli.answer([verb, recipe, "--run", "out"]) == 0
    assert called == ([stage, "report"] if verb == "run" else [stage])
    assert capsys.readouterr().out == f"about {verb}\nout/{artefact}\n"


def test_a_dry_run_prints_the_resolved_recipe_and_the_costs_and_leaves_nothing(recipe, monkeypatch, capsys):
    monkeypatch.setattr("datalloy.costs.estimate", lambda recipe: [f"costs of {recipe.name}"])
    assert cli.answer(["run", recipe, "--dry-run", "--set", "train.rank=5"]) == 0
    text, costs = capsys.readouterr().out.split("\n\n")
    assert "  rank: 5\n" in text
    assert "  learning_rate: 2.0e-05\n" in text
    assert costs == "costs of small\n"
    assert [path.name for path in Path().iterdir()] == [recipe]


def test_report_writes_the_page_of_a_finished_run(recipe, monkeypatch, capsys):
    monkeypatch.setattr("datalloy.report.write_report", lambda folder: folder / "report.html")
    with Run(config.load_recipe(recipe), "out") as run:
        write_json(run.path("status.json"), {})
    assert cli.answer(["report", recipe, "--run", "out"]) == 0
    assert capsys.readouterr().out == "out/report.html\n"


def test_report_refuses_a_run_that_is_not_finished_and_makes_none(recipe, capsys):
    assert cli.answer(["report", recipe, "--run", "out"]) == 3
    assert "out holds no finished run; `datalloy run recipe.yaml` makes one" in capsys.readouterr().err
    assert not Path("out").exists()


def test_report_of_run_folders_is_one_page_each_or_one_of_all(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datalloy.report.write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr("datalloy.report.write_comparison", lambda folders, out: f"{len(folders)} in {out}")
    for name in ("a", "b"):
        Path(name).mkdir()
    assert cli.answer(["report", "a"]) == 0
    assert cli.answer(["report", "a", "b"]) == 0
    assert cli.answer(["report", "a", "b", "--out", "both.html"]) == 0
    assert capsys.readouterr().out == "a/report.html\n2 in comparison.html\n2 in both.html\n"


def test_report_of_a_run_folder_takes_no_settings(recipe, capsys):
    Path("a").mkdir()
    assert cli.answer(["report", "a", "--set", "train.rank=4"]) == 2
    assert "--set and --run belong to a recipe" in capsys.readouterr().err


def test_report_refuses_a_folder_that_is_no_run(recipe, capsys):
    Path("a").mkdir()
    assert cli.answer(["report", "a", recipe]) == 3
    assert "a holds no finished run; `datalloy run RECIPE --run a` makes one" in capsys.readouterr().err


def test_init_writes_a_recipe_that_loads(recipe, capsys):
    assert cli.answer(["init", "new/folder/mine.yaml"]) == 0
    assert capsys.readouterr().out == "new/folder/mine.yaml\n"
    assert Path("new/folder/mine.yaml").read_text() == RECIPE_TEMPLATE
    assert config.load_recipe("new/folder/mine.yaml").name == "my-selection"


@pytest.mark.parametrize("path", ["recipe.yaml", "recipe.yaml/inside.yaml"])
def test_init_overwrites_nothing(path, recipe, capsys):
    assert cli.answer(["init", path]) == 2
    assert "recipe.yaml exists already; give another name" in capsys.readouterr().err
    assert Path(recipe).read_text() == RECIPE


def test_merge_takes_paths_and_weights_and_names_what_it_wrote(tmp_path, monkeypatch, capsys):
    asked = []

    def merge(weights, out, base):
        asked.append((weights, out, base))
        return SimpleNamespace(kind="checkpoint", tensors=3, dtype="float32", bytes=2_000_000)

    monkeypatch.setattr("datalloy.checkpoints.merge_checkpoints", merge)
    assert cli.answer(["merge", "a=b/c=0.25", "d=0.75", "--out", "merged"]) == 0
    assert asked == [([(Path("a=b/c"), 0.25), (Path("d"), 0.75)], Path("merged"), None)]
    assert capsys.readouterr().out.splitlines() == ["checkpoint: 3 tensors of float32, 2.0 MB", "merged"]


@pytest.mark.parametrize("model", ["experts/chart", "experts/chart=", "=0.5", "experts/chart=half"])
def test_a_model_without_a_weight_is_refused(model, capsys):
    assert cli.answer(["merge", model, "--out", "merged"]) == 2
    assert "is not PATH=WEIGHT" in capsys.readouterr().err


@pytest.mark.parametrize("grid", [[], ["--grid"]])
def test_demo_prints_its_lines(grid, monkeypatch, capsys):
    def run_demo(folder, seed, *, with_grid):
        return iter([f"{folder} {seed} {with_grid}", "report.html"])

    monkeypatch.setattr("datalloy.tiny.demo.run_demo", run_demo)
    assert cli.answer(["demo", "--folder", "here", "--seed", "3", *grid]) == 0
    assert capsys.readouterr().out == f"here 3 {bool(grid)}\nreport.html\n"


@pytest.mark.parametrize("verb", [*VERBS, "report", "init", "demo"])
def test_every_verb_has_help(verb, capsys):
    assert cli.answer([verb, "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_the_overview_lists_every_verb_and_is_the_answer_to_nothing(capsys):
    assert cli.answer([]) == cli.answer(["--help"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert all(text.count(f"│ {verb} ") == 2 for verb in (*VERBS, "report", "init", "demo"))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check"], "Missing argument"),
        (["check", "recipe.yaml", "--fast"], "No such option: --fast"),
        (["check", "recipe.yaml", "--run"], "Option '--run' requires an argument"),
        (["check", "recipe.yaml", "more"], "Got unexpected extra argument"),
        (["chek", "recipe.yaml"], "No such command 'chek'"),
        (["demo", "--seed", "x"], "Invalid value for '--seed'"),
        (["check", "absent.yaml"], "cannot read the recipe absent.yaml: No such file or directory"),
        (["check", "recipe.yaml", "--set", "score.probes=0"], "score.probes is 0, must be"),
    ],
)
def test_wrong_usage_is_one_line_on_stderr_and_exit_code_2(arguments, message, recipe, capsys):
    assert cli.answer(arguments) == 2
    output = capsys.readouterr()
    assert output.err.startswith("datalloy: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("found in vain"), 2),
        (DataError("found in vain"), 3),
        (LeakageError("found in vain"), 3),
        (AgreementError("found in vain"), 3),
        (ModelError("found in vain"), 3),
        (EnvironmentFault("found in vain"), 4),
        (OSError(errno.ENOSPC, "found in vain"), 4),
        (PermissionError(errno.EACCES, "found in vain"), 4),
        (MemoryError(), 4),
    ],
)
def test_every_fault_has_its_exit_code(error, code, recipe, check, capsys):
    def fail(_: object) -> None:
        raise error

    check(fail)
    assert cli.answer(["check", recipe, "--run", "out"]) == code
    output = capsys.readouterr()
    assert ("out of memory" if isinstance(error, MemoryError) else "found in vain") in output.err
    assert output.out == ""


def test_a_fault_of_our_own_is_not_hidden(recipe, check):
    def fail(_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "a bug")

    check(fail)
    with pytest.raises(FileNotFoundError, match="a bug"):
        cli.answer(["check", recipe, "--run", "out"])


def test_a_run_folder_in_use_is_exit_code_75(recipe, check, capsys):
    with Run(config.load_recipe(recipe), "out"):
        assert cli.answer(["check", recipe, "--run", "out"]) == 75
    assert f"out is in use by process {os.getpid()} on " in capsys.readouterr().err


def test_a_data_file_that_is_missing_is_named(recipe, capsys):
    assert cli.answer(["check", recipe, "--run", "out"]) == 3
    assert "chart.jsonl: No such file or directory; check the path in the recipe" in capsys.readouterr().err


# --- processes -------------------------------------------------------------------------------------------------------

SLOW = """\
import contextlib, sys, time, types
class Workflow:
    def __init__(self, run): self.run = run
    score = select = mix = verify = train = evaluate = export = run_all = None
    def check(self):
        try:
            print("working", flush=True)
            time.sleep(60)
        except Exception:
            print("kept by a library", flush=True)
        finally:
            if "--set" in sys.argv: print("cleaning", flush=True); time.sleep(60)
@contextlib.contextmanager
def open_workflow(run): yield Workflow(run)
stub = types.SimpleNamespace(open_workflow=open_workflow, serve_workflow=None, write_report=None)
sys.modules |= {"datalloy.workflows": stub, "datalloy.report": stub}  # torch is not needed here and takes seconds
from datalloy import cli
cli.main()
"""


def _start(recipe: str, *more: str) -> subprocess.Popen:
    arguments = [sys.executable, "-c", SLOW, "check", recipe, "--run", "out", *more]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_its_exit_code_and_how_to_go_on(number, code, recipe):
    process = _start(recipe)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    assert err.splitlines() == [
        "run folder: out",
        f"datalloy: stopped by {number.name}; resume with: datalloy check {recipe} --run out",
    ]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_run_at_once(second, recipe):
    process = _start(recipe, "--set", "score.seed=1")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(second)
    process.communicate(timeout=20)
    assert process.returncode == -second


def test_a_stage_that_does_not_listen_is_ended_after_the_grace_time(recipe):
    """As inside one long call of a library, or where the exception is swallowed."""
    deaf = SLOW.replace("cli.main()", "cli.GRACE_SECONDS = 0.5; cli.main()")
    arguments = [sys.executable, "-c", deaf, "check", recipe, "--run", "out", "--set", "score.seed=1"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (out, process.returncode) == ("cleaning\n", 130)
    assert err.splitlines()[-1].startswith("datalloy: stopped by SIGINT; resume with: datalloy ")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from datalloy import cli; cli.answer(['--help']); "
        "heavy = ('torch', 'transformers', 'numpy', 'pyarrow', 'sklearn', 'pydantic', 'yaml'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [(["--help"], ""), (["init", "a.yaml"], ""), (["init", "a.yaml"], "1")]
)
def test_a_reader_that_has_gone_is_no_fault(arguments, unbuffered, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "datalloy.cli", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    finished = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path, env=environment, check=False
    )
    os.close(writer)
    assert (finished.returncode, finished.stderr) == (1, b"")
