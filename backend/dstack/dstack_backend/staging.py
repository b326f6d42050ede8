"""Input buffers that batches are gathered into, kept and reused: no page faults on the hot path."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from dstack_backend.batching import Batch
from dstack_backend.interfaces import Feeds
from dstack_backend.tensors import Array

MAX_KEYS = 32
MAX_BUFFERS_PER_KEY = 4
Allocate = Callable[[tuple[int, ...], Any], Array]


class Staging:
    """Gathers batches into reused buffers of `max_rows` rows. Not thread-safe: the caller holds its lock
    around lease() and release(); fill() runs without it.

    allocate(shape, dtype) makes a buffer; a CUDA session offers pinned memory here.
    """

    def __init__(self, max_rows: int, allocate: Allocate = np.empty):
        self._max_rows = max_rows
        self._allocate = allocate
        self._free: OrderedDict[Any, list[Feeds]] = OrderedDict()

    def lease(self, batch: Batch) -> Feeds | None:
        """Buffers for a batch, or None where none are needed: one request is fed as it came."""
        if len(batch.parts) == 1:
            return None
        free = self._free.get(self._key(batch))
        return free.pop() if free else {}

    def fill(self, batch: Batch, buffers: Feeds | None) -> Feeds:
        """The feeds of a batch: views of `buffers` that hold its rows, in the order of its parts."""
        if buffers is None:
            part = batch.parts[0]
            feeds = part.item.feeds
            if not batch.batched or part.stop - part.start == part.item.rows:
                return feeds
            return {name: array[part.start : part.stop] for name, array in feeds.items()}
        gathered = {}
        for name, first in batch.parts[0].item.feeds.items():
            if name not in buffers or len(buffers[name]) < batch.rows:
                rows = max(self._max_rows, batch.rows)
                buffers[name] = self._allocate((rows, *first.shape[1:]), first.dtype)
            target = buffers[name][: batch.rows]
            np.concatenate(
                [part.item.feeds[name][part.start : part.stop] for part in batch.parts], out=target
            )
            gathered[name] = target
        return gathered

    def release(self, batch: Batch, buffers: Feeds | None) -> None:
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
