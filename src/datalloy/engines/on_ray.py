"""Units in, done on the workers of a Ray cluster, local or remote.

Scoring goes through Ray Data: an actor is a worker with its model loaded, one row is one unit, and Ray Data hands rows
to whichever actor is free. Trainings and evaluations of mixtures are Ray tasks; a process keeps its worker between
them. Results do not travel: a unit's files and its done-record are written to the run folder by who did it.

Ray repeats what a lost worker was doing, `SYSTEM_RETRIES` times; then the run ends. What the work itself raises is
never repeated: it comes back as a value and is raised here.

Price: about ten seconds to start a cluster on one machine, five for an actor to load libraries. Trap: results are equal
to the byte only with as many threads a worker as the driver has, for another number sums in another order; so workers
get the driver's number, and OMP_NUM_THREADS=1 before the command is wise where workers share a machine.
"""

import functools
import json
import logging
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datalloy import config
from datalloy.engines import Failure, Unit, Worker
from datalloy.errors import EnvironmentFault
from datalloy.progress import track

log = logging.getLogger(__name__)

SYSTEM_RETRIES = 3  # of a unit whose worker was lost; more would hide a sample that no machine survives

OpenWorker = Callable[[config.Recipe, Path], Worker]


class RayEngine:
    """`open_worker(recipe, folder)` opens a worker on the run folder; it is called in the workers' processes."""

    def __init__(self, recipe: config.Recipe, folder: Path, open_worker: OpenWorker) -> None:
        self._settings = recipe.ray
        self._worker = (open_worker, json.dumps(recipe.dump()), str(folder.resolve()))
        self._ours = _connect(self._settings)

    def complete(self, units: Sequence[Unit], label: str) -> None:
        import ray

        done = self._on_replicas(units) if units[0].kind == "score" else self._as_tasks(units)
        try:
            for failure in track(done, label, len(units)):
                if failure is not None:
                    raise failure.error()
        except ray.exceptions.RayError as fault:
            raise _lost(label, fault) from fault

    def close(self) -> None:
        import ray

        if self._ours:
            ray.shutdown()

    def _options(self) -> dict[str, Any]:
        import torch

        threads = str(torch.get_num_threads())
        variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        return {
            "num_cpus": self._settings.cpus_per_worker,
            "num_gpus": self._settings.gpus_per_worker,
            "runtime_env": {"env_vars": variables},
        }

    def _workers(self, units: int) -> int:
        """How many are at work at once: as the recipe says, or as many as the cluster has room for."""
        import ray

        settings, there = self._settings, ray.cluster_resources()
        room = int(there.get("CPU", 0) // settings.cpus_per_worker)
        if settings.gpus_per_worker:
            room = min(room, int(there.get("GPU", 0) // settings.gpus_per_worker))
        if room < 1:
            raise EnvironmentFault(
                f"the Ray cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, a worker needs "
                f"{settings.cpus_per_worker} and {settings.gpus_per_worker:g}; lower ray.cpus_per_worker or "
                "ray.gpus_per_worker, or add machines"
            )
        return min(settings.num_workers or room, room, units)

    def _on_replicas(self, units: Sequence[Unit]) -> Iterator[Failure | None]:
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        # rows from memory: a task that reads them would wait for a CPU which the actors have all taken
        rows = ray.data.from_items([{"unit": _as_text(unit)} for unit in units], override_num_blocks=len(units))
        with warnings.catch_warnings():
            # the two bounds are announced to go in Ray 2.64, and so far nothing takes their place
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            done = rows.map_batches(
                _Replica,
                fn_constructor_args=self._worker,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=self._workers(len(units))),
                max_restarts=SYSTEM_RETRIES,
                max_task_retries=SYSTEM_RETRIES,
                **self._options(),
            )
        for row in done.iter_rows():
            failed = json.loads(row["failed"])
            yield Failure(*failed) if failed else None

    def _as_tasks(self, units: Sequence[Unit]) -> Iterator[Failure | None]:
        import ray

        remote = ray.remote(_perform).options(max_retries=SYSTEM_RETRIES, retry_exceptions=False, **self._options())
        waiting, limit = list(units), self._workers(len(units))
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < limit:
                running.append(remote.remote(self._worker, _as_text(waiting.pop(0))))
            (ready,), running = ray.wait(running, num_returns=1)
            failed = json.loads(ray.get(ready))
            yield Failure(*failed) if failed else None


class _Replica:
    """A worker that stays: the class that Ray Data makes one actor a worker of."""

    def __init__(self, *worker: Any) -> None:
        self._worker = worker

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"failed": [_perform(self._worker, str(unit)) for unit in batch["unit"]]}


def _as_text(unit: Unit) -> str:
    return json.dumps([unit.name, unit.kind, unit.work, unit.arguments])


def _perform(worker: tuple[OpenWorker, str, str], text: str) -> str:
    """Do a unit in this process; what it raised as JSON, or null. As a value: Ray would wrap an error, or repeat it."""
    name, kind, work, arguments = json.loads(text)
    try:
        _opened(*worker).perform(Unit(name, kind, work, tuple(arguments)))
    except Exception as error:  # noqa: BLE001 - whatever it is, the driver raises it
        failure = Failure.of(error, f"on {socket.gethostname()}, at {name}")
        return json.dumps([failure.kind, failure.message, failure.where])
    return "null"


@functools.lru_cache(maxsize=1)
def _opened(open_worker: OpenWorker, recipe: str, folder: str) -> Worker:
    """The worker of this process, with whatever it has loaded."""
    return open_worker(config.Recipe.model_validate(json.loads(recipe)), Path(folder))


def _connect(settings: config.Ray) -> bool:
    """Join the cluster, or start one on this machine; whether it is ours to shut down. Raises EnvironmentFault."""
    try:
        import ray.data
    except ImportError as error:
        raise EnvironmentFault(f"engine ray needs Ray ({error}): pip install 'datalloy[ray]'") from None
    if ray.is_initialized():
        return False
    try:
        # without an address Ray would join whatever cluster somebody has started on this machine
        ray.init(settings.address or "local", logging_level=logging.WARNING, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EnvironmentFault(f"ray.address is {settings.address}, and there is no cluster: {error}") from error
    return True


def _lost(label: str, fault: Exception) -> EnvironmentFault:
    return EnvironmentFault(
        f"{label}: workers on the Ray cluster cannot start, or are lost again and again ({SYSTEM_RETRIES} retries): "
        f"{fault}\nWhat is finished is kept. Is Datalloy installed on all machines, and is there memory for "
        "ray.num_workers models? Mend it and run the same command again"
    )
