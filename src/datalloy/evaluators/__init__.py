"""Result files of other evaluators in, one tidy table out: a row a task and metric, with its standard error and n.

Read are lmms-eval and lm-evaluation-harness (`*_results.json` and `*samples*.jsonl`, `harness.py`) and VLMEvalKit
(`*_acc.csv`, and its tables of single answers, `vlmevalkit.py`). What a file holds decides what it is, its name only
where nothing else tells. `live_lmms.py` is the other way round: lmms-eval run on a live merged model.

Values stay in the unit of the file. Trap: VLMEvalKit writes shares of one for multiple choice and per cent for VQA, and
no standard error or n beside either; only its tables of single answers tell them.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path

from datalloy.display import as_cell
from datalloy.errors import DataError
from datalloy.evaluators import harness, vlmevalkit
from datalloy.evaluators.measure import Measure

TABLE_COLUMNS = tuple(field.name for field in fields(Measure))


def read_results(path: Path) -> list[Measure]:
    """All that a result file measured, in the file's order. Raises DataError, naming the file, for any other file."""
    if path.suffix in (".xlsx", ".xls"):
        raise DataError(
            f"{path} is a spreadsheet; save it as CSV, or let VLMEvalKit write text: EVAL_FORMAT=csv PRED_FORMAT=tsv"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if path.suffix == ".jsonl":
        measures = harness.read_samples(path, text)
    elif path.suffix == ".json":
        data = harness.parse_json(path, text)
        is_harness = isinstance(data, dict) and isinstance(data.get("results"), dict)
        measures = harness.read_aggregated(path, data) if is_harness else vlmevalkit.read_records(path, data)
    elif path.suffix in (".csv", ".tsv"):
        measures = vlmevalkit.read_table(path, text)
    else:
        raise DataError(f"{path} is no result file that is known; read are .json, .jsonl, .csv and .tsv")
    if not measures:
        raise DataError(f"{path} holds no metric with a number")
    return measures


def table_text(measures: Sequence[Measure]) -> str:
    """The tidy table as CSV; what is not known is an empty cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(TABLE_COLUMNS)
    writer.writerows(map(as_cell, astuple(measure)) for measure in measures)
    return file.getvalue()
