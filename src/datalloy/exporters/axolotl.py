"""A handover in, `train.jsonl` and `config.yaml` for `axolotl train FOLDER/config.yaml` out.

Messages of typed blocks, pictures by absolute path. axolotl concatenates sets and has no shares, so counts are always
exact rows. Its `chat_template` for the model has to be named on the command line or in the file where the tokenizer's
own does not do, as for qwen2_vl.
"""

from pathlib import Path
from typing import Any

from datalloy.exporters.handover import Handover, batch_split, unique_ids
from datalloy.exporters.writing import PictureFiles, write_lines, write_yaml
from datalloy.sample import Sample, Turn


def export(handover: Handover, out: Path) -> list[Path]:
    """Write the folder; the files written. Raises RecipeError for native shares."""
    handover.refuse_native("axolotl", "concatenates its datasets and has no shares of its own")
    pictures = PictureFiles(out)
    ids = unique_ids(handover.samples)
    rows = (_row(sample, id, pictures) for sample, id in zip(handover.samples, ids, strict=True))
    data = write_lines(out / "train.jsonl", rows)
    about = (
        f"{handover.name}: rows by domain: {handover.rows_in_words}; {handover.steps} steps of "
        f"{handover.train.batch_size} samples on one device.\naxolotl train config.yaml"
    )
    return [data, *pictures.written, write_yaml(out / "config.yaml", about, _settings(handover, out))]


def _row(sample: Sample, id: str, pictures: PictureFiles) -> dict[str, Any]:
    return {"id": id, "messages": [_blocks(turn, pictures) for turn in sample.turns]}


def _blocks(turn: Turn, pictures: PictureFiles) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "path": pictures.path(part)}
        for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


def _settings(handover: Handover, out: Path) -> dict[str, Any]:
    train = handover.train
    micro, accumulation = batch_split(train)
    tuning = {"adapter": "lora", "lora_r": train.rank, "lora_alpha": 2 * train.rank, "lora_target_linear": True}
    return {
        "base_model": handover.base,
        "processor_type": "AutoProcessor",
        "datasets": [
            {
                "path": str(out.resolve() / "train.jsonl"),
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
                "roles_to_train": ["assistant"],
            }
        ],
        # pictures are opened while training: no tokenised cache, no packing, no dropped columns
        "skip_prepare_dataset": True,
        "remove_unused_columns": False,
        "sample_packing": False,
        "sequence_len": train.max_tokens,
        "val_set_size": 0.0,
        # of its two samplers the sequential one; a single dataset would be shuffled as it is read
        **({"curriculum_sampling": True, "shuffle_merged_datasets": False} if handover.keeps_order else {}),
        **(tuning if train.adapter == "lora" else {}),
        "freeze_mm_modules": train.freeze_vision,
        "max_steps": handover.steps,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": train.learning_rate,
        "lr_scheduler": "cosine",
        "optimizer": "adamw_torch",
        "warmup_steps": handover.warmup_steps,
        "weight_decay": train.weight_decay,
        **({"gradient_checkpointing": True} if train.gradient_checkpointing else {}),
        "bf16": train.precision == "bfloat16",
        "seed": train.seed,
        "output_dir": str(out.resolve() / "output"),
    }
