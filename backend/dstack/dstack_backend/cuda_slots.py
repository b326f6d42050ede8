"""Device and page-locked memory for batches on their way in and out, reused from batch to batch.

A slot belongs to one batch from stage() to close(): its inputs wait there while another batch computes, its
outputs leave from there while the next one computes. Three streams, ordered by events:

    copy-in   host -> slot                        | arrived
    compute   slot -> model, model, model -> slot | started, computed      waits for arrived
    copy-out  slot -> host                        | leaving, left          waits for computed

entering, started and leaving tell times only: one batch in TIMED_EVERY has them, for every call of the
driver costs some microseconds between two runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dstack_backend.cuda_host import HostMemory
from dstack_backend.errors import RunError
from dstack_backend.tensors import Array, DeviceArray, Feed, TensorSpec

MAX_SLOTS = 8  # two being staged, one running, one launched behind it, the others being answered
LEAST_SLOTS, MANY_BYTES = 4, 512 << 20  # of slots together: beyond, no more than the least that overlap takes
LEASE_TIMEOUT_S = 30.0
GATHER_BELOW_BYTES = 1 << 16
TIMED_EVERY = 8
_EVENTS = ("entering", "arrived", "started", "computed", "leaving", "left")


class Rows:
    """One tensor of up to `capacity` rows: device memory, and its page-locked twin once that is asked for."""

    def __init__(self, cuda: Any, spec: TensorSpec, capacity: int):
        self.dtype = spec.numpy_dtype
        self.row_shape = tuple(int(dim) for dim in spec.shape[1:] if dim is not None)
        self.row_bytes = math.prod(self.row_shape) * self.dtype.itemsize
        self.shape = (capacity, *self.row_shape)
        self._cuda = cuda
        self.device = cuda.allocate(capacity * self.row_bytes)
        self._host: Array | None = None

    @property
    def size_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def host(self) -> Array:
        if self._host is None:
            self._host = self._cuda.allocate_pinned(self.shape, self.dtype)
        return self._host

    def close(self) -> None:
        if self._host is not None:
            self._cuda.free_pinned(self._host)
            self._host = None
        self._cuda.free(self.device)


class Slot:
    """The memory and events of one batch of up to `capacity` rows."""

    def __init__(self, cuda: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], capacity: int):
        self.capacity = capacity
        self._cuda = cuda
        self.inputs = {spec.name: Rows(cuda, spec, capacity) for spec in inputs}
        self.outputs = {spec.name: Rows(cuda, spec, capacity) for spec in outputs}
        self.event = {name: cuda.event() for name in _EVENTS}
        self._uses = 0
        self._times_us: dict[str, int] = {}

    @property
    def size_bytes(self) -> int:
        return sum(rows.size_bytes for rows in (*self.inputs.values(), *self.outputs.values()))

    def enter(self, feeds: Mapping[str, Feed], host: HostMemory, stream: int) -> None:
        """Queue the copies of the inputs: from device memory, from host memory that the device reads
        itself, and of the rest from page-locked memory of ours that it is copied to first.
        """
        self._uses += 1
        self.mark("entering", stream)
        for name, feed in feeds.items():
            self._enter(name, parts_of(feed), host, stream)
        self._cuda.record(self.event["arrived"], stream)

    def _enter(self, name: str, parts: Sequence[Array | DeviceArray], host: HostMemory, stream: int) -> None:
        target = self.inputs[name]
        at = gathered = 0  # rows so far, and rows of those that are on the device or on their way
        for part in parts:
            check_part(name, part, target)
            end = at + len(part)
            direct = _direct(part, host, alone=len(parts) == 1)
            if direct:
                self._send(target, gathered, at, stream)
                pointer = target.device + at * target.row_bytes
                if isinstance(part, DeviceArray):
                    self._cuda.copy(pointer, direct, part.nbytes, stream)
                else:
                    self._cuda.to_device(pointer, direct, part.nbytes, stream)
                gathered = end
            elif isinstance(part, np.ndarray):
                np.copyto(target.host()[at:end], part, casting="no")
            at = end
        self._send(target, gathered, at, stream)

    def _send(self, target: Rows, start: int, stop: int, stream: int) -> None:
        """Queue the copy of rows that were gathered."""
        if stop > start:
            rows = target.host()[start:stop]
            self._cuda.to_device(
                target.device + start * target.row_bytes, rows.ctypes.data, rows.nbytes, stream
            )

    def leave(self, names: Sequence[str], rows: int, stream: int) -> None:
        """Queue the copies of these outputs to the host, behind the computation."""
        self._cuda.hold(stream, self.event["computed"])
        self.mark("leaving", stream)
        for name in names:
            source = self.outputs[name]
            self._cuda.to_host(source.host().ctypes.data, source.device, rows * source.row_bytes, stream)
        self._cuda.record(self.event["left"], stream)

    @property
    def timed(self) -> bool:
        """Whether this batch is one whose times are taken."""
        return self._uses % TIMED_EVERY == 1

    def mark(self, name: str, stream: int) -> None:
        """Record an event that tells times only."""
        if self.timed:
            self._cuda.record(self.event[name], stream)

    def times_us(self) -> dict[str, int]:
        """Device time of the stages, once the batch has left: its own, or of the last that was timed."""
        if not self.timed:
            return self._times_us
        between = self._cuda.elapsed_us
        event = self.event
        self._times_us = {
            "copy_in": between(event["entering"], event["arrived"]),
            "run": between(event["started"], event["computed"]),
            "copy_out": between(event["leaving"], event["left"]),
        }
        return self._times_us

    def close(self) -> None:
        for rows in (*self.inputs.values(), *self.outputs.values()):
            rows.close()
        for event in self.event.values():
            self._cuda.destroy_event(event)


class Slots:
    """The slots of a session: made when needed, at most MAX_SLOTS, each for as many rows as any so far."""

    def __init__(self, cuda: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]):
        self._cuda, self._specs = cuda, (inputs, outputs)
        self._returned = threading.Condition()
        self._free: list[Slot] = []
        self._made = 0
        self.capacity = 1  # rows of the slots made from now on, at least
        self.size_bytes = 0

    def lease(self, rows: int) -> Slot:
        """A slot for a batch; waits for one to come back. Raises RunError when none does in
        LEASE_TIMEOUT_S.
        """
        with self._returned:
            ready = self._returned.wait_for(
                lambda: self._free or self._made < self._limit(), timeout=LEASE_TIMEOUT_S
            )
            if not ready:
                raise RunError(
                    f"{self._made} batches are under way and none was closed in {LEASE_TIMEOUT_S:g} s"
                )
            slot = self._free.pop() if self._free else None
            self._made += slot is None
            self.capacity = max(self.capacity, rows)
        try:
            if slot is None or slot.capacity < rows:
                slot = self._remake(slot)
        except BaseException:
            with self._returned:
                self._made -= 1
                self._returned.notify()
            raise
        return slot

    def _limit(self) -> int:
        return MAX_SLOTS if self.size_bytes < MANY_BYTES else LEAST_SLOTS

    def _remake(self, small: Slot | None) -> Slot:
        if small is not None:
            self.size_bytes -= small.size_bytes
            small.close()
        self._cuda.use()
        slot = Slot(self._cuda, *self._specs, self.capacity)
        self.size_bytes += slot.size_bytes
        return slot

    def give_back(self, slot: Slot) -> None:
        with self._returned:
            self._free.append(slot)
            self._returned.notify()

    def close(self) -> None:
        """Free the slots that are not in use."""
        with self._returned:
            free, self._free = self._free, []
            self._made -= len(free)
        for slot in free:
            self.size_bytes -= slot.size_bytes
            slot.close()


def _direct(part: Array | DeviceArray, host: HostMemory, *, alone: bool) -> int:
    """The address that the device copies a part from; 0: it is to be gathered first. Small parts of many
    are: a copy costs some microseconds each.
    """
    if isinstance(part, DeviceArray):
        return part.pointer
    if not part.flags.c_contiguous or (part.nbytes < GATHER_BELOW_BYTES and not alone):
        return 0
    address = int(part.ctypes.data)
    return address if host.reads(address, part.nbytes) else 0


def parts_of(feed: Feed) -> Sequence[Array | DeviceArray]:
    """A feed as the arrays whose rows follow one another."""
    return (feed,) if isinstance(feed, np.ndarray | DeviceArray) else feed


def lifted(feed: Feed) -> Feed:
    """A tensor as one row."""
    parts = parts_of(feed)
    if len(parts) != 1:
        raise RunError("a tensor of fixed shape came in parts")
    (part,) = parts
    return replace(part, shape=(1, *part.shape)) if isinstance(part, DeviceArray) else part[None]


def rows_of(feeds: Mapping[str, Feed]) -> int:
    """Rows of a batch, by its first input; 0 where that has no dimension. Raises RunError where others
    differ.
    """
    counts = {
        name: sum(len(part) if part.ndim else 0 for part in parts_of(feed)) for name, feed in feeds.items()
    }
    if len(set(counts.values())) > 1:
        raise RunError(f"inputs of one batch with different numbers of rows: {counts}")
    return next(iter(counts.values()), 0)


def check_part(name: str, part: Array | DeviceArray, target: Rows) -> None:
    if part.dtype != target.dtype or tuple(part.shape[1:]) != target.row_shape:
        raise RunError(
            f"input {name!r} is {part.dtype} {list(part.shape)}; the model takes {target.dtype} "
            f"{['rows', *target.row_shape]}"
        )
