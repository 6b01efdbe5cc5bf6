"""Target items in, a function that measures their losses again after a step on the last decoder layers out.

A step that touches only the last layers leaves everything below them as it was: the targets' hidden states at the
entrance of the tail are computed once, and each candidate pays the tail alone, and the head alone on answer
positions. In the prototype the tail step kept nearly all of the exact ranking (DESIGN 2.3).

The tail is replayed by calling the model's own layers with the arguments that the model called them with, so it
needs no knowledge of the family; a family whose forward does more between its layers (additive visual features,
say) is noticed because the replay does not give the model's own losses, and refused.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datalloy.errors import ModelError
from datalloy.scorers.one_step import OneStepScorer
from datalloy.scorers.step import Steppable, StepRule
from datalloy.target_items import TargetItems
from datalloy.vlm import VLM

REPLAY_TOLERANCE = 1e-3  # nats; rounding gives 1e-6, a wrong replay tenths


class TailReplay:
    """The last `depth` decoder layers on cached hidden states of the target items."""

    def __init__(self, vlm: VLM, items: TargetItems, depth: int) -> None:
        layers = vlm.decoder_layers()
        if not 1 <= depth <= len(layers):
            raise ModelError(f"score.tail_layers is {depth}, {vlm.name} has {len(layers)} decoder layers")
        self.items = items
        self.layers = list(layers[-depth:])
        self.norm, self.head = vlm.final_norm(), vlm.output_head()
        self._calls, self._supervised, direct = [], [], []
        for _, batch in items.batches:
            calls, losses = self._record(vlm, batch)
            self._calls.append(calls)
            shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
            self._supervised.append((shifted != -100, shifted))
            direct.append(losses)
        error = np.abs(self.losses() - items.gather(direct)).max()
        if not error < REPLAY_TOLERANCE:
            raise ModelError(
                f"the last {depth} decoder layers of {vlm.name} cannot be replayed alone (losses differ by {error:.2g} "
                "nats): the family does more between its layers; use score.method exact or calibrated"
            )

    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers for p in layer.parameters()]

    def losses(self) -> np.ndarray:
        """Loss of every target item with the tail's weights as they are now, [V], nats per token."""
        with torch.no_grad():
            return self.items.gather([self._replay(i) for i in range(len(self._calls))])

    def _record(self, vlm: VLM, batch: dict[str, Tensor]) -> tuple[list[tuple[tuple, dict[str, Any]]], Tensor]:
        calls: list[tuple[tuple, dict[str, Any]]] = []

        def remember(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))

        handles = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in self.layers]
        try:
            with torch.no_grad():
                losses = vlm.losses(batch)
        finally:
            for handle in handles:
                handle.remove()
        return calls, losses

    def _replay(self, index: int) -> Tensor:
        hidden: Any = None
        for layer, (args, kwargs) in zip(self.layers, self._calls[index], strict=True):
            if hidden is None:
                output = layer(*args, **kwargs)
            elif args:
                output = layer(hidden, *args[1:], **kwargs)
            else:
                output = layer(**{**kwargs, "hidden_states": hidden})
            hidden = output[0] if isinstance(output, tuple) else output
        mask, labels = self._supervised[index]
        logits = self.head(self.norm(hidden[mask])).float()
        token_losses = F.cross_entropy(logits, labels[mask], reduction="none")
        # not index_add_, whose sums on CUDA come in an order of their own each time
        token_losses_BT = token_losses.new_zeros(mask.shape).masked_scatter(mask, token_losses)
        return token_losses_BT.sum(1) / mask.sum(1)


def tail_scorer(vlm: VLM, replay: TailReplay, steppable: Steppable, *, rule: StepRule, step: float) -> OneStepScorer:
    """Finite-step utility of a step that touches only the last decoder layers."""
    return OneStepScorer(vlm, replay.items, steppable, replay.losses, rule=rule, step=step)
