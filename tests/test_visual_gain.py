"""Visual gain against losses that are taken one by one, and what it says of right and wrong answers."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch

import tiny_families
from datalloy.scorers.baselines import LossScorer
from datalloy.scorers.visual_gain import VisualGainScorer
from datalloy.vlm import GREY, VLM
from drawn import draw_samples


def loss(vlm, encoded):
    with torch.no_grad():
        return vlm.losses(vlm.collate([encoded])).item()


def gains(vlm, samples, batch_size=8):
    return VisualGainScorer(vlm, targets=2, batch_size=batch_size).score(samples).utility_N


@pytest.fixture(scope="module")
def tiny():
    return VLM.load("tiny", device="cpu")


def test_it_is_what_the_picture_takes_off_the_loss_of_the_whole_answer(proxy, drawn):
    for sample, gain in zip(drawn[:6], gains(proxy, drawn[:6]), strict=True):
        fall = loss(proxy, sample.without_pictures()) - loss(proxy, sample)
        assert gain == pytest.approx(fall * sample.supervised_tokens, abs=1e-4)


def test_without_pictures_it_is_exactly_zero(proxy, pool):
    assert not pool[-1].has_pictures
    found_N = gains(proxy, pool)
    assert found_N[-1] == 0
    assert np.count_nonzero(found_N) == len(pool) - 1
    assert gains(proxy, pool[-1:]).tolist() == [0]


def test_losses_beside_it_are_those_of_the_samples_as_they_are(proxy, pool):
    beside_N = VisualGainScorer(proxy, targets=2, batch_size=4).score(pool).loss_N
    assert np.array_equal(beside_N, LossScorer(proxy, targets=2, batch_size=4).losses(pool))


def test_answers_about_another_picture_have_less_of_it_and_mostly_less_than_none(tiny):
    for skill in ("counting", "table"):  # where a question fits any picture of the skill
        samples = [sample for sample in draw_samples(80) if sample.domain == skill]
        pairs = [(tiny.encode(a), tiny.encode(b)) for a, b in pairwise(samples) if a.answer != b.answer]
        right_N = gains(tiny, [own for own, _ in pairs])
        wrong_N = gains(tiny, [dataclasses.replace(own, inputs=own.inputs | pixels(other)) for own, other in pairs])
        assert np.mean(right_N > wrong_N) > 0.75
        assert np.median(right_N) > 0 > np.median(wrong_N)


def pixels(encoded):
    return {name: tensor for name, tensor in encoded.inputs.items() if tensor.is_floating_point()}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llava_onevision"])
def test_other_families_see_grey_where_a_picture_was(family, tmp_path):
    vlm = VLM.load(str(tiny_families.build_checkpoint(family, tmp_path)), device="cpu")
    shown, other = (vlm.encode(sample) for sample in draw_samples(2))
    grey = shown.without_pictures()
    assert grey.inputs["input_ids"].equal(shown.inputs["input_ids"])
    assert grey.inputs["pixel_values"].unique().tolist() == [GREY]
    assert loss(vlm, grey) != loss(vlm, shown)
    assert gains(vlm, [shown, other], 1) == pytest.approx(gains(vlm, [shown, other], 2), abs=1e-4)
