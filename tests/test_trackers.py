"""Trackers of transformers' Trainer: `train.report_to` reaches them, and they see every step."""

import pytest
import transformers
from transformers.integrations import integration_utils

from datalloy import training
from datalloy.config import Train
from datalloy.errors import RecipeError
from datalloy.training import train
from drawn import build_vlm, draw_samples

SETTINGS = Train(adapter="none", batch_size=4, learning_rate=1e-3)


@pytest.fixture
def vlm(tmp_path):
    return build_vlm(tmp_path)


@pytest.fixture
def encoded(vlm):
    return [vlm.encode(sample) for sample in draw_samples(8)]


def test_a_tracker_sees_the_loss_of_every_step(vlm, encoded, monkeypatch):
    seen = []

    class Notebook(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((state.global_step, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "notebook", Notebook)
    monkeypatch.setattr(training, "get_available_reporting_integrations", lambda: ["notebook"])
    trained = train(vlm, encoded, SETTINGS.model_copy(update={"report_to": ("notebook",)}), None, steps=3)
    steps = [(step, logs["loss"]) for step, logs in seen if "loss" in logs]
    assert steps == list(zip((1, 2, 3), trained.losses, strict=True))
    assert all(logs["learning_rate"] > 0 for _, logs in seen if "loss" in logs)


def test_a_tracker_changes_no_result(vlm, encoded, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "silent", transformers.TrainerCallback)
    monkeypatch.setattr(training, "get_available_reporting_integrations", lambda: ["silent"])
    tracked = SETTINGS.model_copy(update={"report_to": ("silent",)})
    losses = [train(vlm.copy(), encoded, settings, None, steps=2).losses for settings in (SETTINGS, tracked)]
    assert losses[0] == losses[1]


def test_a_tracker_that_is_not_installed_is_refused(vlm, encoded):
    settings = SETTINGS.model_copy(update={"report_to": ("no-such-tracker",)})
    with pytest.raises(RecipeError, match=r"train\.report_to names no-such-tracker, which is not installed"):
        train(vlm, encoded, settings, None, steps=1)


def test_tensorboard_gets_the_losses(vlm, encoded, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    settings = SETTINGS.model_copy(update={"report_to": ("tensorboard",)})
    trained = train(vlm, encoded, settings, tmp_path / "model", steps=2)
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(trained.losses)
