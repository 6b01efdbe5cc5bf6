"""Bytes in, nothing out, or a fault of ours: what fuzzing asks of every place where bytes of strangers come in.

Each target refuses what it cannot take by an error of our own and lets any other exception through: that is the fault
that fuzzing looks for. `scripts/fuzz.py` drives them; the tests replay the inputs in `fuzz_seeds/TARGET/`.
"""

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from datalloy.config import DataSource, load_recipe
from datalloy.errors import DataError, RecipeError
from datalloy.readers import FORMATS, Reject, read
from datalloy.sample import MAX_IMAGE_PIXELS, has_further_frames, open_image
from datalloy.scorers.judge_reply import NoVerdictError, read_reply, read_verdict
from drawn import MemoryImage

JUDGE_MODES = ("json", "logprobs", "systemone")
BOM = b"\xef\xbb\xbf"
JSON_LAYOUTS = ("messages", "sharegpt", "llava", "alpaca", "prompt_completion")
SETTINGS = [(name, "auto") for name in ("x.jsonl", "x.json", "x.parquet")]
SETTINGS += [(name, layout) for layout in JSON_LAYOUTS for name in ("x.jsonl", "x.json")]
SETTINGS += [("x.parquet", "parquet"), ("x.arrow", "hf"), ("x.tar", "webdataset")]
assert {layout for _, layout in SETTINGS} - {"auto"} <= set(FORMATS)


@cache
def scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="datalloy-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def reader(data: bytes) -> None:
    """A data set: the first byte says how the file is named and laid out, the others are the file."""
    name, layout = SETTINGS[data[0] % len(SETTINGS)] if data else SETTINGS[0]
    content = data[1:]
    path = scratch() / name
    path.write_bytes(content)
    try:
        items = list(read(DataSource(path=str(path), format=layout), "fuzz"))
    except DataError:
        return
    if name.endswith(".jsonl"):
        lines = content.removeprefix(BOM).split(b"\n")
        assert len(items) == sum(bool(line.strip()) for line in lines), "accepted + rejected = read"
    for item in items:
        texts = [item.detail] if isinstance(item, Reject) else [turn.text for turn in item.turns]
        "".join([item.id, *texts]).encode()  # whatever was read can be written, or this raises


def image(data: bytes) -> None:
    """A picture."""
    picture = MemoryImage(data)
    has_further_frames(picture)
    try:
        opened = open_image(picture)
    except ValueError:
        return
    assert opened.mode == "RGB"
    assert 0 < opened.width * opened.height <= MAX_IMAGE_PIXELS


def recipe(data: bytes) -> None:
    """A recipe, and what was read of it written and read again."""
    path = scratch() / "recipe.yaml"
    path.write_bytes(data)
    try:
        loaded = load_recipe(path)
    except RecipeError:
        return
    assert loaded.dump()


def verdict(data: bytes) -> None:
    """A judge's reply: the first byte says how the judge was asked to answer, the others are the reply."""
    mode = JUDGE_MODES[data[0] % len(JUDGE_MODES)] if data else JUDGE_MODES[0]
    try:
        reply = read_reply(data[1:])
        reply.excerpt.encode(), reply.served_by.encode()
        found = read_verdict(reply, mode, 5)
    except NoVerdictError:
        return
    found.text.encode()
    assert 1 <= found.score <= 5


TARGETS: dict[str, Callable[[bytes], None]] = {"reader": reader, "image": image, "recipe": recipe, "verdict": verdict}
