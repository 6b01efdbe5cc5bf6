"""Steps on many samples in, the target items' losses after each of them out: one-step models by the dozen.

A step on one sample changes a linear layer's weight by `-step * sum_t d_t a_t'`, with a the layer's inputs and d the
gradients of its outputs (`Taps` reads both for a batch of samples). So the weights need not be moved one sample at a
time: the target items run through the last decoder layers once for a whole batch of samples, and in each linear layer
every sample's rows meet that sample's own weights. Below those layers nothing changes and nothing is computed: hidden
states at their entrance are kept from the start, and the output head sees answer positions alone.

Price, for each sample and target item: one forward pass of those layers and of the head on the answer. A layer's
stepped weights are formed where that is cheaper than applying the step as a product of two thin matrices, and dropped
before the next layer.

The layers are called as the model called them, so no family's code is repeated here. Which of their arguments belong
to items is seen by laying one batch out twice: what grows belongs to items. What a family adds between its layers
(Qwen3-VL: features of the picture) is kept and added again. Whether all this is right is not assumed: one step is also
taken for real, and a replay that gives other losses than the moved model is refused.

Only the weights of linear layers move; norms and biases carry little of a step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datalloy.errors import ModelError
from datalloy.scorers.step import TINY, Steppable, StepRule, inner, loss_and_gradient
from datalloy.scorers.taps import Reading, Taps
from datalloy.target_items import TargetItems
from datalloy.vlm import IGNORED, Encoded

TOLERANCE = 1e-3  # nats; rounding gives 1e-6, a wrong replay tenths
# of the hidden states of items times samples: more at once fall out of a processor's cache, or fill an accelerator
NUMBERS_AT_ONCE = {"cpu": 1 << 20, "elsewhere": 1 << 26}


class _Call(NamedTuple):
    """The arguments of a layer for one batch of items, and what the model adds to the output of the layer before.

    `dims` has the shape of the arguments, with the dimension of the items for each tensor, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dims: tuple[Any, Any]
    added: Tensor | None

    def for_samples(self, samples: int, before: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for the items once for each sample, sample by sample; `before`: what the layer before put out."""
        args, kwargs = (_repeated(*pair, samples) for pair in zip((self.args, self.kwargs), self.dims, strict=True))
        if before is None:
            return args, kwargs
        hidden = before if self.added is None else before + _repeated(self.added, 0, samples)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


class Replay:
    """The tapped layers on kept hidden states of `items`, for models that are one step away from the taps' own."""

    def __init__(self, taps: Taps, items: TargetItems, check: Encoded) -> None:
        """`check` is a sample on which one step is taken for real too. Raises ModelError where the replay is wrong."""
        if low := {str(w.dtype) for w in taps.weights()} - {"torch.float32"}:
            raise ModelError(f"steps are simulated in float32, the proxy holds {', '.join(low)}; load it in float32")
        self.taps, self.items = taps, items
        self._norm, self._head = taps.vlm.final_norm(), taps.vlm.output_head()
        self._calls, losses = zip(*(self._record(batch) for _, batch in items.batches), strict=True)
        self._live = [self._find_live(batch) for _, batch in items.batches]
        self._labels = [F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED) for _, batch in items.batches]
        self.before_V = items.gather(losses)
        most = NUMBERS_AT_ONCE["cpu" if taps.vlm.device.type == "cpu" else "elsewhere"]
        self.samples_at_once = max(1, most // max(_hidden(*calls[0][:2]).numel() for calls in self._calls))
        self._check(check)

    def _check(self, sample: Encoded) -> None:
        steppable, sgd = Steppable(self.taps.weights()), StepRule("sgd")
        loss, gradient = loss_and_gradient(self.taps.vlm, [sample], steppable.parameters)
        square = inner(gradient, gradient)
        step = loss / square if square and math.isfinite(loss) else 0.0
        with steppable.moved(gradient, -step):
            moved_V = self.before_V - self.items.losses(self.taps.vlm)
        fall_V = self.falls(self.taps.read([sample, sample]), sgd, (step,))[0, 0]
        error = np.abs(fall_V - moved_V).max()
        if not error < TOLERANCE * max(1.0, np.abs(moved_V).max()):
            raise ModelError(
                f"the last {len(self.taps.layers)} decoder layers of {self.taps.vlm.name} cannot be replayed alone: "
                f"after one step the losses differ by {error:.2g} nats from the model's own, so the family does more "
                "between or after its layers; use score.method exact, or calibrated with score.replayed_items: 0"
            )

    def falls(self, reading: Reading, rule: StepRule, steps: Sequence[float]) -> np.ndarray:
        """Fall of every item's loss after a step of each size on each sample of the batch, [B, steps, V]."""
        parts = []
        for first in range(0, len(reading.loss_B), self.samples_at_once):
            here = slice(first, first + self.samples_at_once)
            part = reading if self.samples_at_once >= len(reading.loss_B) else reading.part(here)
            parts.append(np.stack([self.before_V - self._stepped_losses(part, rule, step) for step in steps], axis=1))
        return np.concatenate(parts)

    @torch.no_grad()
    def _stepped_losses(self, reading: Reading, rule: StepRule, step: float) -> np.ndarray:
        """Losses of all items after a step on each sample, [B, V]."""
        size_B = step * rule_scale(rule, reading, len(self.taps.modules))
        loss_BV = np.empty((len(size_B), len(self.items.target_V)))
        for index, (positions, _) in enumerate(self.items.batches):
            with self._stepped(reading, size_B, rule.root_second_moments, index):
                loss_BV[:, positions] = self._losses(index, len(size_B)).cpu().double().numpy()
        return loss_BV

    @contextmanager
    def _stepped(self, reading: Reading, size_B: Tensor, roots: Sequence[Tensor] | None, index: int) -> Iterator[None]:
        """Inside, the tapped layers compute with each sample's own weights, for the items of one batch."""
        replaced = [vars(module).get("forward") for module in self.taps.modules]
        try:
            for layer, module in enumerate(self.taps.modules):
                root = roots[layer] if roots else None
                live = self._live[index].get(layer)
                vars(module)["forward"] = stepped_forward(module, reading, layer, size_B, root=root, live=live)
            yield
        finally:
            for module, forward in zip(self.taps.modules, replaced, strict=True):
                vars(module).pop("forward", None)
                if forward is not None:
                    vars(module)["forward"] = forward

    def _losses(self, index: int, samples: int) -> Tensor:
        hidden: Any = None
        for layer, call in zip(self.taps.layers, self._calls[index], strict=True):
            args, kwargs = call.for_samples(samples, hidden)
            output = layer(*args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        label_ST = self._labels[index]
        mask_ST = label_ST != IGNORED
        answer_BND = hidden.unflatten(0, (samples, -1))[:, mask_ST]
        logits = self._head(self._norm(answer_BND)).float()
        target_BN = label_ST[mask_ST].expand(samples, -1)
        loss_BN = F.cross_entropy(logits.flatten(0, 1), target_BN.flatten(), reduction="none").view_as(target_BN)
        loss_BST = loss_BN.new_zeros(samples, *mask_ST.shape)
        loss_BST[:, mask_ST] = loss_BN
        return loss_BST.sum(dim=2) / mask_ST.sum(dim=1)

    def _record(self, batch: dict[str, Tensor]) -> tuple[list[_Call], Tensor]:
        """What the model calls its layers with for a batch of items, and its losses."""
        calls, outputs, losses = self._watch(batch)
        doubled, _, _ = self._watch({name: torch.cat([tensor, tensor]) for name, tensor in batch.items()})
        recorded = []
        for i, ((args, kwargs), (more_args, more_kwargs)) in enumerate(zip(calls, doubled, strict=True)):
            added = _hidden(args, kwargs) - outputs[i - 1] if i else None
            is_added = added is not None and bool((added != 0).any())
            dims = (_grown(args, more_args), _grown(kwargs, more_kwargs))
            recorded.append(_Call(args, kwargs, dims, added if is_added else None))
        return recorded, losses

    def _find_live(self, batch: dict[str, Tensor]) -> dict[int, Tensor]:
        """For layers of which the answers need few positions only, those positions of the flattened batch.

        Where the loss has no gradient in a layer's output, the output does not matter. So it is with all but the keys
        and values of the last decoder layer.
        """
        _, _, gradients = self.taps.pass_through(batch)
        masks = {layer: (gradients[layer] != 0).any(dim=2).flatten() for layer in self.taps.last}
        return {layer: m.nonzero().squeeze(1) for layer, m in masks.items() if 2 * int(m.sum()) < m.numel()}

    def _watch(self, batch: dict[str, Tensor]) -> tuple[list[tuple[tuple, dict[str, Any]]], list[Tensor], Tensor]:
        """Arguments and outputs of the layers, and the losses."""
        calls: list[tuple[tuple, dict[str, Any]]] = []
        outputs: list[Tensor] = []

        def remember(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            calls.append((args, kwargs))
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handles = [layer.register_forward_hook(remember, with_kwargs=True) for layer in self.taps.layers]
        try:
            with torch.no_grad():
                losses = self.taps.vlm.losses(batch)
        finally:
            for handle in handles:
                handle.remove()
        return calls, outputs, losses


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def rule_scale(rule: StepRule, reading: Reading, layers: int) -> Tensor:
    """What the rule multiplies each sample's gradient by, [B]: one over its norm under unit_norm, else one."""
    if rule.name != "unit_norm":
        return torch.ones_like(reading.loss_B)
    square_B = sum(reading.weight_gradient(layer).square().sum((1, 2)) for layer in range(layers))
    return 1 / torch.as_tensor(square_B).sqrt().clamp(min=TINY)


def stepped_forward(
    linear: nn.Linear,
    reading: Reading,
    layer: int,
    size_B: Tensor,
    *,
    root: Tensor | None = None,
    live: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """The layer's forward for rows of B samples, each with its own weight: moved by a step of its size.

    `root` divides the gradient (Adam's denominators). `live`: the positions of a sample's rows that are needed; the
    output is zero at the others.
    """
    samples, outs, ins = len(size_B), linear.out_features, linear.in_features

    def forward(rows: Tensor) -> Tensor:
        row_BRI = rows.reshape(samples, -1, ins)
        if live is None:
            return compute(row_BRI).reshape(*rows.shape[:-1], outs)
        out_BRO = row_BRI.new_zeros(samples, row_BRI.shape[1], outs)
        out_BRO[:, live] = compute(row_BRI[:, live])
        return out_BRO.reshape(*rows.shape[:-1], outs)

    def compute(row_BRI: Tensor) -> Tensor:
        moved_BTO, input_BTI = -size_B[:, None, None] * reading.output_gradients[layer], reading.inputs[layer]
        if root is None and ins * outs >= row_BRI.shape[1] * (ins + outs):
            still_BRO = F.linear(row_BRI, linear.weight, linear.bias)
            return torch.baddbmm(still_BRO, row_BRI @ input_BTI.mT, moved_BTO)
        if root is None:
            weight_BOI = torch.baddbmm(linear.weight, moved_BTO.mT, input_BTI)
        else:
            weight_BOI = linear.weight + moved_BTO.mT @ input_BTI / root
        out_BRO = row_BRI @ weight_BOI.mT
        return out_BRO if linear.bias is None else out_BRO + linear.bias

    return forward


def _grown(once: Any, twice: Any) -> Any:
    """For each tensor the dimension that doubled, None where none did."""
    if isinstance(once, Tensor):
        return next((i for i, (a, b) in enumerate(zip(once.shape, twice.shape, strict=True)) if a != b), None)
    if isinstance(once, dict):
        return {name: _grown(value, twice[name]) for name, value in once.items()}
    if isinstance(once, tuple | list):
        return [_grown(a, b) for a, b in zip(once, twice, strict=True)]
    return None


def _repeated(values: Any, dims: Any, times: int) -> Any:
    if isinstance(values, Tensor):
        if dims is None or times == 1:
            return values
        shape = list(values.shape)
        return values.unsqueeze(dims).expand(*shape[:dims], times, *shape[dims:]).flatten(dims, dims + 1)
    if isinstance(values, dict):
        return {name: _repeated(value, dims[name], times) for name, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(_repeated(value, dim, times) for value, dim in zip(values, dims, strict=True))
    return values
