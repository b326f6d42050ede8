"""A CUDA device made of host memory, and ONNX Runtime's CPU provider as what runs on it.

Streams are lazy: what is queued runs only when somebody waits for it, and then only what the wait depends
on. So a missing event, a buffer reused too early or an answer read too soon gives wrong numbers, every time.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from dstack_backend import dlpack
from dstack_backend.cuda_sessions import Sessions
from dstack_backend.errors import DeviceError, DeviceLostError

TOTAL_BYTES = 1 << 34


@dataclass
class Stream:
    """Queued work: a callable, or an event mark (stream, position) to wait for."""

    queue: list[Callable[[], None] | tuple[Stream, int]] = field(default_factory=list)
    done: int = 0
    capturing: list[Callable[[], None]] | None = None
    sms: int = 0  # the mask of SM groups it was made for


class FakeCuda:
    """cuda_driver.Driver's methods. log: what was queued, in order. lost: every call fails from now on."""

    device_id = 0

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.memory: dict[int, np.ndarray] = {}
        self.host: dict[int, np.ndarray] = {}
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, tuple[Stream, int] | None] = {}
        self.graphs: dict[int, tuple[list[Callable[[], None]], int]] = {}
        self.launched: list[int] = []  # masks of the graphs launched
        self.log: list[str] = []
        self.registered: dict[int, int] = {}
        self.lost = self.touching = self.unregistrable = False
        self.others_bytes = 0  # what other processes hold
        self._next = 1000

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def use(self) -> None:
        self._alive()

    def check(self) -> None:
        self._alive()

    def _alive(self) -> None:
        if self.lost:
            raise DeviceLostError("fake: an illegal memory access was encountered (700)")

    def name(self) -> str:
        return "fake 9.0"

    def version(self) -> str:
        return "13000"

    def memory_info(self) -> tuple[int, int]:
        held = self.others_bytes + sum(block.nbytes for block in self.memory.values())
        return TOTAL_BYTES - held, TOTAL_BYTES

    # Memory

    def allocate(self, size_bytes: int) -> int:
        self._alive()
        block = np.zeros(max(1, size_bytes) + 64, np.uint8)
        pointer = block.ctypes.data + -block.ctypes.data % 64
        self.memory[pointer] = block
        return pointer

    def free(self, pointer: int) -> None:
        self._alive()
        del self.memory[pointer]

    def allocate_pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = np.zeros(shape, dtype)
        self.host[array.ctypes.data] = array
        return array

    def free_pinned(self, array: np.ndarray) -> None:
        self._alive()
        del self.host[array.ctypes.data]

    def _known(self, pointer: int, size_bytes: int) -> None:
        for start, block in self.memory.items():
            if start <= pointer and pointer + size_bytes <= start + max(1, block.nbytes - 64):
                return
        raise DeviceError(f"fake: {size_bytes} bytes at {pointer} are not device memory")

    def upload(self, pointer: int, source: int, size_bytes: int) -> None:
        self._alive()
        self._known(pointer, size_bytes)
        ctypes.memmove(pointer, source, size_bytes)

    def download(self, target: int, pointer: int, size_bytes: int) -> None:
        self._alive()
        self._known(pointer, size_bytes)
        ctypes.memmove(target, pointer, size_bytes)

    # Streams and events

    def stream(self, sms: int = 0) -> int:
        handle = self._handle()
        self.streams[handle] = Stream(sms=sms)
        return handle

    def destroy_stream(self, stream: int) -> None:
        with contextlib.suppress(RuntimeError):  # what failed before
            self.wait(stream)
        del self.streams[stream]

    def event(self) -> int:
        handle = self._handle()
        self.events[handle] = None
        return handle

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def record(self, event: int, stream: int) -> None:
        self._alive()
        self.events[event] = self.streams[stream], len(self.streams[stream].queue)

    def hold(self, stream: int, event: int) -> None:
        self._alive()
        if (mark := self.events[event]) is not None:
            self.streams[stream].queue.append(mark)

    def _run(self, stream: Stream, until: int) -> None:
        with self.lock:
            while stream.done < until:
                work = stream.queue[stream.done]
                stream.done += 1
                if isinstance(work, tuple):
                    self._run(*work)
                else:
                    work()

    def wait(self, stream: int) -> None:
        self._alive()
        self._run(self.streams[stream], len(self.streams[stream].queue))

    def wait_event(self, event: int) -> None:
        self._alive()
        if (mark := self.events[event]) is not None:
            self._run(*mark)

    def elapsed_us(self, start: int, end: int) -> int:
        marks = self.events[start], self.events[end]
        if None in marks or any(stream.done < at for stream, at in marks):  # type: ignore[misc]
            raise DeviceError("fake: an event has not happened yet")
        return 7

    def queue(self, stream: int, what: str, work: Callable[[], None]) -> None:
        """Put work on a stream, or into the graph that is being captured there."""
        self._alive()
        self.log.append(what)
        target = self.streams[stream]
        if target.capturing is not None:
            target.capturing.append(work)
        else:
            target.queue.append(work)

    def register(self, address: int, size_bytes: int) -> None:
        self._alive()
        if self.unregistrable:
            raise DeviceError("fake: out of memory (2)")
        self.registered[address] = size_bytes

    def unregister(self, address: int) -> None:
        self._alive()
        del self.registered[address]

    def to_device(self, pointer: int, source: int, size_bytes: int, stream: int) -> None:
        known = [(start, array.nbytes) for start, array in self.host.items()] + [*self.registered.items()]
        assert any(start <= source and source + size_bytes <= start + size for start, size in known)
        self._known(pointer, size_bytes)
        self.queue(stream, "to_device", lambda: void(ctypes.memmove(pointer, source, size_bytes)))

    def to_host(self, target: int, pointer: int, size_bytes: int, stream: int) -> None:
        assert any(a <= target and target + size_bytes <= a + x.nbytes for a, x in self.host.items())
        self._known(pointer, size_bytes)
        self.queue(stream, "to_host", lambda: void(ctypes.memmove(target, pointer, size_bytes)))

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        self._known(target, size_bytes)
        self._known(source, size_bytes)
        self.queue(stream, "copy", lambda: void(ctypes.memmove(target, source, size_bytes)))

    # Graphs

    def begin_capture(self, stream: int) -> None:
        self.streams[stream].capturing = []

    def end_capture(self, stream: int) -> int:
        captured, self.streams[stream].capturing = self.streams[stream].capturing, None
        handle = self._handle()
        self.graphs[handle] = captured or [], self.streams[stream].sms
        return handle

    def touches_host(self, graph: int) -> bool:
        return self.touching

    def instantiate(self, graph: int) -> int:
        return graph

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    destroy_executable = destroy_graph

    def launch(self, executable: int, stream: int) -> None:
        captured, sms = self.graphs[executable]
        self.launched.append(sms)
        self.queue(stream, "launch", lambda: void([work() for work in captured]))

    def assert_nothing_left(self) -> None:
        left = self.memory, self.host, self.registered, self.streams, self.events, self.graphs
        assert not any(left), left


def void(_: object) -> None: ...


class FakeGroups:
    """cuda_groups.SmGroups of a device with `count` groups; streams remember their mask."""

    def __init__(self, cuda: FakeCuda, count: int = 16):
        self._cuda = cuda
        self.sms = (8,) * count

    def stream(self, mask: int) -> int:
        assert 0 < mask < 1 << len(self.sms)
        return self._cuda.stream(mask)


class CpuSessions(Sessions):
    """Sessions on the CPU provider whose bound runs go to the fake's streams.

    opened: graphs or not, in order. no_graphs: ONNX Runtime refuses to capture.
    """

    provider = "CPUExecutionProvider"
    device_name = "cpu"
    device_type = dlpack.CPU

    def __init__(
        self,
        path: Path,
        options: Any,
        cuda: FakeCuda,
        cache: Any = None,
        *,
        nhwc: bool = False,
        no_graphs: bool = False,
    ):
        super().__init__(path, 0, options, cuda, cache, nhwc=nhwc)
        self.cuda, self.no_graphs = cuda, no_graphs
        self.opened: list[bool] = []

    def _provider_options(self, stream: int, graphs: bool) -> dict[str, Any]:
        if graphs and self.no_graphs:
            raise DeviceError("fake: this session cannot use the graph capture feature")
        self.opened.append(graphs)
        self._stream = stream
        return {}

    def open(self, stream: int, *, graphs: bool = False) -> Any:
        return BoundLater(super().open(stream, graphs=graphs), self.cuda, stream)


class BoundLater:
    """An InferenceSession whose run_with_iobinding only queues, as on a GPU."""

    def __init__(self, session: ort.InferenceSession, cuda: FakeCuda, stream: int):
        self._session, self._cuda, self._stream = session, cuda, stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: Sequence[str], feeds: Any, options: Any = None) -> Any:
        self._cuda.check()
        return self._session.run(names, feeds)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        session = self._session
        self._cuda.queue(self._stream, "run", lambda: session.run_with_iobinding(binding))


def device_array(cuda: FakeCuda, array: np.ndarray) -> Any:
    """A copy of an array in the fake's memory; its owner frees nothing."""
    from dstack_backend.tensors import DeviceArray

    pointer = cuda.allocate(array.nbytes)
    dense = np.ascontiguousarray(array)
    cuda.upload(pointer, dense.ctypes.data, dense.nbytes)
    return DeviceArray(pointer, array.shape, array.dtype, 0, None)


def read(cuda: FakeCuda, array: Any) -> np.ndarray:
    """What a device array holds now."""
    found = np.empty(array.shape, array.dtype)
    cuda.download(found.ctypes.data, array.pointer, math.prod(array.shape) * array.dtype.itemsize)
    return found
