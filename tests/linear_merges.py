"""Merged models whose values are linear in the weights, and trainings that lie above or below them as a test wants."""

import numpy as np

from datalloy.calibration import TrainedMixtures
from datalloy.objective import Objective

TARGETS = ("chartqa", "docvqa")
MERGED = np.array([[0.5, 0.1, 0.2], [0.3, 0.6, 0.4]])  # value of each target at each vertex


def flat(weight_MK, error=0.0):
    """A merged surface that is linear in the weights and known up to `error`."""
    mean_MG = weight_MK @ MERGED[:, : weight_MK.shape[1]].T
    return mean_MG, np.full_like(mean_MG, error)


def run_results(weight_NK, gain_NG=None, *, noise=0.0, items=50, seed_sd=0.0, seed=0):
    """Trained mixtures that are `gain_NG` above their merges, with noise of every item's own."""
    weight_NK = np.asarray(weight_NK, dtype=float)
    gain_NG = np.zeros((len(weight_NK), 2)) if gain_NG is None else np.asarray(gain_NG, dtype=float)
    rng = np.random.default_rng(seed)
    merged_NV = np.repeat(flat(weight_NK)[0], items, axis=1) + rng.normal(0, 0.2, (1, 2 * items))
    noise_NV = rng.normal(0, noise, merged_NV.shape).reshape(len(weight_NK), 2, items)
    noise_NV -= noise_NV.mean(axis=2, keepdims=True)  # so that means are exact and only their error is not
    true_NV = merged_NV + np.repeat(gain_NG, items, axis=1) + noise_NV.reshape(merged_NV.shape)
    return TrainedMixtures(TARGETS, weight_NK, true_NV, merged_NV, np.repeat([0, 1], items), np.full(2, seed_sd))


def objective(kind="mean", weight_G=(0.5, 0.5), base_G=(0.0, 0.0), max_fall_G=(np.inf, np.inf)):
    return Objective(kind, np.array(weight_G), np.array(base_G), np.array(max_fall_G))


NO_RUNS = run_results(np.zeros((0, 2)))
NO_RUNS_3 = run_results(np.zeros((0, 3)))
HALF = np.array([[0.5, 0.5]])
SCALE_G = np.array([0.4, 0.8])
THIRD_K = np.full(3, 1 / 3)
SIZE_K = np.array([0.6, 0.3, 0.1])
