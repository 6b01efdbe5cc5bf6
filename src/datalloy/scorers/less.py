"""Samples in, cosines between what Adam would make of their gradients and the targets' gradients out: a baseline.

Our reading of LESS (Xia et al. 2024, arXiv 2402.04333, sec. 3 and 4): the influence of sample z on a target is
`cos(G(z), grad L_V)`, where `G(z)` is the gradient as Adam would step along it. The cosine takes away the length of the
gradient, which LESS found to favour short answers. Departs from the paper:

- one checkpoint, the proxy that scores, instead of a sum over those of a LoRA warm-up of four epochs;
- `G(z) = grad l(z) / sqrt(v)` with the second moments of pool batches; the momentum, which all samples share, is
  dropped, and so is the sample's own part in v;
- gradients of the decoder's linear layers (taps.py), in full: per-sample gradients are formed a layer at a time and
  never stored, so no random projection is needed;
- over several targets the weighted mean of the cosines, as all our utilities are, where LESS takes the largest.

Dimensionless, in [-1, 1]. Price: that of `first_order_hooks`, one forward and one backward pass.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from datalloy.scorers.first_order import block_without_errors
from datalloy.scorers.one_step import ScoreBlock
from datalloy.scorers.step import TINY, inner
from datalloy.scorers.taps import Taps
from datalloy.target_items import TargetItems
from datalloy.vlm import Encoded


class LessScorer:
    """`root_second_moments`: of the tapped weights, infinite where nothing was measured and nothing moves."""

    signed = True

    def __init__(
        self, taps: Taps, items: TargetItems, *, root_second_moments: Sequence[Tensor], batch_size: int
    ) -> None:
        self.taps, self.batch_size, self.weight_G = taps, batch_size, items.weight_G
        self._metric = [1 / root**2 for root in root_second_moments]
        self._directions = []
        for g in range(len(items.names)):
            gradient = items.gradient(taps.vlm, taps.weights(), target=g)
            norm = max(math.sqrt(inner(gradient, gradient)), TINY)
            self._directions.append([p / (norm * root) for p, root in zip(gradient, root_second_moments, strict=True)])

    def score(self, samples: Sequence[Encoded]) -> ScoreBlock:
        measured = self.taps.measure_all(samples, self._directions, batch_size=self.batch_size, metric=self._metric)
        norm_N = np.maximum(np.sqrt(measured.metric_norm_N), TINY)
        return block_without_errors(measured.loss_N, measured.slope_NG / norm_N[:, None], self.weight_G)
