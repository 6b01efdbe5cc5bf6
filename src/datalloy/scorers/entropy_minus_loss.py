"""Samples in, how much likelier than expected their answers are out.

The entropy of the proxy's predictions minus the loss of the answer, both means over the answer's tokens: what the
proxy expects to lose there, minus what it does lose. Where its probabilities are right, correct answers have zero on
average, be they easy or hard, short or long. Above zero it was unsure and the answer is its best guess all the same:
likely right, and something to learn. Below zero it was surer of another answer. Low loss cannot tell an answer that is
wrong from one that is hard; here what makes the proxy unsure is taken off.

Source: the deviation of information from entropy, as locally typical sampling has it for tokens (arXiv:2202.00666),
without the absolute value; close to the normalised margin of confident learning (arXiv:1911.00068), which needs
classes. Price: one forward pass.
"""

from collections.abc import Sequence

import numpy as np
import torch

from datalloy.scorers.baselines import LossScorer
from datalloy.scorers.one_step import ScoreBlock
from datalloy.vlm import Encoded


class EntropyMinusLossScorer(LossScorer):
    """Utility is entropy minus loss, nats per token, the same for every target: it knows none and carries no sign."""

    def score(self, samples: Sequence[Encoded]) -> ScoreBlock:
        blocks: list[np.ndarray] = []
        with torch.no_grad(), self.vlm.autocast(self.precision):
            for batch in self.batches(samples):
                both = torch.stack(self.vlm.losses_and_entropies(self.vlm.collate(batch)))
                blocks.append(both.cpu().double().numpy())
        loss_N, entropy_N = np.concatenate(blocks, axis=1)
        utility_N = entropy_N - loss_N
        return ScoreBlock(loss_N, np.tile(utility_N[:, None], self.targets), utility_N, np.full(len(samples), np.nan))
