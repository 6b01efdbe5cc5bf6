"""Samples in, what their pictures tell about their answers out.

The fall of an answer's loss when its pictures are seen instead of plain grey, summed over its tokens:
`log p(answer | pictures, rest) - log p(answer | rest)`, in nats. It is large where the proxy reads the answer off the
picture, below zero where the picture speaks against the answer, as it does for wrong answers and for those about
another picture, and zero without pictures. What makes an answer unlikely whatever is shown, its length or a rare word,
raises both losses and cancels; low loss takes it for a fault.

Sources: pointwise V-information (PVI, arXiv:2110.08420), with the pictures as what is left out; visual information
gain (arXiv:2602.17186), which takes the mean over tokens. Price: two forward passes of what has pictures.
"""

from collections.abc import Sequence

import numpy as np

from datalloy.scorers.baselines import LossScorer
from datalloy.scorers.one_step import ScoreBlock
from datalloy.vlm import Encoded


class VisualGainScorer(LossScorer):
    """Utility is the visual gain, the same for every target: it knows none, and below zero is not harm to one."""

    def score(self, samples: Sequence[Encoded]) -> ScoreBlock:
        loss_N = self.losses(samples)
        gain_N = np.zeros(len(samples))
        shown = [i for i, sample in enumerate(samples) if sample.has_pictures]
        unseen = self.losses([samples[i].without_pictures() for i in shown])
        gain_N[shown] = (unseen - loss_N[shown]) * [samples[i].supervised_tokens for i in shown]
        return ScoreBlock(loss_N, np.tile(gain_N[:, None], self.targets), gain_N, np.full(len(samples), np.nan))
