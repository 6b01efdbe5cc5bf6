"""Encoded samples in, one vector a sample out: where a model's last layer puts them, text and pictures together.

The vector is the mean over a sample's tokens of the decoder's normed last states, one forward pass a sample. Means
over hidden states of the model that is to be tuned choose data at least as well as far dearer vectors do
(arXiv 2503.01807 weights later tokens more; a plain mean is used here).

Trap: raw states of all samples point in nearly one direction, so that every cosine is near one. `directions` takes out
what the samples have in common; similarities then depend on the pool, and a threshold on them is one for this pool.
"""

import io
from collections.abc import Sequence

import numpy as np

from datalloy.encoding import length_batches
from datalloy.vlm import VLM, Encoded

BATCH = 16  # part of the layout, hence of the last bits: a constant, not a setting


def embed(vlm: VLM, samples: Sequence[Encoded]) -> np.ndarray:
    """Mean hidden state of each sample, [N, width] float32, in the order given."""
    batches = length_batches(samples, BATCH)
    parts = [vlm.mean_states(vlm.collate([samples[i] for i in batch])).cpu().numpy() for batch in batches]
    return np.concatenate(parts)[np.argsort(np.concatenate(batches))]


def directions(state_ND: np.ndarray) -> np.ndarray:
    """The states seen from their common mean, at unit length, [N, D].

    Zero, which is similar to nothing, where a state is the mean itself or not finite.
    """
    finite_N = np.isfinite(state_ND).all(axis=1)
    centred_ND = np.zeros_like(state_ND)
    if finite_N.any():
        centred_ND[finite_N] = state_ND[finite_N] - state_ND[finite_N].mean(axis=0)
    norm_N1 = np.linalg.norm(centred_ND, axis=1, keepdims=True)
    return centred_ND / np.where(norm_N1 > 0, norm_N1, 1.0)


def to_bytes(state_ND: np.ndarray) -> bytes:
    """The array as an .npy file in memory; `from_bytes` gives it back."""
    buffer = io.BytesIO()
    np.save(buffer, state_ND, allow_pickle=False)
    return buffer.getvalue()


def from_bytes(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)
