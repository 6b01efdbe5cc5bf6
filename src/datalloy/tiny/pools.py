"""A plan and a seed in, a folder with a faulty pool, its targets and its held-out sets out.

Files are ordinary `messages` JSONL with PNG pictures, as a user would have them. What is wrong with which sample
stands in `truth.jsonl` beside them, for measuring only: no recipe names that file.

Easy samples ask what the embedded model was taught. Hard ones ask for the same numbers in words, a form of answer it
has seldom been asked for, or for one more, which it never has been: clean, of a high loss, and what the targets need.
So "low loss" is not automatically right. Words make answers longer, one more does not.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import PIL.Image

from datalloy.tiny.world import DRAW, FAULTS, Drawing, Question

NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
)
WORDS = ("amber", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island", "jungle", "kettle")


@dataclass(frozen=True)
class PoolPlan:
    """How much of what is drawn.

    `samples`: per domain (a domain is a skill). `faults`: share of each fault in every domain; `faults_of`: the same
    for a domain that has shares of its own. `hard`: share of hard questions among the pool's questions, and among the
    targets' and the held-out ones unless `target_hard` says otherwise; `hard_as`: what they ask for, one of `HARD`.
    `targets`: skills with a target, each with `target_items` target and `holdout_items` held-out questions.
    """

    samples: Mapping[str, int] = field(default_factory=lambda: {"chart": 240, "counting": 240, "table": 240})
    faults: Mapping[str, float] = field(
        default_factory=lambda: {
            "wrong_answer": 0.20,
            "other_picture": 0.10,
            "off_target": 0.08,
            "near_copy": 0.06,
            "garbled": 0.06,
        }
    )
    faults_of: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    hard: float = 0.4
    target_hard: float | None = None
    hard_as: str = "in words"
    targets: Sequence[str] = ("chart", "counting")
    target_items: int = 48
    holdout_items: int = 200


def write_pool(folder: Path, plan: PoolPlan, seed: int) -> None:
    """Draw everything into `folder`: DOMAIN.jsonl, TARGET.target.jsonl, TARGET.holdout.jsonl, images/, truth.jsonl."""
    unknown = set(plan.faults).union(*plan.faults_of.values()) - set(FAULTS)
    if unknown:
        raise ValueError(f"unknown faults {sorted(unknown)}, known are {sorted(FAULTS)}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    truths = []
    for skill, count in plan.samples.items():
        rows, labels = _draw_domain(folder, skill, count, plan, random.Random(f"{seed}-pool-{skill}"))
        _write_lines(folder / f"{skill}.jsonl", rows)
        truths += labels
    if plan.target_hard is not None:
        plan = replace(plan, hard=plan.target_hard)
    for skill in plan.targets:
        for kind, count in (("target", plan.target_items), ("holdout", plan.holdout_items)):
            rng = random.Random(f"{seed}-{kind}-{skill}")
            rows = [_clean_row(folder, f"{kind}-{skill}-{i:05d}", skill, plan, rng) for i in range(count)]
            _write_lines(folder / f"{skill}.{kind}.jsonl", rows)
    _write_lines(folder / "truth.jsonl", truths)


def read_truth(folder: Path) -> dict[str, dict]:
    """What was drawn as what: sample id -> {"fault": "clean" or a fault's name, "hard": bool}."""
    lines = (folder / "truth.jsonl").read_text().splitlines()
    return {row.pop("id"): row for row in map(json.loads, lines)}


def _draw_domain(
    folder: Path, skill: str, count: int, plan: PoolPlan, rng: random.Random
) -> tuple[list[dict], list[dict]]:
    shares = plan.faults_of.get(skill, plan.faults)
    faults = [name for name, share in shares.items() for _ in range(round(share * count))]
    kinds = faults + ["clean"] * (count - len(faults))
    # near-copies copy a clean sample that is already drawn, so they come last; the file is shuffled afterwards
    kinds.sort(key=lambda kind: kind == "near_copy")
    numbers = rng.sample(range(count), count)
    rows, labels = [], []
    clean: list[tuple[dict, Drawing, bool]] = []
    for number, kind in zip(numbers, kinds, strict=True):
        sample_id = f"{skill}-{number:05d}"
        if kind == "near_copy":
            row, hard = _near_copy(folder, sample_id, rng.choice(clean))
        elif kind == "off_target":
            row, hard = _spelling_row(sample_id, rng), False
        else:
            row, hard, drawing, question = _question_row(folder, sample_id, skill, plan, rng)
            if kind == "wrong_answer":
                _answer(row, rng.choice(question.alternatives))
            elif kind == "other_picture":
                _ask(row, *_foreign_question(drawing, question, plan.hard_as, rng))
            elif kind == "garbled":
                _ask(row, _shuffled(question.text, rng), _shuffled(question.answer + question.text[:6], rng))
            else:
                clean.append((row, drawing, hard))
        rows.append(row)
        labels.append({"id": sample_id, "domain": skill, "fault": kind, "hard": hard})
    rng.shuffle(rows)
    return rows, labels


def _question_row(
    folder: Path, sample_id: str, skill: str, plan: PoolPlan, rng: random.Random
) -> tuple[dict, bool, Drawing, Question]:
    drawing = DRAW[skill](rng)
    hard = rng.random() < plan.hard
    question = rng.choice(pool_questions(drawing, hard=hard, hard_as=plan.hard_as))
    _save(folder, sample_id, drawing.pixels)
    return _row(sample_id, question.text, question.answer, image=True), hard, drawing, question


def _in_words(question: Question) -> Question:
    words = (NUMBERS[int(number)] for number in (question.answer, *question.alternatives))
    return Question(question.text.replace("?", " in words?"), next(words), tuple(words), hard=True)


def _plus_one(question: Question) -> Question:
    numbers = (str(int(number) + 1) for number in (question.answer, *question.alternatives))
    return Question(question.text.replace("?", " plus one?"), next(numbers), tuple(numbers), hard=True)


HARD = {"in words": _in_words, "plus one": _plus_one}


def pool_questions(drawing: Drawing, *, hard: bool, hard_as: str = "in words") -> list[Question]:
    """What a pool asks about a picture: the taught questions, or those with a number for an answer, made hard."""
    taught = [question for question in drawing.questions if not question.hard]
    if not hard:
        return taught
    numeric = [q for q in taught if q.answer.isdigit()] or [q for q in drawing.questions if q.answer.isdigit()]
    return [HARD[hard_as](question) for question in numeric]


def _clean_row(folder: Path, sample_id: str, skill: str, plan: PoolPlan, rng: random.Random) -> dict:
    return _question_row(folder, sample_id, skill, plan, rng)[0]


def _near_copy(folder: Path, sample_id: str, original: tuple[dict, Drawing, bool]) -> tuple[dict, bool]:
    row, drawing, hard = original
    _save(folder, sample_id, np.minimum(drawing.pixels.astype(int) + 6, 255).astype(np.uint8))
    question, answer = (message["content"] for message in row["messages"])
    return _row(sample_id, question.removeprefix("<image>"), answer, image=True), hard


def _foreign_question(drawing: Drawing, question: Question, hard_as: str, rng: random.Random) -> tuple[str, str]:
    """A question of the same difficulty about another picture, whose answer is not right for this picture."""
    own = {(q.text, q.answer) for q in pool_questions(drawing, hard=question.hard, hard_as=hard_as)}
    while True:
        other = pool_questions(DRAW[drawing.skill](rng), hard=question.hard, hard_as=hard_as)
        if foreign := [q for q in other if (q.text, q.answer) not in own]:
            picked = rng.choice(foreign)
            return picked.text, picked.answer


def _spelling_row(sample_id: str, rng: random.Random) -> dict:
    word = "".join(rng.sample(rng.choice(WORDS), 5))
    return _row(sample_id, f"Spell {word} backwards.", word[::-1], image=False)


def _shuffled(text: str, rng: random.Random) -> str:
    return "".join(rng.sample(text, len(text)))


def _row(sample_id: str, question: str, answer: str, *, image: bool) -> dict:
    return {
        "id": sample_id,
        "images": [f"images/{sample_id}.png"] if image else [],
        "messages": [
            {"role": "user", "content": ("<image>" if image else "") + question},
            {"role": "assistant", "content": answer},
        ],
    }


def _ask(row: dict, question: str, answer: str) -> None:
    row["messages"][0]["content"] = "<image>" + question
    _answer(row, answer)


def _answer(row: dict, answer: str) -> None:
    row["messages"][1]["content"] = answer


def _save(folder: Path, sample_id: str, pixels: np.ndarray) -> None:
    PIL.Image.fromarray(pixels).save(folder / "images" / f"{sample_id}.png")


def _write_lines(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
