"""A verdict on a mixture in, what is done with it out: `mixture.json`, exact samples to train on, the search's table.

A recommendation in shares is applied wrongly in many ways: sampled by chance, cut off at the smallest domain, repeated
in one fixed order. So it is turned into samples here, once: exact counts by largest remainders, and each domain's
samples in an order drawn from the seed and their own keys, so that neither files nor their order matter. A domain that
is smaller than its share is passed through again, in a new order, only after every one of its samples was used: none
is taken twice more often than another. The domains are interleaved evenly, so that any stretch of the list has the
mixture's shares, as far as whole samples can. Training keeps the order: shuffled, a sample may come twice before
another comes once, and a batch has its shares by chance.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pydantic

from datalloy.errors import DataError
from datalloy.run import write_json
from datalloy.scores import read_table, write_table
from datalloy.simplex import largest_remainder
from datalloy.uncertainty import Interval
from datalloy.verdict import Agreement, Decision, Gain, Verdict

SCHEMA_VERSION = 2
CANDIDATES_VERSION = 1
WEIGHT_PREFIX, VALUE_PREFIX, ERROR_PREFIX = "w:", "value:", "se:"
SUM_TOLERANCE = 1e-6

Id = TypeVar("Id", str, int)


@dataclass(frozen=True)
class Spent:
    """What the recommendation cost: slope calls and evaluations of merged models, real runs with those that confirm."""

    slope_calls: int
    evaluations: int
    runs: int


@dataclass(frozen=True)
class Mixture:
    """The recommended shares of the domains, what is expected of them, and whether to trust that.

    Args:
        weights: shares to train on by domain, summing to one: what was found best, or uniform if that is the verdict.
        searched: the shares that were found best, and that the verdict is about.
        interval: where each searched share could as well lie.
        objective, metric: what was searched for, in the recipe's words.
        judged_by: what gains are measured in: the metric, or `marks and probability`, half each, where the search was
            by probability.
        expected_gain_vs_uniform, expected_gain_vs_size_proportional: of training on it, at `confidence`.
        merge_score: objective of the merged model where the verdict is to deploy that, else None.

    Raises DataError for weights that are no mixture, or intervals of other domains.
    """

    weights: Mapping[str, float]
    searched: Mapping[str, float]
    interval: Mapping[str, Interval]
    objective: str
    metric: str
    judged_by: str
    confidence: float
    expected_gain_vs_uniform: Gain
    expected_gain_vs_size_proportional: Gain
    trusted: bool
    verdict: Decision
    reason: str
    agreement: Agreement
    merge_score: float | None
    spent: Spent

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    def __post_init__(self) -> None:
        _check_weights(self.weights)
        _check_weights(self.searched)
        if not self.weights.keys() == self.searched.keys() == self.interval.keys():
            raise DataError(
                f"weights are of {sorted(self.weights)}, searched shares of {sorted(self.searched)}, intervals of "
                f"{sorted(self.interval)}; they must be of the same domains"
            )

    @classmethod
    def judged(
        cls,
        weights: Mapping[str, float],
        interval: Mapping[str, Interval],
        verdict: Verdict,
        *,
        searched: Mapping[str, float],
        objective: str,
        metric: str,
        judged_by: str,
        spent: Spent,
    ) -> "Mixture":
        """The mixture to train on after the verdict on the `searched` one."""
        return cls(
            weights=weights,
            searched=searched,
            interval=interval,
            objective=objective,
            metric=metric,
            judged_by=judged_by,
            confidence=verdict.confidence,
            expected_gain_vs_uniform=verdict.gain_vs_uniform,
            expected_gain_vs_size_proportional=verdict.gain_vs_size_proportional,
            trusted=verdict.trusted,
            verdict=verdict.verdict,
            reason=verdict.reason,
            agreement=verdict.agreement,
            merge_score=verdict.merge_score,
            spent=spent,
        )

    @classmethod
    def read(cls, path: Path) -> "Mixture":
        """The mixture written at `path`. Raises DataError when it is anything else."""
        try:
            about = json.loads(path.read_bytes())
            version = about.pop("schema_version")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} cannot be read as a mixture: {error}; make it again") from error
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {version}, this Datalloy reads version {SCHEMA_VERSION}; make it again"
            )
        try:
            return _JSON.validate_json(json.dumps(about))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{path} is no mixture of Datalloy: {where or 'weights'}: {first['msg']}") from error

    def write(self, path: Path) -> None:
        """Write JSON at `path`; the file appears complete or not at all."""
        write_json(path, {"schema_version": SCHEMA_VERSION, **self.to_json()})

    def to_json(self) -> dict[str, Any]:
        """Plain data, as in `mixture.json`."""
        return _JSON.dump_python(self, mode="json")


_JSON = pydantic.TypeAdapter(Mixture)


# --- shares into samples ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DomainShare:
    """What a mixture takes of one domain: `count` samples of `available` ones, so many passes through them."""

    domain: str
    weight: float
    count: int
    available: int

    @property
    def passes(self) -> float:
        """How often each sample is used on average; above 1, samples repeat."""
        return self.count / self.available if self.available else 0.0


def plan_shares(weights: Mapping[str, float], available: Mapping[str, int], total: int) -> tuple[DomainShare, ...]:
    """Exact counts that sum to `total`, by domain in the order of their names.

    Raises DataError for weights that are no mixture, a domain with weight but without samples, and a domain that is
    not known.
    """
    _check_weights(weights)
    if total < 1:
        raise DataError(f"a mixture of {total} samples cannot be trained on; at least 1 is needed")
    names = sorted(weights)
    for name in names:
        if weights[name] > 0 and not available.get(name):
            known = ", ".join(sorted(domain for domain, count in available.items() if count)) or "none"
            raise DataError(
                f"domain {name} has a weight of {weights[name]:.4g} and no sample; domains with samples: {known}. "
                "Give it samples or search again without it"
            )
    counts = largest_remainder(np.array([weights[name] for name in names]), total)
    return tuple(
        DomainShare(name, float(weights[name]), int(count), available.get(name, 0))
        for name, count in zip(names, counts, strict=True)
    )


def materialise(
    weights: Mapping[str, float],
    ids_by_domain: Mapping[str, Sequence[Id]],
    total: int,
    seed: int,
    order_seed: int | None = None,
) -> list[tuple[str, Id]]:
    """The `total` samples to train on, as pairs of domain and id, in order and with repetitions.

    Ids are unique in their domain; where they are content hashes, neither names nor files matter. Each id of a domain
    comes `floor(passes)` or `ceil(passes)` times. `seed` draws which; `order_seed`, by default the same, in which order
    the samples of a pass come: the same samples can so be trained on in several orders. Raises DataError as
    `plan_shares` does, and for an id given twice.
    """
    shares = plan_shares(weights, {name: len(ids) for name, ids in ids_by_domain.items()}, total)
    order_seed = seed if order_seed is None else order_seed
    placed = [
        ((position + 0.5) / share.count, share.domain, id)
        for share in shares
        for position, id in enumerate(_take(share, ids_by_domain.get(share.domain, ()), seed, order_seed))
    ]
    return [(domain, id) for _, domain, id in sorted(placed, key=lambda row: row[:2])]


def _take(share: DomainShare, ids: Sequence[Id], seed: int, order_seed: int) -> list[Id]:
    """So many ids as the share asks for: pass after pass, each in an order of its own."""
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise DataError(
            f"sample {twice!r:.200} of domain {share.domain} is listed twice; an id is unique in its domain"
        )
    taken: list[Id] = []
    for turn in range(math.ceil(share.passes)):
        drawn = sorted(ids, key=partial(_draw, seed, share.domain, turn))[: share.count - len(taken)]
        taken += drawn if order_seed == seed else sorted(drawn, key=partial(_draw, order_seed, share.domain, turn))
    return taken


def _draw(seed: int, domain: str, turn: int, id: str | int) -> bytes:
    return hashlib.sha256(json.dumps([seed, domain, turn, id]).encode()).digest()


def _check_weights(weights: Mapping[str, float]) -> None:
    values = np.array(list(weights.values()), dtype=float)
    if not np.isfinite(values).all() or (values < 0).any() or abs(values.sum() - 1) > SUM_TOLERANCE:
        raise DataError(f"weights must be shares, none negative, that add up to one; found {dict(weights)}")


# --- the search's table ----------------------------------------------------------------------------------------------


class Candidate(Protocol):
    """A mixture that was evaluated by merging, in one stage of the search."""

    @property
    def stage(self) -> str: ...
    @property
    def weight_K(self) -> np.ndarray: ...
    @property
    def value_G(self) -> np.ndarray:
        """Mean by target, higher is better (a loss negated)."""
        ...

    @property
    def se_G(self) -> np.ndarray:
        """Standard error of `value_G`; NaN where it was not measured."""
        ...

    @property
    def items(self) -> int:
        """How many items were used."""
        ...


@dataclass(frozen=True)
class Evaluated:
    """A candidate as it is read back."""

    stage: str
    weight_K: np.ndarray
    value_G: np.ndarray
    se_G: np.ndarray
    items: int


def write_candidates(path: Path, names: Sequence[str], targets: Sequence[str], rows: Sequence[Candidate]) -> None:
    """Write `candidates.parquet`: one row a candidate and stage, in the order given.

    Columns: `candidate` (its number), `stage`, `w:DOMAIN` for each of `names`, `value:TARGET` and `se:TARGET` for each
    of `targets`, `items`.
    """
    columns = {
        "candidate": pa.array(range(len(rows)), pa.int64()),
        "stage": pa.array([row.stage for row in rows], pa.string()),
        **_columns(WEIGHT_PREFIX, names, [row.weight_K for row in rows]),
        **_columns(VALUE_PREFIX, targets, [row.value_G for row in rows]),
        **_columns(ERROR_PREFIX, targets, [row.se_G for row in rows]),
        "items": pa.array([row.items for row in rows], pa.int64()),
    }
    write_table(
        path, pa.table(columns), kind="candidates", version=CANDIDATES_VERSION, metadata={}, order=("candidate",)
    )


def read_candidates(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], list[Evaluated]]:
    """Names of the domains, names of the targets, and the rows. Raises DataError as `read_table` does."""
    table, _ = read_table(path, kind="candidates", version=CANDIDATES_VERSION)
    names, weight_NK = _matrix(table, WEIGHT_PREFIX)
    targets, value_NG = _matrix(table, VALUE_PREFIX)
    _, se_NG = _matrix(table, ERROR_PREFIX)
    stages, items = table["stage"].to_pylist(), table["items"].to_pylist()
    return names, targets, [Evaluated(*row) for row in zip(stages, weight_NK, value_NG, se_NG, items, strict=True)]


def _columns(prefix: str, names: Sequence[str], rows: Sequence[np.ndarray]) -> dict[str, pa.Array]:
    matrix = np.array(rows, dtype=np.float64).reshape(len(rows), len(names))
    return {prefix + name: pa.array(column, from_pandas=True) for name, column in zip(names, matrix.T, strict=True)}


def _matrix(table: pa.Table, prefix: str) -> tuple[tuple[str, ...], np.ndarray]:
    columns = [name for name in table.column_names if name.startswith(prefix)]
    matrix = np.array([table[name].to_numpy() for name in columns]).reshape(len(columns), len(table)).T
    return tuple(name.removeprefix(prefix) for name in columns), matrix
