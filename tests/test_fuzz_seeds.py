"""Every input that fuzzing started from or found a fault with, replayed: nothing but our own errors comes out."""

from pathlib import Path

import pytest

from fuzz_targets import TARGETS

SEEDS = Path(__file__).parent / "fuzz_seeds"
INPUTS = [(target, path) for target in TARGETS for path in sorted((SEEDS / target).iterdir())]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is odd in damaged files


@pytest.mark.parametrize(("target", "path"), INPUTS, ids=[f"{target}-{path.name}" for target, path in INPUTS])
def test_a_fuzzed_input_is_taken_or_refused_by_our_own_error(target, path):
    TARGETS[target](path.read_bytes())


def test_every_target_has_seeds():
    assert {target for target, _ in INPUTS} == set(TARGETS)
