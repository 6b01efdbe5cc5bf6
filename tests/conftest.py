"""What the tests of the scorers share: an untrained tiny proxy that no test may change, drawn samples, two targets."""

from pathlib import Path

import hypothesis
import pytest

from datalloy.sample import Origin, Sample, Turn
from datalloy.target_items import TargetItems
from datalloy.vlm import VLM, Encoded
from drawn import build_vlm, draw_samples

hypothesis.settings.register_profile("datalloy", deadline=None)  # a busy machine is no fault of a test
hypothesis.settings.load_profile("datalloy")


@pytest.fixture(scope="session")
def proxy(tmp_path_factory) -> VLM:
    return build_vlm(tmp_path_factory.mktemp("proxy"))


@pytest.fixture(scope="session")
def drawn(proxy) -> list[Encoded]:
    return [proxy.encode(sample) for sample in draw_samples(40)]


@pytest.fixture(scope="session")
def targets(drawn) -> dict[str, list[Encoded]]:
    """Of different sizes, so that a mean over targets is not one over items."""
    return {"first": drawn[:5], "second": drawn[5:8]}


@pytest.fixture(scope="session")
def items(proxy, targets) -> TargetItems:
    return TargetItems.lay_out(proxy, targets, {"first": 1.0, "second": 3.0})


@pytest.fixture(scope="session")
def text_only() -> Sample:
    turns = (Turn("user", ("Which word follows three, four?",)), Turn("assistant", ("five",)))
    return Sample("text", "text", turns, Origin(Path("drawn.jsonl"), 99, 100), "text")


@pytest.fixture(scope="session")
def pool(proxy, drawn, text_only) -> list[Encoded]:
    return [*drawn[8:19], proxy.encode(text_only)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Hostile text that a test logs may hold lone surrogates, which cannot be sent from one process to another."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
