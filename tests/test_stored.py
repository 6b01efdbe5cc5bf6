"""Samples that stay on disk: the same as those that are held, found again, checked when they are read again."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datalloy.config import DataSource
from datalloy.errors import DataError
from datalloy.exporters import export_rows
from datalloy.readers import Samples, origins, read_all, read_stored
from datalloy.readers.origins import Origins
from datalloy.readers.stored import REMEMBERED, StoredSample
from datalloy.sample import Origin


def row(number: int, **more: object) -> bytes:
    turns = [{"role": "user", "content": f"What is {number}+1?"}, {"role": "assistant", "content": str(number + 1)}]
    return json.dumps({"messages": turns, **more}, ensure_ascii=False).encode()


def write(folder: Path, *lines: bytes, name: str = "pool.jsonl") -> DataSource:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\n".join(lines))
    return DataSource(path=str(folder / name))


STRANGE = (
    b"\xef\xbb\xbf" + row(0, id="first"),
    b"",
    row(1, id="Bär \u2028"),
    b"{bad",
    row(2) + b"\r",
    row(2),
    row(3, id="first"),
    row(2),
    b"  ",
    row(4, id=7),
)


@pytest.fixture
def strange(tmp_path) -> DataSource:
    """A mark, empty lines, bad ones, no ids, copies, an id twice, no newline at the end."""
    return write(tmp_path, *STRANGE)


def test_stored_samples_are_those_that_are_held(strange):
    for source in (strange, strange.model_copy(update={"skip": 2, "limit": 2})):
        held, rejects = read_all(source, "d")
        stored, rejects_of_stored = read_stored(source, "d")
        assert [*stored] == held
        assert held == [*stored]
        assert isinstance(stored[0], StoredSample)
        assert rejects_of_stored == rejects
        assert stored.ids().to_pylist() == [sample.id for sample in held]
        assert stored.domains().to_pylist() == ["d"] * len(held)
        assert [digest.tobytes().hex() for digest in stored.hashes()] == [sample.content_hash for sample in held]
        assert [*stored.content_hashes()] == [sample.content_hash for sample in held]


def test_samples_of_a_folder_know_their_files(tmp_path):
    write(tmp_path / "many", *STRANGE, name="a.jsonl")
    write(tmp_path / "many", row(7, id="other"), row(8), name="b.jsonl")
    source = DataSource(path=str(tmp_path / "many"))
    assert [*read_stored(source, "d")[0]] == read_all(source, "d")[0]


def test_an_array_is_held(tmp_path):
    source = write(tmp_path, b"[" + row(1) + b"," + row(2) + b"]", name="pool.json")
    stored, _ = read_stored(source, "d")
    assert [*stored] == read_all(source, "d")[0]
    (tmp_path / "pool.json").unlink()
    assert [sample.answer for sample in stored] == ["2", "3"]


def test_a_stored_sample_survives_pickling_without_its_file(strange):
    stored, _ = read_stored(strange, "d")
    again = pickle.loads(pickle.dumps(stored[1]))
    Path(strange.path).unlink()
    assert again.turns[1].text == "2"
    assert hash(again) == hash(stored[1])


@pytest.mark.parametrize("change", [b"{}", row(9, id="first"), b""], ids=["short", "other", "empty"])
def test_a_row_that_changed_is_refused_when_it_is_read_again(tmp_path, change):
    source = write(tmp_path, row(0, id="first"), row(1, id="second"))
    stored, _ = read_stored(source, "d")
    write(tmp_path, change, row(1, id="second"))
    with pytest.raises(DataError, match=r"pool\.jsonl:1 is not what was read there"):
        _ = stored[0].turns


def test_a_file_that_another_thread_lets_go_is_open_until_it_is_read(tmp_path, monkeypatch):
    stored, _ = read_stored(write(tmp_path, row(1), row(2, id="second")), "d")
    read, files = os.pread, stored._sources[0]._file

    def read_late(*place):
        files.cache_clear()
        return read(*place)

    monkeypatch.setattr(os, "pread", read_late)
    assert [sample.answer for sample in stored] == ["2", "3"]


def test_a_row_whose_picture_is_gone_is_refused_when_it_is_read_again(tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Nothing."}]
    source = write(tmp_path, json.dumps({"messages": turns, "images": ["a.png"]}).encode())
    stored, _ = read_stored(source, "d")
    assert stored[0].images == read_all(source, "d")[0][0].images
    (tmp_path / "a.png").unlink()
    stored._sources[0].turns.cache_clear()
    with pytest.raises(DataError, match=r"pool\.jsonl:1 was a sample and is none any more \(image_missing"):
        _ = stored[0].turns


def test_only_the_rows_asked_for_last_are_remembered(tmp_path):
    count = REMEMBERED + 50
    stored, _ = read_stored(write(tmp_path, *[row(i) for i in range(count)]), "d")
    assert [sample.answer for sample in stored] == [str(i + 1) for i in range(count)]
    assert stored._sources[0].turns.cache_info().currsize == REMEMBERED


def test_a_row_costs_some_ten_bytes_beside_its_id_and_hash(tmp_path):
    """Columns, not objects: measured as what is allocated for them."""
    stored, _ = read_stored(write(tmp_path, *[row(i, id=f"row-{i:06d}") for i in range(5000)]), "d")
    (source,) = stored._sources
    known = source._origins
    columns = (known._text, known._starts, known._rows, known._lines)
    columns += (source._hashes, source._starts, source._sizes, source._checksums)
    assert sum(map(sys.getsizeof, columns)) / 5000 < 100


def test_samples_of_several_sources_are_found_in_any_order(tmp_path):
    first, _ = read_stored(write(tmp_path / "a", *[row(i, id=f"{9 - i}") for i in range(10)]), "a")
    second = Samples.of(read_all(write(tmp_path / "b", row(50, id="x"), row(51, id="X")), "b")[0])
    joined = Samples.joined([first.by_id(), second.by_id()])
    assert joined.ids().to_pylist() == [*"0123456789", "X", "x"]
    assert joined.domains().to_pylist() == ["a"] * 10 + ["b"] * 2
    assert [(sample.id, sample.domain) for sample in joined[8:11]] == [("8", "a"), ("9", "a"), ("X", "b")]
    taken = joined.take(np.array([11, 0, 11]))
    assert [sample.answer for sample in taken] == ["51", "10", "51"]
    assert [digest.tobytes().hex() for digest in taken.hashes()] == [sample.content_hash for sample in taken]
    assert len(Samples.joined([])) == 0
    assert Samples.joined([]).ids().to_pylist() == Samples.joined([]).domains().to_pylist() == []


def test_stored_rows_are_exported_byte_for_byte_in_any_order_and_number(tmp_path, strange):
    held, _ = read_all(strange, "d")
    stored, _ = read_stored(strange, "d")
    order = np.array([5, 0, 2, 2, 1, 4, 0])
    export_rows([held[i] for i in order], tmp_path / "held")
    export_rows(stored.take(order), tmp_path / "stored")
    written = (tmp_path / "stored" / "d.jsonl").read_bytes()
    assert written == (tmp_path / "held" / "d.jsonl").read_bytes()
    lines = [STRANGE[sample.origin.line - 1].removeprefix(b"\xef\xbb\xbf") for sample in stored.take(order)]
    assert written == b"".join(line + b"\n" for line in lines)


# ids


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), unique=True, max_size=40))
def test_an_id_leads_to_where_it_was_first_read(names):
    known = Origins()
    for number, name in enumerate(names):
        assert name not in known
        known.add(name, Origin(Path(f"{number // 7}.jsonl"), number, number + 1))
    for number, name in enumerate(names):
        assert known.get(name) == Origin(Path(f"{number // 7}.jsonl"), number, number + 1)
    known.close()
    assert known.ids().to_pylist() == names == [known.id(number) for number in range(len(names))]


@pytest.fixture
def soon_settled(monkeypatch) -> None:
    """As if few ids could be held as they are."""
    monkeypatch.setattr(origins, "RECENT", 4)


def test_ids_of_long_ago_are_found_too(soon_settled):
    known = Origins()
    for number in range(203):
        known.add(f"id-{number}", Origin(Path("a"), number))
    assert len(known._recent) < 4
    assert [len(hash_N) for hash_N, _ in known._older] == [128, 64, 8]
    assert [known.get(f"id-{number}").row for number in range(203)] == [*range(203)]
    assert "id-203" not in known


class SameHash(str):
    """Ids that Python's hash cannot tell apart."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 5

    __eq__ = str.__eq__


def test_ids_with_one_hash_are_two(soon_settled):
    known = Origins()
    for number in range(20):
        known.add(SameHash(number), Origin(Path("a"), number))
    assert [known.get(SameHash(number)).row for number in range(20)] == [*range(20)]
    assert SameHash(20) not in known


def test_an_id_that_stands_there_again_is_rejected_however_late(tmp_path, soon_settled):
    rows = [row(i, id=f"id-{i}") for i in range(50)]
    source = write(tmp_path, *rows, row(99, id="id-3"), *[row(5)] * 9)
    stored, (reject,) = read_stored(source, "d")
    assert (reject.reason, reject.line, reject.detail) == (
        "duplicate_id",
        51,
        f"{tmp_path / 'pool.jsonl'}:4 has the same id",
    )
    assert [sample.id[16:] for sample in stored[50:]] == ["", *(f"-{i}" for i in range(2, 10))]
