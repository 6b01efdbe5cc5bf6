"""Files of numbers from elsewhere in, a ledger of what was told about which mixture out.

Three kinds of model are told apart: `merged`, the experts merged by a mixture's weights; `trained`, a model really
trained on it; `base`, the model before, which only guard rails need. A mixture is known by its shares in steps of
0.01 %, so that a share printed with four decimals is the share itself, and by nothing else.

The ledger is a file of lines, `told.jsonl`, written as a whole or not at all. Telling the same again changes nothing;
telling otherwise is refused, because one of the two is wrong and only the user can say which. So is what is not
complete: a mixture counts when all targets of the recipe have their number. All files of one call are read before the
first line is kept, and results of one mixture may stand in several of them.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from datalloy.errors import DataError, RunError
from datalloy.evaluators import Measure, read_results
from datalloy.run import digest, write_atomically
from datalloy.simplex import largest_remainder
from datalloy.told_recipe import ToldRecipe, ToldTarget

Kind = Literal["merged", "trained", "base"]

STEPS = 10_000  # of a share: 0.01 % each
SUM_TOLERANCE = 1e-3  # of shares as a table prints them
SAME_NUMBER = 1e-9  # relative
WEIGHT, VALUE, ERROR, ITEMS = "w:", "value:", "se:", "n:"
SECTIONS = {"weights": WEIGHT, "values": VALUE, "standard_errors": ERROR, "items": ITEMS}  # of JSON rows
BASE: Kind = "base"


@dataclass(frozen=True)
class Proposal:
    """A mixture whose numbers are asked for, and why.

    `shares` are in steps, in the order of the recipe's domains. `about` is for whoever measures it: the command that
    merges, or the samples to train on.
    """

    candidate: str
    kind: Kind
    role: str
    shares: tuple[int, ...]
    about: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def weight_K(self) -> np.ndarray:
        return np.array(self.shares) / STEPS


@dataclass(frozen=True)
class Told:
    """The numbers of one model: by target the value in the user's own unit, its standard error, its items."""

    kind: Kind
    shares: tuple[int, ...]  # none of the base
    values: dict[str, float]
    standard_errors: dict[str, float] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    @property
    def weight_K(self) -> np.ndarray:
        return np.array(self.shares) / STEPS


def in_steps(weight_K: np.ndarray) -> tuple[int, ...]:
    """Shares in whole steps that add up to one, each less than a step from the weight."""
    return tuple(largest_remainder(weight_K, STEPS).tolist())


def candidate_name(kind: Kind, named: Mapping[str, int]) -> str:
    """Short enough for a folder; the same for the same mixture wherever it is asked for."""
    return BASE if kind == BASE else f"{kind}-{digest(dict(named))[:8]}"


# --- the ledger ------------------------------------------------------------------------------------------------------


class Ledger:
    """What was asked and what was told in one folder. Raises RunError where that is about other domains."""

    def __init__(self, folder: Path, recipe: ToldRecipe) -> None:
        self.folder, self.recipe = folder, recipe
        if (folder / "provenance.json").exists():
            raise RunError(
                f"{folder} is a run of its own; numbers from elsewhere need a folder of their own, see --run"
            )
        self.proposals_path, self.told_path = folder / "mixture/proposals.jsonl", folder / "mixture/told.jsonl"
        self.proposals = [self._proposal(row) for row in self._rows(self.proposals_path)]
        self.told = [self._told(row) for row in self._rows(self.told_path)]

    def _rows(self, path: Path) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), start=1):
            try:
                row = json.loads(line)
                named = row.pop("weights")
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{path}:{number} is damaged; take the line out and tell those numbers again") from None
            if row["kind"] != BASE and named.keys() != self.recipe.domains.keys():
                raise RunError(
                    f"{path}:{number} is about the domains {', '.join(named)}, the recipe has "
                    f"{', '.join(self.recipe.domains)}; name another folder with --run"
                )
            yield row | {"shares": tuple(round(named[name] * STEPS) for name in self.recipe.domains) if named else ()}

    def _proposal(self, row: dict[str, Any]) -> Proposal:
        named = {key: row.pop(key) for key in ("candidate", "kind", "role", "shares")}
        return Proposal(**named, about=row)

    def _told(self, row: dict[str, Any]) -> Told:
        told = Told(**row | {"sources": tuple(row["sources"])})
        if missing := self.recipe.targets.keys() - told.values.keys():
            raise RunError(
                f"{self.told_path} has no number of target {sorted(missing)[0]} for {self.describe(told)}: the recipe "
                "got new targets; name another folder with --run and tell all of them"
            )
        return told

    @property
    def open(self) -> list[Proposal]:
        """What was asked for and not told yet."""
        known = {(told.kind, told.shares) for told in self.told}
        return [proposal for proposal in self.proposals if (proposal.kind, proposal.shares) not in known]

    def of_kind(self, kind: Kind) -> list[Told]:
        return [told for told in self.told if told.kind == kind]

    def propose(self, proposals: Sequence[Proposal]) -> None:
        """Add to `proposals.jsonl`."""
        self.proposals += proposals
        write_atomically(self.proposals_path, _lines([self._row(p) | p.about for p in self.proposals]))

    def keep(self, told: Sequence[Told]) -> int:
        """Add to `told.jsonl`; how many were new. Raises DataError, and keeps none, where one contradicts another."""
        by_mixture = {(row.kind, row.shares): row for row in self.told}
        new = []
        for row in told:
            if (before := by_mixture.get((row.kind, row.shares))) is None:
                by_mixture[row.kind, row.shares] = row
                new.append(row)
            else:
                self._refuse_contradiction(before, row)
        self.told += new
        if new:
            write_atomically(self.told_path, _lines([self._row(row) for row in self.told]))
        return len(new)

    def named(self, row: Told | Proposal) -> dict[str, float]:
        """Weights by domain; none of the base."""
        return {name: share / STEPS for name, share in zip(self.recipe.domains, row.shares, strict=row.kind != BASE)}

    def _row(self, row: Told | Proposal) -> dict[str, Any]:
        data = {key: value for key, value in asdict(row).items() if key not in ("shares", "about")}
        return {**data, "weights": self.named(row)}

    def _refuse_contradiction(self, before: Told, now: Told) -> None:
        for target in self.recipe.targets:
            was, value = before.values[target], now.values[target]
            if not _is_same(was, value):
                raise DataError(
                    f"{', '.join(now.sources)}: {target} of {self.describe(now)} is {value:g}, but {was:g} was told "
                    f"before ({', '.join(before.sources)}). One mixture has one number; if the old one is wrong, take "
                    f"its line out of {self.told_path} and tell again"
                )
            for name, old, new in (
                ("standard error", before.standard_errors, now.standard_errors),
                ("number of items", before.items, now.items),
            ):
                if target in new and not _is_same(old.get(target), new[target]):
                    raise DataError(
                        f"{', '.join(now.sources)}: {target} of {self.describe(now)} has the {name} {new[target]:g}, "
                        f"before ({', '.join(before.sources)}) it was {old.get(target, 'not told')}; to replace the "
                        f"old one, take its line out of {self.told_path} and tell again"
                    )

    def describe(self, row: Told | Proposal) -> str:
        if row.kind == BASE:
            return "the base"
        shares = ", ".join(f"{name} {100 * weight:g}%" for name, weight in self.named(row).items() if weight)
        return f"{row.kind} {shares}"


def _is_same(old: float | None, new: float) -> bool:
    return old is not None and math.isclose(old, new, rel_tol=SAME_NUMBER, abs_tol=SAME_NUMBER)


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


# --- files of numbers ------------------------------------------------------------------------------------------------


def read_told(paths: Sequence[Path], ledger: Ledger, *, candidate: str | None, kind: Kind | None) -> list[Told]:
    """The complete numbers of every mixture in the files, which are own tables or results of evaluators.

    Args:
        candidate: whose results they are, where neither a column nor a folder says so.
        kind: of the models, where no column says so and they were not asked for.

    Raises DataError, naming file and line, for anything that is not clear and complete.
    """
    reader = _Reader(ledger, candidate, kind)
    parts = [part for path in paths for part in reader.read(path)]
    return [_complete(ledger, rows) for rows in _by_mixture(parts).values()]


def _by_mixture(parts: Sequence[Told]) -> dict[tuple[Kind, tuple[int, ...]], list[Told]]:
    groups: dict[tuple[Kind, tuple[int, ...]], list[Told]] = {}
    for part in parts:
        groups.setdefault((part.kind, part.shares), []).append(part)
    return groups


def _complete(ledger: Ledger, parts: Sequence[Told]) -> Told:
    """The parts of one mixture put together. Raises DataError where a target lacks or has two numbers."""
    first, sources = parts[0], tuple(dict.fromkeys(source for part in parts for source in part.sources))
    values: dict[str, float] = {}
    for part in parts:
        for target, value in part.values.items():
            if not _is_same(values.setdefault(target, value), value):
                raise DataError(
                    f"{', '.join(sources)}: {target} of {ledger.describe(first)} is {values[target]:g} and {value:g}; "
                    "one mixture has one number"
                )
    if missing := [target for target in ledger.recipe.targets if target not in values]:
        raise DataError(
            f"{', '.join(sources)}: {ledger.describe(first)} has no number of {', '.join(missing)}; give all targets "
            "of a mixture in one call, several files at once if they stand in several"
        )
    errors = {target: error for part in parts for target, error in part.standard_errors.items()}
    items = {target: count for part in parts for target, count in part.items.items()}
    return Told(first.kind, first.shares, values, errors, items, sources)


class _Reader:
    """Rows of one call: a table's columns, or an evaluator's measures, as numbers of a mixture."""

    def __init__(self, ledger: Ledger, candidate: str | None, kind: Kind | None) -> None:
        self.recipe, self.ledger = ledger.recipe, ledger
        self.kind, self.candidate = kind, candidate
        self.asked = {proposal.candidate: proposal for proposal in ledger.proposals}
        self.asked[BASE] = Proposal(BASE, BASE, "told", ())
        if candidate is not None and candidate not in self.asked:
            raise DataError(f"--candidate {candidate} was not asked for; {self._known()}")

    def read(self, path: Path) -> Iterator[Told]:
        rows = _own_rows(path)
        if rows is None:
            yield self._of_measures(path, read_results(path))
            return
        for where, row in rows:
            yield self._of_row(where, row)

    # --- own tables

    def _of_row(self, where: str, row: Mapping[str, Any]) -> Told:
        domains, targets = self.recipe.domains, self.recipe.targets
        known = {"candidate", "kind", "role", "command", "samples"}
        known |= {WEIGHT + d for d in domains} | {p + t for p in (VALUE, ERROR, ITEMS) for t in targets}
        if unknown := [key for key in row if key not in known]:
            raise DataError(
                f"{where}: {unknown[0]} names no domain or target of the recipe; columns are candidate, kind, "
                f"{WEIGHT}DOMAIN of {', '.join(domains)} and {VALUE}TARGET, {ERROR}TARGET, {ITEMS}TARGET of "
                f"{', '.join(targets)}"
            )
        asked = self._asked(where, row)
        shares = self._shares(where, row)
        if asked is not None and shares is not None and asked.shares != shares:
            raise DataError(f"{where}: {asked.candidate} was asked for with other weights; leave one of the two out")
        if asked is None and shares is None:
            raise DataError(
                f"{where}: which mixture? Give candidate, or {WEIGHT}DOMAIN for every domain; {self._known()}"
            )
        values = _numbers(where, row, VALUE, targets)
        errors = _numbers(where, row, ERROR, targets)
        items = _numbers(where, row, ITEMS, targets)
        for target in targets:
            if errors.get(target, 0) < 0 or items.get(target, 1) < 1 or items.get(target, 1) % 1:
                raise DataError(f"{where}: {ERROR}{target} must be 0 or more, {ITEMS}{target} a whole number above 0")
        return Told(
            self._kind(where, row, asked),
            shares if asked is None else asked.shares,  # type: ignore[arg-type]
            values,
            errors,
            {target: int(count) for target, count in items.items()},
            (where,),
        )

    def _asked(self, where: str, row: Mapping[str, Any]) -> Proposal | None:
        name = row.get("candidate") or (None if _has_weights(row) else self.candidate)
        if name is None:
            return None
        if name not in self.asked:
            raise DataError(f"{where}: {name} was not asked for; {self._known()}")
        return self.asked[name]

    def _shares(self, where: str, row: Mapping[str, Any]) -> tuple[int, ...] | None:
        if not _has_weights(row):
            return None
        named = _numbers(where, row, WEIGHT, self.recipe.domains)
        if missing := [name for name in self.recipe.domains if name not in named]:
            raise DataError(f"{where}: {WEIGHT}{missing[0]} is missing; every domain has a weight, 0 where it has none")
        weight_K = np.array(list(named.values()))
        if (weight_K < 0).any() or abs(weight_K.sum() - 1) > SUM_TOLERANCE:
            raise DataError(
                f"{where}: weights are shares, none negative, that add up to one; these add up to {weight_K.sum():g}: "
                f"{named}"
            )
        return in_steps(weight_K / weight_K.sum())

    def _kind(self, where: str, row: Mapping[str, Any], asked: Proposal | None) -> Kind:
        found: Any = row.get("kind") or (asked.kind if asked else self.kind)
        if found not in get_args(Kind):
            raise DataError(
                f"{where}: kind is {found!r}, must be merged or trained: were these models merged by the weights or "
                "really trained on the mixture? Give a column kind, or --kind for all"
            )
        if asked is not None and found != asked.kind:
            raise DataError(f"{where}: {asked.candidate} was asked for as {asked.kind}, the row says {found}")
        return found

    # --- results of evaluators

    def _of_measures(self, path: Path, measures: Sequence[Measure]) -> Told:
        names = {self.candidate} if self.candidate else self._named_by(path, measures)
        if len(names) != 1:
            found = f"it names several: {', '.join(sorted(names))}" if names else "neither its path nor its model says"
            raise DataError(f"{path}: whose results are these? {found}; give --candidate. {self._known()}")
        asked = self.asked[names.pop()]
        chosen = {
            target: measure
            for target, wanted in self.recipe.targets.items()
            if (measure := _measure_of(path, target, wanted, measures)) is not None
        }
        if not chosen:
            tasks = ", ".join(sorted({measure.task for measure in measures}))
            raise DataError(f"{path} has results of {tasks}, none of which is a target; see targets.NAME.task")
        return Told(
            asked.kind,
            asked.shares,
            {target: m.value for target, m in chosen.items()},
            {target: m.standard_error for target, m in chosen.items() if m.standard_error is not None},
            {target: m.n for target, m in chosen.items() if m.n is not None},
            (str(path),),
        )

    def _named_by(self, path: Path, measures: Sequence[Measure]) -> set[str]:
        """Candidates whose name stands in the path or in a model's name; the base only as the whole of one."""
        texts = [str(path.absolute()), *(measure.model for measure in measures)]
        found = {name for name in self.asked if name != BASE and any(name in text for text in texts)}
        is_base = any(BASE in text.replace("__", "/").split("/") for text in texts)
        return found or ({str(BASE)} if is_base else set())

    def _known(self) -> str:
        names = [name for name in self.asked if name != BASE]
        return f"asked for were {', '.join(names[-8:])}" if names else "nothing was asked for yet: `datalloy ask`"


def _measure_of(path: Path, target: str, wanted: ToldTarget, measures: Sequence[Measure]) -> Measure | None:
    task = wanted.task or target
    of_task = [m for m in measures if m.task == task]
    if not of_task:
        return None
    fitting = [m for m in of_task if wanted.metric in (None, m.metric) and wanted.variant in (None, m.variant)]
    if len(fitting) != 1:
        listed = ", ".join(f"{m.metric} ({m.variant})" for m in of_task)
        raise DataError(
            f"{path}: {len(fitting)} values fit target {target}; set targets.{target}.metric, and variant where "
            f"needed, to one of {listed}"
        )
    (measure,) = fitting
    if measure.higher_is_better not in (None, wanted.higher_is_better):
        told = "higher" if measure.higher_is_better else "lower"
        raise DataError(
            f"{path}: of {measure.metric} {told} is better; set targets.{target}.higher_is_better: "
            f"{str(measure.higher_is_better).lower()}"
        )
    return measure


def _own_rows(path: Path) -> list[tuple[str, dict[str, Any]]] | None:
    """Rows of a user's own table with where they stand; None for a file that is none."""
    if path.suffix not in (".csv", ".tsv", ".json", ".jsonl"):
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if path.suffix in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",")
        if not any(name.startswith(VALUE) for name in table.fieldnames or ()):
            return None
        rows = [(f"{path}:{table.line_num}", row) for row in table]
        if longer := [where for where, row in rows if None in row]:
            raise DataError(f"{longer[0]} has more cells than the table has columns; a comma in a number?")
        return [(where, _filled(row)) for where, row in rows]
    try:
        data = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    records = data if isinstance(data, list) else [data]
    if not all(isinstance(row, dict) and ("values" in row or any(k.startswith(VALUE) for k in row)) for row in records):
        return None
    return [(f"{path}:{number}", _filled(_flat(row))) for number, row in enumerate(records, start=1)]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON row as a table has it: {"values": {"chart": 1}} is {"value:chart": 1}."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key in SECTIONS and isinstance(value, dict):
            flat |= {SECTIONS[key] + name: inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None and value != ""}


def _has_weights(row: Mapping[str, Any]) -> bool:
    return any(key.startswith(WEIGHT) for key in row)


def _numbers(where: str, row: Mapping[str, Any], prefix: str, names: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name in names:
        if prefix + name not in row:
            continue
        try:
            numbers[name] = float(row[prefix + name])
        except (TypeError, ValueError):
            numbers[name] = math.nan
        if not math.isfinite(numbers[name]):
            raise DataError(f"{where}: {prefix}{name} is {row[prefix + name]!r}, must be a finite number")
    return numbers
