"""Paths of recipes: shards, saved datasets and their splits, LLaMA-Factory's lists, the hub's cache."""

import json
from pathlib import Path

import pytest

from datalloy.config import load_recipe
from datalloy.errors import DataError, EnvironmentFault
from datalloy.locations import locate
from datalloy.run import fingerprint_parts

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def names(path: str, folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in locate(path).files]


def test_a_plain_path_is_itself(tmp_path):
    assert locate(f"{tmp_path}/a.jsonl").files == (tmp_path / "a.jsonl",)


def test_a_file_whose_name_has_a_number_sign_or_braces_is_that_file(tmp_path):
    touch(tmp_path, "a#b.jsonl", "a{0..1}.jsonl")
    assert names(f"{tmp_path}/a#b.jsonl", tmp_path) == ["a#b.jsonl"]
    assert names(f"{tmp_path}/a{{0..1}}.jsonl", tmp_path) == ["a{0..1}.jsonl"]


def test_shards_are_counted_with_leading_zeros(tmp_path):
    assert names(f"{tmp_path}/s-{{08..11}}.tar", tmp_path) == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]


@pytest.mark.parametrize("braces", ["{3..1}", "{0..9999999}"])
def test_braces_that_count_nothing_are_refused(tmp_path, braces):
    with pytest.raises(DataError, match="counts no shards"):
        locate(f"{tmp_path}/s-{braces}.tar")


def test_a_split_of_a_folder_is_told_by_words_in_its_paths(tmp_path):
    touch(tmp_path, "data/train-00001-of-2.parquet", "data/train-00000-of-2.parquet", "data/test-0.parquet")
    touch(tmp_path, "README.md", ".cache/train-9.parquet", "data/constrained.parquet")
    assert names(f"{tmp_path}#train", tmp_path) == ["data/train-00000-of-2.parquet", "data/train-00001-of-2.parquet"]


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        (["train.jsonl", "test.jsonl"], "", "holds the splits test, train; name one of them"),
        (["train.jsonl", "more.parquet"], "", r"several kinds \(\.jsonl, \.parquet\)"),
        (["train.jsonl"], "#dev", "without a data file of the split dev; splits found: train"),
        (["README.md"], "", "a folder without a data file"),
    ],
)
def test_a_folder_that_is_not_one_set_is_refused(tmp_path, files, path, message):
    touch(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        locate(f"{tmp_path}{path}")


def save(folder: Path, *files: str) -> None:
    touch(folder, *files)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))


def test_a_saved_dataset_lists_its_files_in_order(tmp_path):
    save(tmp_path, "data-1.arrow", "data-0.arrow")
    assert names(str(tmp_path), tmp_path) == ["data-1.arrow", "data-0.arrow"]


def test_a_saved_dataset_cannot_name_files_outside_its_folder(tmp_path):
    save(tmp_path / "in", "data.arrow")
    (tmp_path / "in/state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')
    assert names(str(tmp_path / "in"), tmp_path) == ["in/passwd"]


def test_a_split_of_a_saved_dictionary_is_named_unless_it_is_the_only_one(tmp_path):
    save(tmp_path / "train", "data.arrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert names(str(tmp_path), tmp_path) == names(f"{tmp_path}#train", tmp_path) == ["train/data.arrow"]
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match="has the splits train, test; name one"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (None, "has no dataset 'mine'; it has: other"),
        (
            {"hf_hub_url": "org/name"},
            "hf_hub_url 'org/name', not a file. Nothing is fetched unless",
        ),
        ({"formatting": "alpaca"}, "has no file_name"),
    ],
)
def test_an_entry_that_is_no_file_is_refused(tmp_path, entry, message):
    entries = {"other": {"file_name": "x.json"}, **({"mine": entry} if entry else {})}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match=message):
        locate(f"{tmp_path}/dataset_info.json#mine")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A dataset in the cache of huggingface_hub, and no network."""
    folder = tmp_path / "hub" / "datasets--org--name"
    touch(folder / "snapshots" / COMMIT, "en/train-0.parquet", "en/test-0.parquet")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder / "snapshots" / COMMIT


@pytest.mark.parametrize("address", ["org/name/en#train", f"org/name@{COMMIT}/en#train", "org/name#train"])
def test_a_dataset_of_the_hub_is_read_from_its_cache(hub_cache, address):
    assert names(f"hf://datasets/{address}", hub_cache) == ["en/train-0.parquet"]


def test_a_dataset_that_is_not_to_be_had_says_what_to_do(hub_cache):
    with pytest.raises(EnvironmentFault, match=r"cannot get hf://datasets/org/other from the hub.*HF_TOKEN"):
        locate("hf://datasets/org/other")


@pytest.mark.parametrize("address", ["org", "org/", "/name"])
def test_a_hub_address_without_a_name_is_refused(address):
    with pytest.raises(DataError, match="is no dataset of the hub"):
        locate(f"hf://datasets/{address}")


def parts(tmp_path: Path, path: str) -> dict:
    (tmp_path / "r.yaml").write_text(
        f"name: r\nbase: tiny\ndomains: {{d: {{path: '{path}'}}}}\ntargets: {{t: {{path: t.jsonl}}}}\n"
    )
    return fingerprint_parts(load_recipe(tmp_path / "r.yaml"))


def test_a_fingerprint_covers_every_file_of_a_folder_and_what_a_list_says(tmp_path):
    touch(tmp_path, "set/a.jsonl", "set/b.jsonl")
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "set/a.jsonl"}}')
    before = [parts(tmp_path, path)["inputs"]["domains.d"] for path in ("set", "dataset_info.json#d")]
    (tmp_path / "set/b.jsonl").write_text("{} ")
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "set/a.jsonl", "formatting": "sharegpt"}}')
    now = [parts(tmp_path, path)["inputs"]["domains.d"] for path in ("set", "dataset_info.json#d")]
    assert all(was != is_now for was, is_now in zip(before, now, strict=True))


def test_a_hub_address_stays_as_it_is_in_a_recipe(tmp_path):
    assert parts(tmp_path, "hf://datasets/org/name#train")["inputs"]["domains.d"] == "hf://datasets/org/name#train"
