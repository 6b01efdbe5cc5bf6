"""Two processes on one batch take the steps that one process takes: DDP through gloo, for real."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from datalloy.config import Train
from datalloy.errors import EnvironmentFault, RecipeError
from datalloy.training import micro_batches, train
from drawn import build_vlm, draw_samples

HERE = Path(__file__).parent
FULL = {"adapter": "none", "batch_size": 9, "learning_rate": 1e-3, "freeze_vision": False}
LORA = {"adapter": "lora", "rank": 4, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2}
LOSS_TOLERANCE = 1e-5  # relative: sums in another order
WEIGHT_TOLERANCE = 0.05  # of the learning rate, the length of one of Adam's steps: most weights, see below


@pytest.fixture
def vlm(tmp_path):
    return build_vlm(tmp_path)


def run_training(processes, out, settings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    script = [str(HERE / "torchrun_training.py"), str(out), json.dumps(settings)]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    (weights,) = out.glob("*.safetensors")
    return json.loads((out / "trained.json").read_text()), safetensors.torch.load_file(weights)


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_two_processes_train_as_one_does(settings, tmp_path):
    """Losses agree to rounding. So do weights, but for the few whose gradient is rounding: Adam's step has one length,
    and where the gradient's sign is chance, so is the step's."""
    alone, weights_alone = run_training(1, tmp_path / "one", settings)
    shared, weights_shared = run_training(2, tmp_path / "two", settings)
    assert shared["losses"] == pytest.approx(alone["losses"], rel=LOSS_TOLERANCE)
    assert (shared["steps"], shared["samples_seen"]) == (alone["steps"], alone["samples_seen"])
    assert weights_alone.keys() == weights_shared.keys()
    apart = [abs(weights_alone[name] - weights_shared[name]).flatten() for name in weights_alone]
    near = [(tensor < WEIGHT_TOLERANCE * settings["learning_rate"]).float().mean() for tensor in apart]
    assert min(near) > 0.99
    assert not (tmp_path / "two" / "checkpoints").exists()
    assert (tmp_path / "two" / "after-2").is_dir()


@pytest.mark.parametrize(
    ("batch", "micro", "processes"), [(128, None, 4), (9, None, 2), (10, 3, 2), (7, 1, 7), (8, 3, 1)]
)
def test_every_process_gets_as_many_micro_batches_and_nothing_is_left_out(batch, micro, processes):
    parts = micro_batches(batch, micro, processes)
    assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
    assert len(parts) % processes == 0
    assert max(part.stop - part.start for part in parts) <= (micro or batch)
    assert min(part.stop - part.start for part in parts) >= 1


@pytest.mark.parametrize("sharder", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_weights_are_refused_and_not_trained_some_other_way(sharder, vlm, monkeypatch):
    monkeypatch.setenv(sharder, "true")
    encoded = [vlm.encode(sample) for sample in draw_samples(4)]
    with pytest.raises(EnvironmentFault, match=f"{sharder} is set: weights are not sharded over processes here"):
        train(vlm, encoded, Train(adapter="none", batch_size=2), None, steps=1)


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(RecipeError, match=r"train\.batch_size is 3, and 4 processes with micro-batches of 3 need"):
        micro_batches(3, None, 4)
