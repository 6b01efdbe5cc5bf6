"""A name in, a small half-trained model out: the embedded one, or a real family shrunk and tuned on drawn samples."""

import sys
from pathlib import Path

import torch
import transformers

from datalloy.config import DataSource, Train
from datalloy.readers import read_all
from datalloy.sample import Sample
from datalloy.tiny.pools import PoolPlan, write_pool
from datalloy.training import train
from datalloy.vlm import VLM

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny_families

WIDTH, LAYERS, HEADS = 96, 4, 4
STEPS, BATCH = 400, 16
SKILLS = ("chart", "counting", "table")


def load(name: str, folder: Path) -> VLM:
    """`embedded`, or a family of `tiny_families` at width 96 with four layers, tuned for 400 steps on a clean pool."""
    if name == "embedded":
        return VLM.load("tiny", device="cpu")
    if not (folder / "tuned").exists():
        vlm = VLM.load(str(_build(name, folder / "random")), device="cpu")
        pool = PoolPlan(samples=dict.fromkeys(SKILLS, 400), faults={}, targets=(), target_items=0, holdout_items=0)
        write_pool(folder / "pool", pool, seed=100)
        samples = [s for skill in SKILLS for s in read(folder / "pool" / f"{skill}.jsonl")]
        settings = Train(adapter="none", freeze_vision=False, batch_size=BATCH, learning_rate=2e-3)
        train(vlm, [vlm.encode(sample) for sample in samples], settings, folder / "tuned", steps=STEPS)
    return VLM.load(str(folder / "tuned"), device="cpu")


def read(path: Path) -> list[Sample]:
    return read_all(DataSource(path=str(path)), path.stem)[0]


def _build(name: str, folder: Path) -> Path:
    """The family's checkpoint, with a wider and deeper text model."""
    tiny_families.build_checkpoint(name, folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = WIDTH, 3 * WIDTH, LAYERS
    text.num_attention_heads, text.num_key_value_heads = HEADS, HEADS // 2
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i % len(text.layer_types)] for i in range(LAYERS)]
    if hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size = WIDTH
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return folder
