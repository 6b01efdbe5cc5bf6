"""The drawn world: random draws in, pictures with questions and known answers out.

A 64-pixel picture is a board of 4 x 4 cells of 16 pixels, the same cells that the embedded model's vision tower
cuts it into, so that a tiny model can learn to see in minutes. Five skills are drawn (chart, counting, spatial,
table, arithmetic). Every skill asks easy questions, which the embedded model was taught, and hard ones, which it
has hardly ever seen: clean samples with a high loss, so that "low loss" is not automatically "good".

A pool can be given the faults of real pools (`FAULTS`). What was done to which sample is returned beside the
samples and never written into them.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CELL, SIDE = 16, 4
COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 210), "yellow": (235, 190, 20)}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
CODES = {"circle": "o", "square": "s", "triangle": "t", "cross": "x"}
SKILLS = ("chart", "counting", "spatial", "table", "arithmetic")
FAULTS = {
    "wrong_answer": "the answer is another plausible answer to the question",
    "other_picture": "question and answer belong to another picture of the same skill",
    "off_target": "correct, but of a kind that no target asks for",
    "near_copy": "a sample of the pool again, the picture a shade brighter",
    "garbled": "the letters of question and answer are shuffled",
}
DESCRIBE = "Describe the picture."

_GLYPHS = {
    "0": "01110100011001110101110011000101110",
    "1": "00100011000010000100001000010001110",
    "2": "01110100010000100010001000100011111",
    "3": "11111000100010000010000011000101110",
    "4": "00010001100101010010111110001000010",
    "5": "11111100001111000001000011000101110",
    "6": "00110010001000011110100011000101110",
    "7": "11111000010001000100010000100001000",
    "8": "01110100011000101110100011000101110",
    "9": "01110100011000101111000010001001100",
    "+": "00000001000010011111001000010000000",
    "-": "00000000000000011111000000000000000",
    "=": "00000000001111100000111110000000000",
    "A": "01110100011000111111100011000110001",
    "B": "11110100011000111110100011000111110",
    "C": "01110100011000010000100001000101110",
    "D": "11100100101000110001100011001011100",
    "E": "11111100001000011110100001000011111",
    "F": "11111100001000011110100001000010000",
    "H": "10001100011000111111100011000110001",
    "K": "10001100101010011000101001001010001",
}
LETTERS = "ABCDEFHK"


class Question(NamedTuple):
    """One question about a picture, its answer, the wrong answers one could believe, and whether it is hard."""

    text: str
    answer: str
    alternatives: tuple[str, ...]
    hard: bool


@dataclass(frozen=True)
class Drawing:
    """A picture (`pixels`: 64 x 64 x 3, uint8), a dense description of it, and all questions that can be asked."""

    skill: str
    pixels: np.ndarray
    description: str
    questions: tuple[Question, ...]


def _glyph(char: str) -> np.ndarray:
    """Mask of one character, 16 x 16, drawn at twice its 5 x 7 size."""
    bits = np.array([int(b) for b in _GLYPHS[char]], dtype=bool).reshape(7, 5)
    mask = np.zeros((CELL, CELL), dtype=bool)
    mask[1:15, 3:13] = bits.repeat(2, axis=0).repeat(2, axis=1)
    return mask


def _shape(name: str) -> np.ndarray:
    """Mask of one shape, 16 x 16."""
    y, x = np.mgrid[0:CELL, 0:CELL] - 7.5
    if name == "circle":
        return x**2 + y**2 <= 36
    if name == "square":
        return (abs(x) <= 5.5) & (abs(y) <= 5.5)
    if name == "triangle":
        return (y <= 5.5) & (2 * abs(x) <= y + 6.5)
    return ((abs(x) <= 2) | (abs(y) <= 2)) & (abs(x) <= 6) & (abs(y) <= 6)


_MASKS = {char: _glyph(char) for char in _GLYPHS} | {name: _shape(name) for name in SHAPES}


def _board() -> np.ndarray:
    return np.full((CELL * SIDE, CELL * SIDE, 3), 250, dtype=np.uint8)


def _put(pixels: np.ndarray, row: int, column: int, what: str, colour: tuple[int, int, int] = (20, 20, 20)) -> None:
    pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL][_MASKS[what]] = colour


def _numbers_near(value: int, low: int, high: int) -> tuple[str, ...]:
    """The numbers one could believe instead of `value`."""
    return tuple(str(v) for v in range(max(low, value - 4), min(high, value + 4) + 1) if v != value)


def _others(value: str, among: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(other for other in among if other != value)


def draw_counting(rng: random.Random) -> Drawing:
    """Shapes on the board. Easy: how many of one colour or one shape. Hard: of one colour and shape, or differences."""
    pixels, cells = _board(), [""] * SIDE**2
    palette, shapes = rng.sample(list(COLOURS), 2), rng.sample(SHAPES, 2)
    placed = []
    for cell in rng.sample(range(SIDE**2), rng.randint(2, 9)):
        colour, shape = rng.choice(palette), rng.choice(shapes)
        _put(pixels, *divmod(cell, SIDE), shape, COLOURS[colour])
        cells[cell] = colour[0] + CODES[shape]
        placed.append((colour, shape))
    questions = []
    for colour in palette:
        count = sum(c == colour for c, _ in placed)
        questions.append(Question(f"How many {colour}?", str(count), _numbers_near(count, 0, 9), False))
    for shape in shapes:
        count = sum(s == shape for _, s in placed)
        questions.append(Question(f"How many {PLURALS[shape]}?", str(count), _numbers_near(count, 0, 9), False))
    questions.append(Question("How many in all?", str(len(placed)), _numbers_near(len(placed), 1, 12), False))
    for colour in palette:
        for shape in shapes:
            count = sum(item == (colour, shape) for item in placed)
            questions.append(
                Question(f"How many {colour} {PLURALS[shape]}?", str(count), _numbers_near(count, 0, 9), True)
            )
    return Drawing("counting", pixels, _describe(cells), tuple(questions))


def _describe(cells: list[str]) -> str:
    rows = [" ".join(cell or "." for cell in cells[r * SIDE : (r + 1) * SIDE]) for r in range(SIDE)]
    return "/".join(rows)


def draw_spatial(rng: random.Random) -> Drawing:
    """Four to six different shapes. Easy: what is left, right, above, below. Hard: colour two steps away, rows."""
    pixels, cells = _board(), [""] * SIDE**2
    kinds = rng.sample([(c, s) for c in COLOURS for s in SHAPES], rng.randint(6, 9))
    where = dict(zip(rng.sample(range(SIDE**2), len(kinds)), kinds, strict=True))
    for cell, (colour, shape) in where.items():
        _put(pixels, *divmod(cell, SIDE), shape, COLOURS[colour])
        cells[cell] = colour[0] + CODES[shape]
    names = tuple(f"{c} {s}" for c, s in where.values())
    questions = []
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    for cell, (colour, shape) in where.items():
        row, column = divmod(cell, SIDE)
        for word, (down, right) in steps.items():
            r, c = row + down, column + right
            if 0 <= r < SIDE and 0 <= c < SIDE and (neighbour := where.get(r * SIDE + c)):
                answer = " ".join(neighbour)
                text = f"What is {word} the {colour} {shape}?"
                questions.append(Question(text, answer, _others(answer, names), False))
        alike = sum(c // SIDE == row for c in where) - 1
        text = f"How many others are in the row of the {colour} {shape}?"
        questions.append(Question(text, str(alike), _others(str(alike), ("0", "1", "2", "3")), True))
    return Drawing("spatial", pixels, _describe(cells), tuple(questions))


def draw_chart(rng: random.Random) -> Drawing:
    """Four bars of heights 1 to 9. Easy: height of a bar, highest bar. Hard: differences and sums of two bars."""
    pixels = _board()
    colours = rng.sample(list(COLOURS), SIDE)
    heights = [rng.randint(1, 9) for _ in colours]
    for column, (colour, height) in enumerate(zip(colours, heights, strict=True)):
        pixels[64 - 7 * height :, column * CELL + 2 : column * CELL + 14] = COLOURS[colour]
    pixels[np.arange(64 - 7, 0, -7), ::4] = 150
    questions = []
    for colour, height in zip(colours, heights, strict=True):
        questions.append(Question(f"How high is {colour}?", str(height), _numbers_near(height, 1, 9), False))
    for word, extreme in (("highest", max(heights)), ("lowest", min(heights))):
        if heights.count(extreme) == 1:
            answer = colours[heights.index(extreme)]
            questions.append(Question(f"Which bar is {word}?", answer, _others(answer, tuple(colours)), False))
    for i in range(SIDE):
        for j in range(SIDE):
            if heights[i] > heights[j]:
                gap = heights[i] - heights[j]
                text = f"How much higher is {colours[i]} than {colours[j]}?"
                questions.append(Question(text, str(gap), _numbers_near(gap, 1, 9), True))
            if i < j:
                total = heights[i] + heights[j]
                text = f"What are {colours[i]} and {colours[j]} together?"
                questions.append(Question(text, str(total), _numbers_near(total, 2, 18), True))
    description = " ".join(f"{colour} {height}" for colour, height in zip(colours, heights, strict=True))
    return Drawing("chart", pixels, description, tuple(questions))


def draw_table(rng: random.Random) -> Drawing:
    """Four rows: a letter, then two one-digit columns. Easy: one value. Hard: sum of a row, letter of the maximum."""
    pixels = _board()
    letters = rng.sample(LETTERS, SIDE)
    values = [(rng.randint(0, 9), rng.randint(0, 9)) for _ in letters]
    for row, (letter, (first, second)) in enumerate(zip(letters, values, strict=True)):
        _put(pixels, row, 0, letter, (150, 30, 120))
        _put(pixels, row, 1, str(first))
        _put(pixels, row, 3, str(second))
    pixels[:, 2 * CELL + 7 : 2 * CELL + 9] = 180
    questions = []
    for letter, pair in zip(letters, values, strict=True):
        for name, value in zip(("first", "second"), pair, strict=True):
            text = f"What is the {name} number of {letter}?"
            questions.append(Question(text, str(value), _numbers_near(value, 0, 9), False))
        total = sum(pair)
        text = f"What do the numbers of {letter} add up to?"
        questions.append(Question(text, str(total), _numbers_near(total, 0, 18), True))
    firsts = [pair[0] for pair in values]
    if firsts.count(max(firsts)) == 1:
        answer = letters[firsts.index(max(firsts))]
        questions.append(Question("Who has the largest first number?", answer, _others(answer, tuple(letters)), True))
    description = "/".join(f"{letter} {a} {b}" for letter, (a, b) in zip(letters, values, strict=True))
    return Drawing("table", pixels, description, tuple(questions))


def draw_arithmetic(rng: random.Random) -> Drawing:
    """Two or three sums on the board, one a row, marked by a coloured square. Easy: one digit. Hard: two digits."""
    pixels = _board()
    colours = rng.sample(list(COLOURS), SIDE)
    questions, lines = [], []
    for row, colour in enumerate(colours):
        sign = rng.choice("+-")
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        if sign == "-" and a < b:
            a, b = b, a
        pixels[row * CELL + 4 : row * CELL + 12, 4:12] = COLOURS[colour]
        for column, char in enumerate(f"{a}{sign}{b}", start=1):
            _put(pixels, row, column, char)
        result = a + b if sign == "+" else a - b
        questions.append(Question(f"What is {colour}?", str(result), _numbers_near(result, 0, 18), False))
        text = f"What is ten more than {colour}?"
        questions.append(Question(text, str(result + 10), _numbers_near(result + 10, 10, 28), True))
        lines.append(f"{colour[0]} {a}{sign}{b}")
    return Drawing("arithmetic", pixels, "/".join(lines), tuple(questions))


DRAW = {
    "chart": draw_chart,
    "counting": draw_counting,
    "spatial": draw_spatial,
    "table": draw_table,
    "arithmetic": draw_arithmetic,
}
