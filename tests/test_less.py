"""Cosines of gradients against autograd, one sample at a time."""

import numpy as np
import pytest
import torch

from datalloy.scorers.less import LessScorer
from datalloy.scorers.step import root_second_moments
from datalloy.scorers.taps import Taps
from datalloy.target_items import TargetItems


@pytest.fixture(scope="module")
def roots(proxy, pool):
    return root_second_moments(proxy, pool, Taps(proxy).weights(), batch_size=4)


def score(proxy, items, roots, samples):
    return LessScorer(Taps(proxy), items, root_second_moments=roots, batch_size=4).score(samples)


def flat(parts):
    return torch.cat([part.flatten() for part in parts]).double().numpy()


def test_scores_are_cosines_of_preconditioned_gradients_with_the_targets(proxy, items, pool, roots):
    weights = Taps(proxy).weights()
    found_NG = score(proxy, items, roots, pool).utility_NG
    for n, sample in enumerate(pool):
        gradient = torch.autograd.grad(proxy.losses(proxy.collate([sample]))[0], weights)
        step = flat([part / root for part, root in zip(gradient, roots, strict=True)])
        for g in range(len(items.names)):
            target = flat(items.gradient(proxy, weights, target=g))
            cosine = step @ target / np.linalg.norm(step) / np.linalg.norm(target)
            assert found_NG[n, g] == pytest.approx(cosine, abs=1e-5)


def test_with_even_moments_the_target_item_itself_is_the_best_sample(proxy, drawn, pool):
    items = TargetItems.lay_out(proxy, {"only": [drawn[0]]}, {"only": 1.0})
    ones = [torch.ones_like(weight) for weight in Taps(proxy).weights()]
    utility_N = score(proxy, items, ones, [drawn[0], *pool]).utility_N
    assert utility_N[0] == pytest.approx(1, abs=1e-5)
    assert np.abs(utility_N[1:]).max() < 1


def test_what_no_batch_has_a_gradient_of_enters_no_cosine(proxy, items, pool, roots):
    unmeasured = [torch.full_like(roots[0], torch.inf), *roots[1:]]
    block = score(proxy, items, unmeasured, pool[:3])
    assert np.isfinite(block.utility_NG).all()
    assert block.utility_N != pytest.approx(score(proxy, items, roots, pool[:3]).utility_N, rel=1e-6)
