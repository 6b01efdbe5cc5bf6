"""The judge against a real server: `transformers serve` on the embedded model.

That model has no judge's skill and a vocabulary of its own world, so this checks what passes through: requests are
taken, pictures arrive, text that is no verdict becomes no number, and probabilities of levels become scores.
"""

import dataclasses
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from datalloy.config import Judge
from datalloy.sample import Turn
from datalloy.scorers.judge import JudgeRater
from datalloy.scorers.judge_store import AnswerStore
from datalloy.tiny.model import WEIGHTS
from drawn import draw_samples

SERVE = Path(sys.executable).with_name("transformers")
NEEDED = ("fastapi", "uvicorn", "openai")

pytestmark = pytest.mark.skipif(
    not SERVE.exists() or any(importlib.util.find_spec(name) is None for name in NEEDED),
    reason="no model server is installed; pip install 'transformers[serving]'",
)
SAMPLES = draw_samples(3)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("wb")
    command = [SERVE, "serve", str(WEIGHTS), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while True:
            assert server.poll() is None, Path(log.name).read_text()
            try:
                opener.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()
        log.close()


@pytest.fixture
def make(url, tmp_path):
    def make(**settings):
        settings = {"url": url, "model": str(WEIGHTS), "parameters": {"temperature": 0, "max_tokens": 4}, **settings}
        return JudgeRater(Judge(**settings), tmp_path / "judge.sqlite", run="run")

    return make


def without_picture(sample):
    turns = (Turn("user", (sample.turns[0].text,)), sample.turns[1])
    return dataclasses.replace(sample, turns=turns, content_hash=f"{sample.content_hash} text")


def kept(rater, sample, path):
    with AnswerStore(path / "judge.sqlite") as store:
        return store.answers(rater.key(sample))


def test_replies_without_a_verdict_are_no_scores_and_are_accounted_for(make, tmp_path):
    rater = make(tries=1)
    ratings = rater.rate(SAMPLES)
    assert ratings.state_N.tolist() == ["judge_unparsable"] * 3
    account = rater.account(SAMPLES)
    assert account["answers"] == 3
    assert account["uncounted"] == 0
    assert account["prompt_tokens"] > 3 * 100
    assert list(account["served_by"]) == [kept(rater, SAMPLES[0], tmp_path)[0].served_by]
    assert str(WEIGHTS) in next(iter(account["served_by"]))


def test_pictures_arrive(make, tmp_path):
    """They cost 16 tokens each on the embedded model, and two that frame them."""
    rater = make(tries=1)
    plain = without_picture(SAMPLES[0])
    rater.rate([SAMPLES[0], plain])
    with_picture, without = (kept(rater, sample, tmp_path)[0].prompt_tokens for sample in (SAMPLES[0], plain))
    assert with_picture - without >= 16


def test_probabilities_of_levels_are_scores(make, tmp_path):
    rater = make(mode="systemone", levels=("bad", "fair", "good"))
    samples = [without_picture(sample) for sample in SAMPLES]
    ratings = rater.rate(samples)
    assert ratings.state_N.tolist() == ["ok"] * 3
    assert ((ratings.rating_N >= 1) & (ratings.rating_N <= 3)).all()
    assert len(set(ratings.rating_N)) == 3
    assert sum(kept(rater, samples[0], tmp_path)[0].probability_L) == pytest.approx(1)


def test_logprobs_that_a_server_does_not_give_are_no_score(make, tmp_path):
    rater = make(mode="logprobs", tries=1)
    assert rater.rate(SAMPLES[:1]).state_N.tolist() == ["judge_unparsable"]
    assert kept(rater, SAMPLES[0], tmp_path)[0].outcome in ("no_digit", "no_logprobs", "empty", "unfinished")
