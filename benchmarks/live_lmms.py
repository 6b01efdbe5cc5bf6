"""lmms-eval's `simple_evaluate` on live merges of the embedded model: drawn tasks, two mixtures, one process.

Needs lmms-eval in its environment. Two experts are tuned for a moment, and the base and merges of them are evaluated
one after another, by lmms-eval and by Datalloy's own evaluation on the same items: the two must agree item by item,
and a mixture must agree with itself when it is evaluated again after another, with caches off and with a cache of its
own. Two tasks ask for written answers, one offers choices. Run from the repository:

    python benchmarks/live_lmms.py --out benchmarks/results/live_lmms.json
"""

import argparse
import importlib.metadata
import io
import json
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet

from datalloy.config import Evaluate, Train
from datalloy.encoding import EncodedSamples
from datalloy.evaluation import answer_losses, evaluate
from datalloy.evaluators.harness import read_aggregated
from datalloy.evaluators.live_lmms import LmmsTasks
from datalloy.merging import open_merge
from datalloy.sample import Origin, Sample, Turn
from datalloy.tiny.world import DRAW
from datalloy.training import train
from datalloy.vlm import VLM

SKILLS, ITEMS, SAMPLES, STEPS, MAX_NEW_TOKENS = ("chart", "table"), 40, 64, 12, 8
MIXTURES = ((1.0, 0.0), (0.3, 0.7), (1.0, 0.0))
YAML = """\
task: drawn_{skill}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder}/{skill}.parquet
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {length}
process_results: !function utils.process_results
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOICE_YAML = """\
task: drawn_choice
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {folder}/chart.parquet
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: gold
doc_to_choice: !function utils.doc_to_choice
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
import io

import PIL.Image


def doc_to_visual(doc):
    return [PIL.Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]


def doc_to_choice(doc):
    return doc["choices"]


def process_results(doc, results):
    return {"exact_match": float(results[0].strip().lower() == doc["answer"].lower())}
"""


class Drawn:
    """A picture in memory."""

    def __init__(self, pixels):
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "PNG")
        self.data = file.getvalue()

    def read(self):
        return self.data


def draw(skill, count, seed):
    rng, samples = random.Random(f"{skill}-{seed}"), []
    for i in range(count):
        drawing = DRAW[skill](rng)
        question = rng.choice(drawing.questions)
        turns = (Turn("user", (Drawn(drawing.pixels), question.text)), Turn("assistant", (question.answer,)))
        samples.append(Sample(f"{skill}-{i}", skill, turns, Origin(Path(skill), i), f"{skill}-{seed}-{i}"))
    return samples


def choices_of(sample, others):
    """The right answer among three others of the same task, sorted."""
    wrong = [s.answer for s in others if s.answer != sample.answer]
    return sorted({sample.answer, *dict.fromkeys(wrong[:3])})


def write_tasks(folder, items):
    for skill, samples in items.items():
        rows = [
            {
                "image": {"bytes": s.images[0].read(), "path": None},
                "question": s.turns[0].text,
                "answer": s.answer,
                "choices": choices_of(s, samples),
                "gold": choices_of(s, samples).index(s.answer),
            }
            for s in samples
        ]
        pa.parquet.write_table(pa.Table.from_pylist(rows), folder / f"{skill}.parquet")
        (folder / f"drawn_{skill}.yaml").write_text(YAML.format(skill=skill, folder=folder, length=MAX_NEW_TOKENS))
    (folder / "drawn_choice.yaml").write_text(CHOICE_YAML.format(folder=folder))
    (folder / "utils.py").write_text(UTILS)


def own_marks(vlm, task, items):
    """Every item's mark by Datalloy's own means."""
    settings = Evaluate(max_new_tokens=MAX_NEW_TOKENS, resamples=100)
    if task != "drawn_choice":
        return evaluate(vlm, items[task.removeprefix("drawn_")], "exact_match", settings).values_V
    marks = []
    for sample in items["chart"]:
        options = [
            replace(sample, turns=(sample.turns[0], Turn("assistant", (c,))))
            for c in choices_of(sample, items["chart"])
        ]
        losses = answer_losses(vlm, [vlm.encode(option) for option in options], batch_size=8)
        marks.append(float(options[int(np.argmin(losses))].answer == sample.answer))
    return np.array(marks)


def compare(tasks, vlm, items, label, **cached):
    """One model by both evaluators; what they say, and whether every item has the same mark."""
    started = time.perf_counter()
    results = tasks.evaluate(vlm, **cached)
    row = {"model": label, "seconds": round(time.perf_counter() - started, 2), "tasks": {}}
    for measure in read_aggregated(Path("live"), results):
        marks_V = own_marks(vlm, measure.task, items)
        told = sorted(results["samples"][measure.task], key=lambda sample: sample["doc_id"])
        row["tasks"][measure.task] = {
            measure.metric: measure.value,
            "standard_error": measure.standard_error,
            "n": measure.n,
            "datalloy": float(marks_V.mean()),
            "equal_item_by_item": [sample[measure.metric] for sample in told] == marks_V.tolist(),
        }
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    base = VLM.load("tiny", device="cpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        items = {skill: draw(skill, ITEMS, seed=1) for skill in SKILLS}
        write_tasks(folder, items)
        for skill in SKILLS:
            vlm, settings = base.copy(), Train(adapter="none", learning_rate=1e-3, batch_size=16)
            encoded = EncodedSamples(vlm, draw(skill, SAMPLES, seed=0), max_tokens=settings.max_tokens)
            train(vlm, encoded, settings, folder / "experts" / skill, steps=STEPS)
        started = time.perf_counter()
        written = [f"drawn_{skill}" for skill in SKILLS]
        tasks = LmmsTasks(["drawn_choice", *written], folder=folder, own_only=True)
        indexed = time.perf_counter() - started
        cacheable = LmmsTasks(written, folder=folder, own_only=True)
        rows = [compare(tasks, base, items, "base")]
        merge = open_merge(base, {skill: folder / "experts" / skill for skill in SKILLS})
        for cache in (None, folder / "cache"):
            for shares in MIXTURES:
                weights = dict(zip(SKILLS, shares, strict=True))
                label = " + ".join(f"{w:g} {skill}" for skill, w in weights.items())
                cached = {} if cache is None else {"weights": weights, "response_cache": cache}
                label += "" if cache is None else ", cached by mixture"
                used = tasks if cache is None else cacheable
                rows.append(compare(used, merge.set(np.array(shares)), items, label, **cached))
    versions = {name: importlib.metadata.version(name) for name in ("lmms_eval", "torch", "transformers", "datasets")}
    found = {"versions": versions, "seconds_to_index": round(indexed, 1), "items_a_task": ITEMS, "models": rows}
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
