"""Small drawn samples and an untrained model of the embedded architecture, small enough to train inside a test."""

import io
import random
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from datalloy.sample import Origin, Sample, Turn
from datalloy.tiny.model import build_model, build_processor
from datalloy.tiny.world import DRAW, SKILLS
from datalloy.vlm import VLM


@dataclass(frozen=True)
class MemoryImage:
    data: bytes

    def read(self) -> bytes:
        return self.data


def draw_samples(count: int, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    samples = []
    for i in range(count):
        drawing = DRAW[SKILLS[i % len(SKILLS)]](rng)
        question = rng.choice(drawing.questions)
        file = io.BytesIO()
        PIL.Image.fromarray(drawing.pixels).save(file, "PNG")
        turns = (Turn("user", (MemoryImage(file.getvalue()), question.text)), Turn("assistant", (question.answer,)))
        samples.append(Sample(f"drawn-{i}", drawing.skill, turns, Origin(Path("drawn.jsonl"), i, i + 1), str(i)))
    return samples


def build_vlm(folder: Path) -> VLM:
    """Saved to `folder` and loaded from it, so that adapters trained on it find their base again."""
    processor = build_processor()
    build_model(processor.tokenizer, width=32, layers=2, vision_layers=1).save_pretrained(folder)
    processor.save_pretrained(folder)
    return VLM.load(str(folder), device="cpu")
