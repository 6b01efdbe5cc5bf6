"""A worker whose work is a line of text: what the tests of the engines drive, light to import in Ray's processes."""

import os
import signal
from pathlib import Path

from datalloy.engines import Unit
from datalloy.errors import AgreementError
from datalloy.run import Run, write_atomically


class Writer:
    """Does `write` by a file, `fail` by an error, `die` by killing its own process the first time it is asked."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def perform(self, unit: Unit, coming: Unit | None = None) -> None:
        with self.run.path("performed.log").open("a") as file:
            file.write(f"{unit.name} {os.getpid()}\n")
        if unit.work == "fail":
            raise AgreementError(f"{unit.name} disagrees")
        if unit.work == "die" and not self.run.path("died").exists():
            self.run.path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        path = self.run.path(f"{unit.name}.txt")
        write_atomically(path, repr(unit.arguments).encode())
        self.run.commit(unit.name, [path], {"arguments": list(unit.arguments)})


def open_writer(recipe, folder: Path) -> Writer:
    return Writer(Run(recipe, folder).join())
