"""Does torch.compile pay? One model in, seconds a pass with and without compiled decoder layers out.

    python benchmarks/compiled.py

The pool of scoring.py on the embedded model, laid out by length in batches of 16. Each decoder layer is compiled with
free lengths, which shares one compilation among all of them. Measured: the losses of the pool, and an epoch of
training without its optimiser; processor seconds of one thread, medians over alternating turns of the ratio within a
turn; and what compiling costs, once a process, as seconds and as samples that have to be seen before it has paid.
Needs a C++ compiler. Five minutes of one core.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
from datalloy.encoding import length_batches
from datalloy.run import write_json
from datalloy.vlm import VLM
from scoring import draw, seconds

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
from provenance import provenance

BATCH, TURNS = 16, 7


def passes(vlm: VLM, batches: list[dict[str, torch.Tensor]]) -> dict[str, Callable[[], object]]:
    def losses() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([vlm.losses(batch) for batch in batches])

    def gradients() -> None:
        for batch in batches:
            vlm.losses(batch).mean().backward()
            vlm.model.zero_grad()

    return {"losses": losses, "training without its optimiser": gradients}


def measure(seed: int, folder: Path) -> list[dict[str, Any]]:
    eager = models.load("embedded", folder)
    pool, _ = draw(eager, folder, seed)
    batches = [eager.collate([pool[i] for i in batch]) for batch in length_batches(pool, BATCH)]
    compiled = eager.copy()
    for layer in compiled.decoder_layers():
        layer.compile(dynamic=True)
    as_written, as_compiled = passes(eager, batches), passes(compiled, batches)
    rows = []
    for name in as_written:
        warm = seconds(as_written[name])
        compiling = seconds(as_compiled[name]) - warm
        turns = [(seconds(as_written[name]), seconds(as_compiled[name])) for _ in range(TURNS)]
        saved = float(np.median([before - after for before, after in turns])) / len(pool)
        rows.append(
            {
                "pass": name,
                "compiled over eager": float(np.median([after / before for before, after in turns])),
                "range": [min(a / b for b, a in turns), max(a / b for b, a in turns)],
                "compiling_seconds": compiling,
                "samples until it has paid": round(compiling / saved) if saved > 0 else None,
            }
        )
    difference = (as_written["losses"]() - as_compiled["losses"]()).abs().max()  # type: ignore[operator]
    return [{**row, "largest difference of a loss": float(difference)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compiled.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache"  # what an earlier process compiled is not used
        rows = measure(args.seed, Path(folder))
    write_json(args.out, {"rows": rows, "seed": args.seed, **provenance()})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
