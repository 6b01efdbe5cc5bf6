"""A handover in, JSONL files and `train.sh`, a launch of ms-swift with `--dataset PATH#COUNT ...`, out.

Messages with `<image>` in their texts, pictures by absolute path, and the domain as `channel`, so that ms-swift can log
the loss of each (`--enable_channel_loss true`). Exact counts: the rows are in the files, and each count is the length
of its file. A mixture is one file, which ms-swift shuffles neither as it reads it nor as it trains.

Native shares keep exact counts too: a count above a file's length repeats the file whole and draws the remainder (seed
42 of ms-swift). What drifts is only which rows are seen once more.
"""

import shlex
from pathlib import Path

from datalloy.exporters.handover import Handover, batch_split, unique_ids
from datalloy.exporters.llama_factory import message_row
from datalloy.exporters.writing import PictureFiles, write_lines
from datalloy.run import write_atomically


def export(handover: Handover, out: Path) -> list[Path]:
    """Write the folder; the files written. Raises DataError for a text that cannot be written."""
    pictures, sets = PictureFiles(out), handover.sets()
    written = [
        write_lines(
            out / f"{name}.jsonl",
            (
                {**message_row(s, id, pictures), "channel": s.domain}
                for s, id in zip(samples, unique_ids(samples), strict=True)
            ),
        )
        for name, samples in sets.items()
    ]
    script = out / "train.sh"
    write_atomically(script, _launch(handover, out).encode())
    script.chmod(0o755)
    return [*written, *pictures.written, script]


def dataset_arguments(handover: Handover, out: Path) -> list[str]:
    """`PATH#COUNT` for each set."""
    counts = {name: len(samples) for name, samples in handover.sets().items()}
    if handover.native:
        counts = {portion.name: portion.count for portion in handover.portions}
    return [f"{out.resolve() / name}.jsonl#{count}" for name, count in counts.items() if count]


def _launch(handover: Handover, out: Path) -> str:
    train = handover.train
    micro, accumulation = batch_split(train)
    options = {
        "model": handover.base,
        "tuner_type": "lora" if train.adapter == "lora" else "full",
        **({"lora_rank": train.rank, "lora_alpha": 2 * train.rank} if train.adapter == "lora" else {}),
        "freeze_vit": str(train.freeze_vision).lower(),
        "split_dataset_ratio": 0,
        "max_length": train.max_tokens,
        "max_steps": handover.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": train.learning_rate,
        "warmup_ratio": train.warmup_ratio,
        "weight_decay": train.weight_decay,
        "torch_dtype": train.precision,
        "seed": train.seed,
        "output_dir": out.resolve() / "output",
    }
    if handover.keeps_order:
        options |= {"dataset_shuffle": "false", "train_dataloader_shuffle": "false"}
    if train.report_to:
        options["report_to"] = " ".join(train.report_to)
    lines = [f"    --dataset {shlex.join(dataset_arguments(handover, out))}"]
    lines += [f"    --{key} {shlex.quote(str(value))}" for key, value in options.items()]
    about = f"# {handover.name}: {handover.steps} steps of {train.batch_size} samples on one device. More options: $@"
    return f"#!/bin/sh\n{about}\nexec swift sft \\\n" + " \\\n".join([*lines, '    "$@"']) + "\n"
