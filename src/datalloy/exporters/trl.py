"""A handover in, Parquet files and `sft.yaml` for `trl sft --config FOLDER/sft.yaml` out.

Typed blocks and a column of pictures that Hugging Face datasets opens itself, by path where they are files. TRL takes a
literal "<image>" in a string for text, so strings with placeholders are never written.

Where every conversation has one answer, rows are prompt and completion, and the loss is on the completion with any chat
template. Otherwise they are messages with `assistant_only_loss`, which needs a template that marks its answers
(`{% generation %}`; TRL knows some models' and says so where it does not).

Native shares are TRL's `fraction`: the first rows of each set, cut at the set that ends first, so nothing is repeated
and the total is smaller than asked for. `sft.yaml` says by how much.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from datalloy.exporters.handover import Handover, batch_split, unique_ids
from datalloy.exporters.rows import complete_file
from datalloy.exporters.writing import write_yaml
from datalloy.sample import FileImage, ImageRef, Sample, Turn

ROW_GROUP_ROWS = 100

_TURNS = pyarrow.list_(
    pyarrow.struct(
        [
            ("role", pyarrow.string()),
            ("content", pyarrow.list_(pyarrow.struct([("type", pyarrow.string()), ("text", pyarrow.string())]))),
        ]
    )
)
_IMAGES = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
_TURNS_FEATURE = {
    "_type": "List",
    "feature": {
        "role": {"dtype": "string", "_type": "Value"},
        "content": {
            "_type": "List",
            "feature": {
                "type": {"dtype": "string", "_type": "Value"},
                "text": {"dtype": "string", "_type": "Value"},
            },
        },
    },
}


def export(handover: Handover, out: Path) -> list[Path]:
    """Write the folder; the files written."""
    sets = handover.sets()
    by_completion = all(_has_one_answer(sample) for samples in sets.values() for sample in samples)
    if not handover.native:
        sets = {"train": list(handover.samples)}
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for name, samples in sets.items():
        _write_table(out / f"{name}.parquet", samples, by_completion)
        written.append(out / f"{name}.parquet")
    config = write_yaml(out / "sft.yaml", _about(handover), _settings(handover, out, list(sets), by_completion))
    return [*written, config]


def _has_one_answer(sample: Sample) -> bool:
    return sum(turn.role == "assistant" for turn in sample.turns) == 1


def _write_table(path: Path, samples: Sequence[Sample], by_completion: bool) -> None:
    names = ("prompt", "completion") if by_completion else ("messages",)
    fields: list[Any] = [("id", pyarrow.string()), *((name, _TURNS) for name in names), ("images", _IMAGES)]
    features: dict[str, Any] = {
        "id": {"dtype": "string", "_type": "Value"},
        **dict.fromkeys(names, _TURNS_FEATURE),
        "images": {"_type": "List", "feature": {"_type": "Image"}},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    ids = list(unique_ids(samples))
    with complete_file(path) as file:
        schema = pyarrow.schema(fields, metadata=metadata)
        with pyarrow.parquet.ParquetWriter(file, schema, write_page_checksum=True) as writer:
            for start in range(0, len(samples), ROW_GROUP_ROWS):
                part = slice(start, start + ROW_GROUP_ROWS)
                rows = [_row(s, id, by_completion) for s, id in zip(samples[part], ids[part], strict=True)]
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _row(sample: Sample, id: str, by_completion: bool) -> dict[str, Any]:
    turns = [_blocks(turn) for turn in sample.turns]
    row = {"prompt": turns[:-1], "completion": turns[-1:]} if by_completion else {"messages": turns}
    return {"id": id, **row, "images": [_cell(image) for image in sample.images]}


def _blocks(turn: Turn) -> dict[str, Any]:
    texts = [part if isinstance(part, str) else None for part in turn.parts]
    content = [{"type": "image" if text is None else "text", "text": text} for text in texts]
    return {"role": turn.role, "content": content}


def _cell(image: ImageRef) -> dict[str, Any]:
    if isinstance(image, FileImage):
        return {"bytes": None, "path": str(image.path)}
    return {"bytes": image.read(), "path": None}


def _about(handover: Handover) -> str:
    steps = f"{handover.steps} steps of {handover.train.batch_size} samples on one device"
    about = f"{handover.name}: {handover.rows_in_words} rows; {steps}.\ntrl sft --config sft.yaml"
    if handover.native:
        longest = min(len(portion.samples) / handover.shares[portion.name] for portion in handover.portions)
        about += (
            f"\nfraction never repeats a row: an epoch is {longest:.0f} rows, where the mixture asks for "
            f"{sum(p.count for p in handover.portions)}; every row behind a set's first ones is never seen."
        )
    return about


def _settings(handover: Handover, out: Path, names: Sequence[str], by_completion: bool) -> dict[str, Any]:
    train = handover.train
    micro, accumulation = batch_split(train)
    sets: list[dict[str, Any]] = [
        {"path": "parquet", "data_files": str(out.resolve() / f"{name}.parquet"), "split": "train"} for name in names
    ]
    if handover.native:
        sets = [{**one, "fraction": round(handover.shares[name], 6)} for one, name in zip(sets, names, strict=True)]
    tuning = {"use_peft": True, "lora_r": train.rank, "lora_alpha": 2 * train.rank, "lora_target_modules": "all-linear"}
    return {
        "model_name_or_path": handover.base,
        "datasets": sets,
        **({} if by_completion else {"assistant_only_loss": True}),
        "max_length": None,  # a cut could fall inside a picture's tokens
        **({"train_sampling_strategy": "sequential"} if handover.keeps_order else {}),
        **(tuning if train.adapter == "lora" else {}),
        "max_steps": handover.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": handover.warmup_steps,
        "weight_decay": train.weight_decay,
        **({"gradient_checkpointing": True} if train.gradient_checkpointing else {}),
        "bf16": train.precision == "bfloat16",
        "seed": train.seed,
        "report_to": list(train.report_to) or "none",
        "output_dir": str(out.resolve() / "output"),
    }
