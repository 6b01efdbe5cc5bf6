import threading

import pytest
import torch

from datalloy.encoding import TENSOR_BYTES, EncodedSamples
from datalloy.vlm import Encoded, EncodeError
from drawn import draw_samples

ITEM_BYTES = 2 * (8 * 10 + TENSOR_BYTES)  # inputs and labels of ten tokens


class Counting:
    """Stands for a model: encodes a number as ten tokens of that number, and notes that it was asked."""

    def __init__(self):
        self.asked = []

    def encode(self, sample, *, max_tokens):
        self.asked.append((sample, max_tokens))
        tokens = torch.full((1, 10), sample)
        return Encoded({"input_ids": tokens}, tokens.clone())


def encoded_numbers(items_in_memory=100):
    vlm = Counting()
    return vlm, EncodedSamples(vlm, range(10), max_tokens=7, cache_bytes=items_in_memory * ITEM_BYTES)


def number(encoded):
    return encoded.labels[0, 0].item()


def test_samples_are_encoded_when_asked_for_with_the_token_limit():
    vlm, encoded = encoded_numbers()
    assert len(encoded) == 10
    assert vlm.asked == []
    assert number(encoded[3]) == 3
    assert vlm.asked == [(3, 7)]


def test_what_was_encoded_is_kept():
    vlm, encoded = encoded_numbers()
    assert encoded[3] is encoded[3]
    assert len(vlm.asked) == 1


def test_memory_is_bounded_and_the_longest_unused_goes_first():
    vlm, encoded = encoded_numbers(items_in_memory=2)
    for index in (0, 1, 0, 2, 0, 1):  # 2 replaces 1, the last 1 is encoded again
        assert number(encoded[index]) == index
    assert [sample for sample, _ in vlm.asked] == [0, 1, 2, 1]


def test_memory_stays_bounded_over_many_passes():
    vlm, encoded = encoded_numbers(items_in_memory=4)
    for _ in range(5):
        assert [number(item) for item in encoded] == list(range(10))
    assert len(vlm.asked) == 50  # nothing that is asked for in turn can still be there
    vlm.asked.clear()
    assert [number(encoded[index]) for index in (6, 7, 8, 9)] == [6, 7, 8, 9]
    assert vlm.asked == []


def test_a_sample_larger_than_the_memory_is_still_encoded():
    vlm, encoded = encoded_numbers(items_in_memory=0)
    assert [number(encoded[index]) for index in (0, 1, 1)] == [0, 1, 1]
    assert len(vlm.asked) == 2


def test_slices_and_picks_share_the_memory():
    vlm, encoded = encoded_numbers()
    assert [number(item) for item in encoded[2:5]] == [2, 3, 4]
    assert [number(item) for item in encoded.pick([4, 2, 4])] == [4, 2, 4]
    assert len(vlm.asked) == 3


def test_a_pick_encodes_when_asked_for_in_its_own_order():
    vlm, encoded = encoded_numbers()
    picked = encoded.pick([7, 1, 5])
    assert len(picked) == 3
    assert vlm.asked == []
    assert [number(item) for item in picked[1:]] == [1, 5]
    assert number(picked[-1]) == 5
    assert [sample for sample, _ in vlm.asked] == [1, 5]


def test_what_is_read_ahead_is_encoded_once_and_elsewhere():
    vlm, encoded = encoded_numbers()
    names = []
    encode = vlm.encode
    vlm.encode = lambda *args, **options: names.append(threading.current_thread().name) or encode(*args, **options)
    assert number(encoded[1]) == 1
    encoded.read_ahead(range(4))
    encoded.read_ahead(range(4))
    assert [number(encoded[index]) for index in (3, 0, 1, 2, 5)] == [3, 0, 1, 2, 5]
    assert sorted(sample for sample, _ in vlm.asked) == [0, 1, 2, 3, 5]
    assert [name.startswith("encode") for name in names] == [False, True, True, True, False]


def test_a_sample_that_cannot_be_read_ahead_fails_where_it_is_asked_for():
    vlm, encoded = encoded_numbers()
    encode = vlm.encode

    def failing(sample, *, max_tokens):
        if sample == 2:
            raise EncodeError("too_long", "sample 2")
        return encode(sample, max_tokens=max_tokens)

    vlm.encode = failing
    encoded.read_ahead(range(4))
    assert number(encoded[3]) == 3
    with pytest.raises(EncodeError, match="sample 2"):
        encoded[2]


def test_two_threads_may_encode_with_one_processor(proxy):
    samples = draw_samples(24)
    expected = [proxy.encode(sample).labels for sample in samples]
    encoded = EncodedSamples(proxy.copy(), samples, max_tokens=64)
    encoded.read_ahead(range(24))
    beside = [proxy.encode(sample).labels for sample in samples]
    assert all(a.equal(b) for a, b in zip(beside, expected, strict=True))
    assert all(item.labels.equal(b) for item, b in zip(encoded, expected, strict=True))


def test_encoded_samples_are_what_the_model_gives(proxy):
    samples = draw_samples(3)
    for lazy, sample in zip(EncodedSamples(proxy, samples, max_tokens=64), samples, strict=True):
        direct = proxy.encode(sample)
        assert lazy.labels.equal(direct.labels)
        assert lazy.inputs.keys() == direct.inputs.keys()
        assert all(lazy.inputs[name].equal(tensor) for name, tensor in direct.inputs.items())
