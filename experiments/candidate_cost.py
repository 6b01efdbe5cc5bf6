"""What does a candidate mixture cost beside measuring one model? Two models with four experts each in, seconds out.

    python experiments/candidate_cost.py --out experiments/results/candidate_cost.json

The embedded model and a wider random one of the same family; four LoRA experts of rank 16 on the decoder's linear
layers and four full checkpoints with the vision tower frozen, all random. Measured are the answer losses and the
generated answers of drawn items: of one plain model as `evaluate` measures it (decoding, encoding and forward passes
each time), of the same model on items laid out once, and of candidates (a new mixture set, then measured) with and
without vision features kept. Seconds are those that the processor spent on one thread, since the clock would time what
else runs on the machine. All measurements take turns, and a ratio is the median over turns of the ratio within a turn.
Bars: a LoRA candidate costs at most 1.25 times a plain model, a full one 1.05 times. Some 20 minutes of one core.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from provenance import provenance

from datalloy.config import DataSource, Evaluate, Train
from datalloy.evaluation import MetricItems, evaluate
from datalloy.merging import Merge, open_merge
from datalloy.readers import read_all
from datalloy.sample import Sample
from datalloy.simplex import dirichlet
from datalloy.target_items import TargetItems
from datalloy.tiny.model import build_model, build_processor
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.training import prepare_parameters
from datalloy.vision_features import VisionFeatures
from datalloy.vlm import VLM

TARGETS = ("chart", "counting", "table")
EXPERTS = 4
RANK = 16
BARS = {"lora": 1.25, "full": 1.05}


class Setting(NamedTuple):
    """A model, and how many items of each target it is measured on."""

    vlm: VLM
    items: int


def load_settings(folder: Path) -> dict[str, Setting]:
    processor = build_processor()
    build_model(processor.tokenizer, width=512, layers=8).save_pretrained(folder / "wide")
    processor.save_pretrained(folder / "wide")
    wide = VLM.load(str(folder / "wide"), device="cpu")
    return {"tiny": Setting(VLM.load("tiny", device="cpu"), 32), "wide": Setting(wide, 16)}


def draw_targets(folder: Path, count: int, seed: int) -> dict[str, list[Sample]]:
    write_pool(folder, PoolPlan(samples={}, targets=TARGETS, target_items=count, holdout_items=0), seed)
    return {name: read_all(DataSource(path=str(folder / f"{name}.target.jsonl")), name)[0] for name in TARGETS}


def write_experts(base: VLM, adapter: str, folder: Path, seed: int) -> dict[str, Path]:
    """Random updates of about the size that short tunings make."""
    experts = {}
    for k in range(EXPERTS):
        expert = base.copy()
        parameters = prepare_parameters(expert, Train(adapter=adapter, rank=RANK, freeze_vision=True, seed=seed + k))
        generator = torch.Generator().manual_seed(seed + k)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.003)
        experts[f"expert-{k}"] = folder / f"{adapter}-{k}"
        expert.save(experts[f"expert-{k}"])
    return experts


def make_measurements(
    base: VLM, merges: Mapping[str, Merge], samples: Mapping[str, Sequence[Sample]], seed: int
) -> dict[str, Callable[[], object]]:
    """What takes turns, by name. Mixtures are drawn, none comes twice."""
    mixtures = iter(dirichlet(EXPERTS, 10_000, seed))
    settings = Evaluate(max_new_tokens=12)
    encoded = {name: [base.encode(sample) for sample in group] for name, group in samples.items()}
    weights = dict.fromkeys(samples, 1.0)
    measurements: dict[str, Callable[[], object]] = {
        "losses: plain evaluate": lambda: [evaluate(base, group, "loss", settings) for group in samples.values()],
        "answers: plain evaluate": lambda: [evaluate(base, g, "exact_match", settings) for g in samples.values()],
    }
    for share, suffix in ((False, ""), (True, ", vision kept")):
        vision = VisionFeatures() if share else None
        items = TargetItems.lay_out(base, encoded, weights, items_per_batch=settings.batch_size, vision=vision)
        metrics = dict.fromkeys(samples, "exact_match")
        asked = MetricItems.lay_out(base, samples, metrics, settings, blocks=1, vision=vision)
        measurements[f"losses: plain laid out{suffix}"] = lambda items=items: items.losses(base)
        measurements[f"answers: plain laid out{suffix}"] = lambda asked=asked: asked.values(base)
        for kind, merge in merges.items():
            measurements |= {
                f"losses: {kind} candidate{suffix}": lambda items=items, m=merge: items.losses(m.set(next(mixtures))),
                f"answers: {kind} candidate{suffix}": lambda asked=asked, m=merge: asked.values(m.set(next(mixtures))),
            }
    for apart, suffix in ((False, "targets mixed"), (True, "targets apart")):
        items = TargetItems.lay_out(
            base, encoded, weights, items_per_batch=settings.batch_size, vision=VisionFeatures(), targets_apart=apart
        )
        for kind, merge in merges.items():
            measurements[f"slopes: {kind}, {suffix}"] = lambda items=items, m=merge: m.slopes(next(mixtures), items)
    for kind, merge in merges.items():
        measurements[f"set: {kind}"] = lambda m=merge: m.set(next(mixtures))
    return measurements


def time_in_turns(measurements: Mapping[str, Callable[[], object]], turns: int) -> dict[str, np.ndarray]:
    """Processor seconds of each measurement in each turn; the first turn, which warms up, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in measurements}
    for turn in range(turns + 1):
        for name, measure in measurements.items():
            started = time.process_time()
            measure()
            if turn:
                seconds[name].append(time.process_time() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def compare(seconds: Mapping[str, np.ndarray]) -> list[dict]:
    """Every candidate beside plain evaluation, and beside the same items laid out for the plain model."""
    rows = []
    for what in ("losses", "answers"):
        for kind, bar in BARS.items():
            for suffix in ("", ", vision kept"):
                candidate = seconds[f"{what}: {kind} candidate{suffix}"]
                for plain in ("plain evaluate", f"plain laid out{suffix}"):
                    ratio = float(np.median(candidate / seconds[f"{what}: {plain}"]))
                    row = {"measured": what, "candidate": kind + suffix, "beside": plain, "ratio": ratio, "bar": bar}
                    rows.append(row | {"met": ratio <= bar})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=["tiny", "wide"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {
        **provenance(),
        "seed": options.seed,
        "turns": options.turns,
    }
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, setting in load_settings(folder).items():
            if model not in options.models:
                continue
            samples = draw_targets(folder / model / "data", setting.items, options.seed)
            merges = {
                kind: open_merge(setting.vlm, write_experts(setting.vlm, adapter, folder / model, options.seed))
                for kind, adapter in (("lora", "lora"), ("full", "none"))
            }
            measurements = make_measurements(setting.vlm, merges, samples, options.seed)
            seconds = time_in_turns(measurements, options.turns)
            figures[model] = {
                "parameters": sum(p.numel() for p in setting.vlm.model.parameters()),
                "items": setting.items * len(TARGETS),
                "relative_update": {
                    kind: float(np.sqrt(np.diag(merge.gram_KK)).mean() / merge.base_norm)
                    for kind, merge in merges.items()
                },
                "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
                "ratios": compare(seconds),
            }
            options.out.write_text(json.dumps(about | figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
