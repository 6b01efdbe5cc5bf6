"""What every scorer guarantees, as a suite; a test class subclasses it, its file gives the fixture `make`.

A pool is scored in shards, by whatever batch size fits, killed and started again; the table must not show it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from datalloy.scorers import ScoreBlock, Scorer
from datalloy.target_items import TargetItems
from datalloy.vlm import VLM, Encoded

# Padding and batching round differently in float32. A scorer that divides a difference of losses by the size of a
# small displacement, as first_order does, magnifies that: 4e-4 of the largest utility was seen.
LOSS_TOLERANCE = 1e-5
RELATIVE_TOLERANCE = 2e-3

MakeScorer = Callable[[int], Scorer]  # from a batch size


class ScorerContract:
    @pytest.fixture
    def block(self, make: MakeScorer, pool: Sequence[Encoded]) -> ScoreBlock:
        return make(4).score(pool)

    def test_there_is_one_row_a_sample_and_one_column_a_target(
        self, block: ScoreBlock, pool: Sequence[Encoded], items: TargetItems
    ):
        assert block.loss_N.shape == block.utility_N.shape == block.error_N.shape == (len(pool),)
        assert block.utility_NG.shape == (len(pool), len(items.names))

    def test_losses_and_utilities_are_finite(self, block: ScoreBlock):
        assert block.finite_N.all()
        assert np.isfinite(block.utility_NG).all()

    def test_losses_are_those_of_the_samples_alone(self, block: ScoreBlock, pool: Sequence[Encoded], proxy: VLM):
        alone = [proxy.losses(proxy.collate([sample])).item() for sample in pool]
        assert block.loss_N == pytest.approx(alone, abs=LOSS_TOLERANCE)

    def test_utility_is_the_weighted_mean_over_targets(self, block: ScoreBlock, items: TargetItems):
        assert block.utility_N == pytest.approx(block.utility_NG @ items.weight_G, rel=1e-12)

    def test_scores_follow_the_order_of_the_samples(self, make: MakeScorer, block: ScoreBlock, pool: Sequence[Encoded]):
        self.same(make(4).score(pool[::-1]), block, slice(None, None, -1))

    def test_scores_do_not_depend_on_who_else_is_in_the_call(
        self, make: MakeScorer, block: ScoreBlock, pool: Sequence[Encoded]
    ):
        self.same(make(4).score(pool[3:5]), block, slice(3, 5))

    @pytest.mark.parametrize("batch_size", [1, 5])
    def test_scores_do_not_depend_on_the_batch_size(
        self, batch_size: int, make: MakeScorer, block: ScoreBlock, pool: Sequence[Encoded]
    ):
        self.same(make(batch_size).score(pool), block, slice(None))

    def test_scoring_twice_gives_the_same_bits(self, make: MakeScorer, pool: Sequence[Encoded]):
        scorer = make(4)
        assert scorer.score(pool[:4]).to_bytes() == scorer.score(pool[:4]).to_bytes()

    def test_weights_are_the_same_bits_afterwards(self, make: MakeScorer, pool: Sequence[Encoded], proxy: VLM):
        before = {name: tensor.clone() for name, tensor in proxy.model.state_dict().items()}
        make(4).score(pool[:4])
        assert all(tensor.equal(before[name]) for name, tensor in proxy.model.state_dict().items())

    def test_no_gradient_is_left_on_the_weights(self, make: MakeScorer, pool: Sequence[Encoded], proxy: VLM):
        make(4).score(pool[:4])
        assert all(parameter.grad is None for parameter in proxy.model.parameters())

    def same(self, found: ScoreBlock, whole: ScoreBlock, rows: slice) -> None:
        tolerance = RELATIVE_TOLERANCE * np.abs(whole.utility_NG).max()
        assert found.loss_N == pytest.approx(whole.loss_N[rows], abs=LOSS_TOLERANCE)
        assert found.utility_NG == pytest.approx(whole.utility_NG[rows], abs=tolerance)
        assert found.error_N == pytest.approx(whole.error_N[rows], abs=tolerance, nan_ok=True)
