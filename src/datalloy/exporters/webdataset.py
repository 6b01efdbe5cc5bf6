"""A handover in, WebDataset tars out: `KEY.json` with typed blocks, `KEY.0.jpg`, `KEY.1.png` ... the pictures' bytes.

Self-contained: pictures are copied, also those of rows that repeat, so exact counts cost disk. Keys count rows, in the
order of training. Nothing in a tar depends on when or by whom it was written.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datalloy.exporters.handover import Handover, unique_ids
from datalloy.exporters.rows import complete_file
from datalloy.exporters.writing import picture_suffix
from datalloy.sample import Sample

SHARD_SAMPLES = 10_000


def export(handover: Handover, out: Path) -> list[Path]:
    """Write `train-000000.tar` and so on; the files written. Raises RecipeError for native shares."""
    handover.refuse_native("WebDataset", "has no file that could hold shares (energon has)")
    return write_shards(handover.samples, out, "train")


def write_shards(samples: Sequence[Sample], out: Path, name: str) -> list[Path]:
    """Tars of at most SHARD_SAMPLES samples each, every row with a key and an id of its own."""
    out.mkdir(parents=True, exist_ok=True)
    ids = list(unique_ids(samples))
    written = []
    for number, start in enumerate(range(0, len(samples), SHARD_SAMPLES)):
        path = out / f"{name}-{number:06d}.tar"
        with complete_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for row in range(start, min(start + SHARD_SAMPLES, len(samples))):
                for member, data in _members(samples[row], ids[row]):
                    info = tarfile.TarInfo(f"{row:09d}.{member}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        written.append(path)
    return written


def _members(sample: Sample, id: str) -> Iterator[tuple[str, bytes]]:
    pictures = [image.read() for image in sample.images]
    names = [f"{number}{picture_suffix(data)}" for number, data in enumerate(pictures)]
    record = {"id": id, "domain": sample.domain, "messages": list(_messages(sample)), "images": names}
    yield "json", json.dumps(record, ensure_ascii=False).encode()
    yield from zip(names, pictures, strict=True)


def _messages(sample: Sample) -> Iterable[dict[str, Any]]:
    for turn in sample.turns:
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in turn.parts]
        yield {"role": turn.role, "content": content}
