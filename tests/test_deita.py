"""DEITA's ratings against answers teacher-forced one by one, and what must not change them."""

import dataclasses

import numpy as np
import pytest
import torch

import tiny_families
from datalloy.config import Deita, load_recipe
from datalloy.errors import ModelError, RecipeError
from datalloy.sample import Turn
from datalloy.scorers.deita import DeitaRater, exchanges, find_digits
from datalloy.vlm import VLM
from drawn import MemoryImage, draw_samples

SAMPLES = draw_samples(7)


def make(vlm, batch_size=4, **changes):
    settings = Deita(**changes)
    return DeitaRater(
        vlm,
        vlm,
        complexity_prompt=settings.complexity_prompt,
        quality_prompt=settings.quality_prompt,
        batch_size=batch_size,
    )


def with_turns(sample, *turns):
    return dataclasses.replace(sample, turns=tuple(Turn(role, parts) for role, parts in turns))


def expected_digit(vlm, parts):
    """From the probability of each answer, written out: what follows a digit is the same for all six."""
    log_probability = []
    for digit in "123456":
        encoded = vlm.encode(with_turns(SAMPLES[0], ("user", parts), ("assistant", (digit,))))
        (position,) = (t for t in range(encoded.length) if encoded.inputs["input_ids"][0, t] in DIGIT_IDS(vlm)[digit])
        with torch.no_grad():
            logits_TV = vlm.model(**{k: v for k, v in vlm.collate([encoded]).items() if k != "labels"}).logits[0]
        log_probability.append(logits_TV[position - 1].double().log_softmax(0)[DIGIT_IDS(vlm)[digit][0]])
    return float(torch.stack(log_probability).softmax(0) @ torch.arange(1.0, 7, dtype=torch.float64))


def DIGIT_IDS(vlm):
    return {digit: vlm.tokenizer(digit, add_special_tokens=False)["input_ids"] for digit in "123456"}


def test_a_rating_is_expected_complexity_times_expected_quality(proxy):
    rater = make(proxy, complexity_prompt="hard? {request}", quality_prompt="good? {request}|{answer}")
    chart = next(s for s in SAMPLES if not any(c.isdigit() for c in s.turns[0].text + s.answer))
    picture, question = chart.turns[0].parts
    complexity = expected_digit(proxy, ("hard? ", picture, question))
    quality = expected_digit(proxy, ("good? ", picture, question, f"|{chart.answer}"))
    assert rater.rate([chart]).rating_N == pytest.approx([complexity * quality], rel=1e-4)


def test_ratings_of_the_turns_are_added(proxy):
    rater = make(proxy)
    one, other = (("user", ("Why?",)), ("assistant", ("Because.",))), (("user", ("When?",)), ("assistant", ("Soon.",)))
    singles = [with_turns(SAMPLES[0], *one), with_turns(SAMPLES[0], *other)]
    both = with_turns(SAMPLES[0], *one, *other)
    assert rater.rate([both]).rating_N[0] == pytest.approx(rater.rate(singles).rating_N.sum(), rel=1e-5)


def test_later_requests_come_with_the_pictures_shown_before():
    picture, late = MemoryImage(b"first"), MemoryImage(b"late")
    sample = with_turns(
        SAMPLES[0],
        ("system", ("Be brief.",)),
        ("user", ("Look: ", picture)),
        ("assistant", ("Seen.",)),
        ("user", ("And this?", late)),
        ("user", ("Well?",)),
        ("assistant", ("Also.",)),
    )
    assert exchanges(sample) == [
        (("Look: ", picture), "Seen."),
        ((picture, "And this?", late, "Well?"), "Also."),
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_ratings_depend_neither_on_the_batch_nor_on_the_order(batch_size, proxy):
    whole = make(proxy, 7).rate(SAMPLES).rating_N
    assert np.ptp(whole) > 1e-3
    assert make(proxy, batch_size).rate(SAMPLES[::-1]).rating_N[::-1] == pytest.approx(whole, rel=1e-4)
    assert make(proxy, batch_size).rate(SAMPLES[2:4]).rating_N == pytest.approx(whole[2:4], rel=1e-4)


def test_ratings_lie_between_one_and_thirty_six_and_need_no_digit_in_the_prompt(proxy):
    rating_N = make(proxy).rate(SAMPLES).rating_N
    assert ((rating_N > 1) & (rating_N < 36)).all()


def test_pictures_are_shown(proxy):
    sample = SAMPLES[0]
    (other,) = SAMPLES[6].images
    swapped = with_turns(sample, ("user", (other, sample.turns[0].parts[1])), ("assistant", (sample.answer,)))
    first, second = make(proxy).rate([sample, swapped]).rating_N
    assert first != pytest.approx(second, rel=1e-6)


def test_what_a_model_cannot_be_shown_has_a_state_and_no_number(proxy):
    bad = with_turns(SAMPLES[0], ("user", (MemoryImage(b"no picture"), "What?")), ("assistant", ("This.",)))
    ratings = make(proxy).rate([SAMPLES[1], bad, SAMPLES[2]])
    assert ratings.state_N.tolist() == ["ok", "image_unreadable", "ok"]
    assert np.isnan(ratings.rating_N).tolist() == [False, True, False]
    assert ratings.rating_N[[0, 2]] == pytest.approx(make(proxy).rate(SAMPLES[1:3]).rating_N, rel=1e-4)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "smolvlm"])
def test_every_familys_way_to_write_a_digit_is_found(family, tmp_path):
    vlm = VLM.load(str(tiny_families.build_checkpoint(family, tmp_path)), device="cpu")
    digits = find_digits(vlm)
    assert [vlm.tokenizer.decode([token]).strip() for token in digits.token_ids] == list("123456")
    assert (make(vlm).rate(SAMPLES[:2]).state_N == "ok").all()


def test_a_model_whose_digits_are_no_tokens_is_refused(proxy, monkeypatch):
    monkeypatch.setattr(VLM, "encode", lambda self, sample: encode(self, _spelt_out(sample)))
    with pytest.raises(ModelError, match=r"digits 1 to 6 as one token.*deita\.quality_model"):
        find_digits(proxy)


encode = VLM.encode
WORDS = {"1": "one", "2": "two", "3": "three", "4": "four", "5": "five", "6": "six"}


def _spelt_out(sample):
    return with_turns(sample, ("user", sample.turns[0].parts), ("assistant", (WORDS[sample.answer],)))


@pytest.mark.parametrize(
    ("key", "prompt", "found"),
    [
        ("complexity_prompt", "How hard?", "none"),
        ("complexity_prompt", "{request} {answer}", r"\{request\} \{answer\}"),
        ("quality_prompt", "{answer} {request}", r"\{answer\} \{request\}"),
        ("quality_prompt", "{request} {answer} {answer}", r"\{request\} \{answer\} \{answer\}"),
    ],
)
def test_prompts_without_their_places_are_refused(key, prompt, found, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: a\nbase: tiny\ndomains: {d: {path: d.jsonl}}\ntargets: {t: {path: t.jsonl}}\n"
        f"deita: {{{key}: '{prompt}'}}\n"
    )
    with pytest.raises(RecipeError, match=rf"deita: {key} must hold .* once, found {found}"):
        load_recipe(recipe)
