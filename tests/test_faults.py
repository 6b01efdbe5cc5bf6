"""Every single write, fsync, rename, open, unlink and mkdir of a small run goes wrong once, in every way there is.

The disk is full, the disk is broken, the process is killed before the call and after it. The run ends with exit code 4
and names the file, or is dead; started again it ends with the bytes of an undisturbed run, and nothing that had a
done-record is done again. `make torture` does the same to the whole chain.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from torture import injector

needs_compiler = pytest.mark.skipif(injector.compiler() is None, reason="needs Linux and a C compiler named cc")


@pytest.fixture
def world():
    """A folder in memory where there is one: thousands of fsyncs would wait for a disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@needs_compiler
def test_a_fault_at_any_call_of_any_kind_costs_nothing_that_was_finished(world, tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "torture.toy", str(world)],
        env=injector.environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    faults = json.loads(finished.stdout)
    assert len(faults) == len(injector.kinds())
    assert all(count >= 1 for count in faults.values()), faults
    assert sum(faults.values()) > 150, faults
