"""What a scorer found in, a checked table out: id -> utility, one row a sample.

Utility is the fall of the targets' loss caused by one step on the sample, in nats per token: positive helps, higher
is better, for every scorer (DESIGN 1). A row that could not be scored stays in the table with a state word and no
utility, so that the table has as many rows as the pool has samples and nothing vanishes.

The table is Parquet with zstd and page checksums: of 200 plain Parquet files with one flipped bit, 110 read back
silently wrong (reliability, measured facts). Trap: the checksums cover the pages and not the footer, so names and
number of columns and rows stand in the metadata a second time, under a SHA-256 of their own. Rows are sorted by
domain and id when they are written, so the file does not depend on the order in which samples were scored.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datalloy.errors import DataError
from datalloy.run import write_atomically

SCHEMA_VERSION = 1
SIGN = "utility = loss before - loss after; positive helps"
TARGET_PREFIX = "utility:"
STATE_WORD = r"[a-z][a-z_]*"

_FIRST_FIELDS = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("domain", pa.string(), nullable=False),
    pa.field("supervised_tokens", pa.int64(), nullable=False),
    pa.field("length_tokens", pa.int64(), nullable=False),
    pa.field("loss", pa.float64()),
    pa.field("utility", pa.float64()),
)
_LAST_FIELDS = (
    pa.field("utility_se", pa.float64()),
    pa.field("state", pa.string(), nullable=False),
)
CONTRIBUTIONS = "contributions"
_CONTRIBUTIONS = pa.field(CONTRIBUTIONS, pa.list_(pa.float64()))


@dataclass(frozen=True)
class Scores:
    """The utilities of a pool. N rows; all arrays are [N], in row order; a missing number is NaN in them.

    `metadata` is plain JSON data about how the scores were made. Two keys are required: `method`, the scorer's name,
    and `signed`, true where a negative utility means harm (one-step utilities) and false where only the order means
    something (random, loss, length). Usual further ones: step, step_rule, agreement, noise_floor.

    Raises DataError when a row contradicts itself: state ok without a finite utility or the reverse, an infinite
    number, a negative length, a sample given twice.
    """

    table: pa.Table
    metadata: dict[str, Any]

    def __post_init__(self) -> None:
        _check_schema(self.table)
        _check_metadata(self.metadata)
        _check_rows(self)

    @classmethod
    def from_columns(
        cls,
        *,
        id: Sequence[str] | np.ndarray,
        domain: Sequence[str] | np.ndarray,
        supervised_tokens: Sequence[int] | np.ndarray,
        length_tokens: Sequence[int] | np.ndarray,
        loss: Sequence[float | None] | np.ndarray,
        utility: Sequence[float | None] | np.ndarray,
        utility_by_target: Mapping[str, Sequence[float | None] | np.ndarray],
        utility_se: Sequence[float | None] | np.ndarray,
        state: Sequence[str] | np.ndarray,
        contributions: Sequence[Sequence[float] | np.ndarray | None] | np.ndarray | None = None,
        metadata: Mapping[str, Any],
    ) -> "Scores":
        """Scores from columns of equal length; None and NaN both mean that there is no number.

        `length_tokens` counts all tokens of the sample, image tokens included; `supervised_tokens` those that
        enter the loss. `utility` is weighted over the targets, `utility_by_target` holds it for each of them.
        `loss` and `utility_se` may be missing in any row: not every scorer measures them. `contributions`: the
        utility for each of the V target items, [N, V], where it is to be kept.
        """
        columns = {
            "id": id,
            "domain": domain,
            # as arrays, because pyarrow cuts the 1.5 of a list to 1 and refuses it in an array
            "supervised_tokens": np.asarray(supervised_tokens),
            "length_tokens": np.asarray(length_tokens),
            "loss": loss,
            "utility": utility,
            **{TARGET_PREFIX + target: values for target, values in utility_by_target.items()},
            "utility_se": utility_se,
            "state": state,
            "contributions": contributions,
        }
        schema = _schema(tuple(utility_by_target), has_contributions=contributions is not None)
        try:
            arrays = [pa.array(columns[field.name], type=field.type, from_pandas=True) for field in schema]
            table = pa.Table.from_arrays(arrays, schema=schema)
        except pa.ArrowException as error:
            raise DataError(f"scores cannot be built from these columns: {error}") from error
        return cls(table, dict(metadata))

    @classmethod
    def concat(cls, parts: "Sequence[Scores]") -> "Scores":
        """One table of several, in order. All parts must come from the same scorer: equal metadata and columns."""
        if not parts:
            raise DataError("no scores to join: the list of parts is empty")
        for part in parts[1:]:
            if part.metadata != parts[0].metadata or part.table.schema != parts[0].table.schema:
                raise DataError(
                    "scores of different origin cannot be joined: "
                    f"{parts[0].metadata} with {parts[0].table.column_names} and "
                    f"{part.metadata} with {part.table.column_names}; "
                    "score the whole pool with one setting"
                )
        return cls(pa.concat_tables([part.table for part in parts]), parts[0].metadata)

    @classmethod
    def read(cls, path: Path) -> "Scores":
        """The scores written at `path`, checksums verified. Raises DataError when it is anything else."""
        table, metadata = read_table(path, kind="scores", version=SCHEMA_VERSION)
        del metadata["sign"]
        return cls(table, metadata)

    def write(self, path: Path) -> None:
        """Write Parquet at `path`, rows sorted by domain and id; the file appears complete or not at all."""
        write_table(path, self.table, kind="scores", version=SCHEMA_VERSION, metadata={**self.metadata, "sign": SIGN})

    def with_utility(self, utility_N: np.ndarray, state_N: np.ndarray, metadata: Mapping[str, Any]) -> "Scores":
        """The same samples ranked by another scorer that knows no targets and no errors: a baseline or a rating.

        `state_N` says which rows have that scorer's utility.
        """
        return Scores.from_columns(
            id=self.id,
            domain=self.domain,
            supervised_tokens=self.supervised_tokens,
            length_tokens=self.length_tokens,
            loss=self.loss,
            utility=np.where(state_N == "ok", utility_N, np.nan),
            utility_by_target={},
            utility_se=np.full(len(self), np.nan),
            state=state_N,
            metadata=metadata,
        )

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def id(self) -> np.ndarray:
        return self.table["id"].to_numpy()

    @property
    def domain(self) -> np.ndarray:
        return self.table["domain"].to_numpy()

    @property
    def supervised_tokens(self) -> np.ndarray:
        return self.table["supervised_tokens"].to_numpy()

    @property
    def length_tokens(self) -> np.ndarray:
        return self.table["length_tokens"].to_numpy()

    @property
    def loss(self) -> np.ndarray:
        """Mean loss of the sample on the proxy before any step, in nats per token."""
        return self.table["loss"].to_numpy()

    @property
    def utility(self) -> np.ndarray:
        """Nats per token, weighted over the targets; NaN exactly where `state` is not ok."""
        return self.table["utility"].to_numpy()

    @property
    def utility_by_target(self) -> dict[str, np.ndarray]:
        return {target: self.table[TARGET_PREFIX + target].to_numpy() for target in self.targets}

    @property
    def utility_se(self) -> np.ndarray:
        """Standard error of `utility` over the target items, nats per token; NaN where it was not measured."""
        return self.table["utility_se"].to_numpy()

    @property
    def state(self) -> np.ndarray:
        return self.table["state"].to_numpy()

    @property
    def is_ok(self) -> np.ndarray:
        """Rows that have a utility, bool."""
        return self.state == "ok"

    @property
    def targets(self) -> tuple[str, ...]:
        return _targets(self.table)

    @property
    def is_signed(self) -> bool:
        """Whether a negative utility means harm."""
        return self.metadata["signed"]

    @property
    def contributions(self) -> np.ndarray | None:
        """Utility of each sample for every target item, [N, V], nats per token; NaN rows where there is none.

        None when they were not kept.
        """
        if "contributions" not in self.table.column_names:
            return None
        values = self.table["contributions"].combine_chunks().flatten().to_numpy()
        contribution_NV = np.full((len(self), len(values) // max(int(self.is_ok.sum()), 1)), np.nan)
        contribution_NV[self.is_ok] = values.reshape(-1, contribution_NV.shape[1])
        return contribution_NV


def _targets(table: pa.Table) -> tuple[str, ...]:
    names = [name for name in table.column_names if name.startswith(TARGET_PREFIX)]
    return tuple(name.removeprefix(TARGET_PREFIX) for name in names)


def _schema(targets: Sequence[str], *, has_contributions: bool) -> pa.Schema:
    by_target = [pa.field(TARGET_PREFIX + target, pa.float64()) for target in targets]
    return pa.schema([*_FIRST_FIELDS, *by_target, *_LAST_FIELDS, *([_CONTRIBUTIONS] if has_contributions else [])])


def _check_schema(table: pa.Table) -> None:
    expected = _schema(_targets(table), has_contributions=_CONTRIBUTIONS.name in table.column_names)
    if not table.schema.equals(expected):
        found = ", ".join(f"{field.name} {field.type}" for field in table.schema)
        allowed = ", ".join(f"{field.name} {field.type}" for field in expected)
        raise DataError(f"scores have the columns {found}; they must have {allowed}, in this order")
    for field in expected:
        if not field.nullable and table[field.name].null_count:
            raise DataError(f"scores have {table[field.name].null_count} rows without {field.name}; every row needs it")


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    if not isinstance(metadata.get("method"), str) or not isinstance(metadata.get("signed"), bool):
        raise DataError(
            f"metadata of scores is {dict(metadata)}; it must name the `method` "
            "and say whether the utilities are `signed` (true where negative means harm)"
        )
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"metadata of scores cannot be written as JSON: {error}; found {dict(metadata)}, "
            "allowed are text, finite numbers, lists and mappings"
        ) from error


def _check_rows(scores: Scores) -> None:
    """Refuse rows that contradict themselves, naming the first."""
    is_ok_N = scores.is_ok
    for name in ("supervised_tokens", "length_tokens"):
        _refuse_rows(scores, scores.table[name].to_numpy() < 0, f"{name} below 0")
    words = [word for word in pc.unique(scores.table["state"]).to_pylist() if re.fullmatch(STATE_WORD, word)]
    _refuse_rows(scores, ~np.isin(scores.state, words), "a state that is no snake_case word")
    utilities = {"utility": scores.utility, **scores.utility_by_target}
    for name, values_N in {"loss": scores.loss, "utility_se": scores.utility_se, **utilities}.items():
        _refuse_rows(scores, np.isinf(values_N), f"an infinite {name}; a row with one is nonfinite and has no number")
    for name, utility_N in utilities.items():
        _refuse_rows(scores, is_ok_N & np.isnan(utility_N), f"state ok but no finite {name}")
        _refuse_rows(scores, ~is_ok_N & ~np.isnan(utility_N), f"a {name} but a state other than ok")
    _refuse_rows(scores, scores.utility_se < 0, "a negative utility_se")
    if "contributions" in scores.table.column_names:
        items_N = pc.fill_null(pc.list_value_length(scores.table["contributions"]), 0).to_numpy()
        _refuse_rows(
            scores, items_N != np.where(is_ok_N, items_N.max(initial=0), 0), "not one contribution a target item"
        )
    keys = scores.table.group_by(["domain", "id"]).aggregate([([], "count_all")])
    if keys.num_rows < len(scores):
        twice = keys.filter(pc.greater(keys["count_all"], 1)).to_pylist()[0]
        raise DataError(
            f"sample {twice['id']!r:.200} of domain {twice['domain']!r:.200} is scored {twice['count_all']} times; "
            "an id is unique in its domain"
        )


def _refuse_rows(scores: Scores, is_bad_N: np.ndarray, what: str) -> None:
    if is_bad_N.any():
        first = int(np.flatnonzero(is_bad_N)[0])
        raise DataError(
            f"{int(is_bad_N.sum())} of {len(scores)} scored rows have {what}; the first is sample "
            f"{scores.id[first]!r:.200} of domain {scores.domain[first]!r:.200}, state {scores.state[first]!r:.200}"
        )


def write_table(
    path: Path,
    table: pa.Table,
    *,
    kind: str,
    version: int,
    metadata: Mapping[str, Any],
    order: Sequence[str] = ("domain", "id"),
) -> None:
    """Write a table as Parquet: sorted by the columns `order`, zstd, page checksums, complete or not at all."""
    about = {"kind": kind, "schema_version": version, "metadata": dict(metadata)}
    about |= {"rows": len(table), "columns": table.column_names}
    text = json.dumps(about, sort_keys=True, allow_nan=False)
    footer = {"datalloy": text, "datalloy.sha256": hashlib.sha256(text.encode()).hexdigest()}
    rows = table.sort_by([(column, "ascending") for column in order]).replace_schema_metadata(footer)
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_table(path: Path, *, kind: str, version: int, without: Sequence[str] = ()) -> tuple[pa.Table, dict[str, Any]]:
    """The table and the metadata that `write_table` wrote, the columns `without` left on disk.

    Raises DataError when the file is missing, damaged, of another kind, or of another schema version.
    """
    try:
        names = pq.read_schema(path).names
        wanted = [name for name in names if name not in without]
        table = pq.read_table(path, columns=wanted, partitioning=None, page_checksum_verification=True)
        table.validate(full=True)
        footer = dict(table.schema.metadata or {})
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read as {kind}: {error}; if it is damaged, delete it and make it again"
        ) from error
    text = footer.get(b"datalloy", b"")
    if not text:
        raise DataError(f"{path} is a Parquet file, but it holds no {kind} written by Datalloy")
    if footer.get(b"datalloy.sha256") != hashlib.sha256(text).hexdigest().encode():
        raise DataError(f"{path} is damaged: its metadata do not match their checksum; delete it and make it again")
    about = json.loads(text)
    if about["kind"] != kind:
        raise DataError(f"{path} holds {about['kind']}, not {kind}")
    if about["schema_version"] != version:
        raise DataError(
            f"{path} has {kind} of schema version {about['schema_version']}, this Datalloy reads version {version}; "
            "make them again"
        )
    table = table.replace_schema_metadata(None)
    if (about["rows"], about["columns"]) != (len(table), names):
        raise DataError(f"{path} is damaged: its columns or rows are not those written; delete it and make it again")
    return table, about["metadata"]
