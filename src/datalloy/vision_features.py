"""Fixed batches of pictures in, what a vision tower sees in them, computed once, out.

For many measurements through one frozen tower: candidates on the same targets, one pool at several displacements. What
does not fit into the memory allowed goes to a temporary file and is read back bit for bit; reading is far cheaper than
looking again, and every batch comes up once a pass, so what came first stays in memory and nothing is ever swapped.
"""

import contextlib
import copy
import errno
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten  # transformers registers its outputs there

from datalloy.errors import ModelError

log = logging.getLogger(__name__)

MEMORY_BYTES = 2 << 30  # on the model's device: some 700 pictures of 1,200 patches for a tower 1,280 wide in bfloat16


class VisionFeatures:
    """What one vision tower gives for fixed batches, for all models that share its weights.

    The connector behind the tower is computed anew each time, because candidates may differ in it. Price: for a picture
    as many numbers as its patches times the tower's width; `memory_bytes` of them stay on the device, the rest in a
    nameless file where temporary files go (TMPDIR), and where that disk is full, is computed anew. No gradient reaches
    the tower.

    Trap: only the tower's weights are compared. A hook in the tower goes unnoticed.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_left = memory_bytes
        self._kept: dict[int, list[Any] | _Spilled] = {}  # by the identity of the batch's tokens
        self._batches: list[Tensor] = []  # held on to, or another batch's tokens could come to lie where they lay
        self._file: Any = None  # what does not fit; has no name, so no kill leaves it behind
        self._disk_is_full = False
        # held on to as batches are; with how often each was written to
        self._weights: list[tuple[Tensor, int]] | None = None

    @contextlib.contextmanager
    def reuse(self, tower: torch.nn.Module, batch: Mapping[str, Tensor], name: str) -> Iterator[None]:
        """Calls of `tower` inside are recorded when `batch`, by its input_ids, comes first, and replayed afterwards.

        Raises ModelError, with the model's `name`, for other weights than before, or more calls than were recorded.
        """
        self._check_weights(tower, name)
        tokens = batch["input_ids"]
        recorded: list[Any] = []
        kept = self._look_up(tokens)
        replayed = iter(kept or ())
        look = tower.forward

        @torch.no_grad()
        def record(*args: Any, **kwargs: Any) -> Any:
            output = look(*args, **kwargs)
            recorded.append(copy.copy(output))  # Qwen replaces entries of what its tower returned
            return output

        def replay(*_: Any, **__: Any) -> Any:
            for output in replayed:
                return copy.copy(output)
            raise ModelError(f"{name} looks at a batch more often than the model whose features were kept")

        replaced = vars(tower).get("forward")
        tower.forward = record if kept is None else replay
        try:
            yield
        finally:
            if replaced is None:
                del tower.forward
            else:
                tower.forward = replaced
        if kept is None:
            self._keep(tokens, recorded)

    def _look_up(self, tokens: Tensor) -> list[Any] | None:
        kept = self._kept.get(id(tokens))
        return kept.read(self._file) if isinstance(kept, _Spilled) else kept

    def _keep(self, tokens: Tensor, outputs: list[Any]) -> None:
        size = _bytes(outputs)
        if size <= self._memory_left:
            self._memory_left -= size
            self._kept[id(tokens)] = outputs
        elif self._disk_is_full:
            return
        else:
            try:
                # unbuffered: what a full disk refused would be written again before anything can be read
                self._file = self._file or tempfile.TemporaryFile(buffering=0, prefix="datalloy-vision-")  # noqa: SIM115
                self._kept[id(tokens)] = _Spilled.write(self._file, outputs)
            except OSError as error:
                self._disk_is_full = True
                log.warning(
                    "what the vision tower sees does not fit into %s (%s) and is computed again for each pass; set "
                    "TMPDIR to a disk with more room",
                    tempfile.gettempdir(),
                    error.strerror,
                )
                return
        self._batches.append(tokens)

    def _check_weights(self, tower: torch.nn.Module, name: str) -> None:
        weights = [(parameter.detach(), parameter._version) for parameter in tower.parameters()]
        if self._weights is None:
            self._weights = weights
        if [(w.data_ptr(), version) for w, version in weights] != [(w.data_ptr(), v) for w, v in self._weights]:
            raise ModelError(
                f"the vision tower of {name} is not the one whose features were kept, or was changed since; "
                "features are shared only by models on the very same tower weights"
            )


class _Place(NamedTuple):
    """Where in the file a tensor stands, and what it is."""

    start: int
    size: int  # bytes
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


class _Spilled(NamedTuple):
    """Outputs of one batch whose tensors stand in the file; what holds them stays in memory, so nothing is pickled."""

    leaves: list[Any]  # places where there were tensors
    form: Any

    @classmethod
    def write(cls, file: Any, outputs: list[Any]) -> "_Spilled":
        """Appends."""
        leaves, form = tree_flatten(outputs)
        file.seek(0, os.SEEK_END)
        return cls([_write(file, leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)

    def read(self, file: Any) -> list[Any]:
        return tree_unflatten(
            [_read(file, leaf) if isinstance(leaf, _Place) else leaf for leaf in self.leaves], self.form
        )


def _write(file: Any, tensor: Tensor) -> _Place:
    start = file.tell()
    data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    place = _Place(start, len(data), tensor.dtype, tensor.shape, tensor.device)
    while data:
        data = data[file.write(data) :]
    return place


def _read(file: Any, place: _Place) -> Tensor:
    file.seek(place.start)
    data = np.empty(place.size, dtype=np.uint8)
    left = data.data
    while left:
        count = file.readinto(left)
        if not count:
            raise OSError(errno.EIO, "the temporary file of vision features ended early")
        left = left[count:]
    return torch.from_numpy(data).view(place.dtype).reshape(place.shape).to(place.device)


def _bytes(outputs: list[Any]) -> int:
    """Of the memory that they hold: a view holds all that it is a view of."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
