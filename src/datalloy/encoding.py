"""Samples in, encoded samples out, when they are asked for.

Every stage that needs a model's inputs takes a sequence of encoded samples; this one encodes on access and keeps
what fits a memory budget, so that a small pool is decoded once and a large one still has bounded memory. A stage that
knows what it will ask for next has it encoded meanwhile: pictures are decoded and text is split by another thread while
the model computes.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import overload

from datalloy.sample import Sample
from datalloy.vlm import VLM, Encoded

CACHE_BYTES = 2 * 1024**3
TENSOR_BYTES = 500  # of a tensor beside its numbers: of short texts the larger part


class EncodedSamples(Sequence[Encoded]):
    """The encoded form of `samples`, in their order. Slices and selections share the cache."""

    def __init__(self, vlm: VLM, samples: Sequence[Sample], *, max_tokens: int, cache_bytes: int = CACHE_BYTES) -> None:
        self._vlm, self._samples, self._max_tokens = vlm, samples, max_tokens
        self._cache: OrderedDict[int, tuple[Encoded, int]] = OrderedDict()
        self._free = cache_bytes
        self._ahead: dict[int, Future[Encoded]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index][0]
        encoded = self._ahead.pop(index).result() if index in self._ahead else self._encode(index)
        tensors = (*encoded.inputs.values(), encoded.labels)
        size = sum(TENSOR_BYTES + t.numel() * t.element_size() for t in tensors)
        self._cache[index] = (encoded, size)
        self._free -= size
        while self._free < 0 and len(self._cache) > 1:
            self._free += self._cache.popitem(last=False)[1][1]
        return encoded

    def read_ahead(self, indices: Iterable[int]) -> None:
        """Begin to encode these in another thread. An error is raised where the sample is asked for.

        Price: until they are asked for they are held beside the memory budget, so give no more than come next.
        """
        self._thread = self._thread or ThreadPoolExecutor(1, "encode")
        for index in indices:
            if index not in self._cache and index not in self._ahead:
                self._ahead[index] = self._thread.submit(self._encode, index)

    def _encode(self, index: int) -> Encoded:
        return self._vlm.encode(self._samples[index], max_tokens=self._max_tokens)

    def pick(self, indices: Sequence[int]) -> Sequence[Encoded]:
        """The samples at `indices`, in that order, encoded when they are asked for."""
        return _Picked(self, indices)


def length_batches(encoded: Sequence[Encoded], size: int) -> list[list[int]]:
    """Positions in batches of samples of like length, shortest first, ties in the order given: little padding."""
    order = sorted(range(len(encoded)), key=lambda i: (encoded[i].length, i))
    return [order[start : start + size] for start in range(0, len(order), size)]


class _Picked(Sequence[Encoded]):
    def __init__(self, source: EncodedSamples, indices: Sequence[int]) -> None:
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(index, slice):
            return [self._source[i] for i in self._indices[index]]
        return self._source[self._indices[index]]
