"""The weights of a model once in device memory, for any number of ONNX Runtime sessions.

ONNX Runtime takes initializers that the user owns (SessionOptions.add_initializer). Its own graph
optimisations make new weights, so sessions that share load the model as optimised before (optimized.py),
with its weights in a file beside it, and optimise no more."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from dstack_backend import dlpack
from dstack_backend.onnx_file import Weight, external_weights

ALIGNMENT = 256  # bytes, as cuMemAlloc gives and vector loads like


class Memory(Protocol):
    """What a place for weights must do; cuda_driver.Driver does."""

    def allocate(self, size_bytes: int) -> int: ...
    def upload(self, pointer: int, source: int, size_bytes: int) -> None: ...
    def free(self, pointer: int) -> None: ...


class SharedWeights:
    """The external initializers of an optimised model, in one block of device memory.

    device: DLPack's (type, id) of that memory. Errors: ModelError, DeviceError, OSError.
    """

    def __init__(self, model_path: Path, memory: Memory, device: tuple[int, int]):
        weights = external_weights(model_path)
        self._memory, self._device = memory, device
        offsets = _offsets(weights)
        self.size_bytes = offsets[-1]
        self._block = memory.allocate(self.size_bytes)
        self._values: list[tuple[str, ort.OrtValue]] = []
        try:
            for weight, offset in zip(weights, offsets, strict=False):
                _upload(memory, self._block + offset, model_path.parent / weight.file, weight)
                self._values.append((weight.name, self._value(weight, self._block + offset)))
        except BaseException:
            self.close()
            raise

    def _value(self, weight: Weight, pointer: int) -> ort.OrtValue:
        capsule = dlpack.capsule(pointer, weight.shape, weight.kind, self._device)
        return ort.OrtValue.from_dlpack(capsule)

    def add_to(self, options: ort.SessionOptions) -> None:
        """Let a session that is made with these options use the weights. It must be gone before close()."""
        for name, value in self._values:
            options.add_initializer(name, value)

    def close(self) -> None:
        """Free the memory."""
        self._values.clear()
        block, self._block = self._block, 0
        if block:
            self._memory.free(block)


def _offsets(weights: Sequence[Weight]) -> list[int]:
    """Where each weight begins in the block; behind the last, the size of the block."""
    offsets = [0]
    for weight in weights:
        offsets.append(offsets[-1] + -(-weight.size_bytes // ALIGNMENT) * ALIGNMENT)
    return offsets


def _upload(memory: Memory, pointer: int, file: Path, weight: Weight) -> None:
    if not weight.size_bytes:
        return
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        data: np.ndarray[Any, Any] = np.frombuffer(whole, np.uint8, weight.size_bytes, weight.offset)
        memory.upload(pointer, data.ctypes.data, weight.size_bytes)
        del data  # the map cannot close before
