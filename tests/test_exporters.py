"""Exporters: what is written is read back as the same samples, and is the original bytes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from datalloy.config import DataSource
from datalloy.errors import DataError
from datalloy.exporters import export_rows
from datalloy.locations import locate
from datalloy.readers import read_all
from reader_contract import ALL, LAYOUTS, Conversation, samples_of, write_pictures

QUESTION = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
GOOD = (
    b'{"messages":  [{"role":"user","content":"caf\xc3\xa9?"},{"role":"assistant","content":"caf\\u00e9"}], "x": 1.50}'
)


def export(source: DataSource, samples, out: Path) -> list[Path]:
    return export_rows(samples, out, sources={"shapes": source})


def read_back(written: list[Path], media_root: Path):
    """The exported rows, by the list of LLaMA-Factory where there is one."""
    listed = [path for path in written if path.name == "dataset_info.json"]
    path = f"{listed[0]}#shapes" if listed else str(written[0])
    return samples_of(DataSource(path=path, media_root=str(media_root)))


def without_place(sample):
    turns = [(turn.role, turn.text, [image.read() for image in turn.images]) for turn in sample.turns]
    return sample.id, sample.domain, turns, sample.content_hash


@pytest.mark.parametrize("write", LAYOUTS.values(), ids=LAYOUTS)
def test_exported_rows_are_read_back_as_the_same_samples(tmp_path, write):
    source = write(tmp_path, ALL)
    first, _, third = samples_of(source)
    written = export(source, [third, first], tmp_path / "out")
    assert [without_place(sample) for sample in read_back(written, tmp_path)] == [
        without_place(third),
        without_place(first),
    ]


@pytest.mark.parametrize("write", LAYOUTS.values(), ids=LAYOUTS)
def test_repeated_samples_are_written_repeatedly(tmp_path, write):
    conversations = [Conversation((f"question {n}", "answer")) for n in range(5)]
    source = write(tmp_path, conversations)
    samples = samples_of(source)
    chosen = [samples[n] for n in (4, 0, 4, 2, 4)]
    written = export(source, chosen, tmp_path / "out")
    assert [sample.content_hash for sample in read_back(written, tmp_path)] == [s.content_hash for s in chosen]


def test_lines_are_copied_byte_for_byte(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\n{torn\n" + GOOD + b"  \n" + GOOD)
    first, second, last = read_all(DataSource(path=str(path)), "cafe")[0]
    data, _ = export_rows([last, second, first], tmp_path / "out")
    assert data == tmp_path / "out" / "cafe.jsonl"
    assert data.read_bytes() == GOOD + b"\n" + GOOD + b"  \n" + GOOD + b"\r\n"


def test_elements_of_an_array_are_copied_byte_for_byte(tmp_path):
    path = tmp_path / "train.json"
    other = GOOD.replace(b"1.50", b"[1e5, {}]")
    path.write_bytes(b"\xef\xbb\xbf [\n" + GOOD + b" , " + b"7" * 5000 + b",\t" + other + b"\r\n]")
    first, last = read_all(DataSource(path=str(path)), "cafe")[0]
    data, _ = export_rows([last, first, last], tmp_path / "out")
    assert data.read_bytes() == b"[\n" + other + b",\n" + GOOD + b",\n" + other + b"\n]\n"


def test_parquet_rows_keep_their_schema_metadata_and_other_columns(tmp_path):
    path = tmp_path / "train.parquet"
    rows = [{"messages": [QUESTION, ANSWER], "images": [], "note": n} for n in range(700)]
    original = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": "features"})
    original = original.set_column(2, "note", original["note"].cast(pyarrow.int16()))
    pyarrow.parquet.write_table(original, path, row_group_size=30)
    samples = samples_of(DataSource(path=str(path)))
    order = [n * 37 % 700 for n in range(600)]
    data, _ = export_rows([samples[n] for n in order], tmp_path / "out")
    assert pyarrow.parquet.read_table(data).equals(pyarrow.parquet.read_table(path).take(order), check_metadata=True)


def test_each_domain_has_its_file_and_its_media_root(tmp_path):
    (tmp_path / "a" / "pictures").mkdir(parents=True)
    write_pictures(tmp_path / "a" / "pictures")
    source = LAYOUTS["messages-jsonl"](tmp_path / "a", ALL).model_copy(
        update={"media_root": str(tmp_path / "a/pictures")}
    )
    shapes = samples_of(source)
    plain = [replace(sample, domain="plain") for sample in shapes if not sample.images]
    written = export_rows([*shapes, *plain], tmp_path / "out", sources={"shapes": source})
    assert [path.name for path in written] == ["shapes.jsonl", "plain.jsonl", "media_roots.json"]
    roots = json.loads(written[-1].read_text())
    assert roots == {"shapes.jsonl": str(tmp_path / "a/pictures"), "plain.jsonl": str(tmp_path / "a")}


def test_another_media_root_than_the_readers_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    source = LAYOUTS["llava-json"](tmp_path, ALL)
    samples = samples_of(source)
    with pytest.raises(DataError, match=r"first: .*square\.png is not in .*other; give export the source"):
        export(source.model_copy(update={"media_root": str(tmp_path / "other")}), samples, tmp_path / "out")


def test_the_source_is_never_written_over(tmp_path):
    source = LAYOUTS["messages-jsonl"](tmp_path, ALL)
    samples = [replace(sample, domain="train") for sample in samples_of(source)]
    before = Path(source.path).read_bytes()
    with pytest.raises(DataError, match=r"train\.jsonl would be written over; name another folder"):
        export_rows(samples[:1], tmp_path)
    assert Path(source.path).read_bytes() == before


@pytest.mark.parametrize("layout", ["parquet-messages-struct", "webdataset-tar"])
def test_a_domain_of_several_files_becomes_a_folder_of_as_many(tmp_path, layout):
    suffix = locate(LAYOUTS[layout](tmp_path, ALL).path).files[0].suffix
    (tmp_path / "shards").mkdir()
    for number, conversations in enumerate([ALL, [replace(c, id=f"{c.id} again") for c in ALL]]):
        Path(LAYOUTS[layout](tmp_path, conversations).path).rename(tmp_path / "shards" / f"{number:02d}{suffix}")
    source = DataSource(path=f"{tmp_path}/shards/{{00..01}}{suffix}")
    samples = samples_of(source)
    assert [sample.origin.row for sample in samples] == [0, 1, 2, 0, 1, 2]
    written = export(source, [samples[n] for n in (5, 0, 2, 3)], tmp_path / "out")
    assert written[:2] == [tmp_path / "out" / "shapes" / f"0000{number}{suffix}" for number in (0, 1)]
    again = samples_of(DataSource(path=str(tmp_path / "out" / "shapes")))
    assert [without_place(sample) for sample in again] == [without_place(samples[n]) for n in (0, 2, 5, 3)]


def test_members_of_a_tar_keep_their_headers(tmp_path):
    source = LAYOUTS["webdataset-tar"](tmp_path, ALL)
    written = export(source, samples_of(source), tmp_path / "out")
    original = Path(source.path).read_bytes().rstrip(b"\0")
    assert written[0].read_bytes().startswith(original)
    assert written[0].read_bytes()[len(original) :].strip(b"\0") == b""


@pytest.mark.parametrize("layout", ["messages-jsonl", "messages-json", "parquet-messages-struct", "webdataset-tar"])
def test_a_file_that_lost_rows_is_refused_and_the_old_export_stays(tmp_path, layout):
    samples = samples_of(LAYOUTS[layout](tmp_path, ALL))
    data, roots = export_rows(samples, tmp_path / "out")
    before = data.read_bytes()
    LAYOUTS[layout](tmp_path, ALL[:1])
    with pytest.raises(DataError, match="is not the file that was read"):
        export_rows(samples, tmp_path / "out")
    assert data.read_bytes() == before
    assert set((tmp_path / "out").iterdir()) == {data, roots}


PACKS = os.environ.get("DATALLOY_PACKS", "")


@pytest.mark.skipif(
    not Path(PACKS).is_dir() or not PACKS,
    reason="DATALLOY_PACKS names no folder: set it to one with data packs to test on real data, which is not shipped",
)
def test_a_whole_pack_is_exported_as_it_was(tmp_path):
    for path in sorted(Path(PACKS).glob("*/test.jsonl")):
        samples = read_all(DataSource(path=str(path)), path.parent.name)[0]
        data, _ = export_rows(samples, tmp_path / "out")
        assert data.read_bytes() == path.read_bytes()
