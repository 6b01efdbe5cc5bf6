"""One run, one folder: a recipe in, a locked folder out whose finished work is never done twice.

Work is done in units (a shard of scores, one trained model). A unit's files are written to temporary names,
synced, renamed, and only then is its done-record written, with the SHA-256 of every file: a unit exists exactly
when its record verifies. Killing a run at any point and starting it again repeats nothing that has a record.

The fingerprint covers everything that can change a result: the resolved recipe, the data files, the models and
the versions of the libraries that compute. What is left out is listed in `NOT_IN_FINGERPRINT`, and tests show
that results do not depend on it.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datalloy import config
from datalloy.errors import RunError, RunInUseError

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
NOT_IN_FINGERPRINT = ("score.batch_size", "evaluate.batch_size", "train.micro_batch_size", "train.report_to")
LIBRARIES = ("torch", "transformers", "peft", "numpy", "scikit-learn", "pillow", "pyarrow")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either complete under its name or not there at all, power loss included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_parts(recipe: config.Recipe) -> dict[str, Any]:
    """Everything that can change a result, as plain data whose differences can be shown."""
    resolved = recipe.dump()
    for dotted in NOT_IN_FINGERPRINT:
        section, key = dotted.split(".")
        del resolved[section][key]
    del resolved["data_root"]  # where data lie changes nothing; what is in the files is hashed below
    inputs = {}
    for section in ("domains", "targets", "evaluation"):
        for name, source in resolved[section].items():
            path = Path(source.pop("path"))
            inputs[f"{section}.{name}"] = file_hash(path) if path.is_file() else "missing"
            source.pop("media_root")
    for key in ("base", "proxy"):
        if resolved[key]:
            inputs[key] = _model_hash(resolved.pop(key))
    return {
        "recipe": resolved,
        "inputs": inputs,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "datalloy": importlib.metadata.version("datalloy"),
    }


def _model_hash(model: str) -> str:
    """Hash of a local checkpoint's files (names, sizes, and the contents of all but the weights), or the hub id."""
    from datalloy.tiny.model import WEIGHTS

    folder = WEIGHTS if model == "tiny" else Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def fingerprint(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """The leaves in which two fingerprints differ, one readable line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(old.keys() | new.keys()):
            lines += differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        return lines
    return [] if old == new else [f"  {key}: {old!r} before, {new!r} now"]


class Run:
    """An open run folder. Use it as a context manager: the folder is locked while it is open."""

    def __init__(self, recipe: config.Recipe, folder: Path | None = None) -> None:
        parts = fingerprint_parts(recipe)
        self.recipe = recipe
        self.fingerprint = fingerprint(parts)
        self.folder = Path(folder) if folder else Path("runs") / f"{recipe.name}-{self.fingerprint[:8]}"
        self._parts = parts
        self._lock: int | None = None

    def __enter__(self) -> "Run":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 200).decode(errors="replace").strip()
            os.close(self._lock)
            raise RunInUseError(f"{self.folder} is in use by {holder}; wait for it or stop it") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            self._check_fingerprint()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)  # the kernel releases the lock with the descriptor, also when we are killed
            self._lock = None

    def _check_fingerprint(self) -> None:
        path = self.folder / "provenance.json"
        if path.exists():
            before = json.loads(path.read_text())
            if before["schema_version"] != SCHEMA_VERSION:
                raise RunError(
                    f"{self.folder} was written in schema {before['schema_version']}, this version reads "
                    f"{SCHEMA_VERSION}; start a new run with --run"
                )
            if before["fingerprint"] != self.fingerprint:
                changes = "\n".join(differences(before["parts"], self._parts))
                raise RunError(
                    f"{self.folder} belongs to another recipe, input or version:\n{changes}\n"
                    "Its results would not be comparable; name another folder with --run"
                )
            return
        if any(self.folder.iterdir()) and {p.name for p in self.folder.iterdir()} != {"run.lock"}:
            raise RunError(f"{self.folder} is not empty and not a run of Datalloy; name another folder with --run")
        write_atomically(self.folder / "config.yaml", config.dump_yaml(self.recipe.dump()).encode())
        write_json(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "fingerprint": self.fingerprint,
                "parts": self._parts,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "host": socket.gethostname(),
                "cores": os.cpu_count(),
            },
        )

    def path(self, name: str) -> Path:
        return self.folder / name

    def finished(self, unit: str) -> dict[str, Any] | None:
        """The data of a unit's done-record when its files are all there and unchanged, else None.

        A file that no longer matches its record is moved aside to `*.damaged`, said in the log, and made again.
        """
        record_path = self._record(unit)
        if not record_path.exists():
            return None
        try:
            record = json.loads(record_path.read_text())
            sound = record["fingerprint"] == self.fingerprint
        except (ValueError, KeyError):
            sound, record = False, {"files": {}}
        for name, digest in record["files"].items():
            path = self.folder / name
            if not path.exists() or file_hash(path) != digest:
                log.warning("%s does not match its done-record; the unit %s is made again", path, unit)
                if path.exists():
                    os.replace(path, path.with_name(path.name + ".damaged"))
                sound = False
        if not sound:
            record_path.unlink()
            return None
        return record["data"]

    def commit(self, unit: str, files: Sequence[Path], data: dict[str, Any] | None = None) -> dict[str, Any]:
        """Record that a unit is done. `files` may name folders: all files in them are covered."""
        covered = sorted({path for file in files for path in _files_in(file)})
        record = {
            "unit": unit,
            "fingerprint": self.fingerprint,
            "files": {str(path.relative_to(self.folder)): file_hash(path) for path in covered},
            "data": data or {},
        }
        write_json(self._record(unit), record)
        return record["data"]

    def _record(self, unit: str) -> Path:
        return self.folder / "units" / f"{unit.replace('/', '--')}.json"


def _files_in(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (p for p in path.rglob("*") if p.is_file())
    else:
        yield path
