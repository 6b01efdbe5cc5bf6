"""Target items in, their losses and the utilities that follow from falls of those losses out.

The items of all targets are laid out once in fixed batches (sorted by length), so that the loss before and the
loss after a step are computed with the same padding and their rounding cancels. Legend: V target items, G targets.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datalloy.vision_features import VisionFeatures
from datalloy.vlm import IGNORED, VLM, Encoded

# Part of the layout, hence of the result's last bits: a constant, not a setting.
ITEMS_PER_BATCH = 64


class Utility(NamedTuple):
    """Utility of one sample: per target, over all targets, and its standard error over items, in nats per token.

    The error is NaN where a target has one item: it cannot tell.
    """

    by_target_G: np.ndarray
    total: float
    standard_error: float


@dataclass(frozen=True)
class TargetItems:
    """The items of all targets in one fixed layout.

    `weight_G` sums to one; `target_V` is the index of each item's target. `batches` holds, for each batch, the
    positions of its items in V and the collated tensors. `by_probability_G` says of which targets the risk is not the
    loss but the probability of the answer, negated. With `vision`, what the vision tower sees is computed once for
    all models that are measured: for those that share its weights, and gradients do not reach it.
    """

    names: tuple[str, ...]
    weight_G: np.ndarray
    target_V: np.ndarray
    batches: tuple[tuple[np.ndarray, dict[str, Tensor]], ...]
    by_probability_G: np.ndarray
    vision: VisionFeatures | None = None

    @classmethod
    def lay_out(
        cls,
        vlm: VLM,
        encoded: Mapping[str, Sequence[Encoded]],
        weights: Mapping[str, float],
        *,
        items_per_batch: int = ITEMS_PER_BATCH,
        vision: VisionFeatures | None = None,
        targets_apart: bool = False,
        by_probability: Collection[str] = (),
    ) -> "TargetItems":
        """Lay out the encoded items of each target. `vision`: all models measured have one vision tower.

        `targets_apart`: no batch holds items of two targets. A gradient of each target then costs one backward pass of
        its own batches and not of all; a little more padding is its price.
        """
        items = [item for name in encoded for item in encoded[name]]
        target_V = np.repeat(np.arange(len(encoded)), [len(group) for group in encoded.values()])
        order = sorted(range(len(items)), key=lambda v: (items[v].length, v))
        groups = [[v for v in order if target_V[v] == g] for g in range(len(encoded))] if targets_apart else [order]
        chunks = [group[i : i + items_per_batch] for group in groups for i in range(0, len(group), items_per_batch)]
        weight_G = np.array([weights[name] for name in encoded], dtype=float)
        return cls(
            names=tuple(encoded),
            weight_G=weight_G / weight_G.sum(),
            target_V=target_V,
            batches=tuple((np.array(chunk), vlm.collate([items[v] for v in chunk])) for chunk in chunks),
            by_probability_G=np.array([name in by_probability for name in encoded]),
            vision=vision,
        )

    @property
    def count_G(self) -> np.ndarray:
        return np.bincount(self.target_V, minlength=len(self.names))

    @property
    def item_weight_V(self) -> np.ndarray:
        """Weight of each item in the weighted mean over targets of the mean over items; sums to one."""
        return item_weights(self.weight_G, self.target_V)

    def gather(self, loss_by_batch: Sequence[Tensor]) -> np.ndarray:
        """Losses computed batch by batch, as one float64 array in the order of V."""
        loss_V = np.empty(len(self.target_V))
        for (positions, _), losses in zip(self.batches, loss_by_batch, strict=True):
            loss_V[positions] = losses.cpu().double().numpy()
        return loss_V

    def batch_losses(self, vlm: VLM, index: int) -> Tensor:
        """Losses of the items of one batch, in its order, differentiable."""
        _, batch = self.batches[index]
        with vlm.reusing(self.vision, batch):
            return vlm.losses(batch)

    def batch_risks(self, vlm: VLM, index: int) -> Tensor:
        """What is to be lowered for the items of one batch: their losses, or their answers' probabilities, negated."""
        loss_B = self.batch_losses(vlm, index)
        positions, batch = self.batches[index]
        by_probability_B = torch.as_tensor(self.by_probability_G[self.target_V[positions]], device=vlm.device)
        tokens_B = (batch["labels"][:, 1:] != IGNORED).sum(dim=1)
        return torch.where(by_probability_B, -torch.exp(-loss_B * tokens_B), loss_B)

    def losses(self, vlm: VLM) -> np.ndarray:
        """Loss of every item under the model as it is now, [V], nats per token."""
        with torch.no_grad():
            return self.gather([self.batch_losses(vlm, index) for index in range(len(self.batches))])

    def utility(self, fall_V: np.ndarray) -> Utility:
        """Weighted mean fall of the loss, with the standard error that the choice of target items brings."""
        by_target, variance = [], 0.0
        for g, weight in enumerate(self.weight_G):
            falls = fall_V[self.target_V == g]
            by_target.append(falls.mean())
            variance += weight**2 * falls.var(ddof=1) / len(falls) if len(falls) > 1 else np.nan
        by_target_G = np.array(by_target)
        return Utility(by_target_G, float(self.weight_G @ by_target_G), float(np.sqrt(variance)))

    def gradient(self, vlm: VLM, parameters: Sequence[Tensor], target: int | None = None) -> list[Tensor]:
        """Gradient of the weighted target loss, or of one target's mean loss, with respect to `parameters`."""
        weight_V = self.item_weight_V if target is None else (self.target_V == target) / self.count_G[target]
        total = [torch.zeros_like(p) for p in parameters]
        for index, (positions, _) in enumerate(self.batches):
            weights = torch.as_tensor(weight_V[positions], dtype=torch.float32, device=vlm.device)
            parts = torch.autograd.grad((self.batch_losses(vlm, index) * weights).sum(), parameters, allow_unused=True)
            for sum_, part in zip(total, parts, strict=True):
                if part is not None:
                    sum_ += part
        return total


def item_weights(weight_G: np.ndarray, target_V: np.ndarray) -> np.ndarray:
    """Weight of each item, [V], where targets count by `weight_G`, which sums to one, and a target's items alike."""
    return (weight_G / np.bincount(target_V, minlength=len(weight_G)))[target_V]
