"""Encoded samples in, one vector a sample out: where a model's last layer puts them, text and pictures together.

The vector of a sample is the mean over its tokens of the decoder's normed last states, one forward pass a sample. Means
over hidden states of the model that is to be tuned choose data at least as well as far dearer vectors do
(arXiv 2503.01807 weights later tokens more; a plain mean is used here). That of a prompt is the state from which the
answer is begun: prompts are near each other where the model is about to say the like. `similarity.py` compares them.
"""

import io
from collections.abc import Sequence
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
