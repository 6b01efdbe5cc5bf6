"""The options that experiments over worlds and seeds have in common."""

import argparse
from pathlib import Path


def parser_of(description: str, name: str) -> argparse.ArgumentParser:
    """`name`: of the folder of runs and of that of results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs") / name)
    parser.add_argument("--out", type=Path, default=Path("experiments/results") / name)
    return parser
