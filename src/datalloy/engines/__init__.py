"""Units of work in, their done-records in the run folder out, whoever does them.

Three engines: this process (`LocalEngine`), a Ray cluster (`on_ray.py`), the processes that torchrun started
(`processes.py`). A unit is the same in all of them: named by its done-record, done by `Worker.perform`, which writes
its files atomically and the record last. So a unit does not depend on who does it, doing it twice is harmless, and what
a lost worker has left behind is what a killed run leaves behind: nothing, or a finished unit.

The price: all workers see the run folder and the data under the same paths, and each reads the pool for itself. The
trap: only a unit's own record is a worker's to write; what several units need (the proxy, the probes) is done before.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from datalloy import errors
from datalloy.progress import track
from datalloy.run import Run

__all__ = ["Engine", "Failure", "LocalEngine", "Unit", "Worker", "complete"]


@dataclass(frozen=True)
class Unit:
    """One unit of work. `name` is that of its done-record; `work`, with plain arguments, tells a worker what to do.

    `kind` tells an engine how to spread it: score, many on one loaded model; measure, a short one on a model; train, a
    training, which several processes may also share.
    """

    name: str
    kind: Literal["score", "measure", "train"]
    work: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Failure:
    """What a unit raised in another process, as plain text: no code and no object of a worker is loaded here."""

    kind: str  # name of a class in datalloy.errors, or empty
    message: str
    where: str

    @classmethod
    def of(cls, error: Exception, place: str) -> "Failure":
        """`place`: who did it, and what."""
        names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__]
        if not names and isinstance(error, OSError | MemoryError):
            names = [errors.EnvironmentFault.__name__]
        message = str(error) if names else f"{type(error).__name__}: {error}"
        return cls(names[0] if names else "", message, f"{place}:\n{''.join(traceback.format_tb(error.__traceback__))}")

    def error(self) -> Exception:
        """The same error again: its class where it is one of ours, else RuntimeError."""
        kind: type[Exception] = getattr(errors, self.kind) if self.kind else RuntimeError
        raised = kind(self.message)
        raised.add_note(self.where)
        return raised


class Worker(Protocol):
    """Who does units: a workflow on the run folder."""

    run: Run

    def perform(self, unit: Unit, coming: Unit | None = None) -> None:
        """Do the unit and commit its done-record; `coming` is what is likely to be asked for next."""
        ...


class Engine(Protocol):
    """How units are spread over workers.

    The contract (tests/test_engines.py): every unit is performed, in whatever order, and what a unit writes is equal to
    the byte in all engines. An error of the work itself ends the call and is not tried again; a worker that is lost is
    replaced and its unit done again, a few times.
    """

    def complete(self, units: Sequence[Unit], label: str) -> None:
        """Perform the units, with `label` shown as progress."""
        ...

    def close(self) -> None:
        """Let the workers go."""
        ...


class LocalEngine:
    """All units in this process, one after the other."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def complete(self, units: Sequence[Unit], label: str) -> None:
        following = [*units[1:], None]
        for unit, coming in track(zip(units, following, strict=True), label, len(units)):
            self._worker.perform(unit, coming)

    def close(self) -> None:
        """There is nobody to let go."""


def complete(engine: Engine, run: Run, units: Sequence[Unit], label: str) -> None:
    """See to it that every unit has a done-record. Raises RunError where a worker's record is not seen here."""
    pending = [unit for unit in units if run.finished(unit.name) is None]
    if not pending:
        return
    engine.complete(pending, label)
    for unit in pending:
        if run.finished(unit.name) is None:
            raise errors.RunError(
                f"{unit.name} was done by a worker, but {run.folder} holds no record of it; all machines have to see "
                "one run folder under one path, such as a network file system"
            )
