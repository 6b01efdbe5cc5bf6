"""lmms-eval on live merges: what can be seen without it here, the real thing in the environment that has it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import PIL.ImageFile
import pytest

from datalloy.errors import DataError, EnvironmentFault, RecipeError
from datalloy.evaluators import live_lmms

ROOT = Path(__file__).parent.parent
VARIABLE = "DATALLOY_LMMS_EVAL_PYTHON"
PYTHON = os.environ.get(VARIABLE)
RESULT = ROOT / "benchmarks/results/live_lmms.json"


def documents(**document):
    return {"drawn": {"test": [document]}}


def a_request(settings, visuals=lambda document: [], text="How many?"):
    return (text, settings, visuals, 0, "drawn", "test")


def test_a_request_becomes_a_conversation_with_its_pictures():
    picture = PIL.Image.new("RGB", (4, 4))
    asked = live_lmms._asked(
        a_request({"max_new_tokens": 8, "until": "\n"}, lambda d: [d["image"]]), documents(image=picture)
    )
    assert [turn.role for turn in asked.sample.prompt] == ["user"]
    assert asked.sample.prompt[0].text == "How many?"
    assert len(asked.sample.images) == 1
    assert (asked.max_new_tokens, asked.until) == (8, ("\n",))


def test_a_request_of_chat_models_says_the_same():
    picture = PIL.Image.new("RGB", (4, 4))
    content = [{"type": "image", "url": picture}, {"type": "text", "text": "How many?"}]
    messages = [{"role": "user", "content": content}]
    chat = live_lmms._asked(("", lambda document: messages, {}, 0, "drawn", "test"), documents())
    simple = live_lmms._asked(a_request({}, lambda document: [picture]), documents())
    assert chat.sample.turns == simple.sample.turns


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}])
def test_a_task_that_samples_is_refused(settings):
    with pytest.raises(RecipeError, match="a live merge answers greedily"):
        live_lmms._asked(a_request(settings), documents())


def test_a_video_is_refused():
    with pytest.raises(DataError, match=r"drawn shows str a\.mp4; read are texts and pictures"):
        live_lmms._asked(a_request({}, lambda document: ["a.mp4"]), documents())


@pytest.mark.parametrize(
    ("text", "until", "left"), [("a\nb", ("\n",), "a"), ("a b", ("\n",), "a b"), ("abc", (), "abc")]
)
def test_an_answer_ends_at_the_first_stop(text, until, left):
    assert live_lmms._cut(text, until) == left


def test_the_choice_that_is_scored_is_the_answer():
    sample = live_lmms._continued(("How many?", " four", lambda document: [], 0, "drawn", "test"), documents())
    assert sample.answer == "four"


def test_pillows_switch_is_put_back():
    before = PIL.ImageFile.LOAD_TRUNCATED_IMAGES
    with live_lmms._truncated_images(not before):
        assert before is not PIL.ImageFile.LOAD_TRUNCATED_IMAGES
    assert before is PIL.ImageFile.LOAD_TRUNCATED_IMAGES


def test_without_lmms_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'datalloy\[lmms-eval\]'"):
        live_lmms.LmmsTasks(["chartqa"])


def check(found):
    """Both evaluators agree on every item of every model; a mixture agrees with itself, and not all are alike."""
    models = found["models"]
    assert all(task["equal_item_by_item"] for model in models for task in model["tasks"].values())
    by_name = {}
    for model in models:
        values = {name: task["datalloy"] for name, task in model["tasks"].items()}
        written = {name: value for name, value in values.items() if name != "drawn_choice"}
        assert by_name.setdefault(model["model"].removesuffix(", cached by mixture"), written) == written
    assert len(by_name) == 3
    assert len({tuple(values.values()) for values in by_name.values()}) > 1


def test_the_committed_result_shows_agreement():
    check(json.loads(RESULT.read_text()))


@pytest.mark.skipif(PYTHON is None, reason=f"set {VARIABLE} to the python of an environment with datalloy[lmms-eval]")
def test_lmms_eval_agrees_on_live_merges(tmp_path):
    command = [str(PYTHON), str(ROOT / "benchmarks/live_lmms.py"), "--out", str(tmp_path / "found.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    check(json.loads((tmp_path / "found.json").read_text()))
