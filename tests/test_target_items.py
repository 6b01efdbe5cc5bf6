import numpy as np
import pytest
import torch

from datalloy.target_items import TargetItems
from datalloy.vision_features import VisionFeatures
from quadratic import Point, Quadratic


def lay_out(toy, *groups, weights, **layout):
    named = {str(g): points for g, points in enumerate(groups)}
    return TargetItems.lay_out(toy, named, {str(g): weight for g, weight in enumerate(weights)}, **layout)


POINTS = [Point((1.0,), 1.0, length=9), Point((1.0,), 2.0, length=5), Point((1.0,), 4.0, length=7)]


def test_targets_weigh_by_their_weight_and_items_equally_within_a_target():
    items = lay_out(Quadratic(0.0), POINTS[:2], POINTS[2:], weights=(1.0, 3.0))
    assert items.weight_G.tolist() == [0.25, 0.75]
    assert items.item_weight_V.tolist() == [0.125, 0.125, 0.75]


@pytest.mark.parametrize("items_per_batch", [1, 2, 64])
def test_losses_come_in_the_order_of_the_items_whatever_the_layout(items_per_batch):
    items = lay_out(Quadratic(0.0), POINTS[:2], POINTS[2:], weights=(1, 1), items_per_batch=items_per_batch)
    assert items.losses(Quadratic(0.0)).tolist() == [0.5, 2, 8]


def test_items_are_batched_with_items_of_like_length():
    items = lay_out(Quadratic(0.0), POINTS, weights=(1,), items_per_batch=2)
    assert [positions.tolist() for positions, _ in items.batches] == [[1, 2], [0]]


def test_targets_apart_share_no_batch():
    items = lay_out(
        Quadratic(0.0), POINTS[:2], POINTS[2:], POINTS, weights=(1, 1, 1), items_per_batch=2, targets_apart=True
    )
    assert [positions.tolist() for positions, _ in items.batches] == [[1, 0], [2], [4, 5], [3]]
    assert items.losses(Quadratic(0.0)).tolist() == [0.5, 2, 8, 0.5, 2, 8]


def test_shared_vision_changes_no_loss(proxy, targets, items):
    shared = TargetItems.lay_out(proxy, targets, {"first": 1.0, "second": 3.0}, vision=VisionFeatures())
    for _ in range(2):
        assert np.array_equal(shared.losses(proxy), items.losses(proxy))


def test_losses_of_a_real_model_do_not_depend_on_the_layout(proxy, targets):
    """Padding and batching round differently; 1e-5 nats is some ten times what float32 was seen to lose."""
    losses = [
        TargetItems.lay_out(proxy, targets, {"first": 1, "second": 1}, items_per_batch=size).losses(proxy)
        for size in (1, 3, 64)
    ]
    alone = [proxy.losses(proxy.collate([item])).item() for group in targets.values() for item in group]
    for loss_V in losses:
        assert loss_V == pytest.approx(alone, abs=1e-5)


def test_utility_is_the_weighted_mean_fall():
    items = lay_out(Quadratic(0.0), POINTS[:2], POINTS[2:], weights=(1.0, 3.0))
    utility = items.utility(np.array([1.0, 3.0, -1.0]))
    assert utility.by_target_G.tolist() == [2, -1]
    assert utility.total == 0.25 * 2 - 0.75 * 1


def test_the_standard_error_is_that_of_a_stratified_mean():
    items = lay_out(Quadratic(0.0), POINTS, POINTS[:2], weights=(1.0, 1.0))
    # variances of the items 1 and 8, over 3 and 2 items, weighted by a half each
    assert items.utility(np.array([1.0, 2, 3, 0, 4])).standard_error == pytest.approx(np.sqrt(1 / 4 / 3 + 8 / 4 / 2))


def test_of_one_item_there_is_no_standard_error():
    utility = lay_out(Quadratic(0.0), POINTS, POINTS[:1], weights=(1.0, 1.0)).utility(np.ones(4))
    assert utility.total == 1
    assert np.isnan(utility.standard_error)


@pytest.mark.parametrize("items_per_batch", [1, 3, 64])
def test_the_gradient_is_that_of_the_weighted_mean_loss(items_per_batch, proxy, targets):
    items = TargetItems.lay_out(proxy, targets, {"first": 1.0, "second": 3.0}, items_per_batch=items_per_batch)
    parameters = list(proxy.decoder_layers()[0].parameters())
    means = [proxy.losses(proxy.collate(group)).mean() for group in targets.values()]
    for target, loss in ((None, 0.25 * means[0] + 0.75 * means[1]), (0, means[0]), (1, means[1])):
        expected = torch.autograd.grad(loss, parameters, retain_graph=True)
        for found, part in zip(items.gradient(proxy, parameters, target=target), expected, strict=True):
            torch.testing.assert_close(found, part, rtol=1e-4, atol=1e-6)


def test_what_the_targets_do_not_touch_has_gradient_zero():
    unused = torch.nn.Parameter(torch.ones(2))
    toy = Quadratic(0.0)
    items = lay_out(toy, POINTS, weights=(1.0,))
    gradient, zero = items.gradient(toy, [toy.weight, unused])
    assert gradient.tolist() == pytest.approx([-7 / 3])
    assert zero.tolist() == [0, 0]
