"""The waiting requests of an instance, and how a batch is made of them. Pure: no clock, thread or device.

Requests are served earliest deadline first. A batch holds rows of one group: the same inputs present, with
the same types and the same shapes after the batch dimension. A request larger than a batch is taken in
chunks; it is answered when its last chunk is done.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dstack_backend.errors import RequestError, RunError
from dstack_backend.interfaces import Feeds, Request
from dstack_backend.tensors import Array, DeviceArray

Output: TypeAlias = "Array | DeviceArray"


class Item:
    """A request in the queue. rows 1 and `batched` False where the model has no batch dimension."""

    __slots__ = (
        "arrival_us", "batched", "deadline_us", "done_rows", "feeds", "key", "order", "parts", "queued_us",
        "removed", "request", "rows", "settled", "taken_rows",
    )  # fmt: skip

    def __init__(self, request: Request, feeds: Feeds, batched: bool, arrival_us: int, deadline_us: int):
        self.request = request
        self.feeds = feeds
        self.batched = batched
        self.rows = rows_of(feeds) if batched else 1
        self.key: Any = group_key(feeds, batched)
        self.arrival_us = arrival_us
        self.deadline_us = deadline_us
        self.order = 0  # arrival order, set by the queue
        self.taken_rows = 0  # rows handed to batches so far
        self.done_rows = 0
        self.queued_us = arrival_us  # when it was ready to run
        self.parts: dict[int, Mapping[str, Output]] = {}  # outputs of the chunks done, by first row
        self.settled = False  # answered or failed: later chunks are dropped
        self.removed = False  # taken out of the queue for good


def rows_of(feeds: Feeds) -> int:
    """Rows of a request: the first dimension that all its inputs share. Raises RequestError."""
    rows = {array.shape[0] if array.ndim else -1 for array in feeds.values()}
    if len(rows) != 1 or -1 in rows:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise RequestError(f"inputs must share their first (batch) dimension; got {shapes or 'no input'}")
    if rows == {0}:
        raise RequestError("a batch of 0 rows; send at least one")
    return rows.pop()


def group_key(feeds: Feeds, batched: bool) -> tuple[Any, ...]:
    """What requests must have in common to share a batch."""
    first = 1 if batched else 0
    return tuple(sorted((name, array.dtype.char, array.shape[first:]) for name, array in feeds.items()))


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of one request; they are the rows from `at` on in the batch."""

    item: Item
    start: int
    stop: int
    at: int = 0

    def rows_of(self, name: str) -> Any:
        """Its rows of one input; the whole input where the model has no batch dimension."""
        feed = self.item.feeds[name]
        return feed[self.start : self.stop] if self.item.batched else feed


@dataclass(slots=True)
class Batch:
    """Parts that run together. rows: their sum (1 for a model without batch dimension)."""

    parts: list[Part]
    rows: int

    @property
    def batched(self) -> bool:
        return self.parts[0].item.batched

    @property
    def earliest_deadline_us(self) -> int:
        return min(part.item.deadline_us for part in self.parts)

    @property
    def on_device(self) -> bool:
        """True where all requests came, and want to be answered, in device memory."""
        return all(
            part.item.request.on_device and part.stop - part.start == part.item.rows for part in self.parts
        )

    def outputs_wanted(self, order: Sequence[str]) -> list[str]:
        """The union of the outputs asked for, in graph order."""
        wanted: set[str] = set()
        for part in self.parts:
            wanted.update(part.item.request.wanted)
        return [name for name in order if name in wanted]


def batch_of(parts: Sequence[Part]) -> Batch:
    """A batch of these parts, one behind the other."""
    batch = Batch([], 0)
    for part in parts:
        batch.parts.append(Part(part.item, part.start, part.stop, batch.rows))
        batch.rows += part.stop - part.start
    return batch


class RequestQueue:
    """Waiting rows, by group, each group a heap by (deadline, arrival)."""

    def __init__(self) -> None:
        self._groups: dict[Any, list[tuple[int, int, Item]]] = {}
        self._order = 0
        self.rows = 0  # waiting rows
        self.requests = 0

    def push(self, item: Item) -> None:
        self._order += 1
        item.order = self._order
        self._insert(item)

    def _insert(self, item: Item) -> None:
        heapq.heappush(self._groups.setdefault(item.key, []), (item.deadline_us, item.order, item))
        self.rows += item.rows - item.taken_rows
        self.requests += 1

    def earliest_deadline_us(self) -> int:
        """Deadline of the most urgent waiting request; 0 when none waits."""
        return min((heap[0][0] for heap in self._groups.values()), default=0)

    def take(self, max_rows: int) -> Batch | None:
        """The next batch: at most max_rows rows of the most urgent group, most urgent request first."""
        if not self._groups:
            return None
        key = min(self._groups, key=lambda each: self._groups[each][0][:2])
        heap = self._groups[key]
        batch = Batch([], 0)
        while heap:
            item = heap[0][2]
            left = item.rows - item.taken_rows
            room = max_rows - batch.rows
            if batch.parts and (left > room or not item.batched):
                break
            if left <= room or not item.batched:
                heapq.heappop(heap)
                self.requests -= 1
            taken = min(left, room) if item.batched else 1
            batch.parts.append(Part(item, item.taken_rows, item.taken_rows + taken, batch.rows))
            item.taken_rows += taken
            batch.rows += taken
            self.rows -= taken
            if batch.rows >= max_rows or not item.batched:
                break
        if not heap:
            del self._groups[key]
        return batch

    def give_back(self, batch: Batch) -> None:
        """Undo take(): its rows wait again, in their old place. Not those of requests removed meanwhile."""
        for part in reversed(batch.parts):
            item = part.item
            if item.removed:
                continue
            still_queued = item.taken_rows < item.rows
            item.taken_rows -= part.stop - part.start
            if still_queued:
                self.rows += part.stop - part.start
            else:
                self._insert(item)

    def remove_before(self, deadline_us: int) -> list[Item]:
        """Take out the requests whose deadline is before this time, also those of which a chunk has run: the
        rest of it could not make the answer timely, and whoever orders the removal counts on it."""
        removed = []
        for key in list(self._groups):
            heap = self._groups[key]
            while heap and heap[0][0] < deadline_us:
                removed.append(heapq.heappop(heap)[2])
            if not heap:
                del self._groups[key]
        for item in removed:
            self._leave(item)
        return removed

    def drop(self, item: Item) -> None:
        """Take out one request (its earlier chunk failed or it was cancelled); unknown ones are ignored."""
        heap = self._groups.get(item.key, [])
        for index, entry in enumerate(heap):
            if entry[2] is item:
                heap[index] = heap[-1]
                heap.pop()
                heapq.heapify(heap)
                self._leave(item)
                break
        if not heap:
            self._groups.pop(item.key, None)

    def clear(self) -> list[Item]:
        """Take out everything."""
        items = [entry[2] for heap in self._groups.values() for entry in heap]
        self._groups.clear()
        for item in items:
            self._leave(item)
        return items

    def _leave(self, item: Item) -> None:
        """It is out of its heap, for good."""
        item.removed = True
        self.rows -= item.rows - item.taken_rows
        self.requests -= 1


def check_rows(batch: Batch, outputs: Mapping[str, Output]) -> None:
    """Raise RunError where an output has not a row for each row of the batch."""
    if not batch.batched:
        return
    for name, array in outputs.items():
        if not array.ndim or array.shape[0] != batch.rows:
            raise RunError(
                f"output {name!r} has shape {list(array.shape)} for a batch of {batch.rows} rows: the "
                f"model does not batch; set max_batch_size: 0"
            )


def outputs_of(batch: Batch, part: Part, outputs: Mapping[str, Output]) -> dict[str, Output]:
    """The rows of a part in the outputs of its batch, as views; copies where other chunks are still to come,
    for then they outlive the batch."""
    end = part.at + part.stop - part.start
    whole = len(batch.parts) == 1
    rows = {name: array if whole else array[part.at : end] for name, array in outputs.items()}
    if part.stop - part.start == part.item.rows:
        return rows
    return {name: array.copy() if isinstance(array, np.ndarray) else array for name, array in rows.items()}


def assemble(item: Item) -> dict[str, Output]:
    """The outputs that the request asked for, its chunks put together again."""
    wanted = item.request.wanted
    parts = [item.parts[start] for start in sorted(item.parts)]
    if len(parts) == 1:
        return {name: parts[0][name] for name in wanted}
    return {name: np.concatenate([part[name] for part in parts]) for name in wanted}  # type: ignore[misc]
