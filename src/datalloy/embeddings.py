"""Encoded samples in, one vector a sample out: where a model's last layer puts them, text and pictures together.

The vector of a sample is the mean over its tokens of the decoder's normed last states, one forward pass a sample. Means
over hidden states of the model that is to be tuned choose data at least as well as far dearer vectors do
(arXiv 2503.01807 weights later tokens more; a plain mean is used here). That of a prompt is the state from which the
answer is begun: prompts are near each other where the model is about to say the like. `similarity.py` compares them.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from datalloy.encoding import length_batches
from datalloy.vlm import VLM, Encoded

Embedded = Literal["samples", "prompts"]
BATCH = 16  # part of the layout, hence of the last bits: a constant, not a setting


def embed(vlm: VLM, samples: Sequence[Encoded], of: Embedded = "samples") -> np.ndarray:
    """Vectors of the samples or of their prompts, [N, width] float32, in the order given."""
    states = {"samples": vlm.mean_states, "prompts": vlm.prompt_states}[of]
    batches = length_batches(samples, BATCH)
    parts = [states(vlm.collate([samples[i] for i in batch])).cpu().numpy() for batch in batches]
    return np.concatenate(parts)[np.argsort(np.concatenate(batches))]


def to_bytes(state_ND: np.ndarray) -> bytes:
    """The array as an .npy file in memory; `from_bytes` gives it back."""
    buffer = io.BytesIO()
    np.save(buffer, state_ND, allow_pickle=False)
    return buffer.getvalue()


def from_bytes(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


class StoredStates:
    """Vectors that lie in files of `to_bytes`: rows of the pool in, [R], their vectors out, [R, width] float32.

    NaN where there is none. They are read when they are asked for: those of a large pool need not fit into memory.
    """

    def __init__(self, parts: Sequence[tuple[Path, Sequence[int]]], rows: int) -> None:
        """`parts`: each file and the rows of the pool that it has, in its order; `rows`: how many the pool has."""
        self._paths = [path for path, _ in parts]
        self._part_N, self._place_N = np.full(rows, -1), np.zeros(rows, dtype=np.int64)
        for number, (_, held) in enumerate(parts):
            self._part_N[list(held)] = number
            self._place_N[list(held)] = np.arange(len(held))
        self._width = from_bytes(self._paths[0].read_bytes()).shape[1]

    def __call__(self, row_R: np.ndarray) -> np.ndarray:
        state_RD = np.full((len(row_R), self._width), np.nan, dtype=np.float32)
        part_R = self._part_N[row_R]
        order_R = np.argsort(part_R, kind="stable")
        for asked in np.split(order_R, np.flatnonzero(np.diff(part_R[order_R])) + 1):
            if len(asked) and (number := part_R[asked[0]]) >= 0:
                held_PD = from_bytes(self._paths[number].read_bytes())
                state_RD[asked] = held_PD[self._place_N[row_R[asked]]]
        return state_RD
