"""The tail's replay against the whole model, on the embedded architecture and on shrunk real families."""

import numpy as np
import pytest
import torch

import tiny_families
from datalloy.errors import ModelError
from datalloy.scorers.one_step import exact_scorer
from datalloy.scorers.step import Steppable, StepRule
from datalloy.scorers.tail import TailReplay, tail_scorer
from datalloy.target_items import TargetItems
from datalloy.vlm import VLM
from drawn import draw_samples

SGD = StepRule("sgd")
# float32 losses of 6 nats; the head sees its positions in another order
ROUNDING = 3e-6


def load(name, folder):
    return VLM.load(str(tiny_families.build_checkpoint(name, folder)), device="cpu")


@pytest.fixture(scope="module", params=["embedded", "qwen2_5_vl", "internvl", "gemma3"])
def family(request, proxy, text_only, tmp_path_factory):
    """A model, target items of different lengths in several batches, one of them without a picture, and samples."""
    vlm = proxy if request.param == "embedded" else load(request.param, tmp_path_factory.mktemp("tail"))
    encoded = [vlm.encode(sample) for sample in [*draw_samples(4), text_only]]
    items = TargetItems.lay_out(vlm, {"a": encoded[:2], "b": encoded[2:]}, {"a": 1.0, "b": 3.0}, items_per_batch=3)
    return vlm, items, [vlm.encode(sample) for sample in draw_samples(2, seed=1)]


@pytest.mark.parametrize("depth", [1, 2])
def test_tail_utility_is_exact_utility_of_a_step_on_the_same_layers(depth, family):
    vlm, items, samples = family
    replay = TailReplay(vlm, items, depth)
    steppable = Steppable(replay.parameters())
    assert {id(p) for p in steppable.parameters} == {id(p) for p in vlm.decoder_layers()[-depth:].parameters()}
    tail = tail_scorer(vlm, replay, steppable, rule=SGD, step=0.3).score(samples)
    exact = exact_scorer(vlm, items, steppable, rule=SGD, step=0.3).score(samples)
    assert np.abs(exact.fall_NV).max() > 0.01
    assert tail.fall_NV == pytest.approx(exact.fall_NV, abs=ROUNDING)
    assert tail.utility_NG == pytest.approx(exact.utility_NG, abs=ROUNDING)
    assert tail.loss_N == pytest.approx(exact.loss_N)


def test_the_replay_gives_the_models_own_losses(family):
    vlm, items, _ = family
    assert TailReplay(vlm, items, 1).losses() == pytest.approx(items.losses(vlm), abs=ROUNDING)


def test_the_replay_runs_the_tail_alone(proxy, items, monkeypatch):
    replay = TailReplay(proxy, items, 1)

    def never(*args, **kwargs):
        raise AssertionError("below the tail, or the head on all positions")

    monkeypatch.setattr(proxy.decoder_layers()[0], "forward", never)
    monkeypatch.setattr(proxy.model, "forward", never)
    assert np.isfinite(replay.losses()).all()


def test_a_family_that_adds_features_between_its_layers_is_refused(tmp_path):
    """Qwen3-VL adds visual features after its first layers; a tail above them can be replayed, one with them cannot."""
    vlm = load("qwen3_vl", tmp_path)
    items = TargetItems.lay_out(vlm, {"a": [vlm.encode(sample) for sample in draw_samples(2)]}, {"a": 1.0})
    assert np.isfinite(TailReplay(vlm, items, 1).losses()).all()
    with pytest.raises(
        ModelError, match=r"last 2 decoder layers of .* cannot be replayed alone.*use score\.method exact"
    ):
        TailReplay(vlm, items, 2)


def test_a_family_that_does_more_after_its_last_layer_is_refused(proxy, items, monkeypatch):
    norm = proxy.final_norm()
    monkeypatch.setattr(type(proxy), "final_norm", lambda _: torch.nn.Sequential(norm, torch.nn.Tanh()))
    with pytest.raises(ModelError, match="cannot be replayed alone"):
        TailReplay(proxy, items, 1)


@pytest.mark.parametrize("depth", [0, 3])
def test_a_tail_longer_than_the_decoder_is_refused(depth, proxy, items):
    with pytest.raises(ModelError, match=f"score.tail_layers is {depth}, .* has 2 decoder layers"):
        TailReplay(proxy, items, depth)
