"""`scores.parquet` and `selection.parquet` in, the rows of one screen out.

All columns but the target items' contributions are held in memory. Numbers are numpy arrays, texts stay in Arrow. The
order by a column is made once, when it is first asked for; a filter is one pass over the columns it names; the rows
that a query finds are kept for its further pages. Turning a page therefore touches the rows of that page and no more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field

from datalloy.errors import DataError, RunError
from datalloy.scores import CONTRIBUTIONS, TARGET_PREFIX, read_table
from datalloy.scores import SCHEMA_VERSION as SCORES_VERSION
from datalloy.selection import SCHEMA_VERSION as SELECTION_VERSION
from datalloy.uncertainty import rank_agreement

MAX_PAGE = 200
BINS = 48
OUTER = (0.01, 0.99)  # quantiles between which numbers are drawn; the rest goes into the outermost bins
REMEMBERED = 8  # queries whose rows are kept
ABSENT = -1

Decision = Literal["kept", "dropped", "overruled", "differs"]


class Query(BaseModel):
    """Which rows, in which order. What is left out does not restrict."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    domain: str | None = None
    state: str | None = None
    reason: str | None = None
    decision: Decision | None = Field(None, description="differs: from the other run's decision.")
    by: str = Field("utility", description="The number that least and most refer to.")
    least: float | None = None
    most: float | None = None
    text: str = ""
    sort: str = "utility"
    descending: bool = True


class Search(Protocol):
    """What finds the rows that contain a text; the same object finds the same rows."""

    def __hash__(self) -> int: ...

    def search(self, text: str) -> np.ndarray:
        """Numbers of the rows whose id or conversation contains the text, whatever its case."""
        ...


@dataclass(frozen=True)
class Found:
    """Numbers of rows in the order asked for, and how many of them are kept."""

    rows: np.ndarray
    kept: int


class RunTable:
    """The N samples of one run, sorted by domain and id. `overruled_N`: 1 keep, 0 drop, -1 neither.

    Raises RunError where the folder holds no selection, DataError where its files are damaged or do not match.
    """

    def __init__(self, folder: Path, other: "RunTable | None" = None) -> None:
        for name in ("scores.parquet", "selection.parquet"):
            if not (folder / name).exists():
                raise RunError(f"{folder} has no {name}; `datalloy select RECIPE --run {folder}` makes it")
        self.folder, self.other = folder, other
        self.scores, self.scores_metadata = read_table(
            folder / "scores.parquet", kind="scores", version=SCORES_VERSION, without=(CONTRIBUTIONS,)
        )
        self.selection, self.selection_metadata = read_table(
            folder / "selection.parquet", kind="selection", version=SELECTION_VERSION
        )
        for column in ("domain", "id"):
            if not self.scores[column].equals(self.selection[column]):
                raise DataError(
                    f"{folder}: scores.parquet and selection.parquet list different samples; "
                    f"`datalloy select RECIPE --run {folder}` makes the selection anew"
                )
        self.overruled_N = np.full(len(self), ABSENT, dtype=np.int8)
        self.version = 0
        self._found = lru_cache(maxsize=REMEMBERED)(self._find)
        self._order = lru_cache(maxsize=None)(self._make_order)

    def __len__(self) -> int:
        return self.scores.num_rows

    @property
    def targets(self) -> tuple[str, ...]:
        names = self.scores.column_names
        return tuple(name.removeprefix(TARGET_PREFIX) for name in names if name.startswith(TARGET_PREFIX))

    @cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        """Every column that has a range, [N] each; a missing number is NaN."""
        names = ["utility", *(TARGET_PREFIX + target for target in self.targets), "utility_se", "loss"]
        columns = {name: self.scores[name].to_numpy() for name in names}
        columns |= {name: self.scores[name].to_numpy() for name in ("supervised_tokens", "length_tokens")}
        columns["rank"] = self.selection["rank"].to_numpy()
        if self.other is not None:
            there_N = self.position_in_other_N >= 0
            other_N = np.full(len(self), np.nan)
            other_N[there_N] = self.other.numbers["utility"][self.position_in_other_N[there_N]]
            columns |= {"other_utility": other_N, "difference": columns["utility"] - other_N}
        return columns

    @cached_property
    def _codes(self) -> dict[str, np.ndarray]:
        """Texts as numbers in alphabetic order, for sorting."""
        texts = {"domain": self.scores["domain"], "id": self.scores["id"], "state": self.scores["state"]}
        texts["reason"] = self.selection["reason"]
        return {name: pc.rank(column, tiebreaker="dense").to_numpy() for name, column in texts.items()}

    @cached_property
    def selected_N(self) -> np.ndarray:
        """What the run itself keeps, bool."""
        return self.selection["kept"].to_numpy(zero_copy_only=False)

    @property
    def kept_N(self) -> np.ndarray:
        """What is kept after what was overruled, bool."""
        return np.where(self.overruled_N == ABSENT, self.selected_N, self.overruled_N == 1)

    @cached_property
    def span(self) -> dict[str, tuple[int, int]]:
        """First row and row behind the last of each domain."""
        domains = self.scores["domain"].to_numpy()
        edges = np.flatnonzero(np.r_[True, domains[1:] != domains[:-1]]) if len(self) else np.array([], int)
        return {domains[a]: (int(a), int(b)) for a, b in zip(edges, [*edges[1:], len(self)], strict=True)}

    def ids(self, domain: str) -> np.ndarray:
        """Ids of a domain in ascending order, [n]."""
        first, last = self.span[domain]
        return self.scores["id"].slice(first, last - first).to_numpy()

    def rows_of(self, domain: str, ids: Sequence[str] | np.ndarray) -> np.ndarray:
        """Row number of each id of the domain; -1 where the run has no such sample."""
        if domain not in self.span:
            return np.full(len(ids), ABSENT)
        return _rows_of(self.ids(domain), np.array(ids, dtype=object), self.span[domain][0])

    def key(self, row: int) -> tuple[str, str]:
        """Domain and id of a row."""
        return self.scores["domain"][row].as_py(), self.scores["id"][row].as_py()

    def overrule(self, decisions: dict[tuple[str, str], bool]) -> None:
        """Take these decisions in the place of the selection's, and no others. Raises DataError on unknown samples."""
        overruled_N = np.full(len(self), ABSENT, dtype=np.int8)
        for domain in {domain for domain, _ in decisions}:
            mine = {sample_id: kept for (name, sample_id), kept in decisions.items() if name == domain}
            rows = self.rows_of(domain, list(mine))
            if (rows == ABSENT).any():
                missing = list(mine)[int(np.flatnonzero(rows == ABSENT)[0])]
                raise DataError(f"sample {missing!r:.200} of domain {domain!r:.200} is not in {self.folder}")
            overruled_N[rows] = list(mine.values())
        self.overruled_N = overruled_N
        self.version += 1

    # --- queries -------------------------------------------------------------------------------------------------

    def find(self, query: Query, search: Search) -> Found:
        """The rows that the query finds, in its order. Raises DataError on an unknown column."""
        return self._found(query, search, self.version)

    def _find(self, query: Query, search: Search, _version: int) -> Found:
        order = self._order(query.sort, query.descending)
        rows = order[self._mask(query, search)[order]]
        return Found(rows, int(self.kept_N[rows].sum()))

    def _make_order(self, column: str, descending: bool) -> np.ndarray:
        """Rows sorted by a column: those without a number last, equal ones in file order."""
        value_N = self._codes[column].astype(float) if column in self._codes else self._number(column).astype(float)
        return np.argsort(-value_N if descending else value_N, kind="stable")

    def _number(self, column: str) -> np.ndarray:
        if column not in self.numbers:
            raise DataError(f"there is no number {column!r:.100}; known are {', '.join(self.numbers)}")
        return self.numbers[column]

    def _mask(self, query: Query, search: Search) -> np.ndarray:
        mask_N = np.ones(len(self), bool)
        for table, column in ((self.scores, "domain"), (self.scores, "state"), (self.selection, "reason")):
            wanted = getattr(query, column)
            if wanted is not None:
                mask_N &= pc.equal(table[column], wanted).to_numpy()
        if query.decision is not None:
            mask_N &= self._decided(query.decision)
        value_N = self._number(query.by)
        if query.least is not None:
            mask_N &= value_N >= query.least
        if query.most is not None:
            mask_N &= value_N <= query.most
        if query.text:
            hit_N = np.zeros(len(self), bool)
            hit_N[search.search(query.text)] = True
            mask_N &= hit_N
        return mask_N

    def _decided(self, decision: Decision) -> np.ndarray:
        match decision:
            case "kept":
                return self.kept_N
            case "dropped":
                return ~self.kept_N
            case "overruled":
                return self.overruled_N != ABSENT
        return (self.other_kept_N != ABSENT) & (self.other_kept_N != self.kept_N)

    def row(self, row: int) -> dict[str, Any]:
        """One row as plain data."""
        domain, sample_id = self.key(row)
        values: dict[str, Any] = {
            "row": row,
            "domain": domain,
            "id": sample_id,
            "state": self.scores["state"][row].as_py(),
            "reason": self.selection["reason"][row].as_py(),
            "selected": bool(self.selected_N[row]),
            "overruled": None if self.overruled_N[row] == ABSENT else bool(self.overruled_N[row]),
        }
        values |= {name: _plain(column[row]) for name, column in self.numbers.items()}
        if self.other is not None:
            kept = self.other_kept_N[row]
            values["other_kept"] = None if kept == ABSENT else bool(kept)
        return values

    def histogram(self, rows: np.ndarray, column: str) -> dict[str, Any]:
        """How a number is spread over some rows, kept and dropped apart.

        48 bins between the 1 % and the 99 % quantile of all rows, the outermost open to the outside.
        """
        whole_N = self._number(column).astype(float)
        finite = whole_N[np.isfinite(whole_N)]
        if not len(finite):
            return {"edges": [], "kept": [], "dropped": []}
        low, high = np.quantile(finite, OUTER)
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        value, kept = whole_N[rows], self.kept_N[rows]
        known = np.isfinite(value)
        clipped = np.clip(value, edges[0], edges[-1])
        count = {name: np.histogram(clipped[known & mask], edges)[0] for name, mask in (("k", kept), ("d", ~kept))}
        return {"edges": edges.tolist(), "kept": count["k"].tolist(), "dropped": count["d"].tolist()}

    # --- the other run -------------------------------------------------------------------------------------------

    @cached_property
    def position_in_other_N(self) -> np.ndarray:
        """Row of each sample in the other run, -1 where it is not there. A sample is known by domain and id."""
        position_N = np.full(len(self), ABSENT)
        if self.other is not None:
            for domain, (first, last) in self.span.items():
                position_N[first:last] = self.other.rows_of(domain, self.ids(domain))
        return position_N

    @cached_property
    def other_kept_N(self) -> np.ndarray:
        """What the other run itself keeps: 1, 0, or -1 where it has no such sample."""
        kept_N = np.full(len(self), ABSENT, dtype=np.int8)
        there_N = self.position_in_other_N >= 0
        if self.other is not None:
            kept_N[there_N] = self.other.selected_N[self.position_in_other_N[there_N]]
        return kept_N

    def agreement(self) -> dict[str, Any]:
        """How two runs agree on the samples that both have: counts of decisions, Spearman, a grid of utilities."""
        if self.other is None:
            raise DataError("there is no second run; `datalloy view RUN RUN2` compares two")
        there_N = self.position_in_other_N >= 0
        mine_N, theirs_N = self.kept_N[there_N], self.other_kept_N[there_N] == 1
        x, y = self.numbers["utility"][there_N], self.numbers["other_utility"][there_N]
        known = np.isfinite(x) & np.isfinite(y)
        x, y = x[known], y[known]
        return {
            "both": int(there_N.sum()),
            "only_here": int((~there_N).sum()),
            "only_there": len(self.other) - int(there_N.sum()),
            "kept_by": {
                "both": int((mine_N & theirs_N).sum()),
                "here": int((mine_N & ~theirs_N).sum()),
                "there": int((~mine_N & theirs_N).sum()),
                "neither": int((~mine_N & ~theirs_N).sum()),
            },
            "spearman": rank_agreement(x, y) if len(set(x)) > 1 and len(set(y)) > 1 else None,
            "grid": _grid(x, y),
        }


def _rows_of(sorted_ids: np.ndarray, ids: np.ndarray, first: int) -> np.ndarray:
    place = np.minimum(np.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
    return np.where(sorted_ids[place] == ids, place + first, ABSENT)


def _grid(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """Counts of points on a grid of 48 by 48; its price does not depend on how many points are drawn."""
    if not len(x):
        return {"x": [], "y": [], "counts": []}
    edges = []
    for values in (x, y):
        low, high = np.quantile(values, OUTER)
        edges.append(np.linspace(low, high if high > low else low + 1, BINS + 1))
    inside = [np.clip(values, edge[0], edge[-1]) for values, edge in zip((x, y), edges, strict=True)]
    counts = np.histogram2d(inside[0], inside[1], bins=edges)[0].astype(int)
    return {"x": edges[0].tolist(), "y": edges[1].tolist(), "counts": counts.tolist()}


def _plain(value: Any) -> int | float | None:
    if isinstance(value, np.integer):
        return int(value)
    return float(value) if np.isfinite(value) else None


def facet(column: pa.ChunkedArray, kept_N: np.ndarray) -> list[dict[str, Any]]:
    """The distinct texts of a column with how many rows have each, and how many of those are kept."""
    encoded = column.combine_chunks().dictionary_encode()
    names, code_N = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    rows, kept = np.bincount(code_N, minlength=len(names)), np.bincount(code_N[kept_N], minlength=len(names))
    return [{"name": names[i], "rows": int(rows[i]), "kept": int(kept[i])} for i in np.argsort(names)]
