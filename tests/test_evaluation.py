import dataclasses

import numpy as np
import pytest
import torch

from datalloy.config import Evaluate, Train
from datalloy.errors import DataError, ModelError
from datalloy.evaluation import JudgedItems, MetricItems, answer_losses, evaluate
from datalloy.sample import Turn
from datalloy.training import train
from datalloy.vision_features import VisionFeatures
from drawn import build_vlm, draw_samples

SETTINGS = Evaluate(batch_size=4, max_new_tokens=8, resamples=200)


@pytest.fixture(scope="module")
def samples():
    return draw_samples(12)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory, samples):
    """Trained until its answers are words and differ between pictures."""
    vlm = build_vlm(tmp_path_factory.mktemp("base"))
    encoded = [vlm.encode(sample) for sample in samples]
    train(vlm, encoded, Train(adapter="none", batch_size=12, learning_rate=5e-3), None, steps=60)
    return vlm


@pytest.fixture(scope="module")
def encoded(vlm, samples):
    return [vlm.encode(sample) for sample in samples]


def test_answer_loss_is_the_mean_negative_log_probability_of_the_answer(vlm, encoded):
    item = encoded[0]
    with torch.no_grad():
        logits = vlm.model(**item.inputs).logits[0, :-1]
    targets = item.labels[0, 1:]
    supervised = targets != -100
    expected = -torch.log_softmax(logits, dim=-1)[supervised, targets[supervised]].mean()
    assert answer_losses(vlm, [item], batch_size=1)[0] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_answer_losses_do_not_depend_on_the_batch_size(batch_size, vlm, encoded):
    """Padding and batching round differently; 1e-5 nats is some ten times what float32 was seen to lose here."""
    expected = answer_losses(vlm, encoded, batch_size=4)
    assert answer_losses(vlm, encoded, batch_size=batch_size) == pytest.approx(expected, abs=1e-5)


def test_answer_losses_come_in_the_order_given(vlm, encoded):
    forth, back = answer_losses(vlm, encoded, batch_size=1), answer_losses(vlm, encoded[::-1], batch_size=1)
    assert len(set(forth)) > 6
    assert np.array_equal(forth, back[::-1])


def test_answer_losses_are_the_same_bits_each_time(vlm, encoded):
    assert np.array_equal(answer_losses(vlm, encoded, batch_size=4), answer_losses(vlm, encoded, batch_size=4))


def test_answer_losses_build_no_graph(vlm, encoded, monkeypatch):
    seen = []
    monkeypatch.setattr(type(vlm), "losses", watched(type(vlm).losses, seen))
    assert answer_losses(vlm, encoded[:2], batch_size=2).dtype == np.float64
    assert not any(loss.requires_grad for loss in seen)


def watched(function, results):
    def call(*args):
        results.append(function(*args))
        return results[-1]

    return call


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_predictions_do_not_depend_on_the_batch_size(batch_size, vlm, samples):
    expected = evaluate(vlm, samples, "exact_match", SETTINGS)
    assert len(set(expected.predictions)) > 3
    other = evaluate(vlm, samples, "exact_match", SETTINGS.model_copy(update={"batch_size": batch_size}))
    assert other.predictions == expected.predictions
    assert other.interval == expected.interval


def test_evaluation_marks_each_prediction_against_its_own_reference(vlm, samples):
    evaluation = evaluate(vlm, samples, "exact_match", SETTINGS)
    marks = [p == r for p, r in zip(evaluation.predictions, evaluation.references, strict=True)]
    assert sum(marks) > 0
    assert evaluation.values_V.tolist() == marks
    assert evaluation.mean == pytest.approx(sum(marks) / len(marks))
    assert evaluation.references == tuple(sample.answer for sample in samples)
    assert evaluation.ids == tuple(sample.id for sample in samples)


def test_interval_holds_the_mean(vlm, samples):
    evaluation = evaluate(vlm, samples, "anls", SETTINGS)
    assert evaluation.interval.low <= evaluation.mean <= evaluation.interval.high


def test_loss_is_reported_in_nats_without_generating(vlm, samples, encoded, monkeypatch):
    monkeypatch.setattr(type(vlm), "generate", lambda *_: pytest.fail("generated"))
    evaluation = evaluate(vlm, samples, "loss", SETTINGS)
    assert evaluation.predictions == ()
    assert evaluation.values_V == pytest.approx(answer_losses(vlm, encoded, batch_size=4), abs=1e-5)


def test_answer_probability_is_that_of_the_whole_answer(vlm, samples, encoded, monkeypatch):
    monkeypatch.setattr(type(vlm), "generate", lambda *_: pytest.fail("generated"))
    evaluation = evaluate(vlm, samples, "answer_probability", SETTINGS)
    with torch.no_grad():
        logits = vlm.model(**encoded[3].inputs).logits[0, :-1]
    targets = encoded[3].labels[0, 1:]
    supervised = targets != -100
    assert supervised.sum() > 1
    probability = torch.softmax(logits, dim=-1)[supervised, targets[supervised]].prod()
    assert evaluation.values_V[3] == pytest.approx(probability.item(), rel=1e-4)
    assert evaluation.predictions == ()


def test_chunks_do_not_change_the_order(vlm, samples, monkeypatch):
    whole = evaluate(vlm, samples, "exact_match", SETTINGS)
    monkeypatch.setattr("datalloy.evaluation.CHUNK_BATCHES", 1)
    assert evaluate(vlm, samples, "exact_match", SETTINGS).predictions == whole.predictions


def test_nothing_to_evaluate_is_refused(vlm):
    with pytest.raises(DataError, match="the set has no samples"):
        evaluate(vlm, [], "exact_match", SETTINGS)


def test_reference_that_does_not_suit_the_metric_is_named(vlm, samples):
    wordy = dataclasses.replace(samples[0], turns=(samples[0].turns[0], Turn("assistant", ("Paris",))))
    with pytest.raises(DataError, match=r"drawn.jsonl:1: sample drawn-0: the reference answer 'Paris' names no option"):
        evaluate(vlm, [wordy], "option_letter", SETTINGS)


def test_loss_that_is_not_finite_is_an_error_with_the_sample(vlm, samples):
    broken = vlm.copy()
    next(broken.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite on 2 of 2 samples, the first is drawn-0"):
        evaluate(broken, samples[:2], "loss", SETTINGS)


# items for many candidates


METRICS = {"scored": "loss", "matched": "exact_match", "likened": "anls", "trusted": "answer_probability"}


@pytest.fixture(scope="module")
def targets(samples):
    """With questions that the model was not trained on, so that marks differ."""
    unseen = draw_samples(12, seed=1)
    return {
        "scored": samples[:5],
        "matched": [*samples[5:7], unseen[7]],
        "likened": [*samples[8:10], *unseen[10:]],
        "trusted": [samples[7], *unseen[2:4]],
    }


@pytest.mark.parametrize("share_vision", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_metric_items_have_the_marks_of_evaluation(blocks, share_vision, vlm, targets):
    items = MetricItems.lay_out(
        vlm, targets, METRICS, SETTINGS, blocks=blocks, vision=VisionFeatures() if share_vision else None
    )
    for _ in range(2):
        value_V = items.values(vlm)
        for g, (name, group) in enumerate(targets.items()):
            marks_V = evaluate(vlm, group, METRICS[name], SETTINGS).values_V
            expected = -marks_V if METRICS[name] == "loss" else marks_V
            assert value_V[items.target_V == g] == pytest.approx(expected, abs=1e-5)
    assert 0 < value_V[items.target_V == 1].sum() < 3


def test_values_of_a_block_are_those_of_its_items_in_their_order(vlm, targets):
    items = MetricItems.lay_out(vlm, targets, METRICS, SETTINGS, blocks=3)
    value_V = items.values(vlm)
    for block in range(3):
        assert np.array_equal(items.values(vlm, block), value_V[items.block_V == block])


def test_a_block_measures_its_own_items_alone(vlm, targets, monkeypatch):
    items = MetricItems.lay_out(vlm, targets, METRICS, SETTINGS, blocks=3)
    answered = []
    write = type(vlm).write_answers
    monkeypatch.setattr(type(vlm), "write_answers", lambda *a, **o: answered.extend(write(*a, **o)) or answered)
    items.values(vlm, 1)
    assert len(answered) == ((items.block_V == 1) & np.isin(items.target_V, (1, 2))).sum()


def test_each_block_holds_items_of_every_target_in_even_parts(vlm, targets):
    items = MetricItems.lay_out(vlm, targets, METRICS, SETTINGS, blocks=3)
    counts_GB = np.zeros((4, 3), int)
    np.add.at(counts_GB, (items.target_V, items.block_V), 1)
    assert np.sort(counts_GB).tolist() == [[1, 2, 2], [1, 1, 1], [1, 1, 2], [1, 1, 1]]


def test_blocks_do_not_depend_on_the_order_of_the_samples(vlm, samples):
    def blocks(group):
        items = MetricItems.lay_out(vlm, {"t": group}, {"t": "loss"}, SETTINGS, blocks=3)
        return {sample.id: block for sample, block in zip(group, items.block_V, strict=True)}

    assert blocks(samples) == blocks(samples[::-1])
    assert list(blocks(samples).values()) != [i % 3 for i in range(len(samples))]


def test_more_blocks_than_items_are_refused(vlm, targets):
    with pytest.raises(DataError, match="target matched has 3 items, too few for 4 blocks"):
        MetricItems.lay_out(vlm, targets, METRICS, SETTINGS, blocks=4)


def test_a_target_without_items_is_refused(vlm, targets):
    with pytest.raises(DataError, match="target matched has 0 items"):
        MetricItems.lay_out(vlm, targets | {"matched": []}, METRICS, SETTINGS, blocks=1)


def test_a_race_is_judged_by_marks_and_probabilities_half_each(vlm, targets):
    metrics = dict.fromkeys(targets, "exact_match")
    judged = JudgedItems.lay_out(vlm, targets, metrics, SETTINGS)
    marks_V, probability_V = (
        MetricItems.lay_out(vlm, targets, dict.fromkeys(targets, metric), SETTINGS, blocks=1).values(vlm)
        for metric in ("exact_match", "answer_probability")
    )
    np.testing.assert_allclose(judged.values(vlm), (marks_V + probability_V) / 2)


def test_a_race_on_targets_for_which_nothing_is_written_is_judged_by_their_own_values(vlm, targets):
    metrics = dict.fromkeys(targets, "loss")
    judged = JudgedItems.lay_out(vlm, targets, metrics, SETTINGS)
    expected_V = MetricItems.lay_out(vlm, targets, metrics, SETTINGS, blocks=1).values(vlm)
    np.testing.assert_array_equal(judged.values(vlm), expected_V)


def test_a_candidate_whose_loss_is_not_finite_is_refused_with_the_sample(vlm, targets):
    items = MetricItems.lay_out(vlm, targets, METRICS, SETTINGS, blocks=1)
    broken = vlm.copy()
    broken.output_head().weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite on 8 of 15 samples, the first is drawn-0"):
        items.values(broken)
