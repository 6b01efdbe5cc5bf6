"""Scores in, kept ids out.

Ranked by utility, inside each domain by default: kept globally, careful scores starve the very domain that matters
(DESIGN 2.3), and what share a domain gets is the mixture's job. Every sample leaves with a rank and a reason word, so
that what is dropped can be shown before it is dropped.

All ways of ranking are one: each sample has a place in its cell (its domain, or its stratum of answer lengths inside
the domain), `(rank in the cell - 1/2) / size of the cell`, between 0 and 1, and samples are taken in the order of
places. A cell of any size thus gives the same share of its samples, and a budget is the end of that one queue. Ties
go by a hash of domain and id: neither the alphabet nor the order of rows has a say, and running again gives the same.

Trap: the fraction counts places, not survivors. A toxic sample within the fraction is dropped and nobody moves up,
because the next one was not worth keeping either.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa

from datalloy.config import Select
from datalloy.diversity import apart, facility_location
from datalloy.errors import DataError
from datalloy.scores import Scores, read_table, write_table
from datalloy.strata import MAX_STRATA, length_strata
from datalloy.uncertainty import rank_agreement

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1

_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("rank", pa.int64(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Selection:
    """What is kept of a pool and why. N rows in the order of the scores; arrays are [N].

    `rank`: 1 is the best of its ranking group (the domain, or the pool), 0 for samples without a utility.
    `reason`: top_fraction for what is kept, or diverse where diversity chose; below_fraction, over_budget, toxic,
    redundant (within the fraction, but left out by diversity), or not_scored:STATE for the rest.
    """

    table: pa.Table
    metadata: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Selection":
        """The selection written at `path`, checksums verified. Raises DataError when it is anything else."""
        table, metadata = read_table(path, kind="selection", version=SCHEMA_VERSION)
        return cls(table, metadata)

    def write(self, path: Path) -> None:
        """Write Parquet at `path`, rows sorted by domain and id; the file appears complete or not at all."""
        write_table(path, self.table, kind="selection", version=SCHEMA_VERSION, metadata=self.metadata)

    def with_metadata(self, metadata: Mapping[str, Any]) -> "Selection":
        """The same rows with other metadata."""
        return Selection(self.table, dict(metadata))

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def id(self) -> np.ndarray:
        return self.table["id"].to_numpy()

    @property
    def domain(self) -> np.ndarray:
        return self.table["domain"].to_numpy()

    @property
    def rank(self) -> np.ndarray:
        return self.table["rank"].to_numpy()

    @property
    def kept(self) -> np.ndarray:
        return self.table["kept"].to_numpy()

    @property
    def reason(self) -> np.ndarray:
        return self.table["reason"].to_numpy()

    def kept_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Domains and ids of the kept samples, in row order."""
        return self.domain[self.kept], self.id[self.kept]

    def count_reasons(self) -> dict[str, int]:
        """How many samples have which reason, the commonest first."""
        return dict(Counter(self.reason).most_common())

    def counts(self) -> dict[str, dict[str, int]]:
        """How many samples have which reason, by domain."""
        return {domain: dict(Counter(self.reason[self.domain == domain])) for domain in sorted(set(self.domain))}


def select(
    scores: Scores,
    settings: Select,
    *,
    fraction: float,
    length_normalised: bool = False,
    cost_N: np.ndarray | None = None,
    direction_ND: np.ndarray | None = None,
) -> Selection:
    """Keep the top part of the scored samples.

    Args:
        fraction: share kept of each ranking group's scored samples, in (0, 1]: the recipe's, or the bake-off's answer
            where the recipe says auto. Exactly `round half up (fraction * n)` places of n, and at least one.
        length_normalised: rank within strata of answer length (`length_strata`), each giving the same share.
        cost_N: training FLOPs of each row, needed by `budget_flops` alone.
        direction_ND: unit vectors of the rows, needed by `diversity` alone.

    With `diversity` the fraction says how many are chosen in each ranking group, and of which samples the fraction and
    their similarity decide: facility_location takes as many as would be kept without it, threshold at most as many
    and never fills up with near-copies. A budget then takes the groups' choices in turn, in the order of choice.

    A budget of tokens or FLOPs ranks by utility per cost; utilities below zero have no such ratio and come last, by
    themselves. The queue is cut at the first sample that does not fit, even if a later, smaller one would: what is
    kept stays a prefix of the ranking. With `within: domain` all domains shrink alike. The fraction remains an upper
    bound, and toxic samples cost nothing.

    Raises DataError when a domain has no scored sample, or when nothing at all would be kept.
    """
    if not 0 < fraction <= 1:
        raise DataError(f"fraction is {fraction}, must be in (0, 1]; for 50 % write 0.5")
    _check_scores(scores)
    is_ok_N, tie_N = scores.is_ok, _tie_breakers(scores)
    is_toxic_N = toxic_mask(scores, settings.toxic_confidence) & settings.drop_toxic
    budget, cost_N = _budget(scores, settings, cost_N)
    group_N = np.zeros(len(scores), dtype=np.int64)
    if settings.within == "domain":
        group_N = np.unique(scores.domain, return_inverse=True)[1]
    cell_N = group_N
    if length_normalised:
        cell_N = group_N * MAX_STRATA
        cell_N[is_ok_N] += length_strata(scores.supervised_tokens[is_ok_N], group_N[is_ok_N])
    place_N = _places(_value_per_cost(scores, settings, cost_N), cell_N, tie_N, is_ok_N)
    queue = np.lexsort([tie_N, place_N])
    queue = queue[is_ok_N[queue]]
    rank_N, is_within_N = _ranks(queue, group_N, fraction)
    is_wanted_N, is_redundant_N = is_within_N & ~is_toxic_N, np.zeros(len(scores), bool)
    if settings.diversity != "off":
        queue, is_redundant_N = _diverse(settings, queue, group_N, is_wanted_N, is_toxic_N, place_N, direction_ND)
        is_wanted_N = np.isin(np.arange(len(scores)), queue)
    is_affordable_N = _affordable(queue, is_wanted_N, cost_N, budget)
    is_kept_N = is_wanted_N & is_affordable_N
    reason_N = np.select(
        [~is_ok_N, is_toxic_N, is_redundant_N, ~is_wanted_N, ~is_affordable_N],
        ["not_scored:" + scores.state, "toxic", "redundant", "below_fraction", "over_budget"],
        default="top_fraction" if settings.diversity == "off" else "diverse",
    )
    if not is_kept_N.any():
        raise DataError(_nothing_kept(reason_N))
    metadata = {
        "method": scores.metadata.get("method"),
        "fraction": float(fraction),
        "length_normalised": length_normalised,
        "select": settings.model_dump(mode="json"),
    }
    keys = {"id": scores.table["id"], "domain": scores.table["domain"]}
    table = pa.table({**keys, "rank": rank_N, "kept": is_kept_N, "reason": reason_N}, schema=_SCHEMA)
    log.info("kept %d of %d samples: %s", is_kept_N.sum(), len(scores), dict(Counter(reason_N)))
    for domain in sorted(set(scores.domain) - set(scores.domain[is_kept_N])):
        log.warning("nothing is kept of domain %s: %s", domain, dict(Counter(reason_N[scores.domain == domain])))
    return Selection(table, metadata)


def toxic_mask(scores: Scores, confidence: float) -> np.ndarray:
    """Samples that harm beyond their interval: `utility + z * utility_se < harm_below`, [N] bool.

    One-sided: z is the normal quantile of `confidence`, 1.645 at 0.95. `harm_below` of the metadata is at most zero:
    what clean samples do at the same step, where the scorer measured it, else zero. Never true where the scorer is
    not signed (random, loss, length: below zero means nothing there), nor where the error was not measured.
    """
    if not scores.is_signed:
        return np.zeros(len(scores), bool)
    if np.isnan(scores.utility_se[scores.is_ok]).all():
        log.warning("the scores have no standard errors, so no sample can be called toxic")
    margin_N = NormalDist().inv_cdf(confidence) * scores.utility_se
    return scores.utility + margin_N < scores.metadata.get("harm_below", 0.0)


def length_correlation(scores: Scores) -> float:
    """Spearman of utility with supervised tokens over the scored samples, in [-1, 1].

    Far from zero means that the ranking is partly one of answer length: mean loss favours short answers, sum loss
    long ones (DESIGN 2.1). 0 where all lengths or all utilities are equal.
    """
    length_N, utility_N = scores.supervised_tokens[scores.is_ok], scores.utility[scores.is_ok]
    if len(set(length_N)) < 2 or len(set(utility_N)) < 2:
        return 0.0
    return rank_agreement(length_N, utility_N)


def kept_count(fraction: float, samples: int) -> int:
    """How many places `fraction` gives of so many samples: rounded half up in decimal, at least 1 of a non-empty group.

    In decimal because 0.29 * 50 is 14.499999999999998 in binary and the user meant 14.5.
    """
    exact = Decimal(repr(float(fraction))) * samples
    return min(samples, max(1, int(exact.to_integral_value(ROUND_HALF_UP))))


def _check_scores(scores: Scores) -> None:
    if not len(scores):
        raise DataError("there are no scores to select from")
    for domain in sorted(set(scores.domain) - set(scores.domain[scores.is_ok])):
        states = dict(Counter(scores.state[scores.domain == domain]))
        raise DataError(
            f"domain {domain!r:.200} has no scored sample to select from: its rows are {states}; "
            "mend its data, score it again, or take it out of the recipe"
        )
    if len(scores) > 1 and len(set(scores.utility[scores.is_ok])) == 1:
        log.warning("all %d utilities are equal: what is kept is drawn by a hash of the ids", scores.is_ok.sum())


def _budget(scores: Scores, settings: Select, cost_N: np.ndarray | None) -> tuple[float, np.ndarray]:
    """What may be spent, and what each row costs in the same unit. Without a budget, samples without limit."""
    if settings.budget_tokens is not None:
        return settings.budget_tokens, _checked_costs(scores, scores.length_tokens)
    if settings.budget_flops is None:
        return settings.budget_samples or np.inf, np.ones(len(scores))
    if cost_N is None:
        raise DataError("select.budget_flops needs the training FLOPs of every sample (cost_N), none were given")
    return settings.budget_flops, _checked_costs(scores, cost_N)


def _checked_costs(scores: Scores, cost_N: np.ndarray) -> np.ndarray:
    if len(cost_N) != len(scores):
        raise DataError(f"{len(cost_N)} costs for {len(scores)} scored rows; every row needs one, in the same order")
    for row in np.flatnonzero(scores.is_ok & ~(np.isfinite(cost_N) & (cost_N > 0))):
        raise DataError(
            f"sample {scores.id[row]!r:.200} of domain {scores.domain[row]!r:.200} costs {cost_N[row]}; "
            "under a budget every scored sample needs a finite cost above zero"
        )
    return cost_N


def _value_per_cost(scores: Scores, settings: Select, cost_N: np.ndarray) -> np.ndarray:
    """What samples are ranked by. Utilities below zero are not divided: dear ones would look less harmful."""
    if settings.budget_tokens is None and settings.budget_flops is None:
        return scores.utility
    value_N = scores.utility.copy()
    helps_N = scores.utility > 0
    value_N[helps_N] /= cost_N[helps_N]
    return value_N


def _tie_breakers(scores: Scores) -> np.ndarray:
    """A number drawn from domain and id, the same in every run and every order of rows, [N] uint64."""
    digests = (hashlib.sha256(f"{d}\0{i}".encode()).digest() for d, i in zip(scores.domain, scores.id, strict=True))
    return np.fromiter((int.from_bytes(digest[:8]) for digest in digests), dtype=np.uint64, count=len(scores))


def _places(value_N: np.ndarray, cell_N: np.ndarray, tie_N: np.ndarray, is_ok_N: np.ndarray) -> np.ndarray:
    """Place of each scored sample in its cell, best first, in (0, 1); NaN for the others."""
    place_N = np.full(len(value_N), np.nan)
    for cell in np.unique(cell_N[is_ok_N]):
        rows = np.flatnonzero(is_ok_N & (cell_N == cell))
        best_first = rows[np.lexsort([tie_N[rows], -value_N[rows]])]
        place_N[best_first] = (np.arange(len(rows)) + 0.5) / len(rows)
    return place_N


def _ranks(queue: np.ndarray, group_N: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each queued sample in its group, from 1, and whether it is within the fraction."""
    rank_N, is_within_N = np.zeros(len(group_N), dtype=np.int64), np.zeros(len(group_N), bool)
    for group in np.unique(group_N):
        rows = queue[group_N[queue] == group]
        rank_N[rows] = np.arange(1, len(rows) + 1)
        is_within_N[rows[: kept_count(fraction, len(rows))]] = True
    return rank_N, is_within_N


def _diverse(
    settings: Select,
    queue: np.ndarray,
    group_N: np.ndarray,
    is_wanted_N: np.ndarray,
    is_toxic_N: np.ndarray,
    place_N: np.ndarray,
    direction_ND: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that diversity chooses, as a queue that takes the groups in turn, and which it left out, [N].

    Chosen among all that is not toxic, as many in each group as the ranking alone would keep of it.
    """
    if direction_ND is None or len(direction_ND) != len(group_N):
        found = "none" if direction_ND is None else len(direction_ND)
        raise DataError(f"select.diversity needs the direction of every row, {len(group_N)} in all; given: {found}")
    turn_N, is_redundant_N = np.full(len(group_N), np.nan), np.zeros(len(group_N), bool)
    for group in np.unique(group_N):
        rows = queue[(group_N[queue] == group) & ~is_toxic_N[queue]]
        count = int(is_wanted_N[rows].sum())
        if settings.diversity == "threshold":
            taken, passed = apart(direction_ND[rows], count, max_similarity=settings.max_similarity)
            is_redundant_N[rows[passed]] = True
        else:
            weight = settings.diversity_weight
            taken = facility_location(direction_ND[rows], 1 - place_N[rows], count, diversity_weight=weight)
            left_out = np.setdiff1d(rows, rows[taken])
            is_redundant_N[left_out] = is_wanted_N[left_out]
        turn_N[rows[taken]] = (np.arange(len(taken)) + 0.5) / len(rows)
    order = queue[np.argsort(turn_N[queue], kind="stable")]
    return order[np.isfinite(turn_N[order])], is_redundant_N


def _affordable(queue: np.ndarray, is_wanted_N: np.ndarray, cost_N: np.ndarray, budget: float) -> np.ndarray:
    """Which of the wanted samples fit in the budget when they are taken in order until one does not fit."""
    rows = queue[is_wanted_N[queue]]
    is_affordable_N = np.zeros(len(is_wanted_N), bool)
    is_affordable_N[rows[np.cumsum(cost_N[rows]) <= budget]] = True
    return is_affordable_N


def _nothing_kept(reason_N: np.ndarray) -> str:
    counts = dict(Counter(reason_N))
    advice = []
    if "toxic" in counts:
        advice.append(
            "every utility below zero usually means a step that is too large or a target unlike the pool: "
            "look at the targets, lower score.step, or set select.drop_toxic: false"
        )
    if "over_budget" in counts:
        advice.append("the budget is below the cost of the first sample: raise it")
    return f"nothing is kept of {len(reason_N)} samples: {counts}; {'; '.join(advice)}"
