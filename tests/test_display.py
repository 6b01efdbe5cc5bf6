"""What is printed: nothing that moves the cursor, forges a line, turns text around or gives a secret away."""

import io
import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datalloy.display import SHOWN_LENGTH, SafeFormatter, as_cell, holds_secret, printable, shown, without_secrets
from datalloy.errors import DataError

NASTY = "\x1b[2J\x1b[31m\r\n\u202e\u2066\u2028\x00\x7f\x9b\ud800 done: 100 samples\x08"
KEYS = [
    "hf_" + "abcDEF123" * 3,
    "sk-" + "abcDEF123" * 3,
    "sk-proj-" + "abc_DEF-123" * 3,
    "ghp_" + "abcDEF123" * 4,
    "AKIA" + "ABCDEFGH12345678",
    ".".join(["eyJ" + "abcDEF123" * 2] * 3),
]


def has_unsafe(text: str) -> bool:
    return any(unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in text)


@given(
    st.recursive(
        st.text() | st.just(NASTY) | st.integers() | st.none(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_what_is_shown_cannot_move_the_cursor_forge_a_line_or_turn_it_around(value):
    text = shown(value)
    assert not has_unsafe(text)
    assert len(text) <= SHOWN_LENGTH


def test_a_long_value_is_cut_and_a_number_without_end_is_named():
    assert len(shown("x" * 10**6)) <= 80 + 2
    assert len(shown([["x" * 1000] * 1000] * 1000)) == SHOWN_LENGTH
    assert shown(10**6000) == "a number of thousands of digits" or len(shown(10**6000)) <= SHOWN_LENGTH


@given(st.text() | st.just(NASTY))
def test_printable_text_keeps_line_breaks_and_visible_characters(text):
    seen = printable(text)
    assert not has_unsafe(seen.replace("\n", ""))
    assert seen.count("\n") == text.count("\n")
    if not has_unsafe(text.replace("\n", "")):
        assert seen == text


def written(log: logging.Logger, write) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(SafeFormatter())
    log.addHandler(handler)
    try:
        write()
    finally:
        log.removeHandler(handler)
    return stream.getvalue()


def test_the_log_is_printable_whatever_is_logged():
    log = logging.getLogger("datalloy.test")
    text = written(log, lambda: log.error("refused: %s", NASTY))
    assert not has_unsafe(text.replace("\n", ""))


def test_a_traceback_in_the_log_hides_secrets(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "opensesame-4711")
    log = logging.getLogger("datalloy.test")

    def fail() -> None:
        try:
            raise DataError(f"no answer for opensesame-4711 and {KEYS[0]}")
        except DataError:
            log.exception("failed with opensesame-4711")

    text = written(log, fail)
    assert "opensesame" not in text
    assert KEYS[0] not in text
    assert "DataError: no answer for *** and ***" in text


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "TOKEN"])
def test_secrets_of_the_environment_are_hidden(name):
    assert without_secrets("Bearer-less opensesame!", {name: "opensesame"}) == "Bearer-less ***!"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "KEYBOARD", "HOME"])
def test_other_variables_are_no_secrets(name):
    assert without_secrets("opensesame", {name: "opensesame"}) == "opensesame"


@pytest.mark.parametrize("key", KEYS)
def test_well_known_keys_are_hidden(key):
    assert without_secrets(f"key={key}, and more", {}) == "key=***, and more"
    assert holds_secret(f"api_key: {key}")


def test_a_password_in_a_url_and_a_bearer_token_are_hidden():
    assert without_secrets("https://me:pass@host/x", {}) == "https://***@host/x"
    assert without_secrets("Authorization: Bearer abcdefgh12", {}) == "Authorization: Bearer ***"


@pytest.mark.parametrize("text", ["task-oriented-dialogue-with-images", "https://example.org/a:b", "sk-1", "hf_home"])
def test_ordinary_words_are_no_secrets(text):
    assert without_secrets(text, {}) == text


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_text_that_a_spreadsheet_would_run_is_text(formula):
    assert as_cell(formula) == f"'{formula}"


@pytest.mark.parametrize("value", ["accuracy", "a=b", "", -1.5, None])
def test_other_cells_stay_as_they_are(value):
    assert as_cell(value) == value
