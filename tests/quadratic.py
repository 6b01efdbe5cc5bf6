"""A model whose steps can be worked out by hand: the loss of a point (x, y) is (w . x - y)^2 / 2.

It has what scorers use of a VLM and nothing else. Gradient of a point's loss: (w . x - y) x.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from datalloy.scorers.one_step import ExactScorer, OneStepScorer
from datalloy.scorers.step import Steppable, StepRule
from datalloy.target_items import TargetItems

SGD = StepRule("sgd")


class Point(NamedTuple):
    """A sample. `length` decides where it stands in a layout."""

    x: tuple[float, ...]
    y: float
    length: int = 1


class Quadratic:
    name = "quadratic"
    device = torch.device("cpu")

    def __init__(self, *weights: float) -> None:
        self.weight = torch.nn.Parameter(torch.tensor(weights))

    def collate(self, points: Sequence[Point]) -> dict[str, Tensor]:
        return {"x": torch.tensor([p.x for p in points]), "y": torch.tensor([p.y for p in points])}

    def losses(self, batch: dict[str, Tensor], *, dtype: torch.dtype = torch.float32) -> Tensor:
        return ((batch["x"] @ self.weight - batch["y"]) ** 2 / 2).to(dtype)

    def reusing(self, vision: None, batch: dict[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """It looks at no picture."""
        return contextlib.nullcontext(vision)

    def scorer(self, *targets: Sequence[Point], rule: StepRule = SGD, step: float = 1.0) -> OneStepScorer:
        """Exact utility for targets of equal weight."""
        named = {str(g): points for g, points in enumerate(targets)}
        items = TargetItems.lay_out(self, named, dict.fromkeys(named, 1.0))
        return ExactScorer(self, items, Steppable([self.weight]), rule=rule, step=step)
