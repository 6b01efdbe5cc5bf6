"""A trained model in, what it makes of the held-out questions out: columns that every row of results has."""

from dataclasses import dataclass
from typing import Any

from datalloy.evaluation import MetricItems
from datalloy.vlm import VLM
from datalloy.workflows import Workflow


@dataclass(frozen=True)
class HeldOut:
    """The questions of all evaluation sets, laid out once for many models."""

    _marks: MetricItems
    _probabilities: MetricItems

    @classmethod
    def lay_out(cls, work: Workflow) -> "HeldOut":
        sets, settings = work.evaluation, work.recipe.evaluate
        return cls(
            *(
                MetricItems.lay_out(work._base, sets, dict.fromkeys(sets, metric), settings, blocks=1)
                for metric in ("exact_match", "answer_probability")
            )
        )

    def measure(self, vlm: VLM) -> dict[str, Any]:
        """Share of right answers, mean probability of the right answer, and right (1) or wrong (0) by question."""
        right_V = self._marks.values(vlm)
        return {
            "accuracy": float(right_V.mean()),
            "probability": float(self._probabilities.values(vlm).mean()),
            "right": "".join(str(int(value)) for value in right_V),
        }
