"""Device and page-locked memory for batches on their way in and out, reused from batch to batch.

A slot belongs to one batch from stage() to close(): its inputs wait there while another batch computes, its
outputs leave from there while the next one computes. Three streams, ordered by events:

    copy-in   host -> slot                        | arrived
    compute   slot -> model, model, model -> slot | started, computed      waits for arrived
    copy-out  slot -> host                        | leaving, left          waits for computed

A batch that has the device to itself takes the compute stream for all (run_alone).

entering, started and leaving tell times only: one batch in TIMED_EVERY has them, for every call of the
driver costs some microseconds between two runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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


class Copy(NamedTuple):
    """Some rows of an input on their way: to `offset` bytes from the start of its buffer."""

    name: str
    offset: int
    source: int
    size_bytes: int
    on_device: bool


class Leaving(NamedTuple):
    """Which outputs of how many rows go to the host (names) and which stay on the device (left)."""

    rows: int
    names: Sequence[str]
    left: Sequence[str]


def row_bytes(spec: TensorSpec) -> int:
    """Bytes of one row of a tensor whose other dimensions are fixed."""
    return math.prod(dim for dim in spec.shape[1:] if dim is not None) * spec.numpy_dtype.itemsize


class Rows:
    """One tensor of up to `capacity` rows: device memory, and its page-locked twin once that is asked for."""

    def __init__(self, cuda: Any, spec: TensorSpec, capacity: int):
        self.dtype = spec.numpy_dtype
        self.row_shape = tuple(int(dim) for dim in spec.shape[1:] if dim is not None)
        self.row_bytes = row_bytes(spec)
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

    def gather(self, feeds: Mapping[str, Feed], host: HostMemory) -> list[Copy]:
        """What is to be copied to the device: from device memory, from host memory that the device reads
        itself, and of the rest from page-locked memory of ours, to which it is copied here. Raises RunError.
        """
        self._uses += 1
        copies: list[Copy] = []
        for name, feed in feeds.items():
            self._gather(name, parts_of(feed), host, copies)
        return copies

    def _gather(
        self, name: str, parts: Sequence[Array | DeviceArray], host: HostMemory, copies: list[Copy]
    ) -> None:
        target = self.inputs[name]
        at = sent = 0  # rows so far, and rows of those that a copy takes
        for part in parts:
            check_part(name, part, target)
            end = at + len(part)
            if direct := _direct(part, host, alone=len(parts) == 1):
                self._send(name, sent, at, copies)
                on_device = isinstance(part, DeviceArray)
                copies.append(Copy(name, at * target.row_bytes, direct, part.nbytes, on_device))
                sent = end
            elif isinstance(part, np.ndarray):
                np.copyto(target.host()[at:end], part, casting="no")
            at = end
        self._send(name, sent, at, copies)

    def _send(self, name: str, start: int, stop: int, copies: list[Copy]) -> None:
        """Rows that were gathered."""
        if stop > start:
            target = self.inputs[name]
            rows = target.host()[start:stop]
            copies.append(Copy(name, start * target.row_bytes, rows.ctypes.data, rows.nbytes, False))

    def enter(self, copies: Sequence[Copy], stream: int) -> None:
        """Queue the copies of the inputs to this slot."""
        self.mark("entering", stream)
        self.copy_in(copies, self.inputs, stream)
        self._cuda.record(self.event["arrived"], stream)

    def copy_in(self, copies: Sequence[Copy], targets: Mapping[str, Rows], stream: int) -> None:
        for name, offset, source, size_bytes, on_device in copies:
            pointer = targets[name].device + offset
            if on_device:
                self._cuda.copy(pointer, source, size_bytes, stream)
            else:
                self._cuda.to_device(pointer, source, size_bytes, stream)

    def leave(self, names: Sequence[str], rows: int, stream: int) -> None:
        """Queue the copies of these outputs to the host, behind the computation."""
        self._cuda.hold(stream, self.event["computed"])
        self.mark("leaving", stream)
        for name in names:
            self._to_host(name, rows, self.outputs[name], stream)
        self._cuda.record(self.event["left"], stream)

    def run_alone(self, program: Any, copies: Sequence[Copy], batch: Leaving, stream: int) -> None:
        """Everything on one stream, straight into the program's buffers and out of them: half the calls of
        the driver, where no other batch could overlap with this one.
        """
        self.mark("entering", stream)
        self.copy_in(copies, program.inputs, stream)
        self.mark("arrived", stream)
        self.mark("started", stream)
        program.start(stream)
        self.mark("computed", stream)
        for name in batch.left:
            source = program.outputs[name]
            self._cuda.copy(self.outputs[name].device, source.device, batch.rows * source.row_bytes, stream)
        self.mark("leaving", stream)
        for name in batch.names:
            self._to_host(name, batch.rows, program.outputs[name], stream)
        self._cuda.record(self.event["left"], stream)

    def _to_host(self, name: str, rows: int, source: Rows, stream: int) -> None:
        self._cuda.to_host(
            self.outputs[name].host().ctypes.data, source.device, rows * source.row_bytes, stream
        )

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

    @property
    def in_use(self) -> int:
        with self._returned:
            return self._made - len(self._free)

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
