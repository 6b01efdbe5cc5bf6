"""Readers: the contract for every format, then faults of files, of JSON, of records and of image paths."""

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datalloy.config import DataSource
from datalloy.errors import DataError
from datalloy.readers import conversation, detect_format, read, read_all, records
from datalloy.sample import FileImage
from reader_contract import ReaderContract

QUESTION = {"role": "user", "content": "2 + 2?"}
ANSWER = {"role": "assistant", "content": "4"}
GOOD = {"messages": [QUESTION, ANSWER]}


class TestMessagesLines(ReaderContract):
    layout, format = "messages-jsonl", "messages"


class TestMessagesArray(ReaderContract):
    layout, format = "messages-json", "messages"


class TestShareGPTLines(ReaderContract):
    layout, format = "sharegpt-jsonl", "sharegpt"


class TestShareGPTArray(ReaderContract):
    layout, format = "sharegpt-json", "sharegpt"


class TestLLaVALines(ReaderContract):
    layout, format = "llava-jsonl", "llava"


class TestLLaVAArray(ReaderContract):
    layout, format = "llava-json", "llava"


class TestTypedBlocks(ReaderContract):
    layout, format = "messages-typed-blocks", "messages"


class TestPromptCompletion(ReaderContract):
    layout, format = "prompt-completion-jsonl", "prompt_completion"
    fault = "missing_messages"


class TestAlpaca(ReaderContract):
    layout, format = "alpaca-jsonl", "alpaca"
    fault = "empty_content"


class TestLLaMAFactoryShareGPT(ReaderContract):
    layout, format = "llama-factory-sharegpt", "llama_factory"


class TestLLaMAFactoryOpenAI(ReaderContract):
    layout, format = "llama-factory-openai", "llama_factory"


class TestLLaMAFactoryAlpaca(ReaderContract):
    layout, format = "llama-factory-alpaca", "llama_factory"
    fault = "empty_content"


class TestSavedDataset(ReaderContract):
    layout, format = "hf-saved", "hf"


class TestDatasetFolder(ReaderContract):
    layout, format = "hf-folder", "hf"


class TestWebDataset(ReaderContract):
    layout, format = "webdataset-tar", "webdataset"


class TestParquetStructs(ReaderContract):
    layout, format = "parquet-messages-struct", "parquet"


class TestParquetBinaries(ReaderContract):
    layout, format = "parquet-messages-binary", "parquet"


class TestParquetPaths(ReaderContract):
    layout, format = "parquet-conversations-path", "parquet"


def write_lines(folder: Path, *lines: bytes | dict, ending: bytes = b"\n") -> DataSource:
    path = folder / "train.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + ending for line in lines)
    )
    return DataSource(path=str(path), format="messages")


def reasons(source: DataSource) -> list[tuple[int, str]]:
    return [(reject.line, reject.reason) for reject in read_all(source, "d")[1]]


def reason_of(folder: Path, record: dict, format: str = "messages") -> str:
    source = write_lines(folder, record).model_copy(update={"format": format})
    samples, rejects = read_all(source, "d")
    assert samples == []
    return rejects[0].reason


def accepted(folder: Path, record: dict, format: str = "messages"):
    source = write_lines(folder, record).model_copy(update={"format": format})
    samples, rejects = read_all(source, "d")
    assert rejects == []
    return samples[0]


# Lines of a file


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [', "malformed_json"),
        (b'{"messages": []} {"messages": []}', "malformed_json"),
        (b'{"messages": [], "score": NaN}', "malformed_json"),
        (b'{"messages": [], "score": -Infinity}', "malformed_json"),
        (b'{"messages": [], "score": 1e999}', "malformed_json"),
        (b'{"messages": [], "score": ' + b"9" * 5000 + b"}", "malformed_json"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed_json"),
        (b'{"messages": [], "messages": []}', "duplicate_key"),
        (b'{"messages": [{"role": "user", "role": "user"}]}', "duplicate_key"),
        (b"[1, 2]", "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"messages": [], "note": "\\ud800"}', "bad_encoding"),
        (b'{"messages": [], "note": "\xe9"}', "bad_encoding"),
    ],
)
def test_a_bad_line_costs_one_record(tmp_path, line, reason):
    source = write_lines(tmp_path, GOOD, line, GOOD)
    assert reasons(source) == [(2, reason)]
    assert [sample.origin.line for sample in read_all(source, "d")[0]] == [1, 3]


def test_surrogate_pairs_and_escaped_backslashes_are_text(tmp_path):
    line = (
        rb'{"messages": [{"role": "user", "content": "\ud83d\ude00 \\ud800"}, {"role": "assistant", "content": "4"}]}'
    )
    (sample,) = read_all(write_lines(tmp_path, line), "d")[0]
    assert sample.turns[0].text == "\U0001f600 \\ud800"


def test_carriage_returns_and_the_byte_order_mark_are_not_data(tmp_path):
    source = write_lines(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), GOOD, ending=b"\r\n")
    assert len(read_all(source, "d")[0]) == 2


def test_blank_lines_are_lines_but_not_records(tmp_path):
    samples, rejects = read_all(write_lines(tmp_path, b"", GOOD, b" \t", GOOD), "d")
    assert [(sample.origin.row, sample.origin.line) for sample in samples] == [(0, 2), (1, 4)]
    assert rejects == []


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    text = "a\u2028b\u0085c\x0bd"
    record = {"messages": [{"role": "user", "content": text}, ANSWER]}
    (sample,) = read_all(write_lines(tmp_path, json.dumps(record, ensure_ascii=False).encode()), "d")[0]
    assert sample.turns[0].text == text


def test_a_torn_last_line_is_one_reject(tmp_path):
    source = write_lines(tmp_path, GOOD, b'{"messages": [{"role": "us', ending=b"\n")
    with Path(source.path).open("r+b") as file:
        file.truncate(Path(source.path).stat().st_size - 1)
    assert reasons(source) == [(2, "malformed_json")]


@pytest.mark.parametrize(("excess", "expected"), [(0, []), (1, [(2, "line_too_long")]), (999, [(2, "line_too_long")])])
def test_a_line_over_the_limit_is_rejected_and_the_next_one_read(tmp_path, monkeypatch, excess, expected):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 300)
    line = json.dumps(GOOD).encode()
    source = write_lines(tmp_path, GOOD, line.ljust(299 + excess), GOOD)
    assert reasons(source) == expected
    assert read_all(source, "d")[0][-1].origin.line == 3


# Files


def test_a_malformed_array_is_refused_with_its_position(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('[\n{"messages": []},\n{"messages": [}\n]')
    with pytest.raises(DataError, match=r"train\.json:3:15: malformed JSON array"):
        read_all(DataSource(path=str(path), format="messages"), "d")


@pytest.mark.parametrize("text", ["[", "[{}", "[{},]", "[{} {}]", "[{}] {}", "[" + "[" * 100_000])
def test_every_fault_in_the_syntax_of_an_array_is_refused(tmp_path, text):
    path = tmp_path / "train.json"
    path.write_text(text)
    with pytest.raises(DataError, match="malformed JSON array"):
        read_all(DataSource(path=str(path), format="messages"), "d")


def test_a_bad_element_of_an_array_costs_one_record(tmp_path):
    path = tmp_path / "train.json"
    good = json.dumps(GOOD)
    path.write_text(f'[{good}, {{"a": 1, "a": 2}}, 7, {{"n": {"9" * 5000}}}, {good}]')
    samples, rejects = read_all(DataSource(path=str(path), format="messages"), "d")
    assert [sample.origin.row for sample in samples] == [0, 4]
    assert [reject.reason for reject in rejects] == ["duplicate_key", "not_an_object", "malformed_json"]


def test_an_array_that_is_not_utf8_is_refused_with_its_byte(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(b'["caf\xe9"]')
    with pytest.raises(DataError, match="byte 5 is not UTF-8"):
        read_all(DataSource(path=str(path), format="messages"), "d")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer.*git lfs pull"),
        (gzip.compress(b"{}", mtime=0), "gzip; unpack"),
        (b"PK\x03\x04", "zip archive"),
        (b"BZh91AY", "bzip2; unpack"),
        (b"\xfd7zXZ\x00", "xz; unpack"),
        (b"\x28\xb5\x2f\xfd", "zstd; unpack"),
        (b"train/0.json".ljust(257, b"\0") + b"ustar", "tar archive"),
        ('{"messages": []}'.encode("utf-16"), "UTF-16 text; convert"),
        ('{"messages": []}'.encode("utf-16-le"), "UTF-16 text; convert"),
        ('{"messages": []}'.encode("utf-16-be"), "UTF-16 text; convert"),
        (b"\xef\xbb\xbf<html>", "HTML page"),
        (b"<?xml version='1.0'?>", "XML document"),
        (b"\n<!DOCTYPE html><html></html>", "HTML page"),
        (b"PAR1", "Parquet file; set `format: parquet`"),
    ],
)
def test_what_is_no_json_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_all(DataSource(path=str(path), format="messages"), "d")


@pytest.mark.parametrize("format", ["auto", "messages", "parquet"])
@pytest.mark.parametrize(
    ("name", "message"), [("folder", "a folder"), ("pipe", "a named pipe"), ("gone", "No such file")]
)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, name, message, format):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match=message):
        read_all(DataSource(path=str(tmp_path / name), format=format), "d")


def test_a_device_is_refused():
    with pytest.raises(DataError, match="/dev/zero is a device"):
        detect_format(Path("/dev/zero"))


def test_a_media_root_that_is_no_folder_is_refused(tmp_path):
    source = write_lines(tmp_path, GOOD).model_copy(update={"media_root": str(tmp_path / "gone")})
    with pytest.raises(DataError, match=r"media_root .*gone .*is not a folder"):
        read_all(source, "d")


# Detection


def test_llava_is_detected_when_its_first_records_are_text_only(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    write_lines(tmp_path, {"conversations": turns}, {"conversations": turns, "image": "x.png"})
    assert detect_format(tmp_path / "train.jsonl") == "llava"


def test_detection_looks_past_bad_records(tmp_path):
    write_lines(tmp_path, b"{torn", b"7", GOOD)
    assert detect_format(tmp_path / "train.jsonl") == "messages"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x", "label": "y"}', r"keys \['text', 'label'\]; wanted: .*'messages'"),
        ("a.jsonl", b"", "it holds no record"),
        ("a.json", b"{\n}", "the first record is refused .malformed_json"),
        ("a.csv", b"question,answer\n", r"does not end in \.jsonl, \.ndjson, \.json; set `format` to one of messages"),
    ],
)
def test_an_unknown_format_is_refused_with_what_was_found_and_what_is_allowed(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_all(DataSource(path=str(tmp_path / name)), "d")


# Records


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "missing_messages"),
        ({"messages": "x"}, "missing_messages"),
        ({"messages": []}, "missing_messages"),
        ({"messages": [{"role": "tool", "content": "x"}, ANSWER]}, "unknown_role"),
        ({"messages": [{"content": "x"}, ANSWER]}, "unknown_role"),
        ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, "unknown_role"),
        ({"messages": [{"from": "human", "value": "x"}, ANSWER]}, "unknown_role"),
        ({"messages": ["x", ANSWER]}, "bad_content"),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, "bad_content"),
        ({"messages": [{"role": "user", "content": 7}, ANSWER]}, "bad_content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}, ANSWER]}, "bad_content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]}, "image_url"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "path": "a", "url": "b"}]}, ANSWER]},
            "bad_content",
        ),
        ({"messages": [QUESTION]}, "bad_turn_order"),
        ({"messages": [ANSWER, QUESTION]}, "bad_turn_order"),
        ({"messages": [QUESTION, QUESTION, ANSWER]}, "bad_turn_order"),
        ({"messages": [QUESTION, ANSWER, {"role": "system", "content": "x"}]}, "bad_turn_order"),
        ({"messages": [{"role": "system", "content": "x"}]}, "bad_turn_order"),
        ({"messages": [QUESTION, {"role": "assistant", "content": ""}]}, "empty_content"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " \n\u200b"}]}, "empty_content"),
        ({"messages": [QUESTION, {"role": "assistant", "content": []}]}, "empty_content"),
        ({"messages": [QUESTION, ANSWER], "images": ["x.png"]}, "image_count_mismatch"),
        ({"messages": [{"role": "user", "content": "<image>?"}, ANSWER]}, "image_count_mismatch"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": "<image>"}], "images": ["x.png"]},
            "image_outside_user_turn",
        ),
        ({"messages": [QUESTION, ANSWER], "image": "x.png"}, "unsupported_media"),
        ({"messages": [QUESTION, ANSWER], "videos": ["x.mp4"]}, "unsupported_media"),
        ({"messages": [QUESTION, ANSWER], "id": 1.5}, "bad_id"),
        ({"messages": [QUESTION, ANSWER], "id": True}, "bad_id"),
        ({"messages": [QUESTION, ANSWER], "id": ""}, "bad_id"),
    ],
)
def test_a_bad_messages_record_has_its_reason(tmp_path, record, reason):
    (tmp_path / "x.png").write_bytes(b"picture")
    assert reason_of(tmp_path, record) == reason


def test_a_record_of_endless_text_turns_or_images_is_rejected(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(b"picture")
    assert conversation.MAX_TEXT_CHARACTERS >= 10**5 < records.MAX_LINE_BYTES
    monkeypatch.setattr(conversation, "MAX_TEXT_CHARACTERS", 100)
    monkeypatch.setattr(conversation, "MAX_TURNS", 4)
    monkeypatch.setattr(conversation, "MAX_IMAGES", 2)
    many = {"role": "user", "content": "<image>" * 3}
    for_reason = {
        "text_too_long": {"messages": [{"role": "user", "content": "x" * 100}, ANSWER]},
        "too_many_turns": {"messages": [QUESTION, ANSWER] * 3},
        "too_many_images": {"messages": [many, ANSWER], "images": ["x.png"] * 3},
    }
    assert {reason: reason_of(tmp_path, record) for reason, record in for_reason.items()} == {r: r for r in for_reason}
    largest = {
        "messages": [QUESTION, ANSWER, {"role": "user", "content": "<image>" * 2}, ANSWER],
        "images": ["x.png"] * 2,
    }
    assert len(accepted(tmp_path, largest).turns) == 4


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [QUESTION, ANSWER]}, "missing_messages"),
        ({"conversations": [{"from": "user", "value": "x"}]}, "unknown_role"),
        ({"conversations": [{"from": "human", "value": ["x"]}]}, "bad_content"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "bad_turn_order"),
        ({"conversations": [{"from": "human", "value": "x"}], "image": "x.png"}, "unsupported_media"),
        ({"conversations": [{"from": "human", "value": "x"}], "system": 7}, "bad_content"),
    ],
)
def test_a_bad_sharegpt_record_has_its_reason(tmp_path, record, reason):
    assert reason_of(tmp_path, record, "sharegpt") == reason


def test_a_reject_says_what_was_found_cut_short_and_without_control_characters(tmp_path):
    role = "\x1b[31m\u202e" + "x" * 1000
    source = write_lines(tmp_path, {"id": 7, "messages": [{"role": role, "content": "x"}]})
    (reject,) = read_all(source, "d")[1]
    assert (reject.path, reject.row, reject.line, reject.id) == (Path(source.path), 0, 1, "7")
    assert reject.detail.startswith("found '\\x1b[31m\\u202e")
    assert reject.detail.endswith("allowed: system, user, assistant")
    assert len(reject.detail) < 200


def test_an_integer_id_is_its_digits_and_clashes_with_the_same_string(tmp_path):
    samples, rejects = read_all(write_lines(tmp_path, {**GOOD, "id": 7}, {**GOOD, "id": "7"}), "d")
    assert [sample.id for sample in samples] == ["7"]
    assert rejects[0].detail.endswith("train.jsonl:1 has the same id")


def test_a_hash_id_steps_aside_for_a_given_one(tmp_path):
    copy = read_all(write_lines(tmp_path, GOOD), "d")[0][0].id
    other = {"messages": [QUESTION, {"role": "assistant", "content": "5"}], "id": copy}
    samples, _ = read_all(write_lines(tmp_path, other, GOOD), "d")
    assert [sample.id for sample in samples] == [copy, f"{copy}-2"]


def test_one_newline_on_each_side_of_a_placeholder_goes_with_it(tmp_path):
    (tmp_path / "x.png").write_bytes(b"picture")
    text = "\n\nbefore\n\n<image>\n\nafter<image>end \n"
    record = {"messages": [{"role": "user", "content": text}, ANSWER], "images": ["x.png", "x.png"]}
    parts = accepted(tmp_path, record).turns[0].parts
    assert parts == ("\n\nbefore\n", FileImage(tmp_path / "x.png"), "\nafter", FileImage(tmp_path / "x.png"), "end \n")


def test_typed_blocks_take_their_own_file_or_the_next_image(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(b"picture")
    blocks = [
        {"type": "image"},
        {"type": "text", "text": "one <image>", "image": None},
        {"type": "image", "path": "b"},
        {"type": "image", "text": None, "image": None},
    ]
    record = {"messages": [{"role": "user", "content": blocks}, ANSWER], "images": ["a", "c"]}
    a, b, c = (FileImage(tmp_path / name) for name in "abc")
    assert accepted(tmp_path, record).turns[0].parts == (a, "one <image>", b, c)


def test_a_system_turn_may_stand_in_the_conversation_or_beside_it(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    inside = accepted(tmp_path, {"conversations": [{"from": "system", "value": "s"}, *turns]}, "sharegpt")
    beside = accepted(tmp_path, {"conversations": turns, "system": "s"}, "sharegpt")
    absent = accepted(tmp_path, {"conversations": turns, "system": ""}, "sharegpt")
    assert inside.turns == beside.turns
    assert [turn.role for turn in absent.turns] == ["user", "assistant"]


# Image paths


def with_image(value) -> dict:
    return {"messages": [{"role": "user", "content": "<image>?"}, ANSWER], "images": [value]}


@pytest.fixture
def media(tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    (tmp_path / "media-secret").mkdir()
    (tmp_path / "media-secret" / "x.png").write_bytes(b"secret")
    (root / "x.png").write_bytes(b"picture")
    (root / "inside").symlink_to("x.png")
    (root / "outside").symlink_to(tmp_path / "media-secret" / "x.png")
    (root / "loop").symlink_to("loop")
    (root / "dead").symlink_to("gone.png")
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe")
    return root


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("gone.png", "image_missing"),
        ("dead", "image_missing"),
        ("x.png/y.png", "image_missing"),
        ("../media-secret/x.png", "image_outside_root"),
        ("/etc/passwd", "image_outside_root"),
        ("../gone.png", "image_outside_root"),
        ("outside", "image_outside_root"),
        ("https://example.org/x.png", "image_url"),
        ("data:image/png;base64,AAAA", "image_url"),
        ("s3://bucket/x.png", "image_url"),
        ("file:///etc/passwd", "image_url"),
        ("folder", "image_unreadable"),
        ("pipe", "image_unreadable"),
        ("loop", "image_unreadable"),
        ("x" * 5000, "image_unreadable"),
        ("x\0.png", "image_unreadable"),
        ("", "bad_images"),
        (None, "bad_images"),
        ({"bytes": "AAAA"}, "bad_images"),
    ],
)
def test_a_bad_image_path_has_its_reason(tmp_path, media, value, reason):
    source = write_lines(tmp_path, with_image(value)).model_copy(update={"media_root": str(media)})
    assert reasons(source) == [(1, reason)]


@pytest.mark.parametrize("value", ["x.png", "inside", "./folder/../x.png", "ROOT/x.png"])
def test_an_image_path_is_relative_to_the_media_root_or_absolute_inside_it(tmp_path, media, value):
    source = write_lines(tmp_path, with_image(value.replace("ROOT", str(media))))
    (sample,) = read_all(source.model_copy(update={"media_root": str(media)}), "d")[0]
    assert sample.images == (FileImage(media / "x.png"),)


def test_an_image_over_the_size_limit_is_rejected_unread(tmp_path):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(2**40)
    assert reason_of(tmp_path, with_image("x.png")) == "image_too_large"


# Parquet


@pytest.mark.parametrize("cell", [b"picture", {"bytes": b"picture", "path": "gone.png"}])
def test_a_parquet_image_may_stand_alone_in_its_cell(tmp_path, cell):
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    text = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [{"conversations": text, "image": None}, {"conversations": turns, "image": cell}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    samples, rejects = read_all(DataSource(path=str(tmp_path / "train.parquet")), "d")
    assert [[image.read() for image in sample.images] for sample in samples] == [[], [b"picture"]]
    assert rejects == []


def test_a_missing_picture_in_parquet_costs_one_record(tmp_path):
    turns = [{"role": "user", "content": "<image>?"}, ANSWER]
    rows = [{"messages": turns, "images": [image]} for image in (b"picture", None, b"picture")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    samples, rejects = read_all(DataSource(path=str(tmp_path / "train.parquet")), "d")
    assert [sample.origin.row for sample in samples] == [0, 2]
    assert [(reject.row, reject.reason) for reject in rejects] == [(1, "bad_images")]


def test_a_parquet_row_with_a_video_is_rejected(tmp_path):
    rows = [{**GOOD, "videos": []}, {**GOOD, "videos": ["x.mp4"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    samples, rejects = read_all(DataSource(path=str(tmp_path / "train.parquet")), "d")
    assert len(samples) == 1
    assert [(reject.row, reject.reason) for reject in rejects] == [(1, "unsupported_media")]


def test_parquet_pictures_are_found_across_batches_and_row_groups(tmp_path):
    turns = [{"role": "user", "content": "<image>?"}, ANSWER]
    rows = [{"messages": turns, "images": [str(row).encode()]} for row in range(200)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=70)
    samples, _ = read_all(DataSource(path=str(tmp_path / "train.parquet")), "d")
    assert (
        [int(sample.images[0].read()) for sample in samples]
        == [sample.origin.row for sample in samples]
        == [*range(200)]
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["text"], "has the columns text; wanted: either messages or conversations"),
        (["messages", "conversations"], "either messages or conversations"),
        (["messages", "image", "images"], "at most one of image and images"),
    ],
)
def test_parquet_with_other_columns_is_refused(tmp_path, columns, message):
    pyarrow.parquet.write_table(pyarrow.table({name: ["x"] for name in columns}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=message):
        read_all(DataSource(path=str(tmp_path / "train.parquet")), "d")


def test_a_flipped_bit_is_seen_where_pages_have_checksums(tmp_path):
    path = tmp_path / "train.parquet"
    table = pyarrow.Table.from_pylist([GOOD] * 100)
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, **plain)
    path.write_bytes(path.read_bytes().replace(b"2 + 2?", b"2 + 3?", 1))
    with pytest.raises(DataError, match="CRC"):
        read_all(DataSource(path=str(path)), "d")


# Any input


@given(st.text(max_size=60).filter(lambda text: "<image>" not in text), st.booleans())
def test_any_text_survives_the_way_through_a_file(tmp_path_factory, text, escaped):
    folder = tmp_path_factory.mktemp("text")
    record = {"messages": [{"role": "user", "content": f"q{text}"}, {"role": "assistant", "content": f"{text}a"}]}
    source = write_lines(folder, json.dumps(record, ensure_ascii=escaped).encode())
    (sample,) = read_all(source, "d")[0]
    assert [turn.text for turn in sample.turns] == [f"q{text}", f"{text}a"]


FRAGMENTS = st.sampled_from(
    [
        json.dumps(GOOD).encode(),
        b"\n",
        b"\r\n",
        b"\xef\xbb\xbf",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b'"id": 1',
        b"\\ud800",
        b"\xff",
    ]
)
ANY_BYTES = st.one_of(st.binary(max_size=200), st.lists(FRAGMENTS, max_size=12).map(b"".join))


def refusal_of(source: DataSource) -> str | None:
    try:
        read_all(source, "d")
    except DataError as refused:
        return str(refused)
    return None


@settings(max_examples=300)
@given(ANY_BYTES)
def test_any_bytes_as_lines_are_all_accounted_for(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    try:
        items = list(read(DataSource(path=str(path), format="messages"), "d"))
    except DataError:
        return
    assert len(items) == sum(bool(line.strip()) for line in lines)


@settings(max_examples=300)
@given(ANY_BYTES, st.sampled_from(["any.json", "any.jsonl", "any.parquet", "any.tar"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    for format in (
        "auto",
        "messages",
        "sharegpt",
        "llava",
        "alpaca",
        "prompt_completion",
        "parquet",
        "hf",
        "webdataset",
    ):
        refusal = refusal_of(DataSource(path=str(path), format=format))
        assert refusal is None or str(path) in refusal


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_parquet_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "train.parquet"
    rows = [{"messages": [{"role": "user", "content": "<image>?"}, ANSWER], "images": [b"picture"]}] * 80
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=30)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    refusal = refusal_of(DataSource(path=str(path), format="parquet"))
    assert refusal is None or str(path) in refusal


# Keys that trainers act on


@pytest.mark.parametrize(
    ("turns", "accepted"),
    [
        ([{**QUESTION, "loss": False}, {**ANSWER, "loss": True, "loss_scale": 1.0}], True),
        ([QUESTION, {**ANSWER, "train": None, "weight": 1}], True),
        ([QUESTION, {**ANSWER, "loss": False}], False),
        ([QUESTION, {**ANSWER, "weight": 0}], False),
        ([QUESTION, {**ANSWER, "loss_scale": 0.5}], False),
        ([{**QUESTION, "train": True}, ANSWER], False),
    ],
)
def test_flags_are_accepted_only_where_they_say_what_is_done_anyway(tmp_path, turns, accepted):
    source = write_lines(tmp_path, {"messages": turns})
    assert reasons(source) == ([] if accepted else [(1, "loss_flag")])


@pytest.mark.parametrize(
    "record",
    [
        {**GOOD, "tools": [{"name": "search"}]},
        {**GOOD, "objects": {"bbox": [[0, 0, 1, 1]]}},
        {"messages": [QUESTION, {**ANSWER, "tool_calls": [{"function": {}}]}]},
        {"messages": [QUESTION, {**ANSWER, "train_detail": [{"begin_offset": 0}]}]},
    ],
)
def test_keys_that_change_the_prompt_are_refused(tmp_path, record):
    assert reason_of(tmp_path, record) == "unsupported_key"


def test_empty_keys_change_nothing(tmp_path):
    accepted(tmp_path, {**GOOD, "tools": [], "objects": None, "channel": "maths"})


# Typed blocks, prompts and completions, alpaca


def test_a_picture_may_be_an_object_with_its_path(tmp_path):
    (tmp_path / "x.png").write_bytes(b"picture")
    record = {
        "messages": [{"role": "user", "content": "<image>?"}, ANSWER],
        "images": [{"bytes": None, "path": "x.png"}],
    }
    assert accepted(tmp_path, record).images == (FileImage(tmp_path / "x.png"),)


def test_an_image_url_block_may_name_a_file(tmp_path):
    (tmp_path / "x.png").write_bytes(b"picture")
    blocks = [{"type": "image_url", "image_url": {"url": "x.png"}}, {"type": "text", "text": "?"}]
    sample = accepted(tmp_path, {"messages": [{"role": "user", "content": blocks}, ANSWER]})
    assert sample.turns[0].parts == (FileImage(tmp_path / "x.png"), "?")


@pytest.mark.parametrize("block", [{"base64": "AAAA"}, {"source": {"type": "base64", "data": "AAAA"}}])
def test_a_picture_inside_the_text_is_refused_by_name(tmp_path, block):
    blocks = [{"type": "image", **block}]
    assert reason_of(tmp_path, {"messages": [{"role": "user", "content": blocks}, ANSWER]}) == "image_inline"


def test_pictures_that_no_placeholder_asks_for_come_first_in_a_prompt(tmp_path):
    (tmp_path / "x.png").write_bytes(b"picture")
    record = {"prompt": "q", "completion": "a", "images": ["x.png"]}
    sample = accepted(tmp_path, record, "prompt_completion")
    assert sample.turns[0].parts == (FileImage(tmp_path / "x.png"), "q")
    assert sample.answer == "a"


def test_a_completion_is_the_assistants_alone(tmp_path):
    record = {"prompt": "q", "completion": [QUESTION]}
    assert reason_of(tmp_path, record, "prompt_completion") == "bad_turn_order"


def test_instruction_and_input_are_two_lines_of_one_question(tmp_path):
    record = {"instruction": "Add.", "input": "2 + 2", "output": "4", "system": "s", "history": [["a", "b"]]}
    turns = accepted(tmp_path, record, "alpaca").turns
    assert [turn.text for turn in turns] == ["s", "a", "b", "Add.\n2 + 2", "4"]


def test_query_and_response_are_read_as_alpaca(tmp_path):
    write_lines(tmp_path, {"query": "q", "response": "a"})
    assert detect_format(tmp_path / "train.jsonl") == "alpaca"
    assert accepted(tmp_path, {"query": "q", "response": "a"}, "alpaca").answer == "a"


@pytest.mark.parametrize("history", ["a", [["a"]], [["a", 1]]])
def test_a_bad_history_is_rejected(tmp_path, history):
    assert reason_of(tmp_path, {"instruction": "q", "output": "a", "history": history}, "alpaca") == "bad_content"


# Lists of LLaMA-Factory


def listed(folder: Path, record: dict, **entry) -> DataSource:
    write_lines(folder, record)
    (folder / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "train.jsonl", **entry}}))
    return DataSource(path=f"{folder}/dataset_info.json#d")


TALK = {"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}], "images": ["x.png"]}


def test_columns_that_an_entry_leaves_out_are_not_there(tmp_path):
    (tmp_path / "x.png").write_bytes(b"picture")
    source = listed(tmp_path, TALK, formatting="sharegpt", columns={"messages": "conversations"})
    assert reasons(source) == [(1, "image_count_mismatch")]
    assert reasons(listed(tmp_path, TALK, formatting="sharegpt")) == [(1, "image_count_mismatch")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"formatting": "chatml"}, "formatting is 'chatml'; known: alpaca, sharegpt, openai"),
        ({"ranking": True}, "preference data"),
        ({"columns": {"kto_tag": "label"}}, "preference data"),
        ({"formatting": "sharegpt", "tags": {"role_tag": "role"}}, "tags lacks content_tag, user_tag, assistant_tag"),
        ({"columns": ["instruction"]}, "an object of column names"),
    ],
)
def test_an_entry_that_cannot_be_followed_is_refused(tmp_path, entry, message):
    with pytest.raises(DataError, match=message):
        read_all(listed(tmp_path, TALK, **entry), "d")


def test_a_list_is_read_as_llama_factory_or_not_at_all(tmp_path):
    source = listed(tmp_path, TALK, formatting="sharegpt")
    with pytest.raises(DataError, match="with format llama_factory or auto"):
        read_all(source.model_copy(update={"format": "sharegpt"}), "d")


# Saved datasets, tars


def test_what_hugging_face_datasets_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed; pip install 'datalloy[trainers]'")
    turns = [{"role": "user", "content": "<image>?"}, ANSWER]
    picture = io.BytesIO()
    PIL.Image.new("RGB", (2, 2), "red").save(picture, "PNG")
    rows = [{"messages": turns, "images": [{"bytes": picture.getvalue(), "path": "a.png"}]}, {**GOOD, "images": []}]
    table = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    datasets.DatasetDict(train=table, test=table.select([1])).save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "train.parquet")
    first, second = (
        read_all(DataSource(path=path), "d")[0] for path in (f"{tmp_path}/saved#train", f"{tmp_path}/train.parquet")
    )
    assert [sample.content_hash for sample in first] == [sample.content_hash for sample in second]
    assert first[0].images[0].read() == picture.getvalue()


def write_tar(folder: Path, *members: tuple[str, bytes], **attributes) -> DataSource:
    with tarfile.open(folder / "train.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in attributes.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return DataSource(path=str(folder / "train.tar"))


RECORD = json.dumps({"messages": [{"role": "user", "content": "<image>?"}, ANSWER]}).encode()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("1.jpg", b"picture")], "missing_messages"),
        ([("1.json", RECORD), ("1.a.json", RECORD)], "missing_messages"),
        ([("1.json", b"{torn"), ("1.jpg", b"picture")], "malformed_json"),
        ([("1.json", b'{"label": 3}'), ("1.jpg", b"picture")], "missing_messages"),
        ([("1.json", RECORD)], "image_count_mismatch"),
        ([("1.json", RECORD), ("1.mp4", b"video")], "unsupported_media"),
        ([("1.json", RECORD[:-1] + b', "images": ["0.jpg", "7.jpg"]}'), ("1.0.jpg", b"picture")], "image_missing"),
    ],
)
def test_a_bad_sample_of_a_tar_has_its_reason(tmp_path, members, reason):
    samples, rejects = read_all(write_tar(tmp_path, *members), "d")
    assert ([reject.reason for reject in rejects], samples) == ([reason], [])


def test_a_link_in_a_tar_is_never_followed(tmp_path):
    (tmp_path / "secret").write_bytes(RECORD)
    source = write_tar(tmp_path, ("1.json", b""), type=tarfile.SYMTYPE, linkname=str(tmp_path / "secret"))
    assert [reject.reason for reject in read_all(source, "d")[1]] == ["bad_member"]


def test_names_in_a_tar_are_no_paths(tmp_path):
    before = sorted(tmp_path.parent.rglob("*"))
    source = write_tar(tmp_path, ("../../1.json", RECORD), ("../../1.jpg", b"picture"))
    (sample,) = read_all(source, "d")[0]
    assert sample.images[0].read() == b"picture"
    assert sorted(tmp_path.parent.rglob("*")) == sorted([*before, tmp_path / "train.tar"])


def test_a_single_picture_of_a_tar_may_keep_the_name_it_had(tmp_path):
    record = RECORD[:-1] + b', "images": ["coco/train/9.jpg"]}'
    (sample,) = read_all(write_tar(tmp_path, ("1.json", record), ("1.jpg", b"picture")), "d")[0]
    assert sample.images[0].read() == b"picture"


def test_a_tar_that_was_cut_off_is_refused(tmp_path):
    source = write_tar(tmp_path, ("1.json", RECORD), ("1.jpg", b"picture" * 9999))
    with Path(source.path).open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(DataError, match=r"train\.tar is not a tar that can be read"):
        read_all(source, "d")


# The outside


def test_readers_are_imported_without_torch():
    code = "import sys, datalloy.readers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PACKS = os.environ.get("DATALLOY_PACKS", "")


@pytest.mark.skipif(
    not Path(PACKS).is_dir() or not PACKS,
    reason="DATALLOY_PACKS names no folder: set it to one with data packs to test on real data, which is not shipped",
)
def test_real_packs_are_read_without_a_reject():
    files = sorted(Path(PACKS).glob("*/*.jsonl"))
    assert files
    for path in files:
        samples, rejects = read_all(DataSource(path=str(path)), path.parent.name)
        assert rejects == []
        assert len(samples) == path.read_bytes().count(b"\n")
