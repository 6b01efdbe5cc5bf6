"""One run, one folder: a recipe in, a locked folder out whose finished work is never done twice.

Work is done in units (a shard of scores, one trained model). A unit's files are written to temporary names,
synced, renamed (`durable`), and only then is its done-record written, with the SHA-256 of every file: a unit exists
exactly when its record verifies. Killing a run at any point and starting it again repeats nothing that has a record.

The fingerprint covers everything that can change a result: the resolved recipe, the data files, the models and
the versions of the libraries that compute. What is left out is listed in `NOT_IN_FINGERPRINT`, and tests show
that results do not depend on it. Trap: the lock is one of the local kernel; a run folder on a network file system that
two machines use at once is not protected.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datalloy.config import DEITA_MODELS, Recipe
from datalloy.durable import (
    clear_leftovers,
    digest,
    disk_faults,
    file_hash,
    sync_file,
    sync_folder,
    write_atomically,
    write_json,
)
from datalloy.errors import DatalloyError, EnvironmentFault, RunError, RunInUseError
from datalloy.events import EVENTS, EventLog
from datalloy.locations import HUB, locate_or_missing
from datalloy.progress import listening
from datalloy.strict_yaml import dump_yaml
from datalloy.tiny.model import WEIGHTS

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
NOT_IN_FINGERPRINT = (
    "data_root",  # where data lie changes nothing; what is in the files is hashed
    "max_rejected_fraction",  # whether a run goes on or is refused, not what it computes
    "score.batch_size",
    "evaluate.batch_size",
    "export",  # the same rows for other trainers
    "train.micro_batch_size",
    "train.report_to",
    # how hard and where it is tried to get an answer, never what is asked
    "judge.api_key_env",
    "judge.max_concurrency",
    "judge.retries",
    "judge.retry_seconds",
    "judge.timeout_seconds",
    "judge.deadline_seconds",
    "judge.breaker_failures",
    "judge.cache",
    "engine",  # who does the work
    "ray",
)
LIBRARIES = ("torch", "transformers", "peft", "numpy", "scikit-learn", "pillow", "pyarrow")
LOCK, PROVENANCE, CONFIG = "run.lock", "provenance.json", "config.yaml"


def fingerprint_parts(recipe: Recipe) -> dict[str, Any]:
    """Everything that can change a result, as plain data whose differences can be shown.

    A file that is not there is "missing": to refuse it is the reader's part. Price: every data file and local
    checkpoint is read once, about a second a gigabyte.
    """
    settings = recipe.dump()
    for dotted in NOT_IN_FINGERPRINT:
        section, _, key = dotted.rpartition(".")
        if section not in settings or settings[section] is not None:  # a section may be absent
            del (settings[section] if section else settings)[key]
    inputs = {}
    for section in ("domains", "targets", "evaluation"):
        for name, source in settings[section].items():
            inputs[f"{section}.{name}"] = source_hash(source.pop("path"))
            source.pop("media_root")  # pictures are hashed with their samples
    for key in ("base", "proxy"):
        if settings[key]:
            inputs[key] = _model_hash(settings.pop(key))
    for key in DEITA_MODELS:
        if settings["deita"][key]:
            inputs[f"deita.{key}"] = _model_hash(settings["deita"].pop(key))
    return {
        "recipe": settings,
        "inputs": inputs,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "datalloy": importlib.metadata.version("datalloy"),
    }


def source_hash(path: str) -> str:
    """Hash of a source's files: of one file its own, of several that of their hashes in order; or the hub address.

    What a list of LLaMA-Factory says about a file is part of what is read.
    """
    if path.startswith(HUB):
        return path
    located = locate_or_missing(path)
    hashes = [file_hash(file) if file.is_file() else "missing" for file in located.files]
    return hashes[0] if len(hashes) == 1 and not located.entry else digest([hashes, located.entry])


def _model_hash(model: str) -> str:
    """Hash of the names and contents of a local checkpoint's files, cards and hidden ones left out; or the hub id."""
    folder = WEIGHTS if model == "tiny" else Path(model)
    if not folder.is_dir():
        return model
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return digest({n: file_hash(folder / n) for n in names if not n.endswith(".md") and "/." not in f"/{n}"})


def differences(old: dict[str, Any], new: dict[str, Any], under: str = "") -> list[str]:
    """The leaves in which two nested dicts differ, one readable line each; all stand `under` a key."""
    before, now = dict(leaves(old, under)), dict(leaves(new, under))
    changes = {key: (before.get(key, "absent"), now.get(key, "absent")) for key in sorted(before.keys() | now.keys())}
    return [f"  {key}: {was} before, {is_now} now" for key, (was, is_now) in changes.items() if was != is_now]


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dicts."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inner in value.items():
        yield from leaves(inner, f"{key}.{name}" if key else name)


def take_lock(folder: Path) -> int:
    """The descriptor of a folder's lock; closing it, or ending the process, gives it back. Raises RunInUseError."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise RunInUseError(f"{folder} is in use by {holder}; wait for it or stop it") from None
    except OSError as error:
        os.close(lock)
        raise EnvironmentFault(
            f"{folder} cannot be locked ({error}); put the run on a disk of this machine with --run"
        ) from error
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:
        os.close(lock)
        raise
    return lock


class Run:
    """An open run folder. Use it as a context manager: the folder is locked while it is open.

    Opening raises RunInUseError where another process has it open, and RunError where the folder is not a run, or
    holds results of another recipe, input or version. A folder in which nothing is finished yet is taken over, so
    that a recipe whose first attempt was refused can be mended.
    """

    def __init__(self, recipe: Recipe, folder: str | Path | None = None) -> None:
        self.recipe = recipe
        self._parts = fingerprint_parts(recipe)
        self.fingerprint = digest(self._parts)
        self.folder = Path(folder) if folder else Path("runs") / f"{recipe.name}-{self.fingerprint[:8]}"
        self._lock: int | None = None
        self._records = True
        self._heard = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        try:
            self._make_folder()
            self._lock = take_lock(self.folder)
            self._check_provenance()
            clear_leftovers(self.folder)
            self._heard.enter_context(listening(EventLog(self.path(EVENTS))))
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError) and not isinstance(error, DatalloyError):
                raise EnvironmentFault(f"{self.folder} cannot be opened as a run folder: {error}") from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._heard.close()
        if self._lock is not None:
            os.close(self._lock)  # the kernel releases the lock with the descriptor, also when we are killed
            self._lock = None

    def join(self) -> "Run":
        """The folder for a worker of the process that has it open: nothing is locked, checked or cleaned up.

        Raises RunError where this machine sees no such run, or would compute something else: other data, other
        versions.
        """
        if not self.path(PROVENANCE).exists():
            raise RunError(
                f"{self.folder.resolve()} holds no run as seen from {socket.gethostname()}; all machines have to see "
                "one run folder under one path"
            )
        before = read_provenance(self.path(PROVENANCE))
        if before["fingerprint"] != self.fingerprint:
            changes = "\n".join(differences(before["parts"], self._parts))
            raise RunError(f"{socket.gethostname()} would not compute the same as who opened {self.folder}:\n{changes}")
        return self

    @contextlib.contextmanager
    def looking_on(self) -> Iterator[None]:
        """Meanwhile `commit` records nothing: another process takes part in the same unit and records it."""
        self._records = False
        try:
            yield
        finally:
            self._records = True

    def _make_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"{self.folder} is not a folder; name another one with --run")
        self.folder.mkdir(parents=True, exist_ok=True)
        is_ours = self.path(LOCK).exists() or self.path(PROVENANCE).exists()
        if not is_ours and any(self.folder.iterdir()):
            raise RunError(f"{self.folder} is not empty and not a run of Datalloy; name another folder with --run")

    def _check_provenance(self) -> None:
        path = self.path(PROVENANCE)
        if path.exists():
            before = read_provenance(path)
            if before["fingerprint"] == self.fingerprint:
                if not self._matches(CONFIG, before["config"]):
                    log.warning("%s is damaged or missing; it is written again", self.path(CONFIG))
                    self._write_provenance()
                return
            if any(self.path("units").glob("*.json")):
                changes = "\n".join(differences(before["parts"], self._parts))
                raise RunError(
                    f"{self.folder} belongs to another recipe, input or version:\n{changes}\n"
                    "Its results would not be comparable; name another folder with --run"
                )
        self._write_provenance()

    def _write_provenance(self) -> None:
        write_atomically(self.path(CONFIG), dump_yaml(self.recipe.dump()).encode())
        record = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "parts": self._parts,
            "config": file_hash(self.path(CONFIG)),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "host": socket.gethostname(),
            "cores": os.cpu_count(),
        }
        write_json(self.path(PROVENANCE), {**record, "sha256": digest(record)})

    def verify_inputs(self) -> None:
        """Raise RunError where an input file is not what it was when the run was opened, naming it.

        What was computed after it changed is worth nothing, and nobody would know. Price: every data file and local
        checkpoint is read once more.
        """
        now = fingerprint_parts(self.recipe)
        if changes := differences(self._parts["inputs"], now["inputs"], "inputs"):
            raise RunError(
                f"inputs of {self.folder} changed while it was running:\n" + "\n".join(changes) + "\n"
                "What it holds cannot be trusted; put the files back and run it in another folder with --run"
            )

    def path(self, name: str) -> Path:
        """Where the run keeps `name`, an artefact's path inside its folder."""
        return self.folder / name

    def finished(self, unit: str) -> dict[str, Any] | None:
        """The data of a unit's done-record when it and all its files are there and unchanged, else None.

        A file that no longer matches is moved to the folder `damaged`, said in the log, and the unit is to be made
        again. Price: the unit's files are read once.
        """
        path = self._record(unit)
        if not path.exists():
            return None
        record = _read_record(path)
        if record is None:
            log.warning("%s is damaged; the unit %s is made again", path, unit)
            path.unlink()
            return None
        mismatched = [name for name, sha256 in record["files"].items() if not self._matches(name, sha256)]
        if not mismatched and record["fingerprint"] == self.fingerprint:
            return record["data"]
        for name in mismatched:
            log.warning("%s does not match its done-record; the unit %s is made again", self.path(name), unit)
            self._set_aside(name)
        path.unlink()
        return None

    def commit(self, unit: str, files: Sequence[Path], data: dict[str, Any] | None = None) -> dict[str, Any]:
        """Record that a unit is done; returns `data` as a later `finished` will.

        `files` may name folders: all files in them are covered. They are on disk before the record is.
        """
        covered = sorted({path for file in files for path in _files_in(file)})
        with disk_faults(self._record(unit)):
            for path in covered:
                sync_file(path)
            for folder in {path.parent for path in covered}:
                sync_folder(folder)
        record = {
            "unit": unit,
            "fingerprint": self.fingerprint,
            "files": {str(path.relative_to(self.folder)): file_hash(path) for path in covered},
            "data": json.loads(json.dumps(data or {})),
        }
        if self._records:
            write_json(self._record(unit), {**record, "sha256": digest(record)})
        return record["data"]

    def once(self, unit: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The data of a unit that leaves no files: as recorded, or measured now and recorded with its `seconds`."""
        done = self.finished(unit)
        if done is None:
            started = time.monotonic()
            measured = measure()
            done = self.commit(unit, [], {**measured, "seconds": time.monotonic() - started})
        return done

    def _record(self, unit: str) -> Path:
        return self.path(f"units/{unit.replace('/', '--')}.json")

    def _matches(self, name: str, sha256: str) -> bool:
        return self.path(name).is_file() and file_hash(self.path(name)) == sha256

    def _set_aside(self, name: str) -> None:
        if self.path(name).exists():
            target = self.path("damaged") / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self.path(name).replace(target)


def read_provenance(path: Path) -> dict[str, Any]:
    """What `provenance.json` says of a run. Raises RunError where it is damaged or of another schema version."""
    damaged = RunError(
        f"{path} is damaged or not of Datalloy; what the folder holds cannot be told, so name another one with --run"
    )
    try:
        before = json.loads(path.read_bytes())
        version = before["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if version != SCHEMA_VERSION:
        raise RunError(
            f"{path.parent} was written in schema {version}, this version reads {SCHEMA_VERSION}; go on with the "
            "version that wrote it (see provenance.json), or name another folder with --run"
        )
    if before.pop("sha256", None) != digest(before):
        raise damaged
    return before


def _read_record(path: Path) -> dict[str, Any] | None:
    """A done-record, or None where it does not match its own checksum."""
    try:
        record = json.loads(path.read_bytes())
        sha256 = record.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return record if sha256 == digest(record) else None


def _files_in(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (inner for inner in path.rglob("*") if inner.is_file())
    else:
        yield path
