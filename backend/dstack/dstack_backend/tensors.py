"""One table of tensor types: the names ONNX Runtime, Triton and NumPy use for the same thing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dstack_backend.errors import ModelError, RequestError

Array: TypeAlias = NDArray[Any]

# ONNX Runtime's name -> (Triton's config name, NumPy type). BF16 is missing on purpose: NumPy has no such
# type and Triton's Python backend cannot hand such a tensor over.
_TYPES: dict[str, tuple[str, Any]] = {
    "tensor(bool)": ("TYPE_BOOL", np.bool_),
    "tensor(uint8)": ("TYPE_UINT8", np.uint8),
    "tensor(uint16)": ("TYPE_UINT16", np.uint16),
    "tensor(uint32)": ("TYPE_UINT32", np.uint32),
    "tensor(uint64)": ("TYPE_UINT64", np.uint64),
    "tensor(int8)": ("TYPE_INT8", np.int8),
    "tensor(int16)": ("TYPE_INT16", np.int16),
    "tensor(int32)": ("TYPE_INT32", np.int32),
    "tensor(int64)": ("TYPE_INT64", np.int64),
    "tensor(float16)": ("TYPE_FP16", np.float16),
    "tensor(float)": ("TYPE_FP32", np.float32),
    "tensor(double)": ("TYPE_FP64", np.float64),
    "tensor(string)": ("TYPE_STRING", np.object_),
}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a model. `dims`: a number, the name of a dynamic dimension, or None (nameless).

    `optional`: a request may leave the input out. `has_default`: because the graph holds a value for it
    (an initializer that is also a graph input).
    """

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]
    optional: bool = False
    has_default: bool = False

    def __iter__(self) -> Iterator[Any]:
        """Unpacks as name, dtype, shape."""
        return iter((self.name, self.dtype, self.shape))

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The dimensions, None where dynamic."""
        return tuple(dim if isinstance(dim, int) else None for dim in self.dims)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(_TYPES[self.dtype][1])
        return dtype

    @property
    def triton_dtype(self) -> str:
        return _TYPES[self.dtype][0]


@dataclass(frozen=True, slots=True, eq=False)
class DeviceArray:
    """A dense row-major array in CUDA memory. `pointer` is good while `owner` lives.

    Knows of NumPy's interface what batching needs: shape, dtype, ndim, nbytes, len() and slices of rows.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device_id: int
    owner: object = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> DeviceArray:
        """Rows [start, stop) as a view; another step than 1 is an error (ValueError)."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError("rows of a DeviceArray are taken one behind the other")
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (max(0, stop - start), *self.shape[1:])
        return DeviceArray(self.pointer + start * row_bytes, shape, self.dtype, self.device_id, self.owner)


# What can be fed as one input: an array, or several whose rows follow one another in the batch.
Feed: TypeAlias = "Array | DeviceArray | Sequence[Array | DeviceArray]"


def check_served(spec: TensorSpec, what: str, file: object) -> None:
    """Raise ModelError where Triton's Python backend cannot carry a tensor of this type."""
    if spec.dtype in _TYPES:
        return
    mend = "export the model with FP32 or FP16 there" if "bfloat16" in spec.dtype else "export it as tensors"
    raise ModelError(f"{file}: {what} {spec.name!r} has type {spec.dtype}, which Triton cannot carry; {mend}")


def text_of(array: Array, name: str) -> Array:
    """BYTES elements as the str that ONNX Runtime wants, same shape. Raises RequestError if not UTF-8.

    ONNX Runtime keeps strings as UTF-8 and returns them as str, so other bytes could not come back.
    """
    flat = array.ravel()
    out = np.empty(flat.shape, dtype=np.object_)
    try:
        out[:] = [item.decode() if isinstance(item, bytes) else str(item) for item in flat.tolist()]
    except UnicodeDecodeError as error:
        raise RequestError(f"input {name!r}: BYTES elements must be UTF-8 text ({error.reason})") from None
    return out.reshape(array.shape)
