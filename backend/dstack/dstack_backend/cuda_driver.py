"""The calls of the CUDA driver that the runtime needs, through ctypes: no package beside the driver.

Pointers and handles are plain integers. Calls that may take long release the GIL. Calls that only queue work
keep it: a thread that gives it up waits up to a switch interval to get it back, and a batch makes fifteen.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from dstack_backend.cuda_devices import cuda_version
from dstack_backend.errors import DeviceError, DeviceLostError

_STREAM_NON_BLOCKING = 1
_CAPTURE_RELAXED = 2
_HOST_MEMORY, _POINTER_MEMORY_TYPE = 1, 2  # CU_MEMORYTYPE_HOST, CU_POINTER_ATTRIBUTE_MEMORY_TYPE
_NODE_MEMCPY, _NODE_HOST = 1, 3
_POINTER = ctypes.c_uint64
_SIZE = ctypes.c_size_t
_HANDLE = ctypes.c_void_p
# Codes after which every call of this process fails: context gone (4, 201, 709), device or link broken (46,
# 214, 220, 226), a kernel's fault (700, 702, 710, 714..719), MPS daemon or server gone (805..807, 810),
# unknown (999).
LOST = frozenset({4, 46, 201, 214, 220, 226, 700, 702, 709, 710, *range(714, 720), 805, 806, 807, 810, 999})


class _CopyEnd(ctypes.Structure):
    """One side of CUDA_MEMCPY3D."""

    _fields_ = (
        *((name, _SIZE) for name in ("x_bytes", "y", "z", "lod")),
        ("kind", ctypes.c_int),
        ("host", _HANDLE),
        ("device", _POINTER),
        *((name, _SIZE) for name in ("array", "reserved", "pitch", "height")),
    )


class _Copy3D(ctypes.Structure):
    """CUDA_MEMCPY3D: what a copy node of a graph copies."""

    _fields_ = (("source", _CopyEnd), ("target", _CopyEnd), ("extent", _SIZE * 3))


class Driver:
    """libcuda with its primary context on one device. `use` makes the context current in the calling thread;
    methods that need that say so by doing it.

    Errors: DeviceError with the driver's own words, DeviceLostError where nothing works any more.
    """

    def __init__(self, device_id: int):
        try:
            self._blocking, self._quick = ctypes.CDLL("libcuda.so.1"), ctypes.PyDLL("libcuda.so.1")
        except OSError as error:
            raise DeviceError(
                f"no CUDA driver: {error}; use a CPU instance (KIND_CPU) on this host"
            ) from error
        self._declare()
        self._current = threading.local()
        self.device_id = device_id
        self.call("cuInit", 0)
        self.device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(self.device), device_id)
        self._context = _HANDLE()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self.device)
        self._setup_stream = self.stream()

    def _declare(self) -> None:
        """What the calls of every batch take: ctypes then converts plain integers by itself, which is
        quicker.
        """
        self._record = self._quickly("cuEventRecord", _HANDLE, _HANDLE)
        self._hold = self._quickly("cuStreamWaitEvent", _HANDLE, _HANDLE, ctypes.c_uint)
        self._to_device = self._quickly("cuMemcpyHtoDAsync_v2", _POINTER, _HANDLE, _SIZE, _HANDLE)
        self._to_host = self._quickly("cuMemcpyDtoHAsync_v2", _HANDLE, _POINTER, _SIZE, _HANDLE)
        self._copy = self._quickly("cuMemcpyDtoDAsync_v2", _POINTER, _POINTER, _SIZE, _HANDLE)
        self._elapsed = self._quickly("cuEventElapsedTime", _HANDLE, _HANDLE, _HANDLE)
        self._launch = self._quickly("cuGraphLaunch", _HANDLE, _HANDLE)

    # Contexts and memory

    def use(self) -> None:
        """Make the context current in this thread."""
        if not getattr(self._current, "set", False):
            self.call("cuCtxSetCurrent", self._context)
            self._current.set = True

    def allocate(self, size_bytes: int) -> int:
        """Device memory, zeroed: padding rows that nobody wrote hold valid numbers."""
        self.use()
        pointer = _POINTER()
        size_bytes = max(1, size_bytes)
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), _SIZE(size_bytes))
        stream = _HANDLE(self._setup_stream)  # not the null stream: ours do not wait for that one
        self.call("cuMemsetD8Async", pointer, ctypes.c_ubyte(0), _SIZE(size_bytes), stream)
        self.wait(self._setup_stream)
        return pointer.value

    def free(self, pointer: int) -> None:
        self.use()
        self.call("cuMemFree_v2", _POINTER(pointer))

    def allocate_pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Page-locked host memory as an array; give it back with free_pinned."""
        self.use()
        size_bytes = math.prod(shape) * dtype.itemsize
        pointer = _HANDLE()
        self.call("cuMemHostAlloc", ctypes.byref(pointer), _SIZE(max(1, size_bytes)), ctypes.c_uint(0))
        raw: Any = (ctypes.c_ubyte * max(1, size_bytes)).from_address(pointer.value or 0)
        return np.ctypeslib.as_array(raw)[:size_bytes].view(dtype).reshape(shape)

    def free_pinned(self, array: np.ndarray) -> None:
        self.use()
        self.call("cuMemFreeHost", _HANDLE(array.ctypes.data))

    def register(self, address: int, size_bytes: int) -> None:
        """Let the device read host memory that was mapped by others. Whole pages."""
        self.use()
        self.call("cuMemHostRegister_v2", _HANDLE(address), _SIZE(size_bytes), ctypes.c_uint(0))

    def unregister(self, address: int) -> None:
        self.use()
        self.call("cuMemHostUnregister", _HANDLE(address))

    def upload(self, pointer: int, source: int, size_bytes: int) -> None:
        """Copy host memory of any kind to the device and wait for it."""
        self.use()
        stream = _HANDLE(self._setup_stream)
        self.call("cuMemcpyHtoDAsync_v2", _POINTER(pointer), _HANDLE(source), _SIZE(size_bytes), stream)
        self.wait(self._setup_stream)

    def download(self, target: int, pointer: int, size_bytes: int) -> None:
        """Copy device memory to host memory of any kind and wait for it."""
        self.use()
        stream = _HANDLE(self._setup_stream)
        self.call("cuMemcpyDtoHAsync_v2", _HANDLE(target), _POINTER(pointer), _SIZE(size_bytes), stream)
        self.wait(self._setup_stream)

    def name(self) -> str:
        """The device's model and compute capability: what graph optimisation may depend on."""
        text = ctypes.create_string_buffer(128)
        self.call("cuDeviceGetName", text, ctypes.c_int(128), self.device)
        major, minor = (self._attribute(code) for code in (75, 76))
        return f"{text.value.decode()} {major}.{minor}"

    def version(self) -> str:
        """Of CUDA that the driver brings: a newer driver may compile otherwise."""
        return str(cuda_version())

    def _attribute(self, code: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(code), self.device)
        return value.value

    def memory_info(self) -> tuple[int, int]:
        """Free and total device memory in bytes; under MPS, of the share this process may use."""
        self.use()
        free, total = _SIZE(), _SIZE()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    # Streams, events, copies

    def stream(self) -> int:
        self.use()
        handle = _HANDLE()
        self.call("cuStreamCreate", ctypes.byref(handle), ctypes.c_uint(_STREAM_NON_BLOCKING))
        return handle.value or 0

    def destroy_stream(self, stream: int) -> None:
        self.use()
        self.call("cuStreamDestroy_v2", _HANDLE(stream))

    def event(self) -> int:
        """An event of the current context, with timing."""
        handle = _HANDLE()
        self.call("cuEventCreate", ctypes.byref(handle), ctypes.c_uint(0))
        return handle.value or 0

    def destroy_event(self, event: int) -> None:
        self.use()
        self.call("cuEventDestroy_v2", _HANDLE(event))

    def record(self, event: int, stream: int) -> None:
        """The event happens once the stream has done what it holds now."""
        self._record(event, stream)

    def hold(self, stream: int, event: int) -> None:
        """What the stream gets from now on waits for the event."""
        self._hold(stream, event, 0)

    def wait(self, stream: int) -> None:
        """Until all that the stream holds is done. A device fault of an earlier call surfaces here."""
        self.call("cuStreamSynchronize", _HANDLE(stream))

    def wait_event(self, event: int) -> None:
        """Until the event has happened (at once for one never recorded)."""
        self.call("cuEventSynchronize", _HANDLE(event))

    def elapsed_us(self, start: int, end: int) -> int:
        """Device time between two events that have happened."""
        elapsed_ms = ctypes.c_float()
        self._elapsed(ctypes.byref(elapsed_ms), start, end)
        return round(elapsed_ms.value * 1000)

    def to_device(self, pointer: int, source: int, size_bytes: int, stream: int) -> None:
        """Queue a copy from page-locked host memory."""
        self._to_device(pointer, source, size_bytes, stream)

    def to_host(self, target: int, pointer: int, size_bytes: int, stream: int) -> None:
        """Queue a copy to page-locked host memory."""
        self._to_host(target, pointer, size_bytes, stream)

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Queue a copy within the device."""
        self._copy(target, source, size_bytes, stream)

    # Graphs

    def begin_capture(self, stream: int) -> None:
        """What the stream gets from now on becomes a graph and does not run."""
        self.call("cuStreamBeginCapture_v2", _HANDLE(stream), ctypes.c_int(_CAPTURE_RELAXED))

    def end_capture(self, stream: int) -> int:
        """The captured graph, for instantiate(). Errors: DeviceError where something cannot be captured."""
        graph = _HANDLE()
        self.call("cuStreamEndCapture", _HANDLE(stream), ctypes.byref(graph))
        if not graph.value:
            raise DeviceError("nothing was captured: the model does not run on the stream it was given")
        return graph.value

    def instantiate(self, graph: int) -> int:
        """An executable graph; `graph` is used up."""
        executable = _HANDLE()
        try:
            self.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), _HANDLE(graph), _POINTER(0))
        finally:
            self.destroy_graph(graph)
        return executable.value or 0

    def destroy_graph(self, graph: int) -> None:
        self.call("cuGraphDestroy", _HANDLE(graph))

    def launch(self, executable: int, stream: int) -> None:
        self._launch(executable, stream)

    def destroy_executable(self, executable: int) -> None:
        self.use()
        self.call("cuGraphExecDestroy", _HANDLE(executable))

    def touches_host(self, graph: int) -> bool:
        """Whether a graph calls the host or copies from or to host memory: its replay would use whatever lies
        there by then."""
        count = _SIZE()
        self.call("cuGraphGetNodes", _HANDLE(graph), None, ctypes.byref(count))
        nodes = (_HANDLE * count.value)()
        self.call("cuGraphGetNodes", _HANDLE(graph), nodes, ctypes.byref(count))
        return any(self._node_touches_host(_HANDLE(node)) for node in nodes)

    def _node_touches_host(self, node: ctypes.c_void_p) -> bool:
        kind = ctypes.c_int()
        self.call("cuGraphNodeGetType", node, ctypes.byref(kind))
        if kind.value != _NODE_MEMCPY:
            return kind.value == _NODE_HOST
        copy = _Copy3D()
        self.call("cuGraphMemcpyNodeGetParams", node, ctypes.byref(copy))
        return any(
            end.kind == _HOST_MEMORY or self._is_host(end.device) for end in (copy.source, copy.target)
        )

    def _is_host(self, pointer: int) -> bool:
        kind = ctypes.c_uint()
        status = self._quick.cuPointerGetAttribute(
            ctypes.byref(kind), ctypes.c_int(_POINTER_MEMORY_TYPE), _POINTER(pointer)
        )
        return bool(status) or kind.value == _HOST_MEMORY  # memory unknown to CUDA is pageable host memory

    # Calls

    def check(self) -> None:
        """Raise DeviceLostError where the context is broken; a good one stays undisturbed."""
        status = self._quick.cuStreamQuery(_HANDLE(self._setup_stream))
        if status in LOST:
            raise self._error("cuStreamQuery", status)

    def call(self, name: str, *arguments: Any) -> None:
        """A call that may take long: without the GIL."""
        status = getattr(self._blocking, name)(*arguments)
        if status:
            raise self._error(name, status)

    def _quickly(self, name: str, *types: Any) -> Callable[..., None]:
        """A call that returns at once, for plain integers: with the GIL."""
        function = getattr(self._quick, name)
        function.argtypes, function.restype = types, ctypes.c_int

        def call(*arguments: Any) -> None:
            status = function(*arguments)
            if status:
                raise self._error(name, status)

        return call

    def entry(self, name: str, version: int) -> Any:
        """A function for levels as of a CUDA version (12040 for 12.4), as a callable. Errors: DeviceError,
        also where the driver has none.
        """
        function, found = _HANDLE(), ctypes.c_int()
        self.call(
            "cuGetProcAddress_v2", name.encode(), ctypes.byref(function), ctypes.c_int(version), _POINTER(0),
            ctypes.byref(found),
        )  # fmt: skip
        if not function.value:
            raise DeviceError(f"this CUDA driver has no {name}: take a newer one, or set levels to off")
        address = function.value
        prototype = ctypes.CFUNCTYPE(ctypes.c_int)
        bare = prototype(address)

        def call(*arguments: Any) -> None:
            status = bare(*arguments)
            if status:
                raise self._error(name, status)

        return call

    def _error(self, name: str, status: int) -> DeviceError | DeviceLostError:
        text = ctypes.c_char_p()
        self._quick.cuGetErrorString(status, ctypes.byref(text))
        words = f"{name}: {(text.value or b'unknown CUDA error').decode()} ({status})"
        return DeviceLostError(words) if status in LOST else DeviceError(words)


@lru_cache(maxsize=8)
def driver(device_id: int) -> Driver:
    """The driver on one device, opened once a process."""
    return Driver(device_id)
