"""Trainings of the embedded model one after another, as torchrun starts them in the tests.

Arguments: the folder to write, and the trainings as JSON: `name` of a folder in it and `settings`; `shards`, whether
FSDP is asked for; `killed_after` so many steps (as it is then it stays in NAME-killed); `damaged`, its checkpoint then.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import ClassVar

import torch
from torch.distributed.tensor import DTensor

from datalloy import training
from datalloy.config import Train
from datalloy.sample import Turn
from datalloy.training import Crew, train
from datalloy.vlm import VLM
from drawn import draw_samples

STEPS = 4


class Killed(Exception):
    pass


class Watched(training._Follower):
    """Notes which steps were begun, the norm of their gradients and how many numbers are held, and kills in time."""

    killed_after = 0
    begun: ClassVar = []
    norms: ClassVar = []
    held: ClassVar = []

    def on_step_begin(self, *args, **kwargs):
        if self.attempt.steps == self.killed_after > 0:
            raise Killed
        self.begun.append(self.attempt.steps)
        super().on_step_begin(*args, **kwargs)

    def on_log(self, *args, **kwargs):
        if (norm := kwargs["logs"].get("grad_norm")) is not None:
            self.norms.append(float(norm))
        super().on_log(*args, **kwargs)
        self.held.append(sum(map(held, numbers_of(self.module.model, self.checkpoint.optimizer))))


def numbers_of(model, optimizer):
    for parameter in model.parameters():
        yield parameter
        yield from optimizer.state.get(parameter, {}).values()


def held(tensor):
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


def samples():
    """Every third without a picture: often one process looks at pictures and the other has none."""
    drawn = draw_samples(20)
    for i in range(0, len(drawn), 3):
        text = Turn("user", (f"What is {i} + 1?",))
        drawn[i] = dataclasses.replace(drawn[i], turns=(text, *drawn[i].turns[1:]))
    return drawn


def run(out, settings, encoded):
    Watched.begun, Watched.norms, Watched.held = [], [], []
    vlm = VLM.load("tiny", device="cpu")
    trained = train(vlm, encoded, settings, out, steps=STEPS, milestones={2: out / "after-2"})
    with torch.no_grad():
        after = vlm.losses(vlm.collate(encoded)).tolist()
    facts = {
        **dataclasses.asdict(trained),
        "begun": Watched.begun,
        "norms": Watched.norms,
        "held": Watched.held[0],
        "losses_after": after,
    }
    (out / f"process-{Crew.launched().number}.json").write_text(json.dumps(facts))


def damage(file, crew):
    if crew.is_first:
        data = file.read_bytes()
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    crew.wait()


training._Follower = Watched
crew = Crew.launched()
if crew.count > 1:
    torch.distributed.init_process_group("gloo")
vlm = VLM.load("tiny", device="cpu")
encoded = [vlm.encode(sample) for sample in samples()]
for asked in json.loads(sys.argv[2]):
    # as `accelerate launch` sets them
    os.environ |= {"ACCELERATE_USE_FSDP": str(asked["shards"]).lower(), "FSDP_VERSION": "2"}
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    out, settings = Path(sys.argv[1]) / asked["name"], Train(**asked["settings"])
    out.mkdir(parents=True, exist_ok=True)
    Watched.killed_after = asked.get("killed_after", 0)
    if Watched.killed_after:
        training.CHECKPOINT_SECONDS = 0.0
        with contextlib.suppress(Killed):
            run(out, settings, encoded)
        Watched.killed_after, training.CHECKPOINT_SECONDS = 0, 300.0
        crew.wait()
        if crew.is_first:
            shutil.copytree(out, f"{out}-killed")
    if asked.get("damaged"):
        damage(out / "checkpoints" / "state.safetensors", crew)
    crew.wait()
    run(out, settings, encoded)
if crew.count > 1:
    torch.distributed.destroy_process_group()
