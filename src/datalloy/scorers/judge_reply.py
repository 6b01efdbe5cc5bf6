"""The bytes of a judge's reply in, one verdict out, or the word for why there is none.

A verdict is a finite number inside the scale, found exactly once, in a reply that was finished. Anything else is no
verdict: never a zero, never a mean, never the first number that a text contains. Three ways to answer are read:

- json: the answer is one JSON object, `{"score": n}`; a reason may stand beside it;
- logprobs: the answer is one digit, and the verdict is the expected digit under the probabilities of its alternatives;
- systemone: `transformers serve` gives a probability for each level, without writing anything.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datalloy.display import printable

MAX_REPLY_BYTES = 1 << 20
LEAST_MASS = 0.5  # of the first token's probability that must lie on the scale's digits
SUM_TOLERANCE = 1e-2  # of the probabilities of all levels
SHOWN_TEXT = 400  # characters of an answer that are kept beside its verdict

_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)


class NoVerdictError(Exception):
    """A reply without a verdict; `reason` is one word."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Usage:
    """Tokens that the server says it read and wrote; None where it says nothing that can be believed."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Verdict:
    """`score` from 1 to the number of levels; probabilities of the levels where the server tells them."""

    score: float
    probability_L: tuple[float, ...] | None
    text: str


@dataclass(frozen=True)
class Reply:
    """What a reply says beside its verdict.

    `served_by`: the model and the build that the server says it is. `excerpt`: the beginning of what it wrote.
    """

    body: Mapping[str, Any]
    usage: Usage
    served_by: str
    excerpt: str


def read_reply(data: bytes) -> Reply:
    """The reply as a JSON object. Raises NoVerdictError for anything that is none."""
    if len(data) > MAX_REPLY_BYTES:
        raise NoVerdictError("too_large")
    try:
        body = strict_json(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise NoVerdictError("not_json") from None
    if not isinstance(body, dict):
        raise NoVerdictError("not_json")
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens"))
    names = (body.get("model"), body.get("system_fingerprint"))
    served_by = printable(" ".join(name[:200] for name in names if isinstance(name, str)))
    return Reply(body, Usage(_count(prompt), _count(completion)), served_by, _excerpt(body))


def _excerpt(body: Mapping[str, Any]) -> str:
    try:
        return printable(_text(body["choices"][0])[:SHOWN_TEXT])
    except (KeyError, IndexError, TypeError, AttributeError, NoVerdictError):
        return ""


def read_verdict(reply: Reply, mode: str, levels: int) -> Verdict:
    """The verdict of a reply on a scale from 1 to `levels`. Raises NoVerdictError."""
    if mode == "systemone":
        return _from_levels(reply.body, levels)
    choice = _only_choice(reply.body)
    text = _text(choice)
    if mode == "logprobs":
        return _from_logprobs(choice, text, levels)
    return Verdict(_from_object(text, levels), None, printable(text[:SHOWN_TEXT]))


def strict_json(text: str) -> Any:
    """JSON as its standard has it: no NaN, no Infinity, no key twice. Raises ValueError or RecursionError."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40
    return value if is_count else None


def _only_choice(body: Mapping[str, Any]) -> dict[str, Any]:
    choices = body.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise NoVerdictError("not_one_choice")
    if choices[0].get("finish_reason") != "stop":
        raise NoVerdictError("unfinished")
    return choices[0]


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise NoVerdictError("empty")
    return text.strip()


def _from_object(text: str, levels: int) -> float:
    fenced = _FENCED.fullmatch(text)
    try:
        answer = strict_json(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise NoVerdictError("no_object") from None
    if not isinstance(answer, dict) or "score" not in answer or not answer.keys() <= {"score", "reason"}:
        raise NoVerdictError("no_object")
    score = answer["score"]
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise NoVerdictError("no_number")
    if not 1 <= score <= levels:  # false for what is not finite: 1e999 is read as infinity
        raise NoVerdictError("out_of_range")
    return float(score)


def _from_logprobs(choice: dict[str, Any], text: str, levels: int) -> Verdict:
    scale = [str(level) for level in range(1, levels + 1)]
    if text not in scale:
        raise NoVerdictError("no_digit")
    probability = dict.fromkeys(scale, 0.0)
    for alternative in _alternatives(choice):
        token, logprob = alternative.get("token"), alternative.get("logprob")
        if not isinstance(token, str) or isinstance(logprob, bool) or not isinstance(logprob, int | float):
            raise NoVerdictError("bad_logprobs")
        if not logprob <= 1e-6:
            raise NoVerdictError("bad_logprobs")
        if token.strip(" ") in probability:
            probability[token.strip(" ")] += math.exp(min(logprob, 0.0))
    mass = sum(probability.values())
    if not LEAST_MASS <= mass <= 1 + SUM_TOLERANCE:
        raise NoVerdictError("bad_logprobs")
    probability_L = tuple(p / mass for p in probability.values())
    return Verdict(_expected(probability_L), probability_L, text[:SHOWN_TEXT])


def _alternatives(choice: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the first token that is no white space: the digit, since the answer is nothing else."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    tokens = content if isinstance(content, list) else []
    for token in tokens:
        if not isinstance(token, dict) or not isinstance(token.get("token"), str):
            break
        if token["token"].strip():
            top = token.get("top_logprobs")
            if isinstance(top, list) and top and all(isinstance(item, dict) for item in top):
                return top
            break
    raise NoVerdictError("no_logprobs")


def _from_levels(body: Mapping[str, Any], levels: int) -> Verdict:
    answers = body.get("answers")
    answer = answers.get("rating") if isinstance(answers, dict) and len(answers) == 1 else None
    found = answer.get("probabilities") if isinstance(answer, dict) else None
    if not isinstance(found, dict) or list(found) != [str(level) for level in range(levels)]:
        raise NoVerdictError("no_levels")
    values = list(found.values())
    if any(isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1 for p in values):
        raise NoVerdictError("bad_levels")
    if abs(sum(values) - 1) > SUM_TOLERANCE:
        raise NoVerdictError("bad_levels")
    probability_L = tuple(float(p) / sum(values) for p in values)
    return Verdict(_expected(probability_L), probability_L, "")


def _expected(probability_L: tuple[float, ...]) -> float:
    return sum(level * p for level, p in enumerate(probability_L, start=1))
