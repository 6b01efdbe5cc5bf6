"""What the viewer costs: opening a run of a million samples, sorting, filtering, paging; reading and searching texts.

    python benchmarks/viewer.py [--rows 1000000] [--texts 100000] [--out benchmarks/results/viewer.json]

Processor seconds of one process, one turn each. Scores are drawn; texts are drawn questions without pictures.
"""

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from datalloy import scores as scores_file
from datalloy import selection as selection_file
from datalloy.config import load_recipe
from datalloy.run import Run, write_json
from datalloy.scores import write_table
from datalloy.viewer.server import View
from datalloy.viewer.table import Query, RunTable

RECIPE = """\
name: viewer
base: tiny
domains: {a: {path: a.jsonl}}
targets: {goal: {path: goal.jsonl}}
"""


def seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return round(time.process_time() - started, 4)


def write_run(folder: Path, rows: int, domains: list[str]) -> None:
    """Scores and selection of `rows` samples, drawn."""
    random = np.random.default_rng(0)
    keys = {"id": np.char.zfill(np.arange(rows).astype(str), 8), "domain": np.repeat(domains, rows // len(domains))}
    ones, numbers = np.ones(rows, dtype=np.int64), random.normal(size=rows)
    scored = {**keys, "supervised_tokens": ones, "length_tokens": ones, "loss": numbers, "utility": numbers}
    scored |= {"utility:goal": numbers, "utility_se": np.ones(rows), "state": np.full(rows, "ok")}
    metadata = {"method": "exact", "signed": True}
    version = scores_file.SCHEMA_VERSION
    write_table(folder / "scores.parquet", pa.table(scored), kind="scores", version=version, metadata=metadata)
    chosen = {**keys, "rank": ones, "kept": numbers > 0, "reason": np.full(rows, "top_fraction")}
    version = selection_file.SCHEMA_VERSION
    write_table(folder / "selection.parquet", pa.table(chosen), kind="selection", version=version, metadata={})


class NoTexts:
    """Stands in for texts that have not been read."""

    def search(self, text: str) -> np.ndarray:
        raise NotImplementedError


def measure_table(folder: Path, rows: int) -> dict[str, float]:
    write_run(folder, rows, ["a", "b"])
    found: dict[str, Any] = {}
    figures = {"open": seconds(lambda: found.update(table=RunTable(folder)))}
    table, texts = found["table"], NoTexts()
    queries = {
        "first sort": Query(),
        "filter by range": Query(least=0.0),
        "filter and sort by another column": Query(domain="b", decision="kept", sort="loss"),
    }
    for name, query in queries.items():
        figures[name] = seconds(lambda query=query: table.find(query, texts))
    rest = table.find(queries["first sort"], texts).rows[5_000:5_050]
    figures["the rows of another page"] = seconds(lambda: [table.row(row) for row in rest.tolist()])
    return figures


def measure_texts(folder: Path, rows: int) -> dict[str, float]:
    lines = []
    for number in range(rows):
        turns = [
            {"role": "user", "content": f"Question {number}: " + "what does the picture show? " * 8},
            {"role": "assistant", "content": f"It shows {number % 97} squares. " * 4},
        ]
        lines.append(json.dumps({"id": f"{number:08d}", "messages": turns}) + "\n")
    (folder / "a.jsonl").write_text("".join(lines))
    (folder / "goal.jsonl").write_text(lines[0])
    (folder / "recipe.yaml").write_text(RECIPE)
    with Run(load_recipe(folder / "recipe.yaml"), folder / "run") as run:
        write_run(run.folder, rows, ["a"])
    view = View(folder / "run")
    figures = {"read all": seconds(view.texts.read_all), "search": seconds(lambda: view.texts.search("question 77"))}
    megabytes = {"data file": (folder / "a.jsonl").stat().st_size, "kept": view.texts.path.stat().st_size}
    return figures | {f"MB {name}": round(size / 1e6, 1) for name, size in megabytes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/viewer.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "table").mkdir()
        (folder / "texts").mkdir()
        results = {
            "machine": {"platform": platform.platform(), "python": platform.python_version()},
            "rows": arguments.rows,
            "seconds": measure_table(folder / "table", arguments.rows),
            "peak_GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
            "texts": arguments.texts,
            "texts_seconds": measure_texts(folder / "texts", arguments.texts),
        }
    write_json(arguments.out, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
