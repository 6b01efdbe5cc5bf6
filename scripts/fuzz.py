"""Coverage-guided fuzzing of the places where bytes of strangers come in: a target and seconds in, faults out.

    python scripts/fuzz.py reader --seconds 600

libFuzzer, by way of atheris, changes inputs by what new code they reach; `tests/fuzz_seeds/TARGET` is where it
starts. Inputs that reach more stay in `--work`, and one that breaks the rule of its target (tests/fuzz_targets.py)
is left there as crash-*: make it a seed, mend the fault. Exits with 0 where nothing was found.

Trap: libFuzzer ends the process, so the finding of one run is one fault.
"""

import argparse
import shutil
import sys
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("fuzzing needs atheris: pip install 'datalloy[fuzz]' (Python 3.11 to 3.13 on Linux)")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

with atheris.instrument_imports(include=["datalloy", "yaml", "PIL"]):
    import fuzz_targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", choices=fuzz_targets.TARGETS)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--work", type=Path, default=Path("fuzz-work"))
    arguments = parser.parse_args()
    corpus = arguments.work / arguments.target
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in sorted((ROOT / "tests" / "fuzz_seeds" / arguments.target).iterdir()):
        shutil.copyfile(seed, corpus / seed.name)
    options = [
        f"-max_total_time={arguments.seconds}",
        f"-artifact_prefix={corpus.parent}/{arguments.target}-",
        f"-dict={ROOT / 'tests' / 'fuzz_seeds' / 'words.dict'}",
        "-max_len=8192",
        "-timeout=20",  # seconds an input may take
        "-rss_limit_mb=4096",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], fuzz_targets.TARGETS[arguments.target])
    atheris.Fuzz()


main()
