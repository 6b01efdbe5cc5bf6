"""A results or samples file of lmms-eval or lm-evaluation-harness in, rows of the tidy table out.

The two have one ancestor and one layout: `results` holds `{task: {"METRIC,FILTER": value, "METRIC_stderr,FILTER":
error or "N/A"}}`. lmms-eval adds errors by the central limit theorem and clustered ones; the clustered one is taken
where there is one, because questions about one picture are not independent.

Samples hold one answer a line with a column for each metric. Trap: lmms-eval writes the answers of several filters into
one file without saying which is which; such a file is refused.
"""

import json
import logging
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from datalloy.errors import DataError
from datalloy.evaluators.measure import Measure, as_number, mean_and_error

log = logging.getLogger(__name__)

LMMS_EVAL, LM_EVAL = "lmms-eval", "lm-evaluation-harness"
ERRORS = ("_stderr_clustered", "_stderr", "_stderr_clt")  # the most honest first
NO_METRICS = {
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "input", "input_media"),
    *("token_counts", "doc_hash", "prompt_hash", "target_hash"),
}
LMMS_SAMPLES = re.compile(r"[0-9_-]+_samples_(.+)")  # 20260806_102030_samples_chartqa
LM_SAMPLES = re.compile(r"samples_(.+)_[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9.-]+")  # samples_chartqa_2026-08-21T10-56-54.1


def parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def read_aggregated(path: Path, data: dict[str, Any]) -> list[Measure]:
    """The rows of a results file, groups included. Raises DataError for a metric that is NaN or infinite."""
    evaluator = LMMS_EVAL if "lmms_eval_version" in data else LM_EVAL
    measures = []
    for task, row in {**data.get("groups", {}), **data["results"]}.items():
        for key, value in row.items():
            metric, comma, variant = key.rpartition(",")
            if not comma or any(metric.endswith(suffix) for suffix in ERRORS):
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise DataError(f"{path}: {task} has {key} = {value}; that evaluation failed, run it again")
            if (number := as_number(value)) is None:
                log.warning("%s: %s of %s is %.40r, no number; it is left out", path, key, task, value)
                continue
            errors = (as_number(row.get(f"{metric}{suffix},{variant}")) for suffix in ERRORS)
            measures.append(
                Measure(
                    evaluator,
                    _model(path, data),
                    task,
                    metric,
                    variant,
                    number,
                    next((error for error in errors if error is not None), None),
                    _items(data, task, row),
                    data.get("higher_is_better", {}).get(task, {}).get(metric),
                )
            )
    return measures


def _model(path: Path, data: dict[str, Any]) -> str:
    """Its name as the evaluator has it; a live object has none, so the folder it wrote to."""
    return data.get("model_name") or path.parent.name


def _items(data: dict[str, Any], task: str, row: dict[str, Any]) -> int | None:
    told = row.get("samples", row.get("sample_len"))
    told = data.get("n-samples", {}).get(task, {}).get("effective") if told is None else told
    return told if isinstance(told, int) else None


def read_samples(path: Path, text: str) -> list[Measure]:
    """Means over the lines of a samples file, by metric and filter, with their standard errors."""
    lmms, lm = LMMS_SAMPLES.fullmatch(path.stem), LM_SAMPLES.fullmatch(path.stem)
    if (named := lmms or lm) is None:
        raise DataError(
            f"{path} is not named as samples are, DATE_samples_TASK.jsonl by lmms-eval or samples_TASK_DATE.jsonl by "
            "lm-evaluation-harness; the task is told by nothing else"
        )
    value_by_metric: dict[tuple[str, str], list[float]] = defaultdict(list)
    seen: set[tuple[Any, str]] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        row = parse_json(Path(f"{path}:{number}"), line)
        variant = row.get("filter", "none")
        if (item := (row.get("doc_id"), variant)) in seen:
            raise DataError(
                f"{path}:{number}: doc_id {item[0]} comes a second time; answers of several filters are in one file "
                "and nothing says which is which. Read the results file of this run instead"
            )
        seen.add(item)
        for metric in row.get("metrics", sorted(row.keys() - NO_METRICS)):
            score = _score(row.get(metric))
            if score is None:
                continue
            if not math.isfinite(score):
                raise DataError(f"{path}:{number}: {metric} of doc_id {item[0]} is {score}; evaluate it again")
            value_by_metric[metric, variant].append(score)
    evaluator, items_by_variant = LMMS_EVAL if lmms else LM_EVAL, Counter(variant for _, variant in seen)
    measures = []
    for (metric, variant), values in sorted(value_by_metric.items()):
        if len(values) < items_by_variant[variant]:
            raise DataError(
                f"{path}: {metric} has a number for {len(values)} of {items_by_variant[variant]} answers; a mean over "
                "some of them is no measure of the model. Judge the others, or read the results file of this run"
            )
        mean, error = mean_and_error(values)
        measures.append(Measure(evaluator, path.parent.name, named[1], metric, variant, mean, error, len(values), None))
    return measures


def _score(value: Any) -> float | None:
    """The mark of one answer, as a number or under `score`; None for what is no mark, such as a category."""
    if isinstance(value, dict):
        value = value.get("score")
    return float(value) if isinstance(value, bool | int | float) else None
