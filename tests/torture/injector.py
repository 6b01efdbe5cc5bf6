"""The C library of `faults.c`: compiled once, loaded before a process starts, armed in a child after its fork."""

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

CALLS = ("write", "fsync", "rename", "open", "unlink", "mkdir")
WAYS = ("fail", "short", "kill before", "kill after")
NOT_REACHED = "the run ended before the call that was to fail"
VARIABLE = "DATALLOY_FAULTS"


@dataclass(frozen=True)
class Fault:
    """The `number`-th call of one kind goes wrong in one way; `error` is an errno's name, or empty for a kill."""

    call: str
    way: str
    error: str
    number: int

    @property
    def kind(self) -> str:
        return f"{self.call}: {self.error or 'SIGKILL'} ({self.way})"


def kinds() -> list[tuple[str, str, str]]:
    """Call, way and error of all faults there are."""
    found = [(call, way, "") for call in CALLS for way in ("kill before", "kill after")]
    found += [(call, "fail", "EIO") for call in CALLS]
    found += [(call, "fail", "ENOSPC") for call in ("write", "fsync", "rename", "open", "mkdir")]
    return [*found, ("write", "short", "ENOSPC")]


def compiler() -> str | None:
    """A C compiler, where the system is one whose library calls can be replaced."""
    return (shutil.which("cc") or shutil.which("gcc")) if sys.platform == "linux" else None


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that can inject faults; the library is compiled into `folder`."""
    library = folder / "faults.so"
    source = Path(__file__).parent / "faults.c"
    subprocess.run([compiler() or "cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    added = {"LD_PRELOAD": str(library), VARIABLE: str(library), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **added}


def run_child(work: Callable[[], int], folder: Path, faults: Sequence[Fault] = (), log: Path | None = None) -> int:
    """`work` in a forked child, with a fault below `folder`; its exit code, or minus the signal that killed it."""
    child = start_child(work, folder, faults, log)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_child(work: Callable[[], int], folder: Path, faults: Sequence[Fault] = (), log: Path | None = None) -> int:
    """As `run_child`, without waiting for its end; the child's process id."""
    child = os.fork()
    if child:
        return child
    code = 70  # pragma: no cover - the child
    try:
        if log is not None:
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(target, 1)
            os.dup2(target, 2)
        library = ctypes.CDLL(os.environ[VARIABLE])
        for fault in faults:
            call, way = CALLS.index(fault.call), WAYS.index(fault.way)
            error = getattr(errno, fault.error) if fault.error else 0
            library.arm(str(folder).encode(), call, way, error, ctypes.c_long(fault.number))
        code = work()
        for fault in faults:
            calls = library.count(CALLS.index(fault.call))
            library.arm(b"", -1, 0, 0, ctypes.c_long(0))
            sys.stdout.write(f"{NOT_REACHED if calls < fault.number else ''}\n")
    except BaseException:  # noqa: BLE001 - said where the parent looks for it
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def was_killed(code: int) -> bool:
    return code == -signal.SIGKILL
