import dataclasses

import numpy as np
import pytest
import torch

from datalloy.embeddings import StoredStates, embed, from_bytes, to_bytes
from datalloy.sample import Turn
from datalloy.vlm import IGNORED
from drawn import draw_samples


def test_an_embedding_is_the_mean_of_the_last_states_of_the_sample_alone(proxy, pool):
    found_ND = embed(proxy, pool)
    model = proxy.copy().model  # transformers leaves hooks in a model that was asked for its states
    for state_D, sample in zip(found_ND, pool, strict=True):
        with torch.no_grad():
            outputs = model(**proxy.collate([sample]) | {"labels": None}, output_hidden_states=True)
        assert state_D == pytest.approx(outputs.hidden_states[-1][0].mean(dim=0).numpy(), abs=1e-4)


def test_a_prompt_is_the_last_state_before_the_answer(proxy, pool):
    model = proxy.copy().model
    for state_D, sample in zip(embed(proxy, pool, "prompts"), pool, strict=True):
        batch = proxy.collate([sample])
        before = int((batch["labels"][0] != IGNORED).nonzero()[0]) - 1
        with torch.no_grad():
            outputs = model(**batch | {"labels": None}, output_hidden_states=True)
        assert state_D == pytest.approx(outputs.hidden_states[-1][0, before].numpy(), abs=1e-4)


def test_a_prompt_knows_nothing_of_the_answer(proxy):
    sample, other = draw_samples(2)
    answer = dataclasses.replace(sample.turns[1], parts=("Something else that is longer.",))
    samples = [sample, dataclasses.replace(sample, turns=(sample.turns[0], answer)), other]
    state_ND = embed(proxy, [proxy.encode(sample) for sample in samples], "prompts")
    assert state_ND[1] == pytest.approx(state_ND[0], abs=1e-4)
    assert np.abs(state_ND[2] - state_ND[0]).max() > 1e-3


def test_samples_keep_their_order(proxy, pool):
    assert len({sample.length for sample in pool}) > 2
    assert embed(proxy, pool[::-1])[::-1] == pytest.approx(embed(proxy, pool), abs=1e-4)


def test_pictures_and_texts_both_move_an_embedding(proxy):
    sample, other = draw_samples(2)
    picture, question = sample.turns[0].parts
    requests = [(picture, question), (other.images[0], question), (picture, question + " And why?")]
    samples = [dataclasses.replace(sample, turns=(Turn("user", parts), sample.turns[1])) for parts in requests]
    state_ND = embed(proxy, [proxy.encode(sample) for sample in samples])
    assert np.abs(state_ND[1:] - state_ND[0]).max(axis=1).min() > 1e-3


def test_states_come_back_from_their_file_as_they_were(proxy, pool):
    state_ND = embed(proxy, pool[:3])
    np.testing.assert_array_equal(from_bytes(to_bytes(state_ND)), state_ND)


def test_stored_states_come_in_the_order_asked_for_and_are_nan_where_there_is_none(tmp_path):
    state_ND = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    parts = [(tmp_path / "0.npy", [4, 0, 2]), (tmp_path / "1.npy", [1])]  # nothing of row 3
    for path, rows in parts:
        path.write_bytes(to_bytes(state_ND[rows]))
    asked = np.array([1, 3, 2, 4, 0, 2])
    expected = np.where(asked[:, None] == 3, np.nan, state_ND[asked])
    np.testing.assert_array_equal(StoredStates(parts, 5)(asked), expected)
    assert StoredStates(parts, 5)(np.arange(0)).shape == (0, 3)
