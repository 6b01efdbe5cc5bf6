"""Gradient dot products against autograd, one sample at a time."""

import dataclasses

import numpy as np
import peft
import pytest
import torch

import tiny_families
from datalloy.errors import ModelError
from datalloy.scorers.first_order import FiniteDifferenceScorer, TapScorer, vision_stands_still
from datalloy.scorers.step import Steppable, StepRule, root_second_moments, scoped_parameters
from datalloy.scorers.taps import Taps
from datalloy.target_items import TargetItems
from datalloy.uncertainty import rank_agreement
from datalloy.vlm import VLM
from drawn import draw_samples
from quadratic import Point, Quadratic

STEP = 0.5


def gradient_of(vlm, sample, parameters):
    return torch.autograd.grad(vlm.losses(vlm.collate([sample]))[0], parameters, allow_unused=True)


def dot(a, b):
    return sum((x.double() * y).sum().item() for x, y in zip(a, b, strict=True) if x is not None)


# --- finite differences --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_finite_differences_are_the_products_of_gradients(rule, proxy, items, pool):
    steppable = Steppable(list(proxy.model.parameters()))
    parameters = steppable.parameters
    roots = root_second_moments(proxy, pool, parameters, batch_size=4) if rule == "adamw" else None
    scorer = FiniteDifferenceScorer(proxy, items, steppable, rule=StepRule(rule, roots), step=STEP, batch_size=4)
    found = scorer.score(pool).utility_NG
    for g in range(len(items.names)):
        target = StepRule(rule, roots).direction(items.gradient(proxy, parameters, target=g))
        exact_N = np.array([STEP * dot(gradient_of(proxy, sample, parameters), target) for sample in pool])
        # of twelve, two that lie closer than the rounding may swap: on some processors they do
        assert rank_agreement(found[:, g], exact_N) > 0.99
        assert found[:, g] == pytest.approx(exact_N, abs=0.01 * np.abs(exact_N).max())


def test_finite_differences_of_a_quadratic_are_its_gradients():
    toy = Quadratic(1.0, 1.0)
    items = TargetItems.lay_out(toy, {"only": [Point((1.0, 0.0), 0.0)]}, {"only": 1.0})  # gradient (1, 0)
    scorer = FiniteDifferenceScorer(
        toy, items, Steppable([toy.weight]), rule=StepRule("sgd"), step=STEP, batch_size=2, relative_epsilon=1e-3
    )
    block = scorer.score([Point((1.0, 0.0), 3.0), Point((0.0, 1.0), 3.0), Point((2.0, 1.0), 2.0)])
    # gradients (-2, 0), (0, -2), (2, 1)
    assert block.utility_N == pytest.approx([STEP * -2, 0, STEP * 2], abs=2e-3)
    assert block.loss_N.tolist() == [2, 2, 0.5]


def test_a_target_that_is_learnt_already_gives_no_utility():
    toy = Quadratic(1.0)
    items = TargetItems.lay_out(toy, {"only": [Point((1.0,), 1.0)]}, {"only": 1.0})
    scorer = FiniteDifferenceScorer(toy, items, Steppable([toy.weight]), rule=StepRule("sgd"), step=1.0, batch_size=1)
    assert scorer.score([Point((1.0,), 3.0)]).utility_N.tolist() == [0]


def test_finite_differences_rank_as_exact_products_do(proxy, items, drawn):
    """With cross entropies in float32 the displacement would have to be larger, and curvature would show."""
    samples = drawn[8:]
    exact_NG = TapScorer(Taps(proxy), items, rule=StepRule("sgd"), step=STEP, batch_size=8).score(samples).utility_NG
    steppable = Steppable(Taps(proxy).weights())
    scorer = FiniteDifferenceScorer(proxy, items, steppable, rule=StepRule("sgd"), step=STEP, batch_size=8)
    found_NG = scorer.score(samples).utility_NG
    for found_N, exact_N in zip(found_NG.T, exact_NG.T, strict=True):
        assert rank_agreement(found_N, exact_N) >= 0.999
        assert np.linalg.norm(found_N - exact_N) < 0.005 * np.linalg.norm(exact_N)


def test_scores_come_in_the_order_of_the_samples(proxy, items, pool):
    """Though samples of like length are batched together."""
    steppable = Steppable(Taps(proxy).weights())
    scorer = FiniteDifferenceScorer(proxy, items, steppable, rule=StepRule("sgd"), step=STEP, batch_size=4)
    assert len({sample.length for sample in pool}) > 2
    forwards, backwards = scorer.score(pool), scorer.score(pool[::-1])
    assert backwards.loss_N[::-1] == pytest.approx(forwards.loss_N, abs=1e-5)
    assert backwards.utility_N[::-1] == pytest.approx(forwards.utility_N, abs=0.01 * np.abs(forwards.utility_N).max())


def test_a_sample_costs_one_forward_pass_and_one_more_for_each_target(proxy, items, pool):
    counted = proxy.copy()
    steppable = Steppable(Taps(counted).weights())
    scorer = FiniteDifferenceScorer(counted, items, steppable, rule=StepRule("sgd"), step=STEP, batch_size=4)
    seen = []
    counted.model.register_forward_hook(
        lambda module, args, inputs, output: seen.append((len(inputs["input_ids"]), output.logits.requires_grad)),
        with_kwargs=True,
    )
    scorer.score(pool)
    assert sum(count for count, _ in seen) == len(pool) * (1 + len(items.names))
    assert not any(has_graph for _, has_graph in seen)


def test_a_vision_tower_that_stands_still_is_asked_once_for_all_targets(proxy, items, pool):
    counted = proxy.copy()
    steppable = Steppable(Taps(counted).weights())
    scorers = [
        FiniteDifferenceScorer(
            counted, items, steppable, rule=StepRule("sgd"), step=STEP, batch_size=4, share_vision=share
        )
        for share in (False, True)
    ]
    inside = []
    next(counted.vision_tower().children()).register_forward_hook(lambda *_: inside.append(None))
    alone = scorers[0].score(pool)
    batches = len(inside) // (1 + len(items.names))
    inside.clear()
    shared = scorers[1].score(pool)
    assert len(inside) == batches > 0
    assert shared.loss_N.tobytes() == alone.loss_N.tobytes()
    assert shared.utility_NG.tobytes() == alone.utility_NG.tobytes()


@pytest.mark.parametrize(
    ("scope", "freeze", "still"), [("full", False, False), ("full", True, False), ("decoder", True, True)]
)
def test_a_connector_inside_the_tower_counts_as_part_of_it(scope, freeze, still, tmp_path):
    """As Qwen's merger does, which is trained when the tower is frozen."""
    vlm = VLM.load(str(tiny_families.build_checkpoint("qwen2_5_vl", tmp_path)), device="cpu")
    assert vision_stands_still(vlm, Steppable(scoped_parameters(vlm, scope, freeze_vision=freeze))) == still


def test_features_of_a_tower_that_moves_are_not_shared(proxy, items):
    everything = Steppable(list(proxy.model.parameters()))
    assert vision_stands_still(proxy, Steppable(scoped_parameters(proxy, "full", freeze_vision=True)))
    with pytest.raises(ModelError, match=r"moves weights in the vision tower.*share_vision=False"):
        FiniteDifferenceScorer(
            proxy, items, everything, rule=StepRule("sgd"), step=STEP, batch_size=4, share_vision=True
        )


# --- taps ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["embedded", "adapter", "qwen2_5_vl", "gemma3"])
def tapped(request, proxy, tmp_path_factory):
    """A model and five samples of different lengths. Of the model under PEFT the adapter's layers are tapped."""
    vlm = proxy
    if request.param == "adapter":
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=r".*text_model.*(q_proj|down_proj)", init_lora_weights=False)
        vlm = dataclasses.replace(proxy, model=peft.get_peft_model(proxy.copy().model, config).eval())
    elif request.param != "embedded":
        vlm = VLM.load(
            str(tiny_families.build_checkpoint(request.param, tmp_path_factory.mktemp("tapped"))), device="cpu"
        )
    return vlm, [vlm.encode(sample) for sample in draw_samples(5)]


def test_slopes_and_norms_are_those_of_autograd_one_sample_at_a_time(tapped):
    vlm, samples = tapped
    taps = Taps(vlm)
    weights = taps.weights()
    torch.manual_seed(1)
    directions = [[torch.randn_like(weight) for weight in weights] for _ in range(2)]
    metric = [torch.rand_like(weight) for weight in weights]
    measured = taps.measure_all(samples, directions, batch_size=3, metric=metric)
    for n, sample in enumerate(samples):
        gradient = gradient_of(vlm, sample, weights)
        size = np.sqrt(dot(gradient, gradient))
        assert measured.squared_norm_N[n] == pytest.approx(size**2, rel=1e-4)
        weighted = [part * weight for part, weight in zip(gradient, metric, strict=True)]
        assert measured.metric_norm_N[n] == pytest.approx(dot(gradient, weighted), rel=1e-4)
        # a random direction is nearly at right angles, so rounding is to be compared with its length
        slopes = [dot(gradient, direction) for direction in directions]
        assert measured.slope_NG[n] == pytest.approx(slopes, rel=1e-4, abs=1e-4 * size)


def test_finite_differences_agree_with_the_contraction_at_the_taps(tapped):
    vlm, samples = tapped
    targets = TargetItems.lay_out(vlm, {"one": samples[:2], "other": samples[2:3]}, {"one": 1.0, "other": 1.0})
    steppable = Steppable(Taps(vlm).weights())
    exact = TapScorer(Taps(vlm), targets, rule=StepRule("sgd"), step=STEP, batch_size=2).score(samples)
    scorer = FiniteDifferenceScorer(
        vlm, targets, steppable, rule=StepRule("sgd"), step=STEP, batch_size=2, share_vision=True
    )
    found = scorer.score(samples)
    assert found.loss_N == pytest.approx(exact.loss_N, abs=1e-5)
    for g in range(2):
        size = np.abs(exact.utility_NG[:, g]).max()
        assert found.utility_NG[:, g] == pytest.approx(exact.utility_NG[:, g], abs=0.01 * size)


def test_every_trainable_linear_layer_of_the_decoder_is_tapped(tapped):
    vlm, _ = tapped
    linear = [m.weight for m in vlm.decoder_layers().modules() if isinstance(m, torch.nn.Linear)]
    assert {id(weight) for weight in Taps(vlm).weights()} == {id(w) for w in linear if w.requires_grad}
    assert len(Taps(vlm).weights()) >= 4


def test_the_fisher_diagonal_is_the_mean_squared_gradient_of_single_samples(proxy, drawn):
    taps = Taps(proxy)
    squares = [[g**2 for g in gradient_of(proxy, sample, taps.weights())] for sample in drawn[:5]]
    expected = [torch.stack(parts).mean(0) for parts in zip(*squares, strict=True)]
    found = taps.mean_squared_gradient([drawn[:2], drawn[2:5]])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * b.max().item())


def test_taps_know_layers_by_name_not_by_the_order_of_calls(proxy, drawn):
    """Two layers of one shape, registered in another order than they are called, would swap unnoticed."""
    swapped = proxy.copy()
    mlp = swapped.decoder_layers()[0].mlp
    mlp._modules = {name: mlp._modules[name] for name in ("down_proj", "up_proj", "gate_proj", "act_fn")}
    taps = Taps(swapped)
    directions = [[torch.ones_like(weight) * (i + 1) for i, weight in enumerate(taps.weights())]]
    (slope,) = taps.measure_all(drawn[:1], directions, batch_size=1).slope_NG[0]
    assert slope == pytest.approx(dot(gradient_of(swapped, drawn[0], taps.weights()), directions[0]), rel=1e-4)


def test_layers_that_get_the_tokens_of_all_samples_in_one_row_are_refused(proxy, drawn):
    """As the experts of a mixture do."""
    flat = proxy.copy()
    mlp = flat.decoder_layers()[0].mlp
    mlp.down_proj = torch.nn.Sequential(torch.nn.Flatten(0, 1), mlp.down_proj, torch.nn.Unflatten(0, (2, -1)))
    with pytest.raises(ModelError, match=r"not each called once on \[samples, tokens, features\].*use score.method"):
        Taps(flat).measure_all(drawn[:2], [], batch_size=2)


def test_a_decoder_without_trainable_linear_layers_is_refused(proxy):
    frozen = proxy.copy()
    frozen.model.requires_grad_(False)
    with pytest.raises(ModelError, match=r"no trainable parameter in a torch\.nn\.Linear of its decoder"):
        Taps(frozen)


def test_tap_utilities_are_products_with_the_targets_gradient(proxy, items, pool):
    weights = Taps(proxy).weights()
    block = TapScorer(Taps(proxy), items, rule=StepRule("sgd"), step=STEP, batch_size=4).score(pool)
    for g in range(len(items.names)):
        target = items.gradient(proxy, weights, target=g)
        expected = [STEP * dot(gradient_of(proxy, sample, weights), target) for sample in pool]
        assert block.utility_NG[:, g] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_unit_norm_divides_by_the_norm_of_each_samples_gradient(proxy, items, pool):
    plain = TapScorer(Taps(proxy), items, rule=StepRule("sgd"), step=STEP, batch_size=4).score(pool)
    unit = TapScorer(Taps(proxy), items, rule=StepRule("unit_norm"), step=STEP, batch_size=4).score(pool)
    norm_N = np.sqrt(Taps(proxy).measure_all(pool, [], batch_size=4).squared_norm_N)
    assert unit.utility_N * norm_N == pytest.approx(plain.utility_N)
