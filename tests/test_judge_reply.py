"""Reading verdicts: closed forms, and that nothing but a verdict becomes a number."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datalloy.scorers.judge_reply import MAX_REPLY_BYTES, NoVerdictError, Usage, read_reply, read_verdict
from faulty_judge import WITHOUT_VERDICT, completion


def read(body, mode="json", levels=5):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_verdict(read_reply(data), mode, levels)


def word(body, mode="json", levels=5):
    with pytest.raises(NoVerdictError) as raised:
        read(body, mode, levels)
    return raised.value.reason


@pytest.mark.parametrize(
    "content",
    [
        '{"score": 4}',
        ' {"score":4.0}\n',
        '{"reason": "right", "score": 4}',
        '```json\n{"score": 4}\n```',
        '```\n{"score": 4}```',
    ],
)
def test_one_object_with_one_score_is_a_verdict(content):
    assert read(completion(content)).score == 4


def test_scores_between_levels_are_numbers_too():
    assert read(completion('{"score": 3.5}')).score == 3.5


@pytest.mark.parametrize("name", WITHOUT_VERDICT)
def test_what_is_no_verdict_has_a_word(name):
    assert word(WITHOUT_VERDICT[name]).replace("_", "").isalpha()


def test_a_reply_beyond_the_limit_is_not_read():
    assert word(b" " * MAX_REPLY_BYTES + b"{}") == "too_large"


@given(st.binary(max_size=300))
def test_bytes_at_random_are_no_verdict(data):
    word(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["score", "reason", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(json_values, st.sampled_from(["json", "logprobs", "systemone"]))
def test_whatever_stands_in_a_reply_is_a_number_on_the_scale_or_no_verdict(value, mode):
    bodies = [
        value,
        {"choices": value},
        {"choices": [value]},
        completion(value),
        completion(json.dumps(value)),
        {**completion("4"), "choices": [{**completion("4")["choices"][0], "logprobs": value}]},
        {"answers": value},
        {"answers": {"rating": {"probabilities": value}}},
        {**completion(), "usage": value, "model": value},
    ]
    for body in bodies:
        try:
            score = read(json.dumps(body).encode(), mode).score
        except NoVerdictError:
            continue
        assert 1 <= score <= 5


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 0}, Usage(3, 0)),
        ({"input_tokens": 3, "output_tokens": 2}, Usage(3, 2)),
        ({"prompt_tokens": -3, "completion_tokens": True}, Usage()),
        ({"prompt_tokens": 2.5, "completion_tokens": "7"}, Usage()),
        (None, Usage()),
        ([1], Usage()),
    ],
)
def test_tokens_are_counts_or_nothing(usage, expected):
    assert read_reply(json.dumps(completion(usage=usage)).encode()).usage == expected


def test_who_served_is_told_by_model_and_build():
    assert read_reply(json.dumps(completion()).encode()).served_by == "judge-2026 fp1"
    assert read_reply(json.dumps({"model": 3}).encode()).served_by == ""


# --- logprobs ------------------------------------------------------------------------------------------------------


def with_logprobs(content, *tokens):
    body = completion(content)
    body["choices"][0]["logprobs"] = {
        "content": [
            {"token": token, "logprob": -0.1, "top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}
            for token, top in tokens
        ]
    }
    return body


HALVES = {"4": math.log(0.6), "5": math.log(0.2), "The": math.log(0.2)}


def test_the_verdict_is_the_expected_digit_among_the_digits():
    verdict = read(with_logprobs("4", ("4", HALVES)), "logprobs")
    assert verdict.score == pytest.approx(0.75 * 4 + 0.25 * 5)
    assert verdict.probability_L == pytest.approx([0, 0, 0, 0.75, 0.25])


def test_a_space_before_the_digit_is_the_same_digit():
    top = {"4": math.log(0.3), " 4": math.log(0.3), "1": math.log(0.2)}
    assert read(with_logprobs("4", ("\n", {}), (" 4", top)), "logprobs").score == pytest.approx(0.75 * 4 + 0.25)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (completion("4"), "no_logprobs"),
        (with_logprobs("4"), "no_logprobs"),
        (with_logprobs("4", ("4", {})), "no_logprobs"),
        (with_logprobs("6", ("6", HALVES)), "no_digit"),
        (with_logprobs("\uff14", ("\uff14", HALVES)), "no_digit"),
        (with_logprobs("4 or 5", ("4", HALVES)), "no_digit"),
        (with_logprobs("4", ("4", {"4": math.log(0.3)})), "bad_logprobs"),
        (with_logprobs("4", ("4", {"4": 0.7})), "bad_logprobs"),
        (with_logprobs("4", ("4", {"4": 0.0, "5": 0.0})), "bad_logprobs"),
        (with_logprobs("4", ("4", {"4": None})), "bad_logprobs"),
    ],
)
def test_without_believable_probabilities_there_is_no_verdict(body, reason):
    assert word(body, "logprobs") == reason


# --- systemone -----------------------------------------------------------------------------------------------------


def levels(*probabilities):
    return {"answers": {"rating": {"type": "score", "probabilities": {str(i): p for i, p in enumerate(probabilities)}}}}


def test_the_verdict_is_the_expected_level_counted_from_one():
    assert read(levels(0.5, 0.25, 0.25), "systemone", 3).score == pytest.approx(1.75)
    assert read(levels(0, 0, 1), "systemone", 3).score == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (levels(0.5, 0.5), "no_levels"),
        (levels(0.25, 0.25, 0.25, 0.25), "no_levels"),
        (levels(0.5, 0.25, 0.5), "bad_levels"),
        (levels(1.5, -0.25, -0.25), "bad_levels"),
        (levels(True, 0, 0), "bad_levels"),
        (levels("1", 0, 0), "bad_levels"),
        ({"answers": {}}, "no_levels"),
        ({"answers": levels(1, 0, 0)["answers"] | {"other": {}}}, "no_levels"),
        (completion("3"), "no_levels"),
    ],
)
def test_without_a_probability_for_each_level_there_is_no_verdict(body, reason):
    assert word(body, "systemone", 3) == reason
