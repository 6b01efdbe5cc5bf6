"""One training on the embedded model, as torchrun starts it in the tests: the folder to write and settings in."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from datalloy.config import Train
from datalloy.training import Crew, train
from datalloy.vlm import VLM
from drawn import draw_samples

if Crew.launched().count > 1:
    torch.distributed.init_process_group("gloo")
out, settings = Path(sys.argv[1]), Train(**json.loads(sys.argv[2]))
vlm = VLM.load("tiny", device="cpu")
encoded = [vlm.encode(sample) for sample in draw_samples(20)]
trained = train(vlm, encoded, settings, out, steps=4, milestones={2: out / "after-2"})
if Crew.launched().is_first:
    (out / "trained.json").write_text(json.dumps(asdict(trained)))
if Crew.launched().count > 1:
    torch.distributed.destroy_process_group()
