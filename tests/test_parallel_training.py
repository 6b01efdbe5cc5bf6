"""Two processes on one batch take the steps that one process takes, each with the whole model (DDP) or with its part of
it (FSDP): through gloo, for real."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from datalloy.config import Train
from datalloy.errors import EnvironmentFault, ModelError, RecipeError
from datalloy.sharding import Shards
from datalloy.training import MAX_GRADIENT_NORM, micro_batches, train
from datalloy.vlm import VLM
from drawn import build_vlm, draw_samples

HERE = Path(__file__).parent
FULL = {"adapter": "none", "batch_size": 9, "micro_batch_size": 2, "learning_rate": 1e-3, "freeze_vision": False}
LORA = {"adapter": "lora", "rank": 4, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2}
SETTINGS = {"full": FULL, "lora": LORA}
LOSS_TOLERANCE = 1e-5  # relative: sums in another order
WEIGHT_TOLERANCE = 0.05  # of the learning rate, the length of one of Adam's steps: most weights, see below
ALONE = [{"name": name, "settings": settings, "shards": False} for name, settings in SETTINGS.items()]
TOGETHER = [
    {"name": f"{way}-{name}", "settings": settings, "shards": way == "fsdp"}
    for way in ("ddp", "fsdp")
    for name, settings in SETTINGS.items()
] + [
    {"name": "resumed", "settings": FULL, "shards": True, "killed_after": 2},
    {"name": "damaged", "settings": LORA, "shards": True, "killed_after": 1, "damaged": True},
]


@pytest.fixture
def vlm(tmp_path):
    return build_vlm(tmp_path)


def run_trainings(processes, out, trainings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    script = [str(HERE / "torchrun_training.py"), str(out), json.dumps(trainings)]
    command = [sys.executable, *(launcher if processes > 1 else []), *script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=560, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    out = tmp_path_factory.mktemp("together")
    run_trainings(2, out, TOGETHER)
    return out


@pytest.fixture(scope="module")
def alone(together, tmp_path_factory):
    """By one process, which also goes on from where two were killed."""
    out = tmp_path_factory.mktemp("alone")
    shutil.copytree(together / "resumed-killed", out / "resumed")
    run_trainings(1, out, [*ALONE, {"name": "resumed", "settings": FULL, "shards": False}])
    return out


def facts(folder, process=0):
    return json.loads((folder / f"process-{process}.json").read_text())


def saved_weights(folder):
    (weights,) = folder.glob("*.safetensors")
    return safetensors.torch.load_file(weights)


def assert_same_weights(one, other, learning_rate):
    """To rounding, but for the few whose gradient is rounding: Adam's step has one length, and where the gradient's
    sign is chance, so is the step's."""
    one, other = saved_weights(one), saved_weights(other)
    assert one.keys() == other.keys()
    apart = [abs(one[name] - other[name]).flatten() for name in one]
    assert min((tensor < WEIGHT_TOLERANCE * learning_rate).float().mean() for tensor in apart) > 0.99


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one_does(way, name, together, alone):
    folder = together / f"{way}-{name}"
    one, two = facts(alone / name), facts(folder)
    assert two["losses"] == pytest.approx(one["losses"], rel=LOSS_TOLERANCE)
    for fact in ("steps", "samples_seen", "tokens_seen"):
        assert two[fact] == one[fact], fact
    assert_same_weights(alone / name, folder, SETTINGS[name]["learning_rate"])
    assert_same_weights(alone / name / "after-2", folder / "after-2", SETTINGS[name]["learning_rate"])
    assert not (folder / "checkpoints").exists()


def test_gradients_are_clipped_by_their_norm_over_all_shards(together, alone):
    expected = facts(alone / "full")["norms"]
    assert max(expected) > MAX_GRADIENT_NORM  # or nothing would be clipped
    assert facts(together / "fsdp-full")["norms"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_of_two_processes_holds_half_of_the_weights_and_of_the_moments(name, together, alone):
    whole = facts(alone / name)["held"]
    assert facts(together / f"ddp-{name}")["held"] == whole
    for process in (0, 1):
        assert facts(together / f"fsdp-{name}", process)["held"] == pytest.approx(whole / 2, rel=0.01)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_sharded_training_leaves_the_whole_model_in_every_process(name, together):
    folder = together / f"fsdp-{name}"
    first, second = facts(folder, 0), facts(folder, 1)
    assert first["losses_after"] == second["losses_after"]
    assert first["losses"] == second["losses"]


def test_a_killed_sharded_training_ends_in_the_same_bits(together):
    resumed, undisturbed = together / "resumed", together / "fsdp-full"
    assert facts(resumed)["begun"] == [2, 3]
    assert facts(resumed)["losses"] == facts(undisturbed)["losses"]
    assert_same_bits(resumed, undisturbed)


def assert_same_bits(folder, other):
    one, two = saved_weights(folder), saved_weights(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_damaged_checkpoint_is_set_aside_by_all_processes(together):
    assert facts(together / "damaged")["begun"] == [0, 1, 2, 3]
    assert_same_bits(together / "damaged", together / "fsdp-lora")


def test_one_process_goes_on_from_where_two_were_killed(together, alone):
    assert facts(alone / "resumed")["begun"] == [2, 3]
    assert facts(alone / "resumed")["losses"] == pytest.approx(facts(alone / "full")["losses"], rel=LOSS_TOLERANCE)
    assert_same_weights(alone / "resumed", alone / "full", FULL["learning_rate"])


@pytest.mark.parametrize("name", SETTINGS)
def test_what_was_trained_in_shards_is_loaded_as_any_checkpoint_is(name, together, vlm):
    folder = together / f"fsdp-{name}"
    loaded = VLM.load(str(folder), device="cpu")
    batch = loaded.collate([loaded.encode(sample) for sample in draw_samples(20)])
    with torch.no_grad():
        losses = loaded.losses(batch).tolist()
    for i, (found, trained) in enumerate(zip(losses, facts(folder)["losses_after"], strict=True)):
        assert i % 3 == 0 or found == pytest.approx(trained, rel=1e-4)  # those without a picture are others there
    if name == "full":
        by_transformers = transformers.AutoModelForImageTextToText.from_pretrained(folder)
        assert all(
            torch.equal(a, b) for a, b in zip(by_transformers.parameters(), loaded.model.parameters(), strict=True)
        )


@pytest.mark.parametrize(
    ("batch", "micro", "processes"), [(128, None, 4), (9, None, 2), (10, 3, 2), (7, 1, 7), (8, 3, 1)]
)
def test_every_process_gets_as_many_micro_batches_and_nothing_is_left_out(batch, micro, processes):
    parts = micro_batches(batch, micro, processes)
    assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
    assert len(parts) % processes == 0
    assert max(part.stop - part.start for part in parts) <= (micro or 16)
    assert min(part.stop - part.start for part in parts) >= 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED is set: DeepSpeed brings an optimiser"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP of version 1 is asked for, parameters are sharded by version 2 here"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "leave --fsdp_offload_params false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, r"set train\.gradient_checkpointing to true"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "in one dimension"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"},
            "fsdp_reshard_after_forward is full_shard; with FSDP version 2 it is true or false",
        ),
    ],
)
def test_what_a_launcher_asks_of_sharding_and_would_not_get_is_refused(variables, message, vlm, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    encoded = [vlm.encode(sample) for sample in draw_samples(4)]
    with pytest.raises(EnvironmentFault, match=message):
        train(vlm, encoded, Train(adapter="none", batch_size=2), None, steps=1)


def test_a_model_with_a_parameter_that_cannot_be_cut_is_refused_and_left_whole(vlm):
    vlm.model.temperature = torch.nn.Parameter(torch.tensor(2.0))
    before = {name: parameter.clone() for name, parameter in vlm.model.named_parameters()}
    with pytest.raises(ModelError, match=r"cannot be sharded: its parameter temperature, of shape \[\], has nothing"):
        Shards(vlm)
    assert all(torch.equal(parameter, before[name]) for name, parameter in vlm.model.named_parameters())


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(RecipeError, match=r"train\.batch_size is 3, and 4 processes with micro-batches of 3 need"):
        micro_batches(3, None, 4)
