"""A handover in, a folder that `llamafactory-cli train FOLDER/train.yaml template=NAME` trains from.

One JSONL file a domain in sharegpt formatting with OpenAI's words, `dataset_info.json`, `train.yaml`. sharegpt and not
openai: LLaMA-Factory adds "detailed thinking off" to the system prompt of every openai record. Exact counts use
`mix_strategy: concat`; a mixture is one file, read in its order (`disable_shuffling`). `template` has no good default:
it is LLaMA-Factory's name for the model's chat template.

Native shares use `interleave_over`: rows are drawn by share until the last set is exhausted, with one seed.
"""

from pathlib import Path
from typing import Any

from datalloy.exporters.handover import Handover, batch_split, unique_ids
from datalloy.exporters.writing import PictureFiles, text_with_placeholders, write_lines, write_yaml
from datalloy.locations import ENTRY_FILE
from datalloy.run import write_json
from datalloy.sample import Sample

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
COLUMNS = {"messages": "messages", "images": "images"}


def export(handover: Handover, out: Path) -> list[Path]:
    """Write the folder; the files written. Raises DataError for a text that cannot be written."""
    pictures, sets = PictureFiles(out), handover.sets()
    written = [
        write_lines(
            out / f"{name}.jsonl",
            (message_row(s, id, pictures) for s, id in zip(samples, unique_ids(samples), strict=True)),
        )
        for name, samples in sets.items()
    ]
    layout = {"formatting": "sharegpt", "columns": COLUMNS, "tags": TAGS}
    write_json(out / ENTRY_FILE, {name: {"file_name": f"{name}.jsonl", **layout} for name in sets})
    config = write_yaml(out / "train.yaml", _about(handover), {**_settings(handover, out), **_mixing(handover)})
    return [*written, *pictures.written, out / ENTRY_FILE, config]


def message_row(sample: Sample, id: str, pictures: PictureFiles) -> dict[str, Any]:
    """`{"id", "messages", "images"}` with `<image>` in the texts: what LLaMA-Factory and ms-swift both read."""
    messages = [{"role": turn.role, "content": text_with_placeholders(sample, turn)} for turn in sample.turns]
    return {"id": id, "messages": messages, "images": [pictures.path(image) for image in sample.images]}


def _about(handover: Handover) -> str:
    lines = [
        f"{handover.name}: rows by set: {handover.rows_in_words}; {handover.steps} steps of "
        f"{handover.train.batch_size} samples on one device.",
        "llamafactory-cli train train.yaml template=NAME   (LLaMA-Factory's name of the model's template)",
    ]
    if handover.native:
        drift = ", ".join(f"{name} +-{sd:.0f}" for name, sd in handover.drawn_drift.items())
        lines.append(f"Shares are drawn at random: counts drift by one standard deviation of {drift} samples.")
    return "\n".join(lines)


def _settings(handover: Handover, out: Path) -> dict[str, Any]:
    train = handover.train
    micro, accumulation = batch_split(train)
    is_lora = train.adapter == "lora"
    tuning = {"lora_rank": train.rank, "lora_alpha": 2 * train.rank, "lora_target": "all"} if is_lora else {}
    return {
        "model_name_or_path": handover.base,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora" if is_lora else "full",
        **tuning,
        "freeze_vision_tower": train.freeze_vision,
        "dataset_dir": str(out.resolve()),
        "dataset": ",".join(handover.sets()),
        "cutoff_len": train.max_tokens,
        "output_dir": str(out.resolve() / "output"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "max_steps": handover.steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": handover.warmup_steps,
        "weight_decay": train.weight_decay,
        **({"gradient_checkpointing": True} if train.gradient_checkpointing else {}),
        "bf16": train.precision == "bfloat16",
        "seed": train.seed,
        "report_to": ",".join(train.report_to) or "none",
    }


def _mixing(handover: Handover) -> dict[str, Any]:
    if handover.keeps_order:
        return {"mix_strategy": "concat", "disable_shuffling": True}
    if not handover.native or len(handover.portions) == 1:
        return {"mix_strategy": "concat"}
    return {
        "mix_strategy": "interleave_over",
        "interleave_probs": ",".join(f"{share:.6f}" for share in handover.shares.values()),
    }
