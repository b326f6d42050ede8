"""Input buffers that batches are gathered into, kept and reused: no page faults on the hot path."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dstack_backend.batching import Batch, Part
from dstack_backend.interfaces import Feeds
from dstack_backend.tensors import Array

MAX_KEYS = 32
MAX_BUFFERS_PER_KEY = 8  # more than batches are under way: pinned memory is made once, not again and again
ALIGNMENT = 64  # bytes: what vector units like best, and reductions then round alike from run to run
SPLIT_BYTES = 2 << 20  # a gathering this large is worth a second thread
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
    alignment; here is the one place where the host copies them, for sessions that do not take parts. Not
    thread-safe: the caller holds its lock around lease() and release(); fill() runs without it.

    allocate(shape, dtype) makes a buffer; a device may offer pinned memory here.
    """

    def __init__(self, max_rows: int, allocate: Allocate = aligned):
        self._max_rows = max_rows
        self._allocate = allocate
        self._free: OrderedDict[Any, list[Feeds]] = OrderedDict()
        self._second = ThreadPoolExecutor(1, "dstack-copy")  # its thread starts with its first work

    def lease(self, batch: Batch) -> Feeds:
        """Buffers for a batch; fill() completes them."""
        free = self._free.get(self._key(batch))
        return free.pop() if free else {}

    def fill(self, batch: Batch, buffers: Feeds) -> Feeds:
        """The feeds of a batch: views of `buffers` that hold its rows, in the order of its parts."""
        parts = batch.parts
        gathered: Feeds = {}
        for name, first in parts[0].item.feeds.items():
            if batch.batched:
                gathered[name] = self._gather(parts, name, batch.rows, first, buffers)
            else:
                gathered[name] = self._copy(name, first, buffers)
        return gathered

    def _gather(self, parts: Sequence[Part], name: str, rows: int, first: Array, buffers: Feeds) -> Array:
        if name not in buffers or len(buffers[name]) < rows:
            self._max_rows = max(self._max_rows, rows)
            buffers[name] = self._allocate((self._max_rows, *first.shape[1:]), first.dtype)
        target: Array = buffers[name][:rows]
        blocks = [part.rows_of(name) for part in parts]
        if target.nbytes < SPLIT_BYTES or rows < 2:
            np.concatenate(blocks, out=target)
            return target
        half = rows // 2
        other = self._second.submit(_concatenate, _between(blocks, half, rows), target[half:])
        _concatenate(_between(blocks, 0, half), target[:half])
        other.result()
        return target

    def _copy(self, name: str, array: Array, buffers: Feeds) -> Array:
        if name not in buffers:
            buffers[name] = self._allocate(array.shape, array.dtype)
        np.copyto(buffers[name], array)
        target: Array = buffers[name]
        return target

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

    def close(self) -> None:
        self._second.shutdown(wait=False)

    @staticmethod
    def _key(batch: Batch) -> Any:
        return batch.parts[0].item.key


def _between(blocks: Sequence[Array], start: int, stop: int) -> list[Array]:
    """Rows [start, stop) of blocks that follow one another."""
    found, at = [], 0
    for block in blocks:
        piece = block[max(0, start - at) : max(0, stop - at)]
        if len(piece):
            found.append(piece)
        at += len(block)
    return found


def _concatenate(blocks: Sequence[Array], target: Array) -> None:
    np.concatenate(blocks, out=target)  # releases the GIL while it copies
