"""On CUDA, inputs gathered in the session's own page-locked memory are not copied on the host again."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dstack_backend.runtime_cuda import Bucket
from dstack_backend.tensors import TensorSpec


class FakeDriver:
    """Device memory is host memory here; `sources` are the host addresses that copies began from."""

    def __init__(self) -> None:
        self.sources: list[int] = []
        self._memory: dict[int, np.ndarray] = {}

    def use(self) -> None: ...
    def wait(self, stream: int) -> None: ...
    def free(self, pointer: int) -> None: ...
    def free_pinned(self, array: np.ndarray) -> None: ...

    def allocate(self, size_bytes: int) -> int:
        block = np.zeros(size_bytes, np.uint8)
        self._memory[block.ctypes.data] = block
        return block.ctypes.data

    def allocate_pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.zeros(shape, dtype)

    def to_device(self, pointer: int, source: int, size_bytes: int, stream: int) -> None:
        self.sources.append(source)
        ctypes.memmove(pointer, source, size_bytes)

    def to_host(self, target: int, pointer: int, size_bytes: int, stream: int) -> None:
        ctypes.memmove(target, pointer, size_bytes)


class FakeOrtSession:
    """y = x, on the device."""

    def __init__(self) -> None:
        self.bound: dict[str, tuple[int, int]] = {}

    def io_binding(self) -> Any:
        return SimpleNamespace(bind_input=self._bind, bind_output=self._bind)

    def _bind(self, name: str, kind: str, device: int, dtype: Any, shape: tuple, pointer: int) -> None:
        self.bound[name] = (pointer, int(np.prod(shape)) * np.dtype(dtype).itemsize)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        ctypes.memmove(self.bound["y"][0], *self.bound["x"])


@pytest.mark.parametrize("gathered", [True, False])
def test_rows_reach_the_device(gathered: bool) -> None:
    driver = FakeDriver()
    ours = np.zeros((8, 3), np.float32)
    spec = [TensorSpec(name, "tensor(float)", ("N", 3)) for name in "xy"]
    pinned = {ours.ctypes.data: ours}
    model: Any = SimpleNamespace(inputs=spec[:1], outputs=spec[1:], pinned=pinned)
    bucket = Bucket(FakeOrtSession(), driver, 0, 0, model, 4)
    fed = ours[:3] if gathered else np.empty((3, 3), np.float32)
    fed[:] = np.arange(9).reshape(3, 3)
    (y,) = bucket.run({"x": fed}, ["y"], 3)
    assert np.array_equal(y, fed)
    assert (driver.sources == [ours.ctypes.data]) is gathered
    assert not np.shares_memory(y, fed)
