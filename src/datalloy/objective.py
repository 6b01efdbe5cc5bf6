"""Values of targets in, what the user wants of them out: one score a mixture, and whether it may be taken at all.

Values are higher-is-better everywhere; a loss enters negated. Four wishes: the mean over targets, a weighted mean, the
lowest target, and the Pareto front, which keeps every mixture that no other beats everywhere and recommends by weights.
Guard rails are apart from the wish: a target may fall below the base by so much and no further, whatever is won
elsewhere.

Traps: a mean over metrics of different scales is ruled by the one that moves most, and the lowest of an accuracy and a
negated loss is always the loss. Guard rails are checked on the values given; those of a surrogate may be off.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from datalloy.errors import RecipeError

Kind = Literal["mean", "weighted", "worst", "pareto"]

TOLERANCE = 1e-9  # of sums of weights, and of values at a guard rail: 0.7 - 0.1 is not 0.6 in floating point


@dataclass(frozen=True)
class Objective:
    """What is wanted of the values of G targets.

    Args:
        weight_G: not negative, sums to one; used by `weighted`, and by `pareto` to recommend one mixture of the front.
        base_G: values of the base model.
        max_fall_G: how far each target may fall below the base, not negative, in its value's unit; inf: any fall.

    Raises RecipeError for another kind, for arrays of different lengths and for numbers outside these ranges.
    """

    kind: Kind
    weight_G: np.ndarray
    base_G: np.ndarray
    max_fall_G: np.ndarray

    def __post_init__(self) -> None:
        for name in ("weight_G", "base_G", "max_fall_G"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=float))
        if self.kind not in get_args(Kind):
            raise RecipeError(f"mixture.objective is one of {', '.join(get_args(Kind))}, found {self.kind!r}")
        shapes = {self.weight_G.shape, self.base_G.shape, self.max_fall_G.shape}
        if len(shapes) > 1 or self.weight_G.ndim != 1 or len(self.weight_G) == 0:
            raise RecipeError(
                "an objective needs one weight, one base value and one largest fall for each target, found arrays of "
                f"{self.weight_G.shape}, {self.base_G.shape} and {self.max_fall_G.shape}"
            )
        if not (self.weight_G >= 0).all() or abs(self.weight_G.sum() - 1) > TOLERANCE:
            raise RecipeError(f"weights of targets must not be negative and must sum to one, found {self.weight_G}")
        if not (self.max_fall_G >= 0).all():
            raise RecipeError(f"guard rails say how far a target may fall, zero or more, found {self.max_fall_G}")
        if not np.isfinite(self.base_G[np.isfinite(self.max_fall_G)]).all():
            raise RecipeError(f"a guard rail needs a finite value of the base model, found {self.base_G}")

    def score(self, value_MG: np.ndarray) -> np.ndarray:
        """[M] scores of M mixtures, higher is better; any further leading axes are kept."""
        if self.kind == "mean":
            return value_MG.mean(axis=-1)
        if self.kind == "worst":
            return value_MG.min(axis=-1)
        return value_MG @ self.weight_G

    def allowed(self, value_MG: np.ndarray) -> np.ndarray:
        """[M] whether no target of a mixture falls through its guard rail; any further leading axes are kept."""
        return np.all(value_MG >= self.lowest_G - TOLERANCE, axis=-1)

    @property
    def lowest_G(self) -> np.ndarray:
        """The values at the guard rails; minus infinity where there is none."""
        return np.where(np.isfinite(self.max_fall_G), self.base_G - self.max_fall_G, -np.inf)


def pareto_front(value_MG: np.ndarray) -> np.ndarray:
    """[M] whether no other mixture is at least as good for every target and better for one. Equal rows all stay."""
    no_worse_MM = (value_MG[:, None] >= value_MG[None]).all(axis=2)
    better_MM = (value_MG[:, None] > value_MG[None]).any(axis=2)
    return ~np.any(no_worse_MM & better_MM, axis=0)
