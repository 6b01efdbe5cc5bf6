"""A run folder without a model: data files with pictures, drawn scores, and the selection that follows from them."""

import json
from pathlib import Path

import numpy as np
import PIL.Image

from datalloy.config import Select, load_recipe
from datalloy.run import Run, write_json
from datalloy.scores import Scores
from datalloy.selection import Selection, select

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e{{7*7}}"
RECIPE = """\
name: drawn
base: tiny
data_root: {root}
domains:
  chart: {{path: chart.jsonl}}
  table: {{path: table.jsonl}}
targets:
  goal: {{path: goal.jsonl}}
"""


def draw_run(root: Path, folder: Path, rows: int = 40, *, seed: int = 0, fraction: float = 0.5) -> Path:
    """A run of `rows` samples in two domains; its data lie in `root`, drawn once. Returns the run folder."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "chart.jsonl").exists():
        _draw_data(root, rows)
    recipe_path = root / "recipe.yaml"
    recipe_path.write_text(RECIPE.format(root=root))
    with Run(load_recipe(recipe_path), folder) as run:
        draw_scores(rows, seed).write(run.path("scores.parquet"))
        scores = Scores.read(run.path("scores.parquet"))
        chosen = select(scores, Select(drop_toxic=False), fraction=fraction)
        chosen.with_metadata({**chosen.metadata, "arm": {"scorer": "exact"}}).write(run.path("selection.parquet"))
        write_json(run.path("status.json"), {"complete": True})
        return run.folder


def draw_scores(rows: int, seed: int = 0) -> Scores:
    """Every tenth sample has no utility; the third has a contribution for each of two target items."""
    random = np.random.default_rng(seed)
    utility = random.normal(size=rows)
    state = np.where(np.arange(rows) % 10 == 9, "nonfinite", "ok")
    utility[state != "ok"] = np.nan
    return Scores.from_columns(
        id=[f"s{number:07d}" for number in range(rows)],
        domain=np.where(np.arange(rows) % 3 == 0, "table", "chart"),
        supervised_tokens=random.integers(1, 20, rows),
        length_tokens=random.integers(20, 90, rows),
        loss=random.random(rows),
        utility=utility,
        utility_by_target={"goal": utility},
        utility_se=np.full(rows, 0.1),
        state=state,
        contributions=[None if word != "ok" else [0.5, -0.5] for word in state] if rows < 1000 else None,
        metadata={"method": "exact", "signed": True},
    )


def _draw_data(root: Path, rows: int) -> None:
    PIL.Image.new("RGB", (40, 20), "red").save(root / "red.png")
    lines: dict[str, list[str]] = {"chart": [], "table": [], "goal": []}
    for number in range(rows):
        question = f"Question {number}: {HOSTILE}" if number == 1 else f"Question {number}: wie groß?"
        record = {"id": f"s{number:07d}", "images": ["red.png"], "messages": _messages(f"<image>{question}", number)}
        lines["table" if number % 3 == 0 else "chart"].append(json.dumps(record))
    lines["goal"] = [json.dumps({"messages": _messages("What?", 1)})]
    for name, written in lines.items():
        # the other way round, so that file order is not the order of ids
        (root / f"{name}.jsonl").write_text("".join(line + "\n" for line in reversed(written)))


def _messages(question: str, number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": f"answer {number}"}]


def read_selection(folder: Path) -> Selection:
    return Selection.read(folder / "selection.parquet")
