"""A data path of a recipe in, the files that it names out.

    train.jsonl                               one file
    folder, folder#train                      a saved Hugging Face dataset or a dataset folder, or one split of it
    shards/train-{0000..0003}.tar             numbered shards, as WebDataset names them
    data/dataset_info.json#name               an entry of LLaMA-Factory's list of datasets
    hf://datasets/ORG/NAME[@REVISION]/[FOLDER][#SPLIT]   a dataset of the Hugging Face hub

Only the last form ever uses the network, and only because the recipe asks for it. A folder whose files belong to
several splits is refused until one is named: a test split that slips into the pool is a leak.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from datalloy.errors import DataError, EnvironmentFault
from datalloy.regular_files import read_regular

HUB = "hf://datasets/"
ENTRY_FILE = "dataset_info.json"
DATA_SUFFIXES = (".parquet", ".arrow", ".tar", ".jsonl", ".ndjson", ".json")
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
MAX_SHARDS = 1_000_000
MAX_LIST_BYTES = 64 * 1024 * 1024

_NOT_DATA = (ENTRY_FILE, "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Located:
    """The files of one source in reading order, and where its relative image paths start by default.

    `entry` is what LLaMA-Factory's list says about the dataset; it is empty for everything else.
    """

    files: tuple[Path, ...]
    root: Path
    is_folder: bool = False
    entry: dict[str, Any] = field(default_factory=dict)


def locate(path: str) -> Located:
    """What a `path` of a recipe names. Raises DataError with what was found and what is wanted."""
    if path.startswith(HUB):
        return _in_hub(path)
    whole, (place, _, name) = Path(path), path.rpartition("#")
    if whole.is_dir():
        return _in_folder(whole, "")
    if not place or whole.exists():
        return Located(_shards(path), whole.parent)
    if Path(place).is_dir():
        return _in_folder(Path(place), name)
    if Path(place).name.endswith(".json") and Path(place).exists():
        return _in_list(Path(place), name)
    return Located(_shards(path), whole.parent)


def locate_or_missing(path: str) -> Located:
    """As `locate`; what cannot be located is one file that is not there: to refuse it is the reader's part."""
    try:
        return locate(path)
    except DataError:
        return Located((Path(path),), Path(path).parent)


def _shards(path: str) -> tuple[Path, ...]:
    """One path for each number in `{0000..0003}`, in order; the path itself where there are no braces."""
    match = _NUMBERS.search(path)
    if match is None or Path(path).exists():
        return (Path(path),)
    first, last = match.groups()
    if not int(first) <= int(last) < int(first) + MAX_SHARDS:
        raise DataError(f"{path}: {match.group()} counts no shards; wanted: {{FIRST..LAST}}, as in {{0000..0003}}")
    width = len(first)
    numbers = range(int(first), int(last) + 1)
    return tuple(Path(f"{path[: match.start()]}{n:0{width}d}{path[match.end() :]}") for n in numbers)


# --- folders ---------------------------------------------------------------------------------------------------------


def _in_folder(folder: Path, split: str) -> Located:
    if (folder / "dataset_dict.json").is_file():
        return _saved(folder / _only_split(folder, _json(folder / "dataset_dict.json").get("splits"), split))
    if (folder / "state.json").is_file():
        if split:
            raise DataError(f"{folder} is one saved dataset and has no split {split}; leave #{split} out")
        return _saved(folder)
    names = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix in DATA_SUFFIXES and path.name not in _NOT_DATA and path.is_file()
    ]
    chosen = _of_split(str(folder), [name for name in names if "/." not in f"/{name}"], split)
    return Located(tuple(folder / name for name in chosen), folder, is_folder=True)


def _saved(folder: Path) -> Located:
    """A dataset as `save_to_disk` of Hugging Face datasets writes it: Arrow files listed in state.json."""
    files = _json(folder / "state.json").get("_data_files")
    try:
        names = [Path(file["filename"]).name for file in files]  # type: ignore[union-attr]
    except (TypeError, KeyError):
        raise DataError(f"{folder / 'state.json'} lists no data files; save the dataset anew") from None
    return Located(tuple(folder / name for name in names), folder, is_folder=True)


def _only_split(folder: Path, splits: Any, split: str) -> str:
    known = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
    chosen = split or (known[0] if len(known) == 1 else "")
    if chosen not in known:
        raise DataError(
            f"{folder} has the splits {', '.join(known) or '(none)'}; name one of them, as in {folder}#train"
        )
    return chosen


def _of_split(where: str, names: Sequence[str], split: str) -> list[str]:
    """The data files of one split by name order, all of one kind. Splits are told by words in the files' paths."""
    chosen = sorted(name for name in names if not split or split in _words(name))
    kinds = {PurePosixPath(name).suffix for name in chosen}
    found = sorted({word for name in names for word in _words(name) if word in SPLITS})
    if not chosen:
        raise DataError(
            f"{where} is a folder without a data file{f' of the split {split}' if split else ''}; splits found: "
            f"{', '.join(found) or 'none'}; wanted: files that end in {', '.join(DATA_SUFFIXES)}"
        )
    if len(kinds) > 1:
        raise DataError(f"{where} holds files of several kinds ({', '.join(sorted(kinds))}); name one file or folder")
    if not split and len(found) > 1:
        raise DataError(f"{where} holds the splits {', '.join(found)}; name one of them, as in {where}#{found[-1]}")
    return chosen


def _words(name: str) -> list[str]:
    return re.split(r"[-_./]|(?<=[a-z])(?=\d)", name.lower())


# --- LLaMA-Factory's list, the hub -----------------------------------------------------------------------------------


def _in_list(path: Path, name: str) -> Located:
    entries = _json(path)
    entry = entries.get(name)
    if not isinstance(entry, dict):
        shown = ", ".join(list(entries)[:20]) or "none"
        raise DataError(f"{path} has no dataset {name!r}; it has: {shown}")
    if hub := next((key for key in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url") if key in entry), None):
        raise DataError(
            f"{path}#{name} is {hub} {entry[hub]!r}, not a file. Nothing is fetched unless the recipe names it: give "
            f"its path as {HUB}ORG/NAME, or download it"
        )
    file = entry.get("file_name")
    if not isinstance(file, str):
        raise DataError(f"{path}#{name} has no file_name; only datasets in files can be read")
    target = path.parent / file
    if not _is_inside(target, path.parent):
        raise DataError(
            f"{path}#{name} names the file {file!r:.200}, which lies outside the list's folder; a list of "
            "somebody else must not say what is read: move the file there, or give its path in the recipe"
        )
    if not target.is_dir():
        return Located((target,), path.parent, entry=entry)
    inside = _of_split(str(target), [p.name for p in target.iterdir() if p.suffix in DATA_SUFFIXES], "")
    return Located(tuple(target / inner for inner in inside), path.parent, entry=entry)


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # a NUL
        return False


def _in_hub(path: str) -> Located:
    address, _, split = path.removeprefix(HUB).partition("#")
    parts = address.strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise DataError(f"{path} is no dataset of the hub; wanted: {HUB}ORG/NAME[@REVISION]/[FOLDER][#SPLIT]")
    name, _, revision = parts[1].partition("@")
    return _in_folder(_download(f"{parts[0]}/{name}", revision or None, "/".join(parts[2:])), split)


def _download(dataset: str, revision: str | None, inside: str) -> Path:
    """The folder of a hub dataset in the cache of huggingface_hub, which fetches only what it lacks."""
    from huggingface_hub import snapshot_download

    patterns = [f"{inside}/*"] if inside else None
    try:
        folder = snapshot_download(dataset, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except (OSError, ValueError) as error:  # its errors are one or the other: no network, no such dataset, no access
        raise EnvironmentFault(
            f"cannot get {HUB}{dataset} from the hub: {error}. Check name, access (HF_TOKEN) and network, or give a "
            "downloaded copy as path"
        ) from None
    return Path(folder) / inside


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_regular(path, max_bytes=MAX_LIST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__}, an object is wanted")
    return value
