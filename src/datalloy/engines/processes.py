"""Units in, done by the processes that torchrun or `accelerate launch` started.

Process 0 runs the workflow; all others serve it: they wait to be told which units there are, do every n-th of them, and
say what they raised. Scores and evaluations are dealt in this way. A training is one unit that all do together: each
process enters it, and the Trainer shares the batch among them (DDP or FSDP, `training.py`).

Libraries take the launcher's environment variables for a command to train in step with the other processes, which a
short training in one of them must not do. So the variables are put away at the start and shown only during what all
do together. Messages go over gloo on the CPU, whatever the models run on.

Trap: a process that is lost ends the command (torchrun ends the others); the run folder keeps what is finished, and the
same command goes on from there.
"""

import contextlib
import datetime
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from datalloy.engines import Failure, Unit, Worker
from datalloy.progress import track

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP")
PATIENCE = datetime.timedelta(days=30)  # of a process that waits for process 0: a bake-off may take long

log = logging.getLogger(__name__)


def count() -> int:
    """How many processes the launcher started for this command; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


class ProcessEngine:
    """The engine of process 0. Opening it waits for all others to `serve`."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self._group = worker, _Group()
        self._in_step = True
        self._group.tell(None)

    def complete(self, units: Sequence[Unit], label: str) -> None:
        if units[0].kind == "train":
            for unit in track(units, label, len(units)):
                self._group.tell([unit])
                self._in_step = False  # until it is done: after an error nobody knows where the others are
                with self._group.in_step():
                    self._worker.perform(unit)
                self._in_step = True
            return
        self._group.tell(list(units))
        for failure in self._group.gather(_do_own(self._group, self._worker, units, label)):
            if failure is not None:
                raise failure.error()

    def close(self) -> None:
        if self._in_step:  # else the launcher ends the others when this process has ended
            self._group.tell([])
            self._group.leave()


def serve(open_worker: Any) -> None:
    """Do what process 0 tells, until it tells that all is done. `open_worker()` is called when the run is open."""
    group = _Group()
    group.hear()
    worker = open_worker()
    while units := group.hear():
        if units[0].kind == "train":
            with group.in_step(), worker.run.looking_on():
                worker.perform(units[0])
        else:
            group.gather(_do_own(group, worker, units, ""))
    group.leave()


def _do_own(group: "_Group", worker: Worker, units: Sequence[Unit], label: str) -> Failure | None:
    """Every n-th unit; what the first that failed raised."""
    own = list(units)[group.number :: group.count]
    try:
        for unit, coming in track(itertools.zip_longest(own, own[1:]), label, len(own)):
            worker.perform(unit, coming)
    except Exception as error:  # noqa: BLE001 - process 0 raises it, whatever it is
        return Failure.of(error, f"in process {group.number}")
    return None


class _Group:
    """The processes and how they talk."""

    def __init__(self) -> None:
        import torch

        self.count, self.number = count(), number()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        has_gpus = torch.cuda.is_available()
        if has_gpus:
            torch.cuda.set_device(local)  # "cuda" means this one from now on
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if has_gpus else "gloo", timeout=PATIENCE)
        self._hidden = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Show the launcher's variables: what trains now trains in step with all other processes."""
        os.environ.update(self._hidden)
        try:
            yield
        finally:
            for name in LAUNCHER:
                os.environ.pop(name, None)

    def tell(self, units: list[Unit] | None) -> None:
        self._broadcast(units)

    def hear(self) -> list[Unit] | None:
        return self._broadcast(None)

    def _broadcast(self, units: list[Unit] | None) -> list[Unit] | None:
        import torch

        said = [units]
        torch.distributed.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        return said[0]

    def gather(self, failure: Failure | None) -> list[Failure | None]:
        import torch

        failures: list[Failure | None] = [None] * self.count
        torch.distributed.all_gather_object(failures, failure)
        return failures

    def leave(self) -> None:
        import torch

        torch.distributed.destroy_process_group()
