"""A generated answer and its reference in, a mark between 0 and 1 out.

Four metrics, each the published rule of the benchmarks that use it. All compare answers after one normalisation:
surrounding white space and a full stop at the end go, case is folded, runs of white space become one blank.
Nothing else is repaired: a metric that guesses what the model meant rewards models for being vague.

Two metrics of a recipe have no entry in `METRICS`, because they compare no texts: `evaluation` asks how probable the
known answer was. `answer_probability` is the probability of exactly that answer, which is the expected exact match
of an answer drawn from the model; `loss` is in nats per token, and the only one of which less is better.
"""

import re
from collections.abc import Callable

from datalloy.errors import DataError

RELATIVE_TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5

_NUMBER = re.compile(r"([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?) ?(%?)")
_LONE_LETTER = re.compile(r"\(?([a-z])\)?[.:]?")
_MARKED_LETTER = re.compile(r"\(([a-z])\)|(?:^| )([a-z])[).:](?= )")
_STATED_LETTER = re.compile(r"\b(?:answer|option|choice)(?: is)? ?:? ?(?:option )?(?:\(([a-z])\)|([a-z])(?=[).,:;]|$))")
_JOINED_LETTER = re.compile(r"(?:\b(?:or|and) |[,/&;] ?)(?:\([a-z]\)|[a-z](?=[).,:;/]|$))")


def normalise(text: str) -> str:
    """The form in which answers are compared: case folded, white space collapsed, no full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def exact_match(prediction: str, reference: str) -> float:
    """1 when the normalised answers are equal, else 0."""
    return float(normalise(prediction) == normalise(reference))


def relaxed_accuracy(prediction: str, reference: str) -> float:
    """1 when a number is within 5 % of the reference, or another answer equals it; else 0.

    (ChartQA, arXiv 2203.10244, sec. 5.1.) `12%` is 0.12 as in the scripts that published results come from, so it
    does not match 12. Thousands separators are read. A reference of zero is matched by zero alone. Trap of the
    published rule, kept for comparability: years are numbers too, so 1990 passes for 2010.
    """
    predicted, expected = parse_number(prediction), parse_number(reference)
    if predicted is None or expected is None:
        return exact_match(prediction, reference)
    return float(abs(predicted - expected) <= RELATIVE_TOLERANCE * abs(expected))


def parse_number(text: str) -> float | None:
    """The number that the whole of `text` is, such as -3, 1,234.5, .5, 2e3 or 12% (0.12); None for any other text."""
    match = _NUMBER.fullmatch(normalise(text))
    if match is None or not any(character.isdigit() for character in match[1].partition("e")[0]):
        return None
    return float(match[1].replace(",", "")) / (100 if match[2] else 1)


def option_letter(prediction: str, reference: str) -> float:
    """1 when the prediction names the reference's option and no other, else 0.

    Raises DataError when the reference itself names no single option.
    """
    expected = parse_option(reference)
    if expected is None:
        raise DataError(
            f"the reference answer {reference[:80]!r} names no option letter such as B or (B); "
            "use the metric exact_match for answers in words"
        )
    return float(parse_option(prediction) == expected)


def parse_option(text: str) -> str | None:
    """The one option that an answer names, as a capital letter; None when it names none or may mean several.

    Read are a letter alone (`B`, `(b)`, `B.`), a letter marked as an option (`B. Paris`, `(B) Paris`), and a letter
    stated as the answer (`Answer: B`, `The answer is (B) because ...`). Any other bare letter is taken for a word.
    Two different letters, or one joined to another by a comma, a slash, "or" or "and", are ambiguous.
    """
    answer = " ".join(text.replace("*", "").casefold().split())
    if match := _LONE_LETTER.fullmatch(answer):
        return match[1].upper()
    found = [*_MARKED_LETTER.finditer(answer), *_STATED_LETTER.finditer(answer)]
    letters = {match[1] or match[2] for match in found}
    if len(letters) != 1 or _JOINED_LETTER.search(answer):
        return None
    return letters.pop().upper()


def anls(prediction: str, reference: str) -> float:
    """Normalised Levenshtein similarity of the answers, in [0, 1], and 0 where it does not exceed one half.

    (ST-VQA, arXiv 1905.13648, eq. 1; used by DocVQA.) For one reference; the mean over items is the benchmark's figure.
    """
    predicted, expected = normalise(prediction), normalise(reference)
    longest = max(len(predicted), len(expected))
    similarity = 1 - edit_distance(predicted, expected) / longest if longest else 1.0
    return similarity if similarity > ANLS_THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of one character that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is an improvement: of all but the loss."""
    return metric != "loss"


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "relaxed_accuracy": relaxed_accuracy,
    "option_letter": option_letter,
    "anls": anls,
}
