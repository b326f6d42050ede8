"""ONNX Runtime's own path on the GPU: any shapes, host arrays in and out, one run at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dstack_backend.cuda_sessions import Sessions
from dstack_backend.cuda_slots import parts_of
from dstack_backend.errors import RunError
from dstack_backend.runtime import CpuBatch
from dstack_backend.tensors import Array, DeviceArray, Feed


class PlainPath:
    """A session that takes what no program takes. keep_memory False: give what a run took back after it."""

    def __init__(self, sessions: Sessions, cuda: Any, stream: int):
        self._cuda = cuda
        self._session: Any = sessions.open(stream)
        self._lock = threading.Lock()
        self.specs = self._session

    def to_host(self, feeds: Mapping[str, Feed]) -> dict[str, Array]:
        """The feeds as host arrays."""
        return {name: self._gather([self._fetch(part) for part in parts_of(feed)])
                for name, feed in feeds.items()}  # fmt: skip

    def _fetch(self, part: Array | DeviceArray) -> Array:
        if isinstance(part, DeviceArray):
            array = np.empty(part.shape, part.dtype)
            self._cuda.download(array.ctypes.data, part.pointer, part.nbytes)
            return array
        return part

    @staticmethod
    def _gather(parts: Sequence[Array]) -> Array:
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> list[Array]:
        """Outputs by name. Raises what ONNX Runtime raises."""
        with self._lock:
            if self._session is None:
                raise RunError("the session is closed")
            return list(self._session.run(list(names), dict(feeds)))

    def close(self) -> None:
        with self._lock:
            self._session = self.specs = None


class PlainBatch(CpuBatch):
    """Staged and Running on that path: it runs in launch(). Outputs wanted on the device are brought back
    there.
    """

    def __init__(self, feeds: Mapping[str, Array], rows: int, gpu_percent: float):
        super().__init__(feeds, rows, gpu_percent)
        self._left: list[DeviceArray] = []
        self._cuda: Any = None

    def leave_on_device(self, count: int, cuda: Any) -> None:
        """Move the last `count` outputs to device memory of this batch."""
        self._cuda = cuda
        for array in self.arrays[len(self.arrays) - count :]:
            dense = np.ascontiguousarray(array)
            pointer = cuda.allocate(dense.nbytes)
            self._left.append(DeviceArray(pointer, dense.shape, dense.dtype, cuda.device_id, self))
            cuda.upload(pointer, dense.ctypes.data, dense.nbytes)
        del self.arrays[len(self.arrays) - count :]

    def device_outputs(self) -> list[DeviceArray]:
        return list(self._left)

    def close(self) -> None:
        while self._left:
            self._cuda.free(self._left.pop().pointer)
