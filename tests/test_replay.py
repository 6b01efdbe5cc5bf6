"""Replayed steps against steps taken for real, on the embedded architecture and on shrunk real families."""

import numpy as np
import pytest
import torch

import tiny_families
from datalloy.errors import ModelError
from datalloy.scorers.one_step import ExactScorer
from datalloy.scorers.replay import NUMBERS_AT_ONCE, Replay, stepped_forward
from datalloy.scorers.step import Steppable, StepRule, root_second_moments
from datalloy.scorers.tail import TailScorer
from datalloy.scorers.taps import Reading, Taps
from datalloy.target_items import TargetItems
from datalloy.vlm import VLM
from drawn import draw_samples

ROUNDING = 1e-5  # float32 losses of 6 nats; weights are formed by another product than they are moved by


def load(name, folder):
    return VLM.load(str(tiny_families.build_checkpoint(name, folder)), device="cpu")


@pytest.fixture(scope="module", params=["embedded", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def family(request, proxy, text_only, tmp_path_factory):
    """A model, target items of different lengths in several batches, one of them without a picture, and samples."""
    vlm = proxy if request.param == "embedded" else load(request.param, tmp_path_factory.mktemp("replay"))
    encoded = [vlm.encode(sample) for sample in [*draw_samples(4), text_only]]
    items = TargetItems.lay_out(vlm, {"a": encoded[:2], "b": encoded[2:]}, {"a": 1.0, "b": 3.0}, items_per_batch=3)
    samples = [vlm.encode(sample) for sample in [*draw_samples(4, seed=1), text_only]]
    return vlm, items, samples


def scorers(vlm, items, samples, depth, rule="sgd", step=0.3):
    taps = Taps(vlm, depth)
    roots = root_second_moments(vlm, samples, taps.weights(), batch_size=2) if rule == "adamw" else None
    rule = StepRule(rule, roots)
    tail = TailScorer(vlm, items, taps, check=samples[0], rule=rule, step=step, batch_size=3)
    return tail, ExactScorer(vlm, items, Steppable(taps.weights()), rule=rule, step=step)


@pytest.mark.parametrize("depth", [1, None])
def test_a_replayed_step_is_the_step_taken_for_real(depth, family):
    vlm, items, samples = family
    tail, exact = (scorer.score(samples) for scorer in scorers(vlm, items, samples, depth))
    assert np.abs(exact.fall_NV).max() > 0.01
    assert tail.fall_NV == pytest.approx(exact.fall_NV, abs=ROUNDING)
    assert tail.utility_NG == pytest.approx(exact.utility_NG, abs=ROUNDING)
    assert tail.loss_N == pytest.approx(exact.loss_N, abs=ROUNDING)


@pytest.mark.parametrize(("rule", "step"), [("unit_norm", 1.0), ("adamw", 3e-3)])
def test_every_step_rule_is_replayed(rule, step, proxy, items, pool):
    tail, exact = (scorer.score(pool[:5]) for scorer in scorers(proxy, items, pool[:5], None, rule, step))
    assert np.abs(exact.fall_NV).max() > 0.01
    assert tail.fall_NV == pytest.approx(exact.fall_NV, abs=2e-5)


@pytest.mark.parametrize("rule", ["sgd", "unit_norm", "adamw"])
def test_polyak_steps_are_those_of_steps_taken_for_real(rule, proxy, items, pool):
    tail, exact = scorers(proxy, items, pool[:5], None, rule)
    assert tail.polyak_steps(pool[:3]) == pytest.approx(exact.polyak_steps(pool[:3]), rel=1e-4)


@pytest.mark.parametrize("rows", [2, 200], ids=["thin products", "formed weights"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_stepped_layer_computes_with_each_samples_own_weight(rows, bias):
    torch.manual_seed(0)
    linear, inputs, moved = torch.nn.Linear(64, 48, bias=bias), torch.randn(3, 5, 64), torch.randn(3, 5, 48)
    row_NI = torch.randn(3 * rows, 1, 64)
    with torch.no_grad():
        reading = Reading(torch.zeros(3), [inputs], [moved])
        found = stepped_forward(linear, reading, 0, torch.tensor([0.5, 1, 2]))(row_NI)
        for b, size in enumerate((0.5, 1, 2)):
            weight = linear.weight - size * sum(torch.outer(moved[b, t], inputs[b, t]) for t in range(5))
            mine = slice(b * rows, (b + 1) * rows)
            expected = torch.nn.functional.linear(row_NI[mine], weight, linear.bias)
            torch.testing.assert_close(found[mine], expected, rtol=0, atol=1e-4)


def test_many_samples_at_once_are_as_few(proxy, items, pool, monkeypatch):
    taps, rule = Taps(proxy), StepRule("sgd")
    reading = taps.read(pool[:5])
    expected = Replay(taps, items, pool[0]).falls(reading, rule, (0.1, 0.3))
    monkeypatch.setitem(NUMBERS_AT_ONCE, "cpu", 1)
    one_by_one = Replay(taps, items, pool[0])
    assert one_by_one.samples_at_once == 1
    assert one_by_one.falls(reading, rule, (0.1, 0.3)) == pytest.approx(expected, abs=ROUNDING)


def test_the_replay_runs_the_tail_alone(proxy, items, pool, monkeypatch):
    taps = Taps(proxy, 1)
    replay, reading = Replay(taps, items, pool[0]), taps.read(pool[:2])

    def never(*args, **kwargs):
        raise AssertionError("below the tail, or the head on all positions")

    monkeypatch.setattr(proxy.decoder_layers()[0], "forward", never)
    monkeypatch.setattr(proxy.model, "forward", never)
    assert np.isfinite(replay.falls(reading, StepRule("sgd"), (0.1,))).all()


def test_layers_are_themselves_again_after_a_replay(proxy, items, pool):
    taps = Taps(proxy)
    Replay(taps, items, pool[0]).falls(taps.read(pool[:2]), StepRule("sgd"), (0.1,))
    assert not any("forward" in vars(module) for module in taps.modules)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in proxy.model.modules())


def test_a_family_that_does_more_after_its_last_layer_is_refused(proxy, items, pool, monkeypatch):
    norm = proxy.final_norm()
    monkeypatch.setattr(type(proxy), "final_norm", lambda _: torch.nn.Sequential(norm, torch.nn.Tanh()))
    with pytest.raises(ModelError, match=r"cannot be replayed alone.*use score\.method exact"):
        Replay(Taps(proxy), items, pool[0])


def test_a_family_that_bends_hidden_states_between_its_layers_is_refused(proxy, items, pool):
    """What is added can be added again; what is multiplied depends on the step."""
    handle = proxy.decoder_layers()[1].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] * 3, *args[1:]), kwargs), with_kwargs=True
    )
    try:
        with pytest.raises(ModelError, match="cannot be replayed alone"):
            Replay(Taps(proxy), items, pool[0])
    finally:
        handle.remove()


@pytest.mark.parametrize("depth", [0, 3])
def test_a_tail_longer_than_the_decoder_is_refused(depth, proxy):
    with pytest.raises(ModelError, match=f"score.tail_layers is {depth}, .* has 2 decoder layers"):
        Taps(proxy, depth)
