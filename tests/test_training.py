import copy
import gc
import math
import shutil

import numpy as np
import pytest
import safetensors
import torch

from datalloy import training
from datalloy.config import Train
from datalloy.errors import DataError, EnvironmentFault, ModelError, RecipeError, RunError
from datalloy.evaluation import answer_losses
from datalloy.training import learning_rate_factor, sample_order, step_count, train, training_flops
from datalloy.vlm import VLM
from drawn import build_vlm, draw_samples

FULL = Train(adapter="none", batch_size=8, learning_rate=2e-3, warmup_ratio=0.0)
LORA = Train(adapter="lora", rank=4, batch_size=8, learning_rate=1e-2, warmup_ratio=0.0)


@pytest.fixture(scope="module", autouse=True)
def _cheap_garbage_collection():
    """The Trainer collects garbage once a run; looking through all of torch each time doubles the time of this file."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    return build_vlm(tmp_path_factory.mktemp("base"))


@pytest.fixture
def vlm(untrained):
    return untrained.copy()


@pytest.fixture(scope="module")
def encoded(untrained):
    return [untrained.encode(sample) for sample in draw_samples(20)]


def changed(settings, **values):
    return settings.model_copy(update=values)


def weights(vlm):
    return {name: parameter.detach().clone() for name, parameter in vlm.model.named_parameters()}


def differing(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# --- order, steps, schedule


@pytest.mark.parametrize(("samples", "total"), [(1, 5), (7, 7), (7, 20), (7, 3), (10, 1000)])
def test_order_shows_each_sample_equally_often(samples, total):
    counts = np.bincount(sample_order(samples, total, 0), minlength=samples)
    assert counts.sum() == total
    assert set(counts) <= {total // samples, math.ceil(total / samples)}


def test_order_reshuffles_each_epoch():
    epochs = sample_order(50, 150, 0).reshape(3, 50)
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_the_seed_and_not_on_how_long_it_goes_on():
    assert np.array_equal(sample_order(9, 30, 1), sample_order(9, 90, 1)[:30])
    assert not np.array_equal(sample_order(9, 30, 1), sample_order(9, 30, 2))


def test_fixed_compute_takes_as_many_steps_for_any_selection():
    settings = changed(FULL, samples=80)
    assert step_count(5, settings) == step_count(5000, settings) == 10
    assert step_count(5, changed(FULL, samples=1)) == 1


def test_fixed_epochs_counts_passes_over_the_selection():
    settings = changed(FULL, protocol="fixed_epochs", epochs=1.5)
    assert step_count(64, settings) == 12
    assert step_count(1, settings) == 1


def test_learning_rate_rises_then_falls_along_half_a_cosine():
    factors = [learning_rate_factor(step, 10, 0.2) for step in range(10)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[6] == pytest.approx(0.5)
    assert min(factors) > 0


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_learning_rate_is_defined_at_the_ends_of_the_warmup_ratio(ratio):
    assert all(0 < learning_rate_factor(step, 4, ratio) <= 1 for step in range(4))


# --- what a step does


def test_first_loss_counts_every_sample_once(vlm, encoded):
    batch = [encoded[i] for i in sample_order(len(encoded), 8, FULL.seed)]
    expected = answer_losses(vlm, batch, batch_size=8).mean()
    assert train(vlm, encoded, FULL, None, steps=1).losses[0] == pytest.approx(expected, abs=1e-5)


def test_one_step_is_adams_first_step_on_the_mean_gradient(vlm, encoded):
    """Clipping scales the gradient and Adam's first step does not feel scale, but for its epsilon."""
    batch = [encoded[i] for i in sample_order(len(encoded), 8, FULL.seed)]
    vlm.losses(vlm.collate(batch)).mean().backward()
    frozen = {id(p) for p in vlm.vision_parameters()}
    gradients = {name: p.grad for name, p in vlm.model.named_parameters() if p.grad is not None and id(p) not in frozen}
    before = weights(vlm)
    vlm.model.zero_grad()
    train(vlm, encoded, FULL, None, steps=1)
    after = weights(vlm)
    for name, gradient in gradients.items():
        clear = gradient.abs() > 1e-5  # below, epsilon and the rounding of the gradient decide about the step
        expected = before[name] - FULL.learning_rate * gradient.sign()
        assert torch.allclose(after[name][clear], expected[clear], atol=1e-5)


def test_gradients_are_clipped(vlm, encoded, monkeypatch):
    """To a norm so far below Adam's epsilon of 1e-8 that hardly a step is left."""
    monkeypatch.setattr(training, "MAX_GRADIENT_NORM", 1e-10)
    before = weights(vlm)
    train(vlm, encoded, FULL, None, steps=1)
    moved = max((weights(vlm)[name] - before[name]).abs().max().item() for name in before)
    assert 0 < moved < 0.02 * FULL.learning_rate


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_training_lowers_the_loss_of_what_it_sees(settings, vlm, encoded):
    """By little under LoRA: the frozen output layer of an untrained model can say only so much."""
    before = answer_losses(vlm, encoded, batch_size=8).mean()
    trained = train(vlm, encoded, settings, None, steps=15)
    assert answer_losses(vlm, encoded, batch_size=8).mean() < before - 0.1
    assert (trained.steps, trained.samples_seen, len(trained.losses)) == (15, 120, 15)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 100])
def test_result_does_not_depend_on_the_micro_batch(micro_batch_size, untrained, encoded):
    """Rounding of the gradients remains, and Adam magnifies it where they are near zero: 1e-4 nats after six steps."""
    whole, parts = untrained.copy(), untrained.copy()
    expected = train(whole, encoded, FULL, None, steps=6)
    trained = train(parts, encoded, changed(FULL, micro_batch_size=micro_batch_size), None, steps=6)
    assert trained.losses == pytest.approx(expected.losses, abs=1e-4)
    assert answer_losses(parts, encoded, batch_size=8) == pytest.approx(
        answer_losses(whole, encoded, batch_size=8), abs=1e-3
    )


def test_the_samples_of_a_step_go_through_the_model_by_length(vlm, encoded, monkeypatch):
    asked, collate = [], vlm.collate
    monkeypatch.setattr(vlm, "collate", lambda items: asked.append([item.length for item in items]) or collate(items))
    train(vlm, encoded, changed(FULL, micro_batch_size=3), None, steps=2)
    for parts in (asked[:3], asked[3:]):
        assert [len(part) for part in parts] == [3, 3, 2]
        lengths = [length for part in parts for length in part]
        assert lengths == sorted(lengths)


def test_tokens_and_operations_are_counted_over_all_epochs(vlm, encoded):
    trained = train(vlm, encoded[:4], changed(FULL, freeze_vision=False), None, steps=3)
    assert trained.tokens_seen == 6 * sum(item.length for item in encoded[:4])
    assert trained.flops == 6 * sum(p.numel() for p in vlm.model.parameters()) * trained.tokens_seen


def test_frozen_vision_tower_saves_its_share_of_the_operations(vlm, encoded):
    trained = train(vlm, encoded, FULL, None, steps=1)
    spared = sum(p.numel() for p in vlm.vision_parameters())
    assert training_flops(vlm, trained.tokens_seen) - trained.flops == 2 * spared * trained.tokens_seen


def test_frozen_weights_save_a_third_of_the_operations(vlm):
    full = training_flops(vlm, 10)
    vlm.model.requires_grad_(False)
    assert training_flops(vlm, 10) == pytest.approx(full * 2 / 3)


def test_samples_are_encoded_when_their_step_comes(vlm, encoded):
    asked = []

    class Lazy(list):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    train(vlm, Lazy(encoded), FULL, None, steps=3)
    assert asked == sample_order(len(encoded), 24, FULL.seed).tolist()


def test_a_list_in_order_is_trained_on_as_it_lies(untrained, encoded):
    scheduled, shuffled = untrained.copy(), untrained.copy()
    order = sample_order(len(encoded), 24, FULL.seed)
    train(scheduled, [encoded[i] for i in order], FULL, None, steps=3, in_order=True)
    train(shuffled, encoded, FULL, None, steps=3)
    for name, weight in shuffled.model.state_dict().items():
        assert torch.equal(weight, scheduled.model.state_dict()[name])


def test_a_list_in_order_has_as_many_samples_as_are_seen(vlm, encoded):
    with pytest.raises(DataError, match=r"3 steps of 8 see 24 samples, and 23 were laid out in order"):
        train(vlm, (encoded * 3)[:23], FULL, None, steps=3, in_order=True)


# --- what is trained


def test_adapter_sits_on_the_linear_layers_of_the_decoder_alone(untrained, vlm, encoded):
    train(vlm, encoded, LORA, None, steps=1)
    linear = sum(isinstance(module, torch.nn.Linear) for module in untrained.decoder_layers().modules())
    trainable = [name for name, p in vlm.model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * linear
    assert all("text_model.layers" in name and "lora_" in name for name in trainable)
    assert vlm.model.active_peft_config.lora_alpha == 2 * LORA.rank


def test_adapter_training_leaves_the_base_weights_alone(untrained, vlm, encoded):
    train(vlm, encoded, LORA, None, steps=3)
    with vlm.model.disable_adapter():
        assert np.array_equal(
            answer_losses(vlm, encoded, batch_size=8), answer_losses(untrained, encoded, batch_size=8)
        )


@pytest.mark.parametrize("freeze", [True, False])
def test_vision_tower_moves_unless_it_is_frozen(freeze, untrained, vlm, encoded):
    train(vlm, encoded, changed(FULL, freeze_vision=freeze), None, steps=2)
    moved = differing(weights(untrained), weights(vlm))
    assert any("vision_model" in name for name in moved) is not freeze
    assert any("connector" in name for name in moved)


def test_weight_decay_spares_biases_and_norms(untrained, vlm, encoded):
    decayed = untrained.copy()
    train(vlm, encoded, FULL, None, steps=1)
    train(decayed, encoded, changed(FULL, weight_decay=0.1), None, steps=1)
    moved = differing(weights(vlm), weights(decayed))
    assert moved
    assert all(dict(vlm.model.named_parameters())[name].ndim >= 2 for name in moved)


def test_an_adapter_that_is_there_is_trained_further(vlm, encoded):
    first = train(vlm, encoded, LORA, None, steps=10)
    second = train(vlm, encoded, LORA, None, steps=1)
    assert second.losses[0] < first.losses[0] - 0.1  # the same batch; a fresh adapter would give the same loss
    assert list(vlm.model.peft_config) == ["default"]


def test_an_adapter_of_another_rank_is_refused(vlm, encoded):
    train(vlm, encoded, LORA, None, steps=1)
    with pytest.raises(ModelError, match=r"adapter of rank 4 and train.rank is 8"):
        train(vlm, encoded, changed(LORA, rank=8), None, steps=1)


def test_full_training_of_a_model_with_an_adapter_is_refused(vlm, encoded):
    train(vlm, encoded, LORA, None, steps=1)
    with pytest.raises(ModelError, match=r"carries an adapter and train.adapter is none"):
        train(vlm, encoded, FULL, None, steps=1)


def test_weights_in_bfloat16_are_refused(vlm, encoded):
    vlm.model.to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"trained in float32, those of .* are torch.bfloat16"):
        train(vlm, encoded, FULL, None, steps=1)


def test_bfloat16_computes_coarsely_and_keeps_float32_weights(untrained, vlm, encoded):
    coarse = train(vlm, encoded, changed(FULL, precision="bfloat16"), None, steps=2)
    exact = train(untrained.copy(), encoded, FULL, None, steps=2)
    assert coarse.losses != exact.losses
    assert coarse.losses == pytest.approx(exact.losses, rel=0.01)  # bfloat16 keeps 8 bits
    assert {p.dtype for p in vlm.model.parameters()} == {torch.float32}


# --- determinism and resuming


class Killed(BaseException):
    pass


def kill_after(monkeypatch, vlm, batches):
    collate, calls = VLM.collate, []

    def collate_until_killed(self, items):
        calls.append(items)
        if self is vlm and len(calls) > batches:
            raise Killed
        return collate(self, items)

    monkeypatch.setattr(VLM, "collate", collate_until_killed)


def with_dropout(vlm):
    for layer in vlm.decoder_layers():
        layer.self_attn.attention_dropout = 0.2
    return vlm


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_same_seed_gives_the_same_bits(settings, untrained, encoded):
    first, second = with_dropout(untrained.copy()), with_dropout(untrained.copy())
    assert (
        train(first, encoded, settings, None, steps=4).losses == train(second, encoded, settings, None, steps=4).losses
    )
    assert not differing(weights(first), weights(second))


def test_other_seed_gives_another_model(untrained, encoded):
    first, second = untrained.copy(), untrained.copy()
    train(first, encoded, LORA, None, steps=2)
    train(second, encoded, changed(LORA, seed=1), None, steps=2)
    assert differing(weights(first), weights(second))


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_killed_run_ends_in_the_same_bits(settings, untrained, encoded, tmp_path, monkeypatch):
    settings = changed(settings, warmup_ratio=0.3)
    undisturbed = with_dropout(untrained.copy())
    expected = train(undisturbed, encoded, settings, None, steps=8)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    killed = with_dropout(untrained.copy())
    with monkeypatch.context() as patch:
        kill_after(patch, killed, 5)
        with pytest.raises(Killed):
            train(killed, encoded, settings, tmp_path, steps=8)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["state.safetensors"]
    resumed = with_dropout(untrained.copy())
    batches = []
    monkeypatch.setattr(resumed.model, "forward", counted(resumed.model.forward, batches))
    trained = train(resumed, encoded, settings, tmp_path, steps=8)
    assert 0 < len(batches) < 8
    assert trained.losses == expected.losses
    assert trained.tokens_seen == expected.tokens_seen
    assert not differing(weights(undisturbed), weights(resumed))


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return call


def killed_folder(untrained, encoded, folder, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    vlm = untrained.copy()
    with monkeypatch.context() as patch:
        kill_after(patch, vlm, 3)
        with pytest.raises(Killed):
            train(vlm, encoded, FULL, folder, steps=4)
    return folder


def test_checkpoint_of_another_training_is_refused(untrained, encoded, tmp_path, monkeypatch):
    folder = killed_folder(untrained, encoded, tmp_path, monkeypatch)
    for name in ("input_ids", "labels"):
        other = copy.deepcopy(encoded)
        ({**other[0].inputs, "labels": other[0].labels})[name][0, -1] = 300
        with pytest.raises(RunError, match="belongs to a training with other settings, samples or model"):
            train(untrained.copy(), other, FULL, folder, steps=4)
    for settings, steps in ((changed(FULL, learning_rate=1e-4), 4), (FULL, 5)):
        with pytest.raises(RunError, match="belongs to a training with other settings, samples or model"):
            train(untrained.copy(), encoded, settings, folder, steps=steps)


def test_micro_batch_may_change_before_resuming(untrained, encoded, tmp_path, monkeypatch):
    folder = killed_folder(untrained, encoded, tmp_path, monkeypatch)
    assert train(untrained.copy(), encoded, changed(FULL, micro_batch_size=4), folder, steps=4).steps == 4


@pytest.mark.parametrize("damage", ["torn", "emptied", "bit"])
def test_a_damaged_checkpoint_is_set_aside_and_training_begins_again(
    damage, untrained, encoded, tmp_path, monkeypatch, caplog
):
    path = killed_folder(untrained, encoded, tmp_path, monkeypatch) / "checkpoints" / "state.safetensors"
    data = path.read_bytes()
    flipped = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]  # in a weight, which safetensors does not see
    path.write_bytes({"torn": data[:1000], "emptied": b"", "bit": flipped}[damage])
    resumed, undisturbed = untrained.copy(), untrained.copy()
    train(resumed, encoded, FULL, tmp_path, steps=4)
    train(undisturbed, encoded, FULL, None, steps=4)
    assert "state.safetensors is damaged and set aside" in caplog.text
    assert not differing(weights(resumed), weights(undisturbed))


def test_a_disk_without_room_is_noticed_before_the_first_step(untrained, encoded, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(training, "_run_trainer", None)
    with pytest.raises(EnvironmentFault, match=r"training .* needs [\d,]+ bytes at .*, 1,000 are free there"):
        train(untrained.copy(), encoded, FULL, tmp_path / "out", steps=1)
    assert list(tmp_path.iterdir()) == []


def test_short_runs_keep_no_checkpoint(vlm, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(training._Checkpoint, "save", lambda *_: pytest.fail("saved"))
    train(vlm, encoded, FULL, tmp_path, steps=3)


# --- what is left behind


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_saved_model_is_the_trained_one(settings, vlm, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    train(vlm, encoded, settings, tmp_path, steps=3)
    loaded = VLM.load(str(tmp_path), device="cpu")
    assert np.array_equal(answer_losses(loaded, encoded, batch_size=8), answer_losses(vlm, encoded, batch_size=8))
    assert not (tmp_path / "checkpoints").exists()


def test_saved_files_hold_no_pickle(vlm, encoded, tmp_path):
    train(vlm, encoded, FULL, tmp_path, steps=1)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json", ".jinja"}
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.keys()


def test_measuring_run_writes_nothing(vlm, encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(vlm, encoded, FULL, None, steps=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [FULL, LORA], ids=["full", "lora"])
def test_model_is_left_as_other_stages_expect_it(settings, vlm, encoded):
    settings = changed(settings, gradient_checkpointing=True, precision="bfloat16")
    config, forward, processor = vlm.model.config.to_dict(), vlm.model.forward.__func__, repr(vlm.processor)
    base = vlm.base_model
    train(vlm, encoded, settings, None, steps=1)
    assert vlm.base_model is base
    assert not any(module.training for module in vlm.model.modules())
    assert not base.is_activation_checkpointing
    assert base.config.to_dict() == config
    assert base.forward.__func__ is forward
    assert repr(vlm.processor) == processor
    assert settings.adapter == "lora" or all(p.requires_grad for p in vlm.model.parameters())


def test_gradient_checkpointing_changes_no_loss(untrained, vlm, encoded):
    plain = train(untrained.copy(), encoded, LORA, None, steps=3)
    assert train(vlm, encoded, changed(LORA, gradient_checkpointing=True), None, steps=3).losses == pytest.approx(
        plain.losses, abs=1e-5
    )


@pytest.mark.filterwarnings("error")
def test_training_says_nothing(vlm, encoded, tmp_path, capfd):
    train(vlm, encoded, LORA, tmp_path, steps=2)
    assert capfd.readouterr() == ("", "")


# --- refusals


def test_no_samples_are_refused(vlm):
    with pytest.raises(DataError, match="no samples were given"):
        train(vlm, [], FULL, None)


def test_diverged_training_is_an_error_and_not_a_number(vlm, encoded):
    next(vlm.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"training loss is nan at step 1; lower train.learning_rate \(now at 0.002\)"):
        train(vlm, encoded, FULL, None, steps=2)
    assert not vlm.model.training


def test_unknown_tracker_is_refused_by_name(vlm, encoded):
    with pytest.raises(RecipeError, match=r"train.report_to names nosuch, which is not installed"):
        train(vlm, encoded, changed(FULL, report_to=("nosuch",)), None, steps=1)


# --- milestones


def test_a_milestone_holds_the_model_as_it_was_after_so_many_steps(vlm, untrained, encoded, tmp_path):
    def losses_after(folder):
        return answer_losses(VLM.load(str(folder), device="cpu"), encoded[:6], batch_size=6)

    constant = changed(FULL, seed=3)
    train(vlm, encoded, constant, tmp_path / "end", steps=4, milestones={2: tmp_path / "middle", 4: tmp_path / "last"})
    assert np.array_equal(losses_after(tmp_path / "last"), losses_after(tmp_path / "end"))
    assert not np.allclose(losses_after(tmp_path / "middle"), losses_after(tmp_path / "end"))
    assert not np.allclose(losses_after(tmp_path / "middle"), answer_losses(untrained, encoded[:6], batch_size=6))


def test_keeping_a_milestone_changes_nothing_in_the_training(untrained, encoded, tmp_path):
    with_milestone, without = untrained.copy(), untrained.copy()
    kept = train(with_milestone, encoded, LORA, None, steps=3, milestones={1: tmp_path / "one"})
    plain = train(without, encoded, LORA, None, steps=3)
    assert kept.losses == plain.losses
    assert differing(weights(with_milestone), weights(without)) == set()
    assert (tmp_path / "one" / "adapter_model.safetensors").exists()
