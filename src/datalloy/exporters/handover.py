"""What a finished run says to train on, and with what settings: the one thing that every exporter is given.

**Exact** (the default): each row as often as the training sees it. Counts are then what the mixture says, whatever the
trainer does with shares. A mixture's rows lie in the order of training, in one file, and trainers are told to keep it.
**Native**: every row once, and the shares in the trainer's own syntax. Files are smaller and shares can be edited, but
most trainers draw at random or cut at the smallest set, so that counts drift; each exporter writes down by how much.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from datalloy.config import Train
from datalloy.errors import RecipeError
from datalloy.exporters.rows import by_domain
from datalloy.sample import Sample


@dataclass(frozen=True)
class Portion:
    """A set of rows with a share of its own: a domain, or a score bucket of one."""

    name: str
    samples: Sequence[Sample]
    count: int

    @property
    def passes(self) -> float:
        """How often each of its rows is seen on average."""
        return self.count / len(self.samples)


@dataclass(frozen=True)
class Handover:
    """A run's training set and settings.

    Args:
        base: the model to be tuned, a folder or a hub id.
        steps: optimiser steps of the final training, `train.batch_size` samples each.
        samples: what is trained on, with repetitions.
        portions: the same by domain or bucket, every row once, with the counts that `samples` has of them.
        native: write shares, not repetitions.
        is_schedule: `samples` lie in the order they are to be seen in; otherwise it is the trainer's to shuffle them.
    """

    name: str
    base: str
    train: Train
    steps: int
    samples: Sequence[Sample]
    portions: Sequence[Portion]
    native: bool = False
    is_schedule: bool = False

    @property
    def keeps_order(self) -> bool:
        """Whether the trainer is to take the rows as they lie."""
        return self.is_schedule and not self.native

    def sets(self) -> dict[str, Sequence[Sample]]:
        """The rows of each file: one file in the order of training, or by domain or portion."""
        return {"train": self.samples} if self.keeps_order else self._by_name()

    @property
    def rows_in_words(self) -> str:
        """How many rows are written, by portion for native shares, else by domain."""
        return ", ".join(f"{name} {len(samples)}" for name, samples in self._by_name().items())

    def _by_name(self) -> dict[str, Sequence[Sample]]:
        if self.native:
            return {portion.name: portion.samples for portion in self.portions}
        return by_domain(self.samples)

    @property
    def shares(self) -> Mapping[str, float]:
        total = sum(portion.count for portion in self.portions)
        return {portion.name: portion.count / total for portion in self.portions}

    @property
    def drawn_drift(self) -> Mapping[str, float]:
        """Standard deviation of each portion's count where a trainer draws rows by share: sqrt(n w (1 - w))."""
        seen = self.steps * self.train.batch_size
        return {name: math.sqrt(seen * share * (1 - share)) for name, share in self.shares.items()}

    @property
    def warmup_steps(self) -> int:
        """In steps, because transformers 5 no longer knows a ratio."""
        return round(self.train.warmup_ratio * self.steps)

    def refuse_native(self, trainer: str, why: str) -> None:
        """Raises RecipeError where native shares are asked of a trainer that has none."""
        if self.native:
            raise RecipeError(f"{trainer} {why}; use weights: exact")


def batch_split(train: Train) -> tuple[int, int]:
    """Samples per forward pass, and passes per step, of one device; their product is the batch size.

    One sample a pass where the recipe says nothing: it fits wherever anything does. A micro-batch that does not divide
    the batch is lowered to the next size that does.
    """
    micro = min(train.micro_batch_size or 1, train.batch_size)
    while train.batch_size % micro:
        micro -= 1
    return micro, train.batch_size // micro


def unique_ids(samples: Sequence[Sample]) -> Iterator[str]:
    """An id for each row: the sample's own, and `ID-2`, `ID-3` ... where it stands again, as readers number copies."""
    used = {sample.id for sample in samples}
    times: Counter[str] = Counter()
    for sample in samples:
        times[sample.id] += 1
        if times[sample.id] == 1:
            yield sample.id
            continue
        while (candidate := f"{sample.id}-{times[sample.id]}") in used:
            times[sample.id] += 1
        used.add(candidate)
        yield candidate
