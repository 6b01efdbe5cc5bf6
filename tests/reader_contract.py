"""What every reader guarantees, as a suite; a test class subclasses it and says how to write its format.

`LAYOUTS` writes the same conversations in every format, for the suite and for the exporters' tests.
"""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from datalloy.config import DataSource
from datalloy.locations import locate
from datalloy.readers import Reject, detect_format, read, read_all
from datalloy.readers.conversation import split_placeholders
from datalloy.sample import FileImage, Sample, Turn, content_hash


@dataclass(frozen=True)
class Conversation:
    """User and assistant texts in turn, with one `<image>` in the texts for each of `images`; `id` is optional."""

    texts: tuple[str, ...]
    images: tuple[str, ...] = ()
    id: str | None = None


Layout = Callable[[Path, Sequence[Conversation]], DataSource]

SQUARE = Conversation(("<image>\nWhich shape?", "square"), ("square.png",), "first")
SUM = Conversation(("What is 1 + 1?", " 2\n", "And 2 + 2?", "4"), (), "zweitens-é")
PAIR = Conversation(("Left <image> or right <image>?", "left"), ("square.png", "circle.png"), "third")
ALL = (SQUARE, SUM, PAIR)
FAULTY = Conversation(("A question without an answer",), (), "faulty")


def write_pictures(folder: Path) -> None:
    for name in ("square.png", "circle.png"):
        (folder / name).write_bytes(f"bytes of {name}".encode())


def messages_record(conversation: Conversation) -> dict:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(conversation.texts)]
    return _with_id(conversation, {"messages": messages, "images": list(conversation.images)})


def sharegpt_record(conversation: Conversation) -> dict:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": text} for i, text in enumerate(conversation.texts)]
    return _with_id(conversation, {"conversations": turns, "images": list(conversation.images)})


def llava_record(conversation: Conversation) -> dict:
    record = sharegpt_record(conversation)
    images = record.pop("images")
    return {**record, "image": images[0] if len(images) == 1 else images} if images else record


def typed_record(conversation: Conversation) -> dict:
    """Typed blocks as axolotl writes them: a picture in its place, with its path."""
    record = messages_record(conversation)
    names = iter(record.pop("images"))
    for message in record["messages"]:
        message["content"] = [
            {"type": "image", "path": next(names)} if piece is None else {"type": "text", "text": piece}
            for piece in split_placeholders(message["content"])
        ]
    return record


def prompt_completion_record(conversation: Conversation) -> dict:
    record = messages_record(conversation)
    messages = record.pop("messages")
    answered = len(messages) % 2 == 0
    return {
        **record,
        "prompt": messages[:-1] if answered else messages,
        "completion": messages[-1:] if answered else [],
    }


def alpaca_record(conversation: Conversation) -> dict:
    *earlier, question, answer = conversation.texts if len(conversation.texts) > 1 else (*conversation.texts, "")
    history = [list(pair) for pair in zip(earlier[::2], earlier[1::2], strict=True)]
    instruction, _, rest = question.partition("\n")
    record = {"instruction": instruction, "input": rest, "output": answer, "history": history}
    return _with_id(conversation, {**record, "images": list(conversation.images)})


def _with_id(conversation: Conversation, record: dict) -> dict:
    return record if conversation.id is None else {"id": conversation.id, **record}


def lines(record: Callable[[Conversation], dict]) -> Layout:
    def write(folder: Path, conversations: Sequence[Conversation]) -> DataSource:
        write_pictures(folder)
        path = folder / "train.jsonl"
        path.write_text("".join(json.dumps(record(c), ensure_ascii=False) + "\n" for c in conversations), "utf-8")
        return DataSource(path=str(path))

    return write


def array(record: Callable[[Conversation], dict]) -> Layout:
    def write(folder: Path, conversations: Sequence[Conversation]) -> DataSource:
        write_pictures(folder)
        path = folder / "train.json"
        path.write_text(json.dumps([record(c) for c in conversations], indent=1), "utf-8")
        return DataSource(path=str(path))

    return write


def table(record: Callable[[Conversation], dict], cell: Callable[[bytes, str], object]) -> Layout:
    def write(folder: Path, conversations: Sequence[Conversation]) -> DataSource:
        write_pictures(folder)
        rows = [record(c) for c in conversations]
        for row in rows:
            row["images"] = [cell((folder / name).read_bytes(), name) for name in row["images"]]
        path = folder / "train.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
        return DataSource(path=str(path))

    return write


def listed(record: Callable[[Conversation], dict], entry: dict) -> Layout:
    """An entry of a LLaMA-Factory list beside its file."""

    def write(folder: Path, conversations: Sequence[Conversation]) -> DataSource:
        source = lines(record)(folder, conversations)
        entries = {"other": {"file_name": "other.json"}, "mine": {"file_name": Path(source.path).name, **entry}}
        (folder / "dataset_info.json").write_text(json.dumps(entries))
        return DataSource(path=f"{folder}/dataset_info.json#mine")

    return write


def renamed(record: Callable[[Conversation], dict], names: dict[str, str]) -> Callable[[Conversation], dict]:
    return lambda conversation: {names.get(key, key): value for key, value in record(conversation).items()}


def saved(folder: Path, conversations: Sequence[Conversation]) -> DataSource:
    """As `save_to_disk` of Hugging Face datasets lays a dataset out."""
    write_pictures(folder)
    rows = [messages_record(c) for c in conversations]
    for row in rows:
        row["images"] = [{"bytes": (folder / name).read_bytes(), "path": name} for name in row["images"]]
    table = pyarrow.Table.from_pylist(rows)
    (folder / "saved").mkdir(exist_ok=True)
    path = folder / "saved" / "data-00000-of-00001.arrow"
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (folder / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}]}))
    (folder / "saved" / "dataset_info.json").write_text("{}")
    return DataSource(path=str(folder / "saved"))


def dataset_folder(folder: Path, conversations: Sequence[Conversation]) -> DataSource:
    """As a dataset lies on the Hugging Face hub: one file a split here."""
    (folder / "data").mkdir(exist_ok=True)
    rows = table(messages_record, lambda data, name: {"bytes": data, "path": name})(folder, conversations)
    Path(rows.path).rename(folder / "data" / "train-00000-of-00001.parquet")
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(b"not read")
    return DataSource(path=f"{folder}#train")


def tar(folder: Path, conversations: Sequence[Conversation]) -> DataSource:
    write_pictures(folder)
    path = folder / "train.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for number, conversation in enumerate(conversations):
            images = {f"{index}.png": name for index, name in enumerate(conversation.images)}
            record = {**sharegpt_record(conversation), "images": list(images)}
            members = {"json": json.dumps(record).encode()}
            members |= {extension: (folder / name).read_bytes() for extension, name in images.items()}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"shapes/{number:04d}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return DataSource(path=str(path))


OPENAI = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}

LAYOUTS: dict[str, Layout] = {
    "messages-jsonl": lines(messages_record),
    "messages-json": array(messages_record),
    "sharegpt-jsonl": lines(sharegpt_record),
    "sharegpt-json": array(sharegpt_record),
    "llava-jsonl": lines(llava_record),
    "llava-json": array(llava_record),
    "messages-typed-blocks": lines(typed_record),
    "prompt-completion-jsonl": lines(prompt_completion_record),
    "alpaca-jsonl": lines(alpaca_record),
    "llama-factory-sharegpt": listed(
        renamed(sharegpt_record, {"conversations": "talk", "images": "pictures"}),
        {"formatting": "sharegpt", "columns": {"messages": "talk", "images": "pictures"}},
    ),
    "llama-factory-openai": listed(
        messages_record,
        {"formatting": "openai", "columns": {"messages": "messages", "images": "images"}, "tags": OPENAI},
    ),
    "llama-factory-alpaca": listed(
        renamed(alpaca_record, {"output": "answer"}),
        {
            "columns": {
                "prompt": "instruction",
                "query": "input",
                "response": "answer",
                "history": "history",
                "images": "images",
            }
        },
    ),
    "hf-saved": saved,
    "hf-folder": dataset_folder,
    "webdataset-tar": tar,
    "parquet-messages-struct": table(messages_record, lambda data, name: {"bytes": data, "path": None}),
    "parquet-messages-binary": table(messages_record, lambda data, name: data),
    "parquet-conversations-path": table(sharegpt_record, lambda data, name: {"bytes": None, "path": name}),
}


def samples_of(source: DataSource) -> list[Sample]:
    samples, rejects = read_all(source, "shapes")
    assert rejects == []
    return samples


class ReaderContract:
    """Subclass, set `layout` to a key of LAYOUTS and `format` to the name of the format."""

    layout: str
    format: str
    fault = "bad_turn_order"  # what the format calls a question without an answer

    @pytest.fixture
    def write(self, tmp_path: Path) -> Callable[..., DataSource]:
        return lambda *conversations: LAYOUTS[self.layout](tmp_path, conversations)

    def test_auto_detects_the_format(self, write):
        source = write(*ALL)
        assert detect_format(source.path) == self.format
        assert samples_of(source) == samples_of(source.model_copy(update={"format": self.format}))

    def test_texts_roles_and_order_are_kept(self, write):
        square, total, pair = samples_of(write(*ALL))
        assert [turn.role for turn in total.turns] == ["user", "assistant", "user", "assistant"]
        assert [turn.text for turn in total.turns] == list(SUM.texts)
        assert square.turns[0].text == "Which shape?"
        assert square.answer == "square"
        assert pair.turns[0].parts[::2] == ("Left ", " or right ", "?")

    def test_images_come_in_the_order_of_their_placeholders(self, write):
        samples = samples_of(write(*ALL))
        pictures = [[image.read() for image in sample.images] for sample in samples]
        assert pictures == [[b"bytes of square.png"], [], [b"bytes of square.png", b"bytes of circle.png"]]

    def test_content_hash_is_the_same_in_every_format(self, write, tmp_path):
        square = samples_of(write(*ALL))[0]
        picture = FileImage(tmp_path / "square.png")
        expected = (Turn("user", (picture, "Which shape?")), Turn("assistant", ("square",)))
        assert square.content_hash == content_hash(expected)

    def test_given_ids_and_the_domain_are_kept(self, write):
        samples = samples_of(write(*ALL))
        assert [(sample.id, sample.domain) for sample in samples] == [(c.id, "shapes") for c in ALL]

    def test_ids_without_given_ones_are_content_hashes_numbered_for_copies(self, write):
        copy = replace(SUM, id=None)
        samples = samples_of(write(copy, replace(PAIR, id=None), copy, copy))
        stem = samples[0].content_hash[:16]
        assert [sample.id for sample in samples] == [stem, samples[1].content_hash[:16], f"{stem}-2", f"{stem}-3"]

    def test_a_second_record_with_the_same_id_is_rejected(self, write):
        samples, rejects = read_all(write(SQUARE, replace(SUM, id="first"), PAIR), "shapes")
        assert [sample.id for sample in samples] == ["first", "third"]
        assert [(reject.row, reject.id, reject.reason) for reject in rejects] == [(1, "first", "duplicate_id")]

    def test_rows_count_rejected_records_too(self, write):
        source = write(SQUARE, FAULTY, PAIR)
        first, fault, third = read(source, "shapes")
        assert isinstance(fault, Reject)
        (file,) = locate(source.path).files
        assert (fault.path, fault.row, fault.id, fault.reason) == (file, 1, "faulty", self.fault)
        assert [item.origin.row for item in (first, third)] == [0, 2]
        assert [item.origin.path for item in (first, third)] == [file] * 2

    def test_lines_are_physical_lines_in_jsonl_and_zero_elsewhere(self, write):
        source = write(*ALL)
        expected = [1, 2, 3] if locate(source.path).files[0].suffix == ".jsonl" else [0, 0, 0]
        assert [sample.origin.line for sample in samples_of(source)] == expected

    def test_limit_counts_samples_not_rejects(self, write):
        source = write(FAULTY, SQUARE, SUM, PAIR).model_copy(update={"limit": 2})
        items = list(read(source, "shapes"))
        assert [type(item) for item in items] == [Reject, Sample, Sample]

    def test_skip_passes_over_samples_before_the_limit_counts(self, write):
        source = write(SQUARE, FAULTY, SUM, PAIR).model_copy(update={"skip": 1, "limit": 1})
        samples, rejects = read_all(source, "shapes")
        assert [sample.id for sample in samples] == [SUM.id]
        assert [reject.id for reject in rejects] == ["faulty"]

    def test_reading_twice_gives_the_same(self, write):
        source = write(SQUARE, FAULTY, PAIR)
        assert read_all(source, "shapes") == read_all(source, "shapes")
