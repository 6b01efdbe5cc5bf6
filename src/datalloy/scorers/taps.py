"""Samples in, what their gradients are worth out: slopes along given directions, norms, curvature-weighted norms.

One forward pass of an ordinary batch, and a backward pass through the decoder. For a linear layer the gradient of
sample b is `sum_t d_bt a_bt^T` with a the layer's input and d the gradient of its output; both are at hand in a batch,
so per-sample gradients cost no batches of one. They are formed one layer at a time, reduced to a few numbers and
dropped: nothing is stored. Only the decoder's linear layers are tapped (inputs [B, T, features]), under PEFT those
of the adapter; the vision tower flattens samples into one row of patches, as experts in a mixture do, and embeddings
and norms carry little of the gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from datalloy.config import Precision
from datalloy.encoding import length_batches
from datalloy.errors import ModelError
from datalloy.vlm import VLM, Encoded


class Measured(NamedTuple):
    """Per sample: loss (nats per token), slope along each direction [N, G], |g|^2, and g^T diag(metric) g."""

    loss_N: np.ndarray
    slope_NG: np.ndarray
    squared_norm_N: np.ndarray
    metric_norm_N: np.ndarray


@dataclass(frozen=True)
class Reading:
    """A batch read at the taps: losses [B]; for each tapped layer its inputs [B, T, in] and the gradients of its
    outputs [B, T, out]. Positions of the last decoder layer at which no sample has a gradient are left out.
    """

    loss_B: Tensor
    inputs: Sequence[Tensor]
    output_gradients: Sequence[Tensor]

    def weight_gradient(self, layer: int) -> Tensor:
        """Each sample's gradient of a tapped weight, [B, out, in]; formed anew each time."""
        return self.output_gradients[layer].mT @ self.inputs[layer]

    def part(self, samples: slice) -> "Reading":
        """The reading of some of the samples."""
        return Reading(self.loss_B[samples], *([t[samples] for t in ts] for ts in (self.inputs, self.output_gradients)))


class Taps:
    """The trainable linear layers of the decoder, or of its last `depth` layers, read as batches pass.

    `precision`: of the passes; what is read comes in float32. Under bfloat16 the ranks of slopes and norms agree with
    those of float32 by more than 0.99 on three small families (benchmarks/precision.py).
    """

    def __init__(self, vlm: VLM, depth: int | None = None, precision: Precision = "float32") -> None:
        self.vlm, self.precision = vlm, precision
        layers = vlm.decoder_layers()
        if depth is not None and not 1 <= depth <= len(layers):
            raise ModelError(f"score.tail_layers is {depth}, {vlm.name} has {len(layers)} decoder layers")
        self.layers = list(layers if depth is None else layers[-depth:])
        linear = [m for layer in self.layers for m in layer.modules() if isinstance(m, nn.Linear)]
        self.modules: list[nn.Linear] = [m for m in linear if m.weight.requires_grad]
        if not self.modules:
            raise ModelError(
                f"{vlm.name} has no trainable parameter in a torch.nn.Linear of its decoder; use score.method exact"
            )

        of_last = set(self.layers[-1].modules())
        # positions of the modules tapped in the last layer
        self.last = [i for i, module in enumerate(self.modules) if module in of_last]

    def weights(self) -> list[nn.Parameter]:
        return [module.get_parameter("weight") for module in self.modules]

    def measure(
        self, reading: Reading, directions: Sequence[Sequence[Tensor]], *, metric: Sequence[Tensor] | None = None
    ) -> Measured:
        """What the samples of a batch are worth. `directions` and `metric` hold one tensor for each tapped weight."""
        count = len(reading.loss_B)
        slope_BG = torch.zeros(count, len(directions), dtype=torch.float64)
        norm_B, weighted_B = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for layer in range(len(self.modules)):
            gradient_BW = reading.weight_gradient(layer).flatten(1)
            if directions:
                along_GW = torch.stack([direction[layer].flatten() for direction in directions])
                slope_BG += (gradient_BW @ along_GW.T).cpu()
            squares_BW = gradient_BW.square()
            norm_B += squares_BW.sum(1).cpu()
            if metric is not None:
                weighted_B += (squares_BW @ metric[layer].flatten()).cpu()
        losses_B = reading.loss_B.double().cpu()
        return Measured(*(tensor.numpy() for tensor in (losses_B, slope_BG, norm_B, weighted_B)))

    def measure_all(
        self,
        samples: Sequence[Encoded],
        directions: Sequence[Sequence[Tensor]],
        *,
        batch_size: int,
        metric: Sequence[Tensor] | None = None,
    ) -> Measured:
        """`measure` for any number of samples."""
        batches = length_batches(samples, batch_size)
        parts = [self.measure(self.read([samples[i] for i in b]), directions, metric=metric) for b in batches]
        restored = np.argsort(np.concatenate(batches))
        return Measured(*(np.concatenate(columns)[restored] for columns in zip(*parts, strict=True)))

    def mean_squared_gradient(self, batches: Sequence[Sequence[Encoded]]) -> list[Tensor]:
        """Mean over samples of the squared gradient: the diagonal of the empirical Fisher matrix, per tapped weight."""
        totals = [torch.zeros_like(weight) for weight in self.weights()]
        for batch in batches:
            reading = self.read(batch)
            for layer, total in enumerate(totals):
                total += reading.weight_gradient(layer).square().sum(0)
        count = sum(len(batch) for batch in batches)
        return [total / count for total in totals]

    def read(self, samples: Sequence[Encoded]) -> Reading:
        """One pass of a batch, forward through the model and backward through the tapped layers."""
        loss_B, inputs, gradients = self.pass_through(self.vlm.collate(samples))
        for i in self.last:
            inputs[i], gradients[i] = _with_gradient(inputs[i], gradients[i])
        return Reading(loss_B, inputs, gradients)

    def pass_through(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Losses [B], and for each tapped layer its inputs and the gradients of its outputs at all positions."""
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []

        def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((module, args[0].detach(), output))

        # what lies below the taps has no gradient to give, so no graph of it is kept
        handles = [self.layers[0].register_forward_pre_hook(_begin_graph, with_kwargs=True)]
        handles += [module.register_forward_hook(remember) for module in self.modules]
        try:
            with torch.no_grad(), self.vlm.autocast(self.precision):
                loss_B = self.vlm.losses(batch)
        finally:
            for handle in handles:
                handle.remove()
        self._check(calls, len(loss_B))
        # layers are called in another order than they are registered in some families
        called = {module: (taken, output) for module, taken, output in calls}
        inputs, outputs = zip(*(called[module] for module in self.modules), strict=True)
        # the sum, not the mean: each sample's own gradient must not depend on who else is in the batch
        gradients = torch.autograd.grad(loss_B.sum(), outputs)
        return loss_B.detach(), [taken.float() for taken in inputs], [gradient.float() for gradient in gradients]

    def _check(self, calls: Sequence[tuple[nn.Module, Tensor, Tensor]], samples: int) -> None:
        once = len(calls) == len(self.modules) == len({module for module, _, _ in calls})
        if not once or any(taken.ndim != 3 or len(taken) != samples for _, taken, _ in calls):
            raise ModelError(
                f"the linear layers of {self.vlm.name} are not each called once on [samples, tokens, features], so "
                "gradients cannot be told apart by sample; use score.method exact or first_order"
            )


def _begin_graph(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Gradients are on from this layer upwards."""
    torch.set_grad_enabled(True)
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _with_gradient(input_BTI: Tensor, gradient_BTO: Tensor) -> tuple[Tensor, Tensor]:
    """Without the positions that no loss depends on: in the last layer's query, output and MLP all but a few."""
    present_BT = (gradient_BTO != 0).any(dim=2)
    most = int(present_BT.sum(dim=1).max())
    if most == present_BT.shape[1]:
        return input_BTI, gradient_BTO
    # a stable sort: the positions that are kept stay in their order
    kept_BT1 = present_BT.sort(dim=1, descending=True, stable=True).indices[:, : max(most, 1), None]
    return tuple(t.gather(1, kept_BT1.expand(-1, -1, t.shape[2])) for t in (input_BTI, gradient_BTO))  # type: ignore[return-value]
