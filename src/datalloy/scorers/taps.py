"""Samples in, what their gradients are worth out: slopes along given directions, norms, curvature-weighted norms.

One forward and backward pass of an ordinary batch. For a linear layer the gradient of sample b is
`sum_t d_bt a_bt^T` with a the layer's input and d the gradient of its output; both are at hand in a batch, so
per-sample gradients cost no batches of one. They are formed one layer at a time, reduced to a few numbers and
dropped: nothing is stored. Only the decoder's linear layers are tapped (inputs [B, T, features]), under PEFT those
of the adapter; the vision tower flattens samples into one row of patches, as experts in a mixture do, and embeddings
and norms carry little of the gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from datalloy.errors import ModelError
from datalloy.vlm import VLM, Encoded


class Measured(NamedTuple):
    """Per sample: loss (nats per token), slope along each direction [N, G], |g|^2, and g^T diag(metric) g."""

    loss_N: np.ndarray
    slope_NG: np.ndarray
    squared_norm_N: np.ndarray
    metric_norm_N: np.ndarray


class Taps:
    """The trainable linear layers of the decoder, read during forward and backward passes."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        linear = [m for m in vlm.decoder_layers().modules() if isinstance(m, nn.Linear)]
        self.modules = [m for m in linear if m.weight.requires_grad]
        if not self.modules:
            raise ModelError(f"the decoder of {vlm.name} has no trainable torch.nn.Linear; use score.method exact")

    def weights(self) -> list[Tensor]:
        return [module.weight for module in self.modules]

    def measure(
        self,
        samples: Sequence[Encoded],
        directions: Sequence[Sequence[Tensor]],
        *,
        batch_size: int,
        metric: Sequence[Tensor] | None = None,
    ) -> Measured:
        """Measure all samples. `directions` and `metric` hold one tensor for each tapped weight."""
        parts = [
            self._measure_batch(samples[i : i + batch_size], directions, metric)
            for i in range(0, len(samples), batch_size)
        ]
        return Measured(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def mean_squared_gradient(self, batches: Sequence[Sequence[Encoded]]) -> list[Tensor]:
        """Mean over samples of the squared gradient: the diagonal of the empirical Fisher matrix, per tapped weight."""
        totals = [torch.zeros_like(weight) for weight in self.weights()]
        for batch in batches:
            _, inputs, gradients = self._run(batch)
            for total, a, d in zip(totals, inputs, gradients, strict=True):
                total += torch.einsum("bto,bti->boi", d, a).square().sum(0)
        count = sum(len(batch) for batch in batches)
        return [total / count for total in totals]

    def _measure_batch(
        self, samples: Sequence[Encoded], directions: Sequence[Sequence[Tensor]], metric: Sequence[Tensor] | None
    ) -> Measured:
        losses, inputs, gradients = self._run(samples)
        count = len(samples)
        slope, norm, weighted = np.zeros((count, len(directions))), np.zeros(count), np.zeros(count)
        for layer, (a, d) in enumerate(zip(inputs, gradients, strict=True)):
            gradient_BOI = torch.einsum("bto,bti->boi", d, a)
            for g, direction in enumerate(directions):
                slope[:, g] += torch.einsum("boi,oi->b", gradient_BOI, direction[layer]).cpu().double().numpy()
            squares = gradient_BOI.square()
            norm += squares.sum((1, 2)).cpu().double().numpy()
            if metric is not None:
                weighted += torch.einsum("boi,oi->b", squares, metric[layer]).cpu().double().numpy()
        return Measured(losses, slope, norm, weighted)

    def _run(self, samples: Sequence[Encoded]) -> tuple[np.ndarray, Sequence[Tensor], Sequence[Tensor]]:
        """Losses, and for every tapped layer its inputs and the gradients of its outputs."""
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []

        def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((module, args[0].detach(), output))

        handles = [module.register_forward_hook(remember) for module in self.modules]
        try:
            losses = self.vlm.losses(self.vlm.collate(samples))
        finally:
            for handle in handles:
                handle.remove()
        self._check(calls, len(samples))
        # layers are called in another order than they are registered in some families
        called = {module: (taken, output) for module, taken, output in calls}
        inputs, outputs = zip(*(called[module] for module in self.modules), strict=True)
        # the sum, not the mean: each sample's own gradient must not depend on who else is in the batch
        gradients = torch.autograd.grad(losses.sum(), outputs)
        return losses.detach().cpu().double().numpy(), inputs, gradients

    def _check(self, calls: Sequence[tuple[nn.Module, Tensor, Tensor]], samples: int) -> None:
        once = len(calls) == len(self.modules) == len({module for module, _, _ in calls})
        if not once or any(taken.ndim != 3 or len(taken) != samples for _, taken, _ in calls):
            raise ModelError(
                f"the linear layers of {self.vlm.name} are not each called once on [samples, tokens, features], so "
                "gradients cannot be told apart by sample; use score.method exact, tail or first_order"
            )
