"""The contract for every scorer, and what `probe` and `prepare` make of a recipe."""

import dataclasses
import functools
import itertools
import json
from dataclasses import asdict

import numpy as np
import peft
import pytest
import torch

from datalloy.config import Score
from datalloy.errors import AgreementError, ModelError, RecipeError
from datalloy.scorers import (
    Probing,
    ScoreBlock,
    ScoringInputs,
    TargetItems,
    agreement_with_exact,
    prepare,
    probe,
)
from datalloy.scorers.baselines import LossScorer
from datalloy.uncertainty import rank_agreement
from scorer_contract import ScorerContract

TARGETED = ["exact", "tail", "first_order", "first_order_hooks"]  # all that know the targets and need no fit


def make_inputs(vlm, items, targets, pool, step="batch_share", **settings):
    return ScoringInputs(vlm, items, targets, pool, Score(**settings), step, freeze_vision=False, train_batch_size=4)


@pytest.fixture(scope="module")
def inputs(proxy, items, targets, pool):
    return make_inputs(proxy, items, targets, pool, min_agreement=0.1, replayed_items=3, seed=3)


@pytest.fixture(scope="module")
def probes(drawn):
    return drawn[8:]


@pytest.fixture(scope="module")
def probing(proxy, probes):
    """Steps as `probe` would choose them, and utilities that losses explain, so that a regression can be fitted."""
    loss_N = LossScorer(proxy, targets=2, batch_size=8).score(probes).loss_N
    utility_NG = np.column_stack([loss_N - loss_N.mean(), 1 - loss_N / 8])
    zeros_N = np.zeros(len(probes))
    exact = ScoreBlock(loss_N, utility_NG, utility_NG @ [0.25, 0.75], zeros_N)
    return Probing(
        scans={},
        steps={"exact": 0.04, "tail": 0.5},
        harm_below={"exact": 0.0, "tail": 0.0},
        exact=exact,
        noise_floor=0.0,
    )


@pytest.fixture(scope="module", params=[*TARGETED, "less", "calibrated", "visual_gain", "entropy_minus_loss", "loss"])
def make(request, inputs, probing, probes):
    @functools.cache
    def make(batch_size):
        settings = inputs.settings.model_copy(update={"batch_size": batch_size})
        return prepare(request.param, dataclasses.replace(inputs, settings=settings), probing, probes)

    return make


class TestEveryScorer(ScorerContract):
    pass


REFUSED = [("first_order", "unit_norm"), ("first_order_hooks", "adamw")]
ALLOWED = [pair for pair in itertools.product(TARGETED, ["sgd", "unit_norm", "adamw"]) if pair not in REFUSED]


@pytest.mark.parametrize(("method", "rule"), ALLOWED)
def test_a_small_step_on_the_target_item_itself_helps(method, rule, proxy, drawn, pool):
    item = drawn[0]
    items = TargetItems.lay_out(proxy, {"only": [item]}, {"only": 1.0})
    inputs = make_inputs(proxy, items, {"only": [item]}, pool[:8], step_rule=rule)
    step = {"sgd": 1e-3, "unit_norm": 1e-2, "adamw": 1e-4}[rule]
    scorer = prepare(method, inputs, Probing({}, {"exact": step, "tail": step}, {}, None, 0.0), [])
    assert scorer.score([item]).utility_N[0] > 1e-5


@pytest.mark.parametrize(("method", "rule"), REFUSED)
def test_a_step_rule_that_a_score_cannot_follow_is_refused(method, rule, proxy, items, targets, pool, probing):
    inputs = make_inputs(proxy, items, targets, pool[:4], step_rule=rule)
    with pytest.raises(RecipeError, match=f"first_order.*{rule}|{rule}.*first_order"):
        prepare(method, inputs, probing, [])


@pytest.mark.parametrize("method", ["loss", "low_loss"])
def test_baselines_share_the_loss_scorer_and_have_no_sign(method, inputs, probing):
    scorer = prepare(method, inputs, probing, [])
    assert isinstance(scorer, LossScorer)
    assert not scorer.signed


@pytest.mark.parametrize(
    "method", ["first_order_hooks", "less", "calibrated", "visual_gain", "entropy_minus_loss", "loss"]
)
def test_ranks_are_kept_where_the_pool_is_read_in_bfloat16(method, proxy, items, targets, pool, probing, probes):
    whole, half = (
        prepare(method, make_inputs(proxy, items, targets, pool, precision=p, min_agreement=0.1), probing, probes)
        for p in ("float32", "bfloat16")
    )
    whole, half = whole.score(probes), half.score(probes)
    for a_N, b_N in [(whole.loss_N, half.loss_N)] + [(whole.utility_N, half.utility_N)] * (method != "loss"):
        assert rank_agreement(a_N, b_N) > 0.97
        assert not np.array_equal(a_N, b_N)


@pytest.mark.parametrize("method", ["exact", "tail", "first_order"])
def test_finite_steps_stay_float32(method, proxy, items, targets, pool, probing):
    whole, half = (
        prepare(method, make_inputs(proxy, items, targets, pool, precision=p), probing, []).score(pool[:3])
        for p in ("float32", "bfloat16")
    )
    assert np.array_equal(whole.utility_NG, half.utility_NG)


def test_decoder_scope_moves_the_decoder_layers_alone(proxy, items, targets, pool, probing):
    scorer = prepare("exact", make_inputs(proxy, items, targets, pool, scope="decoder"), probing, [])
    moved = {id(p) for p in scorer.steppable.parameters}
    assert moved == {id(p) for p in proxy.decoder_layers().parameters()}


def test_a_frozen_vision_tower_is_not_moved(proxy, items, targets, pool, probing):
    inputs = dataclasses.replace(make_inputs(proxy, items, targets, pool), freeze_vision=True)
    moved = {id(p) for p in prepare("exact", inputs, probing, []).steppable.parameters}
    vision = {id(p) for p in proxy.vision_parameters()}
    assert vision
    assert moved == {id(p) for p in proxy.model.parameters()} - vision


# --- probe -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed(proxy, items, targets, pool):
    return probe(make_inputs(proxy, items, targets, pool), ["tail"], pool[:5])


def test_probes_are_scored_exactly_at_the_step_chosen(probed, proxy, items, targets, pool):
    scorer = prepare("exact", make_inputs(proxy, items, targets, pool), probed, [])
    assert scorer.step == probed.steps["exact"]
    assert scorer.score(pool[:5]).to_bytes() == probed.exact.to_bytes()


def test_each_scan_chooses_a_step_of_its_own_inside_its_grid(probed):
    assert probed.steps["exact"] != probed.steps["tail"]
    for name, scan in probed.scans.items():
        steps = [row["step"] for row in scan["rows"]]
        assert probed.steps[name] == scan["chosen"]
        assert steps[0] <= scan["chosen"] <= steps[-1]
    assert set(probed.scans) == {"exact", "tail"}


def test_rounding_moves_utilities_far_less_than_samples_do(probed):
    """Two layouts of the same items differ in padding alone; 1e-5 nats is ten times what float32 was seen to lose.

    On some processors padding changes no bit of these few items, and the floor is zero.
    """
    assert 0 <= probed.noise_floor < 1e-5
    assert np.ptp(probed.exact.utility_N) > 1e-2


def test_the_noise_floor_is_measured_between_two_layouts_of_the_same_items(proxy, items, targets, pool, monkeypatch):
    layouts = []

    def note(*scorers_and_probes):
        layouts.extend([len(rows) for rows, _ in scorer.items.batches] for scorer in scorers_and_probes[:2])
        return 0.25

    monkeypatch.setattr("datalloy.scorers.noise_floor", note)
    assert probe(make_inputs(proxy, items, targets, pool), ["exact"], pool[:2]).noise_floor == 0.25
    assert layouts[0] != layouts[1]
    assert sum(layouts[0]) == sum(layouts[1]) == len(items.target_V)


def test_what_probing_found_can_be_written_as_json(probed):
    json.dumps([dict(probed.scans), dict(probed.steps), probed.noise_floor], allow_nan=False)


@pytest.mark.parametrize(("methods", "scanned"), [(["tail"], "tail"), (["calibrated"], "exact")])
def test_a_step_in_the_recipe_is_for_the_scorer_that_takes_it(methods, scanned, proxy, items, targets, pool):
    found = probe(make_inputs(proxy, items, targets, pool, step=0.125), methods, pool[:2])
    assert found.steps[scanned] == 0.125
    assert found.scans[scanned]["reason"] == "given in the recipe"
    assert [name for name, step in found.steps.items() if step == 0.125] == [scanned]
    others = [scan["reason"] for name, scan in found.scans.items() if name != scanned]
    assert all("part in the step of a batch" in reason for reason in others)


def test_a_step_of_a_visible_effect_is_the_scans_choice(proxy, items, targets, pool):
    found = probe(make_inputs(proxy, items, targets, pool, step="visible_effect"), ["exact"], pool[:4])
    assert found.scans["exact"]["reason"] == "the median of 4 probes changes the targets' loss by 200%"
    assert found.steps["exact"] > probe(make_inputs(proxy, items, targets, pool), ["exact"], pool[:4]).steps["exact"]


def test_a_share_of_a_batch_is_each_scorers_own_and_tried_in_its_scan(proxy, items, targets, pool):
    found = probe(make_inputs(proxy, items, targets, pool), ["tail"], pool[:2])
    assert found.steps["exact"] < found.steps["tail"]  # fewer weights, a smaller gradient, a longer Polyak step
    for name, scan in found.scans.items():
        assert scan["reason"] == "it is 2 times a sample's part in the step of a batch of 4"
        assert found.steps[name] in [row["step"] for row in scan["rows"]]


def test_probes_that_cannot_be_compared_are_refused(proxy, items, targets, pool):
    with pytest.raises(AgreementError, match="1 of 1 probes have a finite exact utility, at least 2"):
        probe(make_inputs(proxy, items, targets, pool), ["tail"], pool[:1])


def test_exact_agrees_with_itself_and_leaves_out_what_is_not_finite(proxy, items, targets, pool, probed):
    utility_N = probed.exact.utility_N.copy()
    utility_N[2] = np.nan
    holed = dataclasses.replace(probed, exact=dataclasses.replace(probed.exact, utility_N=utility_N))
    scorer = prepare("exact", make_inputs(proxy, items, targets, pool), holed, [])
    agreement = agreement_with_exact(scorer, holed, pool[:5], seed=0)
    assert asdict(agreement) == {"spearman": pytest.approx(1), "interval": (1, 1), "probes": 4}


def test_a_block_comes_back_from_its_bytes(probed):
    back = ScoreBlock.from_bytes(probed.exact.to_bytes())
    for name, array in vars(probed.exact).items():
        assert np.array_equal(vars(back)[name], array)


# --- proxies under PEFT ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(proxy):
    """The proxy with an adapter that is not at its starting point, where half of its gradient would be zero."""
    torch.manual_seed(0)
    linear = ["q_proj", "v_proj", "down_proj"]
    names = [name for name, _ in proxy.model.named_modules() if "text_model" in name and name.endswith(tuple(linear))]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    return dataclasses.replace(proxy, model=peft.get_peft_model(proxy.copy().model, config).eval())


@pytest.mark.parametrize("method", TARGETED)
def test_of_an_adapted_proxy_the_adapter_alone_is_moved(method, adapted, targets, pool):
    items = TargetItems.lay_out(adapted, targets, {"first": 1.0, "second": 3.0})
    inputs = make_inputs(adapted, items, targets, pool[:4])
    scorer = prepare(method, inputs, Probing({}, {"exact": 0.01, "tail": 0.01}, {}, None, 0.0), [])
    moved = scorer.taps.weights() if hasattr(scorer, "taps") else scorer.steppable.parameters
    names = {id(parameter): name for name, parameter in adapted.model.named_parameters()}
    assert moved
    assert all("lora_" in names[id(parameter)] for parameter in moved)
    assert scorer.score(pool[:3]).finite_N.all()


def test_an_adapted_proxy_that_cannot_be_trained_is_refused(adapted, items, targets, pool, probing):
    frozen = adapted.copy()
    frozen.model.requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameter"):
        prepare("exact", make_inputs(frozen, items, targets, pool), probing, [])
