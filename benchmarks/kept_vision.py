"""What does it save to keep what a vision tower sees? An architecture in, seconds a picture out.

    python benchmarks/kept_vision.py

The vision tower of Qwen2.5-VL-3B at its true size with random weights, in float32, drawn pictures of 448 pixels. The
same batches are looked at anew, taken from memory, and read back from the file that stands in for memory. Seconds of
the processor, one thread, medians of three turns; the file is in the page cache, so this is the cost of reading without
that of a slow disk. Five minutes of one core, 8 GB of memory.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpu
from datalloy.run import write_json
from datalloy.vision_features import VisionFeatures
from datalloy.vlm import VLM
from scoring import seconds

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
from provenance import provenance

PICTURES, TURNS = 1, 3


def measure(name: str, folder: Path) -> dict[str, Any]:
    gpu.TEXT[name] |= {"num_hidden_layers": 2}  # the tower alone is timed
    vlm = VLM.load(str(gpu.build(name, folder / "model", shrink=1)), device="cpu")
    batches = [vlm.collate([item]) for item in gpu.draw(vlm, folder, PICTURES, gpu.PIXELS)]
    tower = vlm.vision_tower()

    def look(vision: VisionFeatures | None) -> list[Any]:
        seen = []
        for batch in batches:
            with torch.no_grad(), vlm.reusing(vision, batch):
                seen.append(tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output)
        return seen

    in_memory, on_disk = VisionFeatures(), VisionFeatures(memory_bytes=0)
    ways = {"looked at anew": None, "kept in memory": in_memory, "kept on disk": on_disk}
    expected = look(None)
    for vision in (in_memory, on_disk):
        look(vision)
        for found, anew in zip(look(vision), expected, strict=True):
            torch.testing.assert_close(found, anew, rtol=0, atol=0)
    spent = {way: [seconds(lambda vision=vision: look(vision)) for _ in range(TURNS)] for way, vision in ways.items()}
    return {
        "model": name,
        "parameters": sum(p.numel() for p in tower.parameters()),
        "patches": int(batches[0]["pixel_values"].shape[0]),
        "seconds a picture": {way: float(np.median(taken)) / PICTURES for way, taken in spent.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["qwen2_5_vl_3b"], default="qwen2_5_vl_3b")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kept_vision.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.model, Path(folder))
    write_json(args.out, {**found, **provenance()})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
