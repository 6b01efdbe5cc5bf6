"""A scorer and samples in, scores and a state word for every sample out, whatever single samples do to the scorer.

A sample on which the scorer fails (an exception, memory that runs out, a process that is killed) is found by halving,
and gets a state instead of a score. The others get the bits that they would have got beside a healthy one: the batch
is laid out as before, with a stand-in of the same shape in the bad sample's place, because rounding depends on the
shape of a batch. Only where the stand-in fails too (the shape itself does not fit into memory) are the others scored
in smaller batches, equal up to rounding.

States: ok; nonfinite (a loss or a utility is NaN or infinite); compute_error (the scorer raised); oom (memory ran out
on the sample alone); killed (two attempts died while working on it alone, see `attempts`).

Price: nothing while all goes well. A bad sample costs about three times its shard. Where every sample of several fails,
the fault is not theirs, and the error is raised as it came.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from datalloy.attempts import Attempt
from datalloy.errors import DatalloyError
from datalloy.scorers.one_step import ScoreBlock
from datalloy.vlm import IGNORED, Encoded

log = logging.getLogger(__name__)

FAULTS = ("nonfinite", "compute_error", "oom", "killed")  # states that count against the error budget
GREY = 0.5
MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory")  # of torch's plain RuntimeErrors


class _Scorer(Protocol):
    def score(self, samples: Sequence[Encoded]) -> ScoreBlock: ...


class Isolated(NamedTuple):
    """Scores in the order of the samples, NaN where there are none; each sample's state; what failed, in words."""

    block: ScoreBlock
    state_N: list[str]
    errors: dict[int, str]


class _Failure(NamedTuple):
    position: int
    state: str
    error: Exception


class _Piece(NamedTuple):
    positions: Sequence[int]
    block: ScoreBlock


def score_isolated(
    scorer: _Scorer, samples: Sequence[Encoded], keys: Sequence[str], *, targets: int, attempt: Attempt | None = None
) -> Isolated:
    """Scores of the samples for so many targets, those that cannot be scored set apart.

    `keys` name the samples in `attempt`, which remembers attempts that were killed. Raises what the scorer raises
    where all samples fail, and every DatalloyError and OSError: those are not a sample's fault.
    """
    state_N, errors = ["ok"] * len(samples), {}
    for position, key in enumerate(keys):
        if attempt and key in attempt.isolated:
            state_N[position], errors[position] = "killed", "two attempts died while working on this sample alone"
    pieces = None
    if attempt and attempt.is_careful:
        log.warning("an earlier attempt was killed here; %d samples are tried one at a time", len(samples))
        pieces, failures = _score_alone(scorer, samples, keys, attempt, spared=errors)
        if not attempt.never_together:
            pieces = None
    if pieces is None:
        pieces, failures = _score_together(scorer, samples, spared=errors)
    for failure in failures:
        state_N[failure.position], errors[failure.position] = failure.state, f"{failure.error!r:.300}"
    block = _join(len(samples), targets, pieces, without=errors)
    for position, is_finite in enumerate(block.finite_N):
        if not is_finite and state_N[position] == "ok":
            state_N[position], errors[position] = "nonfinite", "a loss or a utility that is not finite"
    return Isolated(block, state_N, errors)


def _score_together(
    scorer: _Scorer, samples: Sequence[Encoded], spared: dict[int, str]
) -> tuple[list[_Piece], list[_Failure]]:
    everywhere = range(len(samples))
    failures: list[_Failure] = []
    if not spared:
        found = list(_halve(scorer, samples, everywhere))
        failures = [part for part in found if isinstance(part, _Failure)]
        pieces = [part for part in found if isinstance(part, _Piece)]
        if len(failures) == len(samples) > 1:
            raise failures[0].error
        if not failures:
            return pieces, []
    bad = {failure.position for failure in failures} | spared.keys()
    try:
        return [_Piece(everywhere, scorer.score(_with_stand_ins(samples, bad)))], failures
    except Exception as error:  # noqa: BLE001 - whatever a library raises
        _refuse_foreign(error)
    log.warning("no stand-in for a sample that fails: its neighbours are scored in other batches, equal up to rounding")
    found = list(_halve(scorer, samples, [n for n in everywhere if n not in bad]))
    failures += [part for part in found if isinstance(part, _Failure)]
    return [part for part in found if isinstance(part, _Piece)], failures


def _halve(scorer: _Scorer, samples: Sequence[Encoded], positions: Sequence[int]) -> Iterator[_Piece | _Failure]:
    """Scores of as many samples at once as can be scored, and the samples that cannot be alone."""
    if not positions:
        return
    try:
        yield _Piece(positions, scorer.score([samples[n] for n in positions]))
        return
    except Exception as error:  # noqa: BLE001 - whatever a library raises
        _refuse_foreign(error)
        if len(positions) == 1:
            yield _Failure(positions[0], _state_of(error), error)
            return
        is_memory = _state_of(error) == "oom"
    if is_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(positions) // 2
    yield from _halve(scorer, samples, positions[:middle])
    yield from _halve(scorer, samples, positions[middle:])


def _score_alone(
    scorer: _Scorer, samples: Sequence[Encoded], keys: Sequence[str], attempt: Attempt, spared: dict[int, str]
) -> tuple[list[_Piece], list[_Failure]]:
    """Each sample alone, suspects first, its name written down before it is touched."""
    suspects = attempt.suspects
    order = sorted((n for n in range(len(samples)) if n not in spared), key=lambda n: (keys[n] not in suspects, n))
    found: list[_Piece | _Failure] = []
    for n in order:
        attempt.working_on(keys[n])
        found += _halve(scorer, samples, [n])
        attempt.survived(keys[n])
    attempt.working_on(None)
    pieces = [part for part in found if isinstance(part, _Piece)]
    return pieces, [part for part in found if isinstance(part, _Failure)]


def _refuse_foreign(error: Exception) -> None:
    if isinstance(error, DatalloyError) or (isinstance(error, OSError) and not isinstance(error, MemoryError)):
        raise error


def _state_of(error: Exception) -> str:
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return "oom" if is_memory or any(words in str(error) for words in MEMORY_WORDS) else "compute_error"


def _with_stand_ins(samples: Sequence[Encoded], bad: set[int]) -> list[Encoded]:
    """The samples, with harmless ones of the same shapes in the places of the bad ones."""
    usual = torch.cat([s.inputs["input_ids"].flatten() for n, s in enumerate(samples) if n not in bad] or [_NO_IDS])
    known = usual.unique()
    return [_stand_in(sample, known) if n in bad else sample for n, sample in enumerate(samples)]


_NO_IDS = torch.zeros(1, dtype=torch.int64)


def _stand_in(sample: Encoded, known: torch.Tensor) -> Encoded:
    """A sample of the same shapes: grey pictures, and no token that no healthy neighbour has.

    Not black: families take a picture of zeros for padding, and then miss it.
    """
    ids = sample.inputs["input_ids"]
    ids = torch.where(torch.isin(ids, known), ids, known[0])
    inputs = {name: torch.full_like(t, GREY) if t.is_floating_point() else t for name, t in sample.inputs.items()}
    return dataclasses.replace(
        sample, inputs=inputs | {"input_ids": ids}, labels=torch.where(sample.labels == IGNORED, IGNORED, ids)
    )


def _join(count: int, targets: int, pieces: Sequence[_Piece], without: dict[int, str]) -> ScoreBlock:
    """The pieces as one block in the order of the samples, NaN for samples that are in no piece or `without`."""
    loss_N, utility_N, error_N = (np.full(count, np.nan) for _ in range(3))
    utility_NG = np.full((count, targets), np.nan)
    falls = [piece.block.fall_NV for piece in pieces if piece.block.fall_NV is not None]
    fall_NV = np.full((count, falls[0].shape[1]), np.nan) if falls else None
    for positions, block in pieces:
        for n, position in enumerate(positions):
            if position in without:
                continue
            loss_N[position], utility_N[position], error_N[position] = (
                block.loss_N[n],
                block.utility_N[n],
                block.error_N[n],
            )
            utility_NG[position] = block.utility_NG[n]
            if fall_NV is not None and block.fall_NV is not None:
                fall_NV[position] = block.fall_NV[n]
    return ScoreBlock(loss_N, utility_NG, utility_N, error_N, fall_NV)
