"""What all engines have in common, and that what they compute is equal to the byte, lost workers included."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from datalloy import workflows
from datalloy.config import load_recipe
from datalloy.engines import Failure, LocalEngine, Unit, complete, processes
from datalloy.errors import AgreementError, DataError, EnvironmentFault, RecipeError, RunError
from datalloy.run import Run, file_hash
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.vlm import EncodeError
from datalloy.workflows import Workflow, open_workflow
from engine_workers import Writer, open_writer
from mortal_workflow import open_mortal

HERE = Path(__file__).parent
PLAN = PoolPlan(samples={"chart": 48, "counting": 36}, targets=("chart", "counting"), target_items=12, holdout_items=4)
RECIPE = """\
name: spread
base: tiny
domains:
  chart: {path: data/chart.jsonl}
  counting: {path: data/counting.jsonl}
targets:
  chart: {path: data/chart.target.jsonl}
  counting: {path: data/counting.target.jsonl}
score: {method: first_order, step: 0.01, target_items: 8, probes: 4, warmup_fraction: 0.1}
select: {keep_fraction: 0.5, diversity: threshold}
train: {adapter: none, learning_rate: 1e-3, batch_size: 4, samples: 16}
"""
MIXTURE = "mixture: {verify_runs: 1, checkpoints: []}\n"


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    write_pool(folder / "data", PLAN, seed=0)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "mixed.yaml").write_text(RECIPE.replace("first_order, step: 0.01", "low_loss") + MIXTURE)
    return folder / "recipe.yaml"


@pytest.fixture
def run(recipe_path, tmp_path):
    with Run(load_recipe(recipe_path), tmp_path / "run") as opened:
        yield opened


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(workflows, "SHARD", 12)


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_cluster():
    """Two workers on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'datalloy[ray]'")
    pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'datalloy[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.setenv("RAY_worker_niceness", "0")  # else workers starve beside other tests
        patch.setenv("RAY_raylet_start_wait_time_s", "240")
        ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(params=["local", "ray"])
def engine(request, run):
    if request.param == "local":
        return LocalEngine(Writer(run))
    request.getfixturevalue("ray_cluster")
    from datalloy.engines.on_ray import RayEngine

    return RayEngine(run.recipe, run.folder, open_writer)


def a_unit(name, work="write", kind="score"):
    return Unit(f"parts/{name}", kind, work, (name, 0.1))


def performed(run):
    return [line.split() for line in run.path("performed.log").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["score", "train"])
def test_every_unit_is_done_once_and_recorded(kind, engine, run):
    units = [a_unit(n, kind=kind) for n in range(5)]
    complete(engine, run, units, "write")
    assert [run.finished(unit.name) for unit in units] == [{"arguments": [n, 0.1]} for n in range(5)]
    assert sorted(name for name, _ in performed(run)) == [unit.name for unit in units]


def test_what_has_a_record_is_not_done_again(engine, run):
    complete(engine, run, [a_unit(0)], "write")
    complete(engine, run, [a_unit(0), a_unit(1)], "write")
    assert [name for name, _ in performed(run)] == ["parts/0", "parts/1"]


@pytest.mark.parametrize("kind", ["score", "measure"])
def test_an_error_of_the_work_is_raised_here_and_not_tried_again(kind, engine, run):
    with pytest.raises(AgreementError, match="parts/0 disagrees"):
        complete(engine, run, [a_unit(0, "fail", kind)], "write")
    assert len(performed(run)) == 1


def test_units_done_beside_a_failing_one_are_kept(engine, run):
    units = [a_unit(0), a_unit(1, "fail")]
    with pytest.raises(AgreementError):
        complete(engine, run, units, "write")
    assert run.finished("parts/0") is not None


def test_a_worker_that_does_nothing_is_noticed(run):
    class Idle:
        def perform(self, unit, coming=None):
            pass

    with pytest.raises(RunError, match="holds no record of it"):
        complete(LocalEngine(Idle()), run, [a_unit(0)], "write")


def test_the_local_engine_says_what_comes_next(run):
    heard = []

    class Listener(Writer):
        def perform(self, unit, coming=None):
            heard.append((unit.name, coming and coming.name))
            super().perform(unit, coming)

    complete(LocalEngine(Listener(run)), run, [a_unit(0), a_unit(1)], "write")
    assert heard == [("parts/0", "parts/1"), ("parts/1", None)]


def test_what_failed_elsewhere_is_raised_as_what_it_was_and_said_where():
    raised = [
        Failure.of(error, "on there").error()
        for error in (EncodeError("too_long", "sample 7: 9 tokens"), OSError(28, "disk full"), KeyError("x"))
    ]
    assert [type(error) for error in raised] == [DataError, EnvironmentFault, RuntimeError]
    assert [str(error) for error in raised] == ["sample 7: 9 tokens", "[Errno 28] disk full", "KeyError: 'x'"]
    assert all(error.__notes__[0].startswith("on there") for error in raised)


# --- workers of a run ------------------------------------------------------------------------------------------------


def test_a_worker_joins_a_locked_run_and_leaves_it_as_it_is(run):
    (run.folder / ".half-written.1.tmp").touch()
    joined = Run(run.recipe, run.folder).join()
    joined.commit("unit", [], {"by": "worker"})
    assert run.finished("unit") == {"by": "worker"}
    assert (run.folder / ".half-written.1.tmp").exists()


def test_a_worker_that_would_compute_something_else_is_refused(run, recipe_path):
    other = load_recipe(recipe_path, ["score.seed=1"])
    with pytest.raises(RunError, match=r"would not compute the same .*\n  recipe.score.seed: 0 before, 1 now"):
        Run(other, run.folder).join()


def test_a_worker_that_does_not_see_the_run_is_refused(run, tmp_path):
    with pytest.raises(RunError, match="have to see one run folder under one path"):
        Run(run.recipe, tmp_path / "elsewhere").join()


def test_who_looks_on_records_nothing(run):
    with run.looking_on():
        assert run.commit("unit", [], {"steps": 1}) == {"steps": 1}
    assert run.finished("unit") is None


# --- ray -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["score", "measure"])
def test_the_unit_of_a_killed_worker_is_done_by_another(kind, ray_cluster, run):
    from datalloy.engines.on_ray import RayEngine

    units = [a_unit(0, "die", kind), *(a_unit(n, kind=kind) for n in range(1, 4))]
    complete(RayEngine(run.recipe, run.folder, open_writer), run, units, "write")
    assert run.path("died").exists()
    assert all(run.finished(unit.name) for unit in units)
    names = [name for name, _ in performed(run)]
    assert names.count("parts/0") == 2


def test_a_cluster_without_room_for_a_worker_is_refused(ray_cluster, run):
    from datalloy.engines.on_ray import RayEngine

    recipe = run.recipe.model_copy(update={"ray": run.recipe.ray.model_copy(update={"cpus_per_worker": 64})})
    with pytest.raises(EnvironmentFault, match=r"has 2 CPUs and 0 GPUs, a worker needs 64 and 0; lower"):
        complete(RayEngine(recipe, run.folder, open_writer), run, [a_unit(0)], "write")


def test_without_ray_the_engine_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    recipe = run.recipe.model_copy(update={"engine": "ray"})
    run.recipe = recipe
    with pytest.raises(EnvironmentFault, match=r"pip install 'datalloy\[ray\]'"), open_workflow(run):
        pass


@pytest.fixture(scope="module")
def scored_here(recipe_path):
    """Scored, embedded and selected by the local engine."""
    folder = recipe_path.parent / "local"
    with Run(load_recipe(recipe_path), folder) as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflows, "SHARD", 12)
        Workflow(run).select()
    return folder


def _hashes(folder, pattern):
    return {str(path.relative_to(folder)): file_hash(path) for path in sorted(folder.glob(pattern)) if path.is_file()}


SELECTED = ("scores/*/*.parquet", "scores.parquet", "probes.npz", "embeddings/*.npy", "selection.parquet")


@pytest.mark.parametrize("workers", [1, 2])
def test_scores_and_what_is_kept_are_equal_to_the_byte_on_ray(
    workers, ray_cluster, scored_here, recipe_path, tmp_path, monkeypatch
):
    """With two workers, one is killed midway."""
    if workers == 2:
        monkeypatch.setattr(workflows, "open_worker", open_mortal)
    recipe = load_recipe(recipe_path, ["engine=ray", f"ray.num_workers={workers}"])
    with Run(recipe, tmp_path / "run") as run, open_workflow(run) as workflow:
        workflow.select()
    assert (tmp_path / "run" / "died").exists() == (workers == 2)
    for pattern in SELECTED:
        assert _hashes(tmp_path / "run", pattern) == _hashes(scored_here, pattern) != {}


NOT_RESULTS = {"units", "provenance.json", "config.yaml", "events.jsonl", "run.lock"}  # hold times and the engine


def test_a_mixture_searched_and_verified_on_ray_is_equal_to_the_byte(ray_cluster, recipe_path, tmp_path):
    """Experts, merged models and the real run by two workers; every result that `verify` leaves."""
    results = []
    for engine in ("local", "ray"):
        recipe = load_recipe(recipe_path.parent / "mixed.yaml", [f"engine={engine}", "ray.num_workers=2"])
        with Run(recipe, tmp_path / engine) as run, open_workflow(run) as workflow:
            workflow.verify()
        hashes = _hashes(tmp_path / engine, "**/*")
        results.append({path: found for path, found in hashes.items() if Path(path).parts[0] not in NOT_RESULTS})
    here, on_ray = results
    assert {"mixture/mixture.json", "mixture/candidates.parquet", "experts/chart/model.safetensors"} <= set(here)
    assert [path for path in here.keys() | on_ray.keys() if here.get(path) != on_ray.get(path)] == []


# --- processes of torchrun -------------------------------------------------------------------------------------------


def torchrun(*arguments):
    """The command line in two processes."""
    return launched(["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "--"], *arguments)


def accelerate(config, *arguments):
    options = ["--config_file", str(config), "--num_processes=2", f"--main_process_port={free_port()}"]
    return launched(["accelerate.commands.launch", *options], *arguments)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launched(launcher, *arguments):
    command = [sys.executable, "-m", *launcher, str(HERE / "torchrun_command.py"), *map(str, arguments)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=560, check=False)


def test_scores_and_what_is_kept_are_equal_to_the_byte_in_two_processes(scored_here, recipe_path, tmp_path):
    folder = tmp_path / "run"
    done = torchrun("select", recipe_path, "--run", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "selection.parquet")
    assert done.stdout.count("selection.parquet") == 1
    for pattern in SELECTED:
        assert _hashes(folder, pattern) == _hashes(scored_here, pattern) != {}


TRAIN_ONLY = ["score.method=length", "score.warmup_fraction=0"]


@pytest.fixture(scope="module")
def trained_alone(recipe_path, tmp_path_factory):
    """Facts of the final training by one process."""
    with Run(load_recipe(recipe_path, TRAIN_ONLY), tmp_path_factory.mktemp("alone") / "run") as run:
        Workflow(run).train()
        return run.finished("model")


def assert_trained_together(done, recipe_path, folder, alone):
    """The run is that of one process, its losses equal to rounding, and it is recorded once."""
    assert done.returncode == 0, done.stderr
    with Run(load_recipe(recipe_path, TRAIN_ONLY), folder) as run:
        together = run.finished("model")
        assert Workflow(run).train() == run.path("model")
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for fact in ("steps", "kept", "tokens_seen", "samples_seen"):
        assert together[fact] == alone[fact], fact


def test_two_processes_train_one_model_together(trained_alone, recipe_path, tmp_path):
    sets = [word for key in TRAIN_ONLY for word in ("--set", key)]
    done = torchrun("train", recipe_path, "--run", tmp_path / "run", *sets)
    assert "sharded" not in done.stderr
    assert_trained_together(done, recipe_path, tmp_path / "run", trained_alone)


def test_two_processes_of_accelerate_train_one_model_in_shards(trained_alone, recipe_path, tmp_path):
    """With the configuration that docs/scaling.md shows."""
    page = (HERE.parent / "docs" / "scaling.md").read_text()
    (tmp_path / "fsdp.yaml").write_text(page.split("```yaml\n# fsdp.yaml\n")[1].split("```")[0])
    sets = [word for key in TRAIN_ONLY for word in ("--set", key)]
    done = accelerate(tmp_path / "fsdp.yaml", "train", recipe_path, "--run", tmp_path / "run", *sets)
    assert "are sharded over 2 processes (FSDP)" in done.stderr
    assert_trained_together(done, recipe_path, tmp_path / "run", trained_alone)


def test_an_error_in_two_processes_ends_both_with_its_exit_code_and_message(recipe_path, tmp_path):
    done = torchrun("score", recipe_path, "--run", tmp_path / "run", "--set", "targets.chart.limit=3")
    assert done.returncode != 0
    assert "targets.chart has 3 items" in done.stderr


@pytest.mark.parametrize("number", [0, 1, 2])
def test_there_may_be_fewer_units_than_processes(number, run):
    units = [a_unit(0), a_unit(1)]
    assert processes._do_own(SimpleNamespace(number=number, count=3), Writer(run), units, "write") is None
    assert [run.finished(unit.name) is not None for unit in units] == [number == 0, number == 1]


def test_ray_inside_torchrun_is_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run.recipe = run.recipe.model_copy(update={"engine": "ray"})
    with pytest.raises(RecipeError, match="engine is ray and torchrun started 2 processes"), open_workflow(run):
        pass
