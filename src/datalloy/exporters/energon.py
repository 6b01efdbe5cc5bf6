"""A handover in, a Megatron-Energon metadataset over WebDataset tars out.

Exact counts without copies: a mixture takes every row of a domain either n or n + 1 times, so rows are grouped by how
often they are seen, and `blend_epochized` repeats each group as often; every row is in one tar. Native shares are
`blend` weights: rows are drawn, counts drift by sqrt(n w (1 - w)), which the file says.

`prepare.sh` builds Energon's index, which only its own command can. Samples are crude: a cooker of the user's task
encoder turns `json` and the pictures into what the model is given; `subflavors` name the domain.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datalloy.exporters.handover import Handover
from datalloy.exporters.webdataset import write_shards
from datalloy.exporters.writing import write_yaml
from datalloy.run import write_atomically
from datalloy.sample import Sample

CRUDE = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
SHARD_NAMES = "shard"


def export(handover: Handover, out: Path) -> list[Path]:
    """Write the folder; the files written."""
    written: list[Path] = []
    blend: list[dict[str, Any]] = []
    about = [f"{handover.name}: {len(handover.samples)} rows an epoch, {_steps(handover)}."]
    if handover.native:
        for portion in handover.portions:
            written += _write_set(portion.samples, out / portion.name)
            subflavors = {"domain": portion.samples[0].domain}
            share = round(handover.shares[portion.name], 6)
            blend.append({"weight": share, "path": f"./{portion.name}", "subflavors": subflavors})
        drift = ", ".join(f"{name} +-{sd:.0f}" for name, sd in handover.drawn_drift.items())
        about.append(f"Rows are drawn by weight: counts drift by one standard deviation of {drift} samples.")
    else:
        for (domain, times), samples in _by_times(handover.samples).items():
            name = f"{domain}-x{times}"
            written += _write_set(samples, out / name)
            blend.append({"repetitions": times, "path": f"./{name}", "subflavors": {"domain": domain}})
        about.append("Use get_train_dataset(..., repeat=False) to stop after an epoch.")
    splits = {"train": {"blend" if handover.native else "blend_epochized": blend}}
    content = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
    meta = write_yaml(out / "metadataset.yaml", "\n".join(about), content)
    script = out / "prepare.sh"
    write_atomically(script, _prepare([entry["path"] for entry in blend]).encode())
    script.chmod(0o755)
    return [*written, meta, script]


def _steps(handover: Handover) -> str:
    return f"{handover.steps} steps of {handover.train.batch_size} samples"


def _by_times(samples: Sequence[Sample]) -> dict[tuple[str, int], list[Sample]]:
    """The distinct samples by domain and by how often they are seen, in the order of their first use."""
    times = Counter((sample.domain, sample.id) for sample in samples)
    first = {(sample.domain, sample.id): sample for sample in samples}
    groups: dict[tuple[str, int], list[Sample]] = {}
    for key, sample in first.items():
        groups.setdefault((sample.domain, times[key]), []).append(sample)
    return dict(sorted(groups.items()))


def _write_set(samples: Sequence[Sample], folder: Path) -> list[Path]:
    shards = write_shards(samples, folder, SHARD_NAMES)
    crude = write_yaml(folder / ".nv-meta" / "dataset.yaml", "Cooked by the task encoder", CRUDE)
    return [*shards, crude]


def _prepare(paths: Sequence[str]) -> str:
    lines = [f"energon prepare --non-interactive --split-ratio 1,0,0 --skip-dataset-yaml {path}" for path in paths]
    return "\n".join(
        ["#!/bin/sh", "# Builds Energon's index of every set, once.", "set -e", 'cd "$(dirname "$0")"', *lines, ""]
    )
