"""The few calls of the CUDA driver that the runtime needs, through ctypes: no package beside the driver.

ctypes releases the GIL during each call. Pointers and handles are plain integers.
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache
from typing import Any

import numpy as np

from dstack_backend.errors import DeviceError

_STREAM_NON_BLOCKING = 1
_POINTER = ctypes.c_uint64


class Driver:
    """libcuda with its primary context on one device. `use` makes the context current in the calling thread.

    Errors: DeviceError with the driver's own words.
    """

    def __init__(self, device_id: int):
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DeviceError(
                f"no CUDA driver: {error}; use a CPU instance (KIND_CPU) on this host"
            ) from error
        self._current = threading.local()
        self._call("cuInit", 0)
        self.device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self.device), device_id)
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self.device)

    def use(self) -> None:
        """Make the context current in this thread."""
        if not getattr(self._current, "set", False):
            self._call("cuCtxSetCurrent", self._context)
            self._current.set = True

    def allocate(self, size_bytes: int) -> int:
        """Device memory, zeroed: padding rows that nobody wrote hold valid numbers."""
        self.use()
        pointer = _POINTER()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(1, size_bytes)))
        self._call("cuMemsetD8_v2", pointer, ctypes.c_ubyte(0), ctypes.c_size_t(max(1, size_bytes)))
        return pointer.value

    def free(self, pointer: int) -> None:
        self.use()
        self._call("cuMemFree_v2", _POINTER(pointer))

    def allocate_pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Page-locked host memory as an array; give it back with free_pinned."""
        self.use()
        size_bytes = max(1, int(np.prod(shape)) * dtype.itemsize)
        pointer = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size_bytes), ctypes.c_uint(0))
        raw: Any = (ctypes.c_ubyte * size_bytes).from_address(pointer.value or 0)
        array: np.ndarray = np.ctypeslib.as_array(raw)[: int(np.prod(shape)) * dtype.itemsize]
        return array.view(dtype).reshape(shape)

    def free_pinned(self, array: np.ndarray) -> None:
        self.use()
        self._call("cuMemFreeHost", ctypes.c_void_p(array.ctypes.data))

    def stream(self) -> int:
        self.use()
        handle = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(handle), ctypes.c_uint(_STREAM_NON_BLOCKING))
        return handle.value or 0

    def destroy_stream(self, stream: int) -> None:
        self.use()
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def to_device(self, pointer: int, source: int, size_bytes: int, stream: int) -> None:
        """Queue a copy from a host address behind what the stream holds."""
        self._call(
            "cuMemcpyHtoDAsync_v2", _POINTER(pointer), ctypes.c_void_p(source), ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream),
        )  # fmt: skip

    def to_host(self, target: int, pointer: int, size_bytes: int, stream: int) -> None:
        """Queue a copy to a host address behind what the stream holds."""
        self._call(
            "cuMemcpyDtoHAsync_v2", ctypes.c_void_p(target), _POINTER(pointer), ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream),
        )  # fmt: skip

    def wait(self, stream: int) -> None:
        """Until all that the stream holds is done. A device fault of an earlier call surfaces here."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            raise DeviceError(f"{name}: {(text.value or b'unknown CUDA error').decode()} ({status})")


@lru_cache(maxsize=8)
def driver(device_id: int) -> Driver:
    """The driver on one device, opened once a process."""
    return Driver(device_id)
