"""A run of four small units in every way that units are written, tormented call by call. Prints what was seen as JSON.

Started by tests/test_faults.py with the fault library loaded. No model: hundreds of attempts in seconds.
"""

import json
import shutil
import sys
from pathlib import Path

from datalloy.config import load_recipe
from datalloy.durable import complete_file, complete_files, write_atomically, write_json
from datalloy.errors import DatalloyError
from datalloy.run import Run
from torture.injector import NOT_REACHED, Fault, kinds, run_child, was_killed

RECIPE = """\
name: toy
base: model
domains: {chart: {path: chart.jsonl}}
targets: {goal: {path: goal.jsonl}}
"""
WRITTEN = ("table", "model/config", "model/weights", "export/rows", "status.json")


def work(prepared: Run, log: Path) -> int:
    """The run's exit code. Units that are computed are noted in `log`."""

    def computed(unit: str) -> None:
        with log.open("a") as file:
            file.write(f"{unit}\n")

    try:
        with prepared as run:
            if run.finished("table") is None:
                write_atomically(run.path("table"), b"row\n" * 5000)
                run.commit("table", [run.path("table")])
                computed("table")
            if run.finished("model") is None:
                with complete_files(run.path("model")) as staging:
                    (staging / "config").write_text("{}")
                    (staging / "weights").write_bytes(bytes(range(256)) * 64)
                run.commit("model", [run.path("model")])
                computed("model")
            is_new = run.finished("measured") is None
            value = run.once("measured", lambda: {"value": 0.25})
            if is_new:
                computed("measured")
            if run.finished("export") is None:
                with complete_file(run.path("export/rows")) as file:
                    for _ in range(3):
                        file.write(b"line\n" * 4000)
                run.commit("export", [run.path("export/rows")])
                computed("export")
            write_json(run.path("status.json"), value["value"])
    except (DatalloyError, OSError) as error:  # as the command line does
        sys.stdout.write(f"{error}\n")
        return error.exit_code if isinstance(error, DatalloyError) else 4 if error.filename else 1
    return 0


def contents(folder: Path) -> dict[str, str]:
    """Every file of the folder that a run answers for; done-records with what they say of the files."""
    found = {name: (folder / name).read_bytes().hex() for name in WRITTEN}
    for path in (folder / "units").iterdir():
        record = json.loads(path.read_text())
        found[path.name] = json.dumps([record["unit"], record["files"], record["data"].get("value")])
    return found


def torment(run: Run, call: str, way: str, error: str, expected: dict[str, str]) -> int:
    """One fault after another, n = 1, 2, 3 ..., each followed by a resume, until the run gets past the n-th call."""
    folder, log, said = run.folder, run.folder.with_name("computed"), run.folder.with_name("said")
    faults = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)
        fault = Fault(call, way, error, faults + 1)
        code = run_child(lambda: work(run, log), folder, [fault], said)
        if NOT_REACHED in said.read_text():
            assert code == 0, (fault, code, said.read_text())
            return faults
        assert was_killed(code) or code in (0, 4), (fault, code, said.read_text())
        assert code != 4 or str(folder) in said.read_text(), (fault, said.read_text())
        before = log.read_text().split() if log.exists() else []
        assert run_child(lambda: work(run, log), folder, log=said) == 0, (fault, said.read_text())
        again = [unit for unit in log.read_text().split()[len(before) :] if unit in before]
        assert not again, (fault, again)
        assert contents(folder) == expected, fault
        left = [path for path in folder.rglob(".*") if path.is_file()]
        assert not left, (fault, left)
        faults += 1


def torment_all(world: Path) -> dict[str, int]:
    """Faults of every kind there is in a small run below `world`: how many of each. Raises AssertionError."""
    (world / "model").mkdir(parents=True)
    (world / "model" / "config.json").write_text("{}")
    for name in ("chart.jsonl", "goal.jsonl"):
        (world / name).write_text("{}\n")
    (world / "recipe.yaml").write_text(RECIPE)
    run = Run(load_recipe(world / "recipe.yaml"), world / "run")
    assert run_child(lambda: work(run, world / "computed"), run.folder) == 0
    expected = contents(run.folder)
    return {Fault(*kind, number=0).kind: torment(run, *kind, expected) for kind in kinds()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(torment_all(Path(sys.argv[1]))) + "\n")
