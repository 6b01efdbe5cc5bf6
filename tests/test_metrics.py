import pytest

from datalloy.errors import DataError
from datalloy.metrics import (
    METRICS,
    anls,
    edit_distance,
    exact_match,
    higher_is_better,
    normalise,
    option_letter,
    parse_number,
    parse_option,
    relaxed_accuracy,
)


def test_normalisation_keeps_nothing_but_the_words():
    assert normalise("  New \n York. ") == "new york"
    assert normalise("STRASSE") == normalise("straße")


@pytest.mark.parametrize(("prediction", "mark"), [("Red square.", 1), ("red  SQUARE", 1), ("red squares", 0), ("", 0)])
def test_exact_match_forgives_case_blanks_and_a_full_stop(prediction, mark):
    assert exact_match(prediction, "red square") == mark


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        ("-3.5", -3.5),
        (".5", 0.5),
        ("1,234.5", 1234.5),
        ("12%", 0.12),
        ("12 %", 0.12),
        ("2e3", 2000),
        ("7.", 7),
    ],
)
def test_numbers_are_read_in_their_usual_forms(text, number):
    assert parse_number(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "%", ".", "e5", "nan", "inf", "1,23", "12,3456", "1_000", "3 apples", "٣", "+"])
def test_other_texts_are_no_numbers(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("prediction", "reference", "mark"),
    [
        ("95", "100", 1),
        ("105", "100", 1),
        ("94.9", "100", 0),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("1,040", "1000", 1),
        ("12%", "0.12", 1),
        ("12%", "12", 0),
        ("0.0", "0", 1),
        ("0.001", "0", 0),
        ("Yes", "yes", 1),
        ("about 100", "100", 0),
    ],
)
def test_relaxed_accuracy_tolerates_five_per_cent_of_the_reference(prediction, reference, mark):
    assert relaxed_accuracy(prediction, reference) == mark


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        "(B)",
        "B.",
        "B)",
        "(B).",
        "B:",
        "**B**",
        "B. Paris",
        "(B) Paris",
        "B) a cat",
        "B: 12.5",
        "Answer: B",
        "answer B.",
        "The answer is (B)",
        "The correct answer is: B.",
        "The answer is B, because a bar is higher.",
        "The answer is (B) because of the axis",
        "Option B",
        "The correct option is (B).",
        "B. Paris. The answer is B.",
        "B. Vitamin C.",
    ],
)
def test_options_are_read_in_their_usual_forms(text):
    assert parse_option(text) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris",
        "A or B",
        "A, B",
        "A/B",
        "(A) and (B)",
        "A. or B.",
        "A. red\nB. blue",
        "A. red B. The answer is C.",
        "A cat is on the mat",
        "The answer is a cat",
        "I think so",
        "The answer is (A). The answer is (B).",
        "BB",
        "7",
    ],
)
def test_answers_without_one_clear_option_are_not_guessed(text):
    assert parse_option(text) is None


def test_option_letter_marks_an_unclear_answer_wrong():
    assert option_letter("(b) Paris", "B") == 1
    assert option_letter("A or B", "B") == 0


def test_option_letter_refuses_a_reference_in_words():
    with pytest.raises(DataError, match=r"'Paris' names no option letter.*exact_match"):
        option_letter("B", "Paris")


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("ab", "ba", 2), ("x", "x", 0)]
)
def test_edit_distance_counts_single_changes(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("prediction", "reference", "similarity"),
    [
        ("Paris", "paris", 1),
        ("sitting", "kitten", 1 - 3 / 7),
        ("ab", "ax", 0),
        ("abc", "abx", 2 / 3),
        ("", "", 1),
        ("", "a", 0),
    ],
)
def test_anls_is_zero_unless_more_than_half_agrees(prediction, reference, similarity):
    assert anls(prediction, reference) == pytest.approx(similarity)


@pytest.mark.parametrize("metric", METRICS.values())
def test_every_metric_gives_full_marks_to_the_reference(metric):
    assert metric("B", "B") == 1


def test_loss_alone_is_better_when_lower():
    assert not higher_is_better("loss")
    assert all(map(higher_is_better, METRICS))
    assert "loss" not in METRICS
