"""A workflow that gets lost, for the tests of the Ray engine: a module that Ray's processes can import."""

import os
import signal
from pathlib import Path

from datalloy.run import Run
from datalloy.workflows import Workflow


class Mortal(Workflow):
    """A workflow whose process is killed, once in a run, when it has scored one shard and begins the next."""

    scored = 0

    def perform(self, unit, coming=None):
        if self.scored == 1 and not self.run.path("died").exists():
            self.run.path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().perform(unit, coming)
        self.scored += unit.kind == "score"


def open_mortal(recipe, folder: Path) -> Mortal:
    return Mortal(Run(recipe, folder).join())
