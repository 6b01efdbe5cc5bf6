"""A score table of VLMEvalKit in, rows of the tidy table out.

`MODEL_DATASET_acc.csv` holds one row a split and one column a metric (`Overall`, then the categories), a table of
single answers (`MODEL_DATASET_..._result.tsv`, written with PRED_FORMAT=tsv) one row an item with `hit` or
`eval_score`. Only the second tells how many items there were, and so a standard error.

Traps: model and data set are told by the file's name alone, both may hold underscores, and only the folder above, named
like the model, tells them apart. The unit is shares of one or per cent, as each data set pleases.
"""

import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datalloy.errors import DataError
from datalloy.evaluators.measure import Measure, mean_and_error

EVALUATOR = "VLMEvalKit"
OF_ITEMS = ("hit", "eval_score")  # columns of the tables of single answers
NAME_END = re.compile(r"(_(exact_matching|openai|gpt4))?_(acc|score|results?)$")


def read_table(path: Path, text: str) -> list[Measure]:
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ","))
    if any(None in row or None in row.values() for row in rows):
        raise DataError(f"{path} has rows of different lengths; it is damaged, write it again")
    return _read(path, rows)


def read_records(path: Path, data: Any) -> list[Measure]:
    """The same tables as JSON (EVAL_FORMAT=json): a list of rows, or the only row."""
    rows = [data] if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} is neither a results file of a harness nor a table of VLMEvalKit")
    return _read(path, [{key: v if isinstance(v, str) else json.dumps(v) for key, v in row.items()} for row in rows])


def _read(path: Path, rows: Sequence[Mapping[str, str]]) -> list[Measure]:
    if not rows:
        raise DataError(f"{path} has no rows")
    model, task = _names(path)
    for column in OF_ITEMS:
        if column in rows[0]:
            return _of_items(path, model, task, column, rows)
    numeric = [column for column in rows[0] if _is_numeric([row[column] for row in rows])]
    return [
        Measure(EVALUATOR, model, task, column, _variant(row, numeric), value, None, None, None)
        for row in rows
        for column in numeric
        if (value := _number(row[column])) is not None
    ]


def _of_items(path: Path, model: str, task: str, column: str, rows: Sequence[Mapping[str, str]]) -> list[Measure]:
    by_split: dict[str, list[float]] = defaultdict(list)
    for number, row in enumerate(rows, start=2):
        if (value := _number(row[column])) is None:
            raise DataError(f"{path}:{number}: {column} is {row[column]!r}, must be a number; judge that answer again")
        by_split[row.get("split") or "none"].append(value)
    return [
        Measure(EVALUATOR, model, task, column, split, mean, error, len(values), True)
        for split, values in by_split.items()
        for mean, error in [mean_and_error(values)]
    ]


def _names(path: Path) -> tuple[str, str]:
    """Model and data set."""
    stem = NAME_END.sub("", path.stem)
    for folder in path.absolute().parents:
        if folder.name and stem.startswith(f"{folder.name}_"):
            return folder.name, stem.removeprefix(f"{folder.name}_")
    model, _, task = stem.partition("_")
    return (model, task) if task else (path.parent.name, stem)


def _variant(row: Mapping[str, str], numeric: Sequence[str]) -> str:
    """What the columns of text say: the split, in most tables."""
    return "/".join(value for column, value in row.items() if column not in numeric) or "none"


def _is_numeric(cells: Sequence[str]) -> bool:
    """Whether a column is a metric. A cell is empty or NaN where a split has no item of a category."""
    numbers = [_number(cell) for cell in cells]
    return any(n is not None for n in numbers) and all(
        n is not None or cell.lower() in ("", "nan") for n, cell in zip(numbers, cells, strict=True)
    )


def _number(cell: str) -> float | None:
    """The finite number that a cell holds, or None."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
