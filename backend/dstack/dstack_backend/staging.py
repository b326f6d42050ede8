"""Input buffers that batches are gathered into, kept and reused: no page faults on the hot path."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from dstack_backend.batching import Batch
from dstack_backend.interfaces import Feeds
from dstack_backend.tensors import Array

MAX_KEYS = 32
MAX_BUFFERS_PER_KEY = 4
ALIGNMENT = 64  # bytes: what vector units like best, and reductions then round alike from run to run
Allocate = Callable[[tuple[int, ...], Any], Array]


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """np.empty whose data begins at a multiple of ALIGNMENT."""
    dtype = np.dtype(dtype)
    if dtype.hasobject:
        return np.empty(shape, dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class Staging:
    """Gathers batches into reused buffers of `max_rows` rows. Requests come as views of shared memory, of any
    alignment; here is the one place where the host copies them. Not thread-safe: the caller holds its lock
    around lease() and release(); fill() runs without it.

    allocate(shape, dtype) makes a buffer; a device may offer pinned memory here.
    """

    def __init__(self, max_rows: int, allocate: Allocate = aligned):
        self._max_rows = max_rows
        self._allocate = allocate
        self._free: OrderedDict[Any, list[Feeds]] = OrderedDict()

    def lease(self, batch: Batch) -> Feeds:
        """Buffers for a batch; fill() completes them."""
        free = self._free.get(self._key(batch))
        return free.pop() if free else {}

    def fill(self, batch: Batch, buffers: Feeds) -> Feeds:
        """The feeds of a batch: views of `buffers` that hold its rows, in the order of its parts."""
        parts = batch.parts
        if not batch.batched:
            return {name: self._copy(name, array, buffers) for name, array in parts[0].item.feeds.items()}
        gathered = {}
        for name, first in parts[0].item.feeds.items():
            if name not in buffers or len(buffers[name]) < batch.rows:
                rows = max(self._max_rows, batch.rows)
                buffers[name] = self._allocate((rows, *first.shape[1:]), first.dtype)
            target = buffers[name][: batch.rows]
            np.concatenate([part.item.feeds[name][part.start : part.stop] for part in parts], out=target)
            gathered[name] = target
        return gathered

    def _copy(self, name: str, array: Array, buffers: Feeds) -> Array:
        if name not in buffers:
            buffers[name] = self._allocate(array.shape, array.dtype)
        np.copyto(buffers[name], array)
        return buffers[name]

    def release(self, batch: Batch, buffers: Feeds) -> None:
        """Give buffers back once nothing reads them any more. The least used shapes are forgotten."""
        if not buffers:
            return
        key = self._key(batch)
        free = self._free.setdefault(key, [])
        self._free.move_to_end(key)
        if len(free) < MAX_BUFFERS_PER_KEY:
            free.append(buffers)
        while len(self._free) > MAX_KEYS:
            self._free.popitem(last=False)

    @staticmethod
    def _key(batch: Batch) -> Any:
        return batch.parts[0].item.key
