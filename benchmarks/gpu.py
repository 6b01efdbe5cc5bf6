"""How fast is each stage on an accelerator, and how much of the machine does it use? An architecture in, figures out.

    python benchmarks/gpu.py --model qwen2_5_vl_3b --out benchmarks/results/gpu_qwen2_5_vl_3b.json
    python benchmarks/gpu.py --model qwen2_5_vl_3b --shrink 16 --device cpu      # the same path, small, to try it

Architecture-true Qwen2.5-VL-3B or Qwen3-VL-4B with random weights, drawn pictures of 448 pixels and answers of about
twenty words. Measured: one training epoch (forward, backward, AdamW; bfloat16 autocast on float32 weights), one
directional derivative, calibrated utility as it is by default in both precisions and with three items replayed
(float32 steps), the forward passes behind an evaluation, and training and forward passes with compiled layers. For
each: samples a second, share of the matrix peak that this run measured, peak memory. Operations are counted as 2 a
parameter and token forward and 6 for training. Medians of five turns.
"""

import argparse
import functools
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers

import models
from datalloy.config import Precision
from datalloy.encoding import length_batches
from datalloy.run import write_json
from datalloy.scorers.first_order import FiniteDifferenceScorer
from datalloy.scorers.replay import Replay
from datalloy.scorers.step import Steppable, StepRule
from datalloy.scorers.taps import Taps
from datalloy.target_items import TargetItems
from datalloy.vlm import VLM, Encoded

TURNS = 5
WORDS = "the picture shows a chart with several bars of which one is larger than all others by far".split()  # noqa: SIM905
TEXT: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "qwen3_vl_4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl_3b": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    "qwen3_vl_4b": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16},
}
MROPE = {"qwen2_5_vl_3b": [16, 24, 24], "qwen3_vl_4b": [24, 20, 20]}
FAMILY = {"qwen2_5_vl_3b": "qwen2_5_vl", "qwen3_vl_4b": "qwen3_vl"}
PIXELS = 448


def build(name: str, folder: Path, shrink: int) -> Path:
    """A checkpoint of the architecture, random; `shrink` divides widths, depths and the picture."""
    models.tiny_families.build_checkpoint(FAMILY[name], folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    for key, value in TEXT[name].items():
        setattr(text, key, value)
    for key, value in VISION[name].items():
        setattr(vision, key, value)
    text.rope_parameters["mrope_section"] = MROPE[name]
    vision.patch_size, vision.out_hidden_size = 14 if name.startswith("qwen2") else 16, text.hidden_size
    if name.startswith("qwen2"):
        vision.window_size, vision.fullatt_block_indexes = 112, [7, 15, 23, 31]
    else:
        vision.deepstack_visual_indexes, vision.num_position_embeddings = [5, 11, 17], 2304
    if shrink > 1:
        text.num_hidden_layers = max(2, text.num_hidden_layers // shrink)
        text.hidden_size, text.intermediate_size = text.hidden_size // shrink, text.intermediate_size // shrink
        text.num_attention_heads, text.num_key_value_heads = max(1, text.hidden_size // 128), 1
        text.vocab_size = 2048
        vision.depth, vision.hidden_size, vision.num_heads = 2, 64, 2
        vision.out_hidden_size, vision.fullatt_block_indexes = text.hidden_size, [1]
        vision.deepstack_visual_indexes = [0]
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    pixels = {"shortest_edge": 56 * 56, "longest_edge": PIXELS * PIXELS}
    images = transformers.Qwen2VLImageProcessorPil(patch_size=vision.patch_size, merge_size=2, size=pixels)
    images.save_pretrained(folder)
    if name.startswith("qwen2"):
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        family = models.tiny_families.FAMILIES[FAMILY[name]]
        (folder / "preprocessor_config.json").write_text(json.dumps(settings | family.settings))
    return folder


def draw(vlm: VLM, folder: Path, count: int, pixels: int) -> list[Encoded]:
    """Questions about pictures of noise, with answers of some twenty words."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        coarse = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        PIL.Image.fromarray(coarse).resize((pixels, pixels)).save(folder / f"{i}.png")
        answer = " ".join(rng.permutation(WORDS))
        question = {"role": "user", "content": f"<image>Describe {' '.join(rng.permutation(WORDS)[:8])}."}
        rows.append({"messages": [question, {"role": "assistant", "content": answer}], "images": [f"{i}.png"]})
    (folder / "drawn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [vlm.encode(sample) for sample in models.read(folder / "drawn.jsonl")]


class Clock:
    """Seconds and peak memory of an action on the device, median over turns; the first warms up."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def time(self, action: Callable[[], object]) -> dict[str, float]:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        spent = [self._once(action) for _ in range(TURNS + 1)][1:]
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else float("nan")
        return {"seconds": float(np.median(spent)), "least": min(spent), "most": max(spent), "peak_gib": peak}

    def _once(self, action: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        action()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def matrix_peak(clock: Clock, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product: what this machine can do at best."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / clock.time(lambda: a @ a)["seconds"]


def measure(name: str, shrink: int, device: str, count: int, batch: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vlm = VLM.load(str(build(name, folder / "model", shrink)), device=device)
        encoded = draw(vlm, folder, count, PIXELS // (4 if shrink > 1 else 1))
        clock = Clock(vlm.device)
        tokens = sum(item.length for item in encoded)
        parameters = sum(p.numel() for p in vlm.model.parameters())
        peaks = {d: matrix_peak(clock, vlm.device, getattr(torch, d)) for d in ("float32", "bfloat16")}
        batches = [[encoded[i] for i in chunk] for chunk in length_batches(encoded, batch)]
        half = min(16, count // 2)
        targets = {"a": encoded[:half], "b": encoded[half : 2 * half]}
        items = TargetItems.lay_out(vlm, targets, dict.fromkeys(targets, 1.0), items_per_batch=batch)
        stages = _stages(vlm, batches, items, encoded[0])
        rows = []
        for stage, (action, operations, dtype) in stages.items():
            found = clock.time(action)
            rate = operations * parameters * tokens / found["seconds"]
            rows.append({"stage": stage, **found, "samples_per_second": count / found["seconds"]})
            rows[-1]["share_of_matrix_peak"] = rate / peaks[dtype]
        return {
            "model": name,
            "parameters": parameters,
            "tokens": tokens,
            "samples": count,
            "peaks": peaks,
            "rows": rows,
        }


def _stages(
    vlm: VLM, batches: list[list[Encoded]], items: TargetItems, check: Encoded
) -> dict[str, tuple[Callable[[], object], float, str]]:
    """What is measured, with its operations for each parameter and token, and the type that it computes in."""
    optimizer = torch.optim.AdamW(vlm.model.parameters(), lr=0.0)

    def epoch() -> None:
        for group in batches:
            with vlm.autocast("bfloat16"):
                vlm.losses(vlm.collate(group)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def forward(precision: Precision) -> None:
        with torch.no_grad(), vlm.autocast(precision):
            for group in batches:
                vlm.losses(vlm.collate(group))

    @functools.cache
    def compile_layers() -> None:
        for layer in vlm.decoder_layers():
            layer.compile(dynamic=True)

    flat = [sample for group in batches for sample in group]
    steppable, rule = Steppable(list(vlm.decoder_layers().parameters())), StepRule("sgd")
    size = len(batches[0])
    derivative = FiniteDifferenceScorer(vlm, items, steppable, rule=rule, step=1.0, batch_size=size)
    few = {"a": [check], "b": [check, check]}
    replay = Replay(Taps(vlm), TargetItems.lay_out(vlm, few, dict.fromkeys(few, 1.0)), check)

    def calibrated(precision: Precision, replayed: Replay | None = None) -> None:
        reader = Taps(vlm, precision=precision)
        for group in batches:
            reading = reader.read(group)
            reader.measure(reading, ())
            if replayed:
                replayed.falls(reading, rule, (1e-3,))

    return {
        "training epoch, bfloat16 autocast": (epoch, 6, "bfloat16"),
        "forward pass, bfloat16 autocast": (lambda: forward("bfloat16"), 2, "bfloat16"),
        "forward pass, float32": (lambda: forward("float32"), 2, "float32"),
        "directional derivatives, two targets, float32": (lambda: derivative.score(flat), 6, "float32"),
        "calibrated utility, float32": (lambda: calibrated("float32"), 6, "float32"),
        "calibrated utility, bfloat16 autocast": (lambda: calibrated("bfloat16"), 6, "bfloat16"),
        "calibrated utility, three items replayed": (lambda: calibrated("float32", replay), 6 + 3 * 2, "float32"),
        # compiling is for good, so these come last; the first turn compiles and is not counted
        "training epoch, bfloat16 autocast, layers compiled": (lambda: (compile_layers(), epoch()), 6, "bfloat16"),
        "forward pass, bfloat16 autocast, layers compiled": (lambda: forward("bfloat16"), 2, "bfloat16"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(TEXT), default="qwen2_5_vl_3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; `--device cpu --shrink 16` tries the same path")
    found = measure(args.model, args.shrink, args.device, args.samples, args.batch)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    about = {"device": device, "torch": torch.__version__, "shrink": args.shrink, "commit": commit}
    if args.out:
        write_json(args.out, {**found, **about})
    for row in found["rows"]:
        print(
            f"| {row['stage']} | {row['samples_per_second']:.1f} | {row['share_of_matrix_peak']:.0%} | "
            f"{row['peak_gib']:.1f} |"
        )


if __name__ == "__main__":
    main()
