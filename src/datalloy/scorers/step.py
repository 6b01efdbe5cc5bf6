"""A gradient in, the simulated training step out: which parameters move, in what direction, how far.

`Delta(z) = -step * d(z)` with d the gradient (sgd), the gradient at unit norm (unit_norm), or the gradient divided
by the root of the second moments (adamw, without the momentum that all samples share). Stepped parameters are
float32: in bfloat16 a real step moves 4 to 8 % of the weights and the ranking is noise (DESIGN 2.1).
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from datalloy.errors import ModelError
from datalloy.vlm import VLM, Encoded

SHARES = 2.0  # of a sample in its batch's step: the one number that was measured in all worlds (docs/evidence.md)
CHECK_EVERY = 256  # simulated steps between two looks at the bits of the weights
TINY = torch.finfo(torch.float32).tiny  # for a division by a norm that is zero: what has no gradient takes no step


@dataclass(frozen=True)
class StepRule:
    """Turns a gradient into the direction of a step. `root_second_moments` belongs to adamw alone."""

    name: str
    root_second_moments: tuple[Tensor, ...] | None = None

    def direction(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """The d of `Delta = -step * d`, one tensor a parameter."""
        if self.name == "unit_norm":
            norm = max(math.sqrt(inner(gradient, gradient)), TINY)
            return [g / norm for g in gradient]
        if self.root_second_moments is not None:
            return [g / root for g, root in zip(gradient, self.root_second_moments, strict=True)]
        return list(gradient)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Inner product of two vectors in parameter space; float32 inside a tensor (MPS has no float64), float64 across."""
    products = torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)])
    return products.cpu().double().sum().item()


def scoped_parameters(vlm: VLM, scope: str, *, freeze_vision: bool) -> list[Parameter]:
    """The parameters a step touches: `full` is all that training would change, `decoder` the decoder layers alone."""
    if scope == "decoder":
        return list(vlm.decoder_layers().parameters())
    frozen = {id(p) for p in vlm.vision_parameters()} if freeze_vision else set()
    return [p for p in vlm.model.parameters() if id(p) not in frozen]


def loss_and_gradient(
    vlm: VLM, samples: Sequence[Encoded], parameters: Sequence[Parameter]
) -> tuple[float, list[Tensor]]:
    """Mean loss of some samples, read as one batch (nats per token), and its gradient."""
    loss = vlm.losses(vlm.collate(samples)).mean()
    parts = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)]


class Steppable:
    """Parameters that can be moved and put back bit for bit: those of `parameters` that training would change.

    Under PEFT that is the adapter alone. Holds one copy of them; nothing else is touched. Every `CHECK_EVERY` steps
    the parameters' bits are compared with those at the start; price: reading them once.
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ModelError("the proxy has no trainable parameter where the step should be; use another score.scope")
        if low := {str(p.dtype) for p in self.parameters} - {"torch.float32"}:
            raise ModelError(f"steps are simulated in float32, the proxy holds {', '.join(low)}; load it in float32")
        self._originals = [p.detach().clone() for p in self.parameters]
        self._bits, self._moves = _bits(self.parameters), 0

    @contextmanager
    def moved(self, direction: Sequence[Tensor], size: float) -> Iterator[None]:
        """The parameters moved by `size * direction` inside the block, and put back after it whatever happens."""
        with torch.no_grad():
            try:
                for parameter, original, part in zip(self.parameters, self._originals, direction, strict=True):
                    torch.add(original, part, alpha=size, out=parameter.data)
                yield
            finally:
                for parameter, original in zip(self.parameters, self._originals, strict=True):
                    parameter.data.copy_(original)
        self._moves += 1
        if self._moves % CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        """Raise ModelError where the parameters, or the copy that they are put back from, are not as at the start."""
        if not _bits(self.parameters) == self._bits == _bits(self._originals):
            raise ModelError(
                f"after {self._moves} simulated steps the proxy's weights are not those that it began with, so nothing "
                "scored since can be trusted; other code changes them, or memory is faulty. Start again from the last "
                "finished part"
            )


def _bits(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor the sum of its bits taken as whole numbers: exact, in any order, and changed by any one bit."""
    return [int(tensor.detach().view(torch.int32).sum(dtype=torch.int64)) for tensor in tensors]


def polyak_step(vlm: VLM, samples: Sequence[Encoded], parameters: Sequence[Parameter], rule: StepRule) -> float:
    """The step that, to first order, would bring the mean loss of some samples to zero: `l / <g, d>`.

    Infinite where they have no gradient, NaN where they have no finite loss.
    """
    loss, gradient = loss_and_gradient(vlm, samples, parameters)
    slope = inner(gradient, rule.direction(gradient))
    return loss / slope if slope else math.inf


def batch_share(
    vlm: VLM, samples: Sequence[Encoded], parameters: Sequence[Parameter], rule: StepRule, *, batch_size: int
) -> float:
    """`SHARES / B` of a Polyak step on a batch of B: about what a sample moves the model as one of a training batch.

    Median over the batches that `samples` are cut into. The Polyak step of a batch is larger than that of a sample,
    because gradients of different samples cancel in their mean. Raises ModelError where no batch has a gradient.
    """
    found = []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        if 0 < (step := polyak_step(vlm, batch, parameters, rule)) < math.inf:
            found.append(SHARES / len(batch) * step)
    if not found:
        raise ModelError(f"no batch of the pool has a gradient under {vlm.name}, so its share of a step is unknown")
    return statistics.median(found)


def root_second_moments(
    vlm: VLM, samples: Sequence[Encoded], parameters: Sequence[Parameter], *, batch_size: int, epsilon: float = 1e-8
) -> tuple[Tensor, ...]:
    """Square root of the mean squared batch gradient, plus epsilon: Adam's denominator where the proxy now stands.

    Measured on batches of the training size, because Adam's second moments are those of batch gradients. Infinite
    where no batch has a gradient (embeddings of tokens that none contains): what was not measured takes no step.
    """
    squares = [torch.zeros_like(p) for p in parameters]
    batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
    for batch in batches:
        _, gradient = loss_and_gradient(vlm, batch, parameters)
        for square, part in zip(squares, gradient, strict=True):
            square += part**2 / len(batches)
    return tuple(torch.where(square > 0, square.sqrt() + epsilon, torch.inf) for square in squares)
