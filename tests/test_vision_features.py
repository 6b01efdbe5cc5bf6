"""What a vision tower sees, kept in memory and beyond it on disk. That kept features change nothing: test_vlm.py."""

import errno
import os
import resource
import tempfile
from pathlib import Path

import pytest
import torch

from datalloy import vision_features
from datalloy.vision_features import VisionFeatures
from datalloy.vlm import VLM


@pytest.fixture
def vlm(proxy) -> VLM:
    return proxy.copy()


@pytest.fixture
def batches(vlm, drawn, text_only) -> list[dict[str, torch.Tensor]]:
    """One of texts alone, and two with pictures."""
    return [vlm.collate(group) for group in ([vlm.encode(text_only)], drawn[:1], drawn[:5])]


@pytest.fixture
def temporary_files(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def losses(vlm: VLM, batches, vision: VisionFeatures | None = None) -> list[torch.Tensor]:
    with torch.no_grad():
        found = []
        for batch in batches:
            with vlm.reusing(vision, batch):
                found.append(vlm.losses(batch))
        return found


def count_looks(vlm: VLM) -> list:
    looks: list = []
    next(vlm.vision_tower().children()).register_forward_hook(lambda *_: looks.append(1))
    return looks


def same(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("memory", [0, 20_000, 1 << 30])
def test_what_is_kept_comes_back_bit_for_bit_wherever_it_was_kept(vlm, batches, temporary_files, memory):
    expected = losses(vlm, batches)
    vision = VisionFeatures(memory)
    looks = count_looks(vlm)
    for _ in range(3):
        assert same(losses(vlm, batches, vision), expected)
    assert len(looks) == 2  # one for each batch with pictures
    assert not list(temporary_files.iterdir())  # no kill leaves anything behind


def test_memory_is_filled_first_and_never_beyond_what_is_allowed(vlm, batches):
    everything = VisionFeatures()
    losses(vlm, batches, everything)
    one, both = (
        vision_features._bytes([everything._kept[id(b["input_ids"])] for b in bs]) for bs in (batches[1:2], batches[1:])
    )
    assert 0 < one < both
    vision = VisionFeatures(both - 1)
    losses(vlm, batches, vision)
    in_memory = [outputs for outputs in vision._kept.values() if isinstance(outputs, list)]
    assert vision_features._bytes(in_memory) == one
    assert len(vision._kept) == 3


def test_on_a_full_disk_what_does_not_fit_is_computed_again_and_said_once(vlm, batches, monkeypatch, caplog):
    expected = losses(vlm, batches)

    class Full:
        def __init__(self, **_) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    vision, looks = VisionFeatures(0), count_looks(vlm)
    for _ in range(2):
        assert same(losses(vlm, batches, vision), expected)
    assert len(looks) == 4
    assert [record.getMessage() for record in caplog.records if "TMPDIR" in record.getMessage()] == [
        f"what the vision tower sees does not fit into {tempfile.gettempdir()} (No space left on device) and is "
        "computed again for each pass; set TMPDIR to a disk with more room"
    ]


@pytest.fixture
def limited_files():
    """Sets how large a file of this process may become; a write beyond it goes as far as there is room, then fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_keeps_what_it_took(vlm, batches, limited_files):
    expected = losses(vlm, batches)
    unlimited = VisionFeatures(0)
    losses(vlm, batches, unlimited)
    vision, looks = VisionFeatures(0), count_looks(vlm)
    limited_files(unlimited._file.seek(0, os.SEEK_END) - 4)
    for _ in range(3):
        assert same(losses(vlm, batches, vision), expected)
    assert len(looks) == 1 + 3  # the batch that was taken once, the other each time
