"""The definition of utility against steps worked out by hand, and against real optimiser steps on a tiny model."""

import numpy as np
import pytest
import torch

from datalloy.errors import ModelError
from datalloy.scorers.one_step import ExactScorer
from datalloy.scorers.step import Steppable, StepRule, batch_share, inner, root_second_moments
from datalloy.target_items import TargetItems
from quadratic import Point, Quadratic

ADAM = StepRule("adamw", (torch.tensor([2.0, 4.0]),))


def test_utility_is_the_fall_of_the_loss_after_the_step():
    # w 0 -> 0.5 (gradient (0 - 2) * 1, step 0.25); target loss (0 - 1)^2 / 2 -> (0.5 - 1)^2 / 2
    block = Quadratic(0.0).scorer([Point((1.0,), 1.0)], step=0.25).score([Point((1.0,), 2.0)])
    assert (block.loss_N[0], block.utility_N[0]) == (2.0, 0.375)


def test_a_sample_that_pulls_the_other_way_has_negative_utility():
    block = Quadratic(0.0).scorer([Point((1.0,), 1.0)], step=0.25).score([Point((1.0,), -2.0)])
    assert block.utility_N[0] == 0.5 - 1.125


def test_a_step_too_far_harms_though_the_gradients_agree():
    """What the finite step knows and the gradient product does not: w lands at 3, past the target's 1."""
    block = Quadratic(0.0).scorer([Point((1.0,), 1.0)], step=1.0).score([Point((1.0,), 3.0)])
    assert block.utility_N[0] == 0.5 - 2.0


def test_unit_norm_steps_go_equally_far_whatever_the_gradient():
    toy = Quadratic(0.0, 0.0)
    scorer = toy.scorer([Point((3.0, 4.0), 10.0)], rule=StepRule("unit_norm"), step=0.5)
    # both gradients point along -(3, 4) / 5; w becomes (0.3, 0.4) and the target's answer 2.5
    block = scorer.score([Point((3.0, 4.0), 1.0), Point((3.0, 4.0), 100.0)])
    assert block.utility_N == pytest.approx([50 - 7.5**2 / 2] * 2, rel=1e-6)


def test_adamw_steps_are_divided_by_the_root_second_moments():
    toy = Quadratic(0.0, 0.0)
    # gradient (-2, -2), direction (-1, -0.5), w (0.1, 0.05)
    block = toy.scorer([Point((1.0, 0.0), 1.0)], [Point((0.0, 1.0), 1.0)], rule=ADAM, step=0.1).score(
        [Point((1.0, 1.0), 2.0)]
    )
    assert block.utility_NG[0] == pytest.approx([0.5 - 0.9**2 / 2, 0.5 - 0.95**2 / 2], rel=1e-6)


def test_second_moments_are_those_of_batch_gradients():
    toy = Quadratic(0.0, 0.0)
    points = [Point((1.0, 0.0), 1.0), Point((3.0, 0.0), 1.0), Point((4.0, 0.0), 2.0)]
    # batch gradients: -(1 + 3) / 2 and -8
    (root,) = root_second_moments(toy, points, [toy.weight], batch_size=2)
    assert root[0].item() == pytest.approx(np.sqrt((2**2 + 8**2) / 2))


def test_what_no_batch_has_a_gradient_for_takes_no_adamw_step():
    """Embeddings of unseen tokens: divided by Adam's epsilon alone, one of them would be thrown 1e8 times too far."""
    toy = Quadratic(0.0, 0.0)
    rule = StepRule("adamw", root_second_moments(toy, [Point((1.0, 0.0), 1.0)], [toy.weight], batch_size=1))
    (direction,) = rule.direction([torch.tensor([2.0, 3.0])])
    assert direction.tolist() == pytest.approx([2, 0])


# losses 2 and 2, mean gradient -(1, 1); losses 8 and 8, gradient -(4, 0); one alone: loss 2, gradient -(2, 0)
BATCHES = [Point((1.0, 0.0), 2.0), Point((0.0, 1.0), 2.0), *[Point((1.0, 0.0), 4.0)] * 2, Point((1.0, 0.0), 2.0)]


@pytest.mark.parametrize(
    ("rule", "shares"), [("sgd", (2 / 2, 8 / 16, 2 * 2 / 4)), ("unit_norm", (2 / 2**0.5, 8 / 4, 2 * 2 / 2))]
)
def test_a_batch_share_is_the_median_of_twice_a_samples_share_in_polyak_steps_of_batches(rule, shares):
    toy = Quadratic(0.0, 0.0)
    step = batch_share(toy, BATCHES, [toy.weight], StepRule(rule), batch_size=2)
    assert step == pytest.approx(np.median(shares))
    assert batch_share(toy, BATCHES[2:4], [toy.weight], StepRule(rule), batch_size=2) == pytest.approx(shares[1])


def test_batches_without_a_gradient_have_no_share_of_a_step():
    toy, against_each_other = Quadratic(0.0), [Point((1.0,), 2.0), Point((1.0,), -2.0)]
    with pytest.raises(ModelError, match="no batch of the pool has a gradient under"):
        batch_share(toy, against_each_other, [toy.weight], StepRule("sgd"), batch_size=2)
    one = [Point((1.0,), 2.0)] * 2
    assert batch_share(toy, against_each_other + one, [toy.weight], StepRule("sgd"), batch_size=2) == 0.5


def test_at_small_steps_utility_is_linear_and_then_quadratic_in_the_step():
    # g = -2, G = -1, H = 1: utility = 2 eta - 2 eta^2
    scorer = Quadratic(0.0).scorer([Point((1.0,), 1.0)])
    steps = np.array([1 / 64, 1 / 8, 1 / 2, 2])
    fall_SV = scorer.falls([Point((1.0,), 2.0)], steps)[1][0]
    assert fall_SV[:, 0] == pytest.approx(2 * steps - 2 * steps**2, rel=1e-5)


def test_the_polyak_step_brings_the_loss_to_zero_to_first_order():
    # loss r^2 / 2, squared gradient r^2 |x|^2
    assert Quadratic(0.0, 0.0).scorer([Point((1.0, 0.0), 1.0)]).polyak_steps([Point((1.0, 2.0), 7.0)]) == pytest.approx(
        0.1
    )


# --- what has no gradient, no number, or no items ------------------------------------------------------------------


@pytest.mark.parametrize("rule", [StepRule("sgd"), StepRule("unit_norm"), ADAM], ids=lambda rule: rule.name)
def test_a_sample_without_gradient_has_utility_zero(rule):
    scorer = Quadratic(0.0, 0.0).scorer([Point((1.0, 0.0), 1.0)], rule=rule)
    learnt = Point((1.0, 1.0), 0.0)
    assert scorer.score([learnt]).utility_N[0] == 0
    assert scorer.polyak_steps([learnt]) == np.inf


def test_a_sample_without_finite_loss_is_marked_and_leaves_no_trace():
    toy = Quadratic(0.5)
    scorer = toy.scorer([Point((1.0,), 1.0)], step=0.25)
    good = Point((1.0,), 2.0)
    block = scorer.score([good, Point((np.nan,), 1.0), good])
    assert block.finite_N.tolist() == [True, False, True]
    assert block.utility_N[0] == block.utility_N[2]
    assert toy.weight.item() == 0.5


def test_targets_without_finite_loss_are_refused():
    with pytest.raises(ModelError, match="1 of 2 target items have no finite loss under quadratic before any step"):
        Quadratic(0.0).scorer([Point((1.0,), 1.0), Point((np.inf,), 1.0)])


# --- the weights ---------------------------------------------------------------------------------------------------


def test_moved_weights_come_back_when_the_block_fails():
    weight = torch.nn.Parameter(torch.tensor([0.1, 0.7]))
    before, seen = weight.detach().clone(), []

    def interrupted():
        with Steppable([weight]).moved([torch.ones(2)], 0.3):
            seen.extend(weight.tolist())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert seen == pytest.approx([0.4, 1.0])
    assert weight.equal(before)


def test_weights_that_were_moved_half_way_come_back():
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(RuntimeError), Steppable(weights).moved([torch.ones(2), torch.ones(4)], 1.0):
        pass
    assert [w.tolist() for w in weights] == [[1, 1], [1, 1, 1]]


def test_steps_in_low_precision_are_refused():
    with pytest.raises(ModelError, match=r"float32, the proxy holds torch\.bfloat16; load it in float32"):
        Steppable([torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])


def test_inner_products_of_many_tensors_do_not_lose_small_ones():
    large, small = torch.tensor([4096.0]), torch.tensor([1.0])
    assert inner([large, *[small] * 10], [large, *[small] * 10]) == 2**24 + 10  # float32 would stay at 2^24


# --- real optimiser steps on a tiny model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parameters(proxy):
    return list(proxy.model.parameters())


def fall_after(optimise, vlm, items, sample):
    """Target losses before minus after a step of torch's own on a copy of the model."""
    trained = vlm.copy()
    parameters = list(trained.model.parameters())
    trained.losses(trained.collate([sample])).sum().backward()
    optimise(parameters)
    return items.losses(vlm) - items.losses(trained)


# losses of 6 nats have seven digits in float32
ROUNDING = {"abs": 2e-6}


@pytest.mark.parametrize("step", [0.01, 0.3])
def test_exact_utility_is_what_a_real_sgd_step_does(step, proxy, items, pool, parameters):
    scorer = ExactScorer(proxy, items, Steppable(parameters), rule=StepRule("sgd"), step=step)
    fall_V = fall_after(lambda p: torch.optim.SGD(p, lr=step).step(), proxy, items, pool[0])
    assert np.abs(fall_V).max() > 0.01
    assert scorer.score(pool[:1]).fall_NV[0] == pytest.approx(fall_V, **ROUNDING)


def test_exact_utility_under_unit_norm_is_what_a_real_normalised_step_does(proxy, items, pool, parameters):
    def optimise(parameters):
        torch.nn.utils.clip_grad_norm_(parameters, 1e-3)  # far below any norm here, so all are scaled to it
        torch.optim.SGD(parameters, lr=0.2 / 1e-3).step()

    scorer = ExactScorer(proxy, items, Steppable(parameters), rule=StepRule("unit_norm"), step=0.2)
    fall_V = fall_after(optimise, proxy, items, pool[0])
    assert np.abs(fall_V).max() > 0.01
    # torch adds 1e-6 to the norm, which here is about 2
    assert scorer.score(pool[:1]).fall_NV[0] == pytest.approx(fall_V, abs=5e-6)


def test_exact_utility_under_adamw_is_what_a_real_adamw_step_does(proxy, items, pool, parameters):
    """With second moments in place and nearly no decay of them, a step of AdamW without momentum is ours."""
    roots = root_second_moments(proxy, pool, parameters, batch_size=4)
    seen = [torch.where(root.isinf(), 0, root) for root in roots]

    def optimise(parameters):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.0, 1 - 1e-12), eps=1e-30, weight_decay=0.0)
        for parameter, root in zip(parameters, seen, strict=True):
            if parameter.grad is not None:
                parameter.grad[root == 0] = 0
                state = {"step": torch.tensor(1e15), "exp_avg": torch.zeros_like(root), "exp_avg_sq": root**2}
                optimizer.state[parameter] = state
        optimizer.step()

    scorer = ExactScorer(proxy, items, Steppable(parameters), rule=StepRule("adamw", roots), step=1e-3)
    fall_V = fall_after(optimise, proxy, items, pool[0])
    assert np.abs(fall_V).max() > 0.01
    assert scorer.score(pool[:1]).fall_NV[0] == pytest.approx(fall_V, abs=1e-4 * np.abs(fall_V).max())


def test_exact_utility_becomes_the_gradient_product_as_the_step_goes_to_zero(proxy, items, pool, parameters):
    scorer = ExactScorer(proxy, items, Steppable(parameters), rule=StepRule("sgd"), step=0.0)
    target_gradient = items.gradient(proxy, parameters)
    steps = np.array([0.016, 0.00025])
    for sample in pool[:4]:
        loss = proxy.losses(proxy.collate([sample]))[0]
        gradient = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        product = sum((a * b).sum().item() for a, b in zip(gradient, target_gradient, strict=True))
        utility_S = scorer.falls([sample], steps)[1][0] @ items.item_weight_V
        error_S = np.abs(utility_S / (steps * product) - 1)
        # the relative error is of first order in the step, hence 64 times smaller but for higher orders
        assert error_S[1] < 0.01
        assert error_S[1] < 0.2 * error_S[0]


def test_utility_is_the_sum_of_the_falls_of_the_items(proxy, items, pool, parameters):
    block = ExactScorer(proxy, items, Steppable(parameters), rule=StepRule("sgd"), step=0.05).score(pool[:3])
    assert block.utility_N == pytest.approx(block.fall_NV @ items.item_weight_V)


def test_items_already_seen_fall_whatever_the_layout(proxy, targets, pool, parameters):
    """Rounding differs between layouts; 2e-6 nats is what float32 leaves of losses of 6."""
    blocks = []
    for size in (1, 3, 64):
        items = TargetItems.lay_out(proxy, targets, {"first": 1.0, "second": 3.0}, items_per_batch=size)
        scorer = ExactScorer(proxy, items, Steppable(parameters), rule=StepRule("sgd"), step=0.05)
        blocks.append(scorer.score(pool[:2]))
    for block in blocks[1:]:
        assert block.fall_NV == pytest.approx(blocks[0].fall_NV, **ROUNDING)
