"""Entropy minus loss against logits that are read one by one, and what it says of right and wrong answers."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

import tiny_families
from datalloy import vlm as vlm_module
from datalloy.sample import Turn
from datalloy.scorers.baselines import LossScorer
from datalloy.scorers.entropy_minus_loss import EntropyMinusLossScorer
from datalloy.vlm import IGNORED, VLM
from drawn import draw_samples


def block(vlm, samples, batch_size=8):
    return EntropyMinusLossScorer(vlm, targets=2, batch_size=batch_size).score(samples)


@pytest.fixture(scope="module")
def tiny():
    return VLM.load("tiny", device="cpu")


def test_it_is_what_the_model_expects_to_lose_minus_what_it_loses(proxy, drawn):
    for sample, utility in zip(drawn[:6], block(proxy, drawn[:6]).utility_N, strict=True):
        batch = proxy.collate([sample])
        labels_T = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            log_TV = proxy.model(**batch).logits[0, :-1].double().log_softmax(dim=1)[labels_T != IGNORED]
        entropy_T = -(log_TV.exp() * log_TV).sum(dim=1)
        loss_T = -log_TV.gather(1, labels_T[labels_T != IGNORED][:, None])[:, 0]
        assert utility == pytest.approx((entropy_T - loss_T).mean().item(), abs=1e-5)


def test_losses_beside_it_are_those_of_the_samples(proxy, pool):
    assert np.array_equal(block(proxy, pool, 4).loss_N, LossScorer(proxy, targets=2, batch_size=4).losses(pool))


def test_how_many_tokens_are_read_at_once_changes_nothing(proxy, pool, monkeypatch):
    whole_N = block(proxy, pool).utility_N
    monkeypatch.setattr(vlm_module, "ENTROPY_TOKENS", 3)
    assert block(proxy, pool).utility_N == pytest.approx(whole_N, abs=1e-6)


def test_an_answer_that_the_model_writes_itself_is_never_below_zero(tiny):
    """The likeliest token loses less than the mean over tokens, which is the entropy."""
    samples = draw_samples(12)
    written = tiny.generate(samples, max_new_tokens=12, batch_size=4)
    own = [tiny.encode(with_answer(sample, text)) for sample, text in zip(samples, written, strict=True)]
    assert block(tiny, own).utility_N.min() > 0


def test_right_answers_are_near_zero_and_those_of_another_question_far_below(tiny):
    for skill in ("counting", "table"):
        samples = [sample for sample in draw_samples(80) if sample.domain == skill]
        pairs = [(a, with_answer(a, b.answer)) for a, b in pairwise(samples) if a.answer != b.answer]
        right_N, wrong_N = (block(tiny, [tiny.encode(s) for s in side]).utility_N for side in zip(*pairs, strict=True))
        assert abs(np.median(right_N)) < 0.2
        assert np.median(wrong_N) < -1


def with_answer(sample, text):
    return dataclasses.replace(sample, turns=(*sample.turns[:-1], Turn("assistant", (text,))), content_hash=text)


def test_a_loss_that_is_not_finite_is_given_back_as_it_is(proxy, pool):
    broken = proxy.copy()
    with torch.no_grad():
        next(iter(broken.model.parameters())).fill_(float("nan"))
    assert not block(broken, pool[:3]).finite_N.any()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llava_onevision"])
def test_other_families_give_it_whatever_the_batch(family, tmp_path):
    vlm = VLM.load(str(tiny_families.build_checkpoint(family, tmp_path)), device="cpu")
    samples = [vlm.encode(sample) for sample in draw_samples(3)]
    assert block(vlm, samples, 1).utility_N == pytest.approx(block(vlm, samples, 3).utility_N, abs=1e-4)
