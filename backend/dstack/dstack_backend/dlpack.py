"""Tensors between ONNX Runtime, Triton's stub and the CUDA driver by DLPack 0.x capsules, without any
framework.

The layout is that of dlpack.h: DLManagedTensor in a capsule named "dltensor", "used_dltensor" once taken.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from dstack_backend.errors import RequestError
from dstack_backend.tensors import DeviceArray

CPU, CUDA = 1, 2  # DLDeviceType
BFLOAT16 = (4, 16)
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # DLDataTypeCode by NumPy's kind
_KINDS = {code: kind for kind, code in _CODES.items()}
_FRESH, _USED = b"dltensor", b"used_dltensor"


class _Managed(ctypes.Structure):
    """DLManagedTensor; the first nine fields are its DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


def _python(name: str, result: Any, *arguments: Any) -> Any:
    """A function of Python's C API of our own: signatures of ctypes.pythonapi are shared by the process."""
    function = ctypes.PyDLL(None)[name]
    function.restype, function.argtypes = result, list(arguments)
    return function


_capsule_new = _python("PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_capsule_valid = _python("PyCapsule_IsValid", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_capsule_pointer = _python("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
_capsule_rename = _python("PyCapsule_SetName", ctypes.c_int, ctypes.py_object, ctypes.c_char_p)
_raw_malloc = _python("PyMem_RawMalloc", ctypes.c_void_p, ctypes.c_size_t)
_raw_free = ctypes.cast(ctypes.PyDLL(None).PyMem_RawFree, ctypes.c_void_p).value


def type_code(dtype: np.dtype[Any]) -> tuple[int, int]:
    """DLPack's (code, bits) of a NumPy type."""
    return _CODES[dtype.kind], dtype.itemsize * 8


def capsule(
    pointer: int, shape: tuple[int, ...], kind: tuple[int, int], device: tuple[int, int] = (CUDA, 0)
) -> Any:
    """A capsule over dense row-major memory that the caller keeps alive. kind: (code, bits); device: (type,
    id).

    Its deleter is PyMem_RawFree on the one block that holds the header and the shape: no call into Python, so
    it may come from any thread and during the interpreter's end.
    """
    size = ctypes.sizeof(_Managed)
    block = _raw_malloc(size + 8 * max(1, len(shape)))
    if not block:
        raise MemoryError("DLPack header")
    dims = (ctypes.c_int64 * max(1, len(shape))).from_address(block + size)
    dims[: len(shape)] = list(shape)
    managed = _Managed.from_address(block)
    managed.data, managed.device_type, managed.device_id = pointer, *device
    managed.ndim, managed.lanes = len(shape), 1
    managed.code, managed.bits = kind
    managed.shape = ctypes.cast(dims, ctypes.POINTER(ctypes.c_int64))
    managed.strides, managed.byte_offset, managed.manager = None, 0, None
    managed.deleter = _raw_free
    return _capsule_new(block, _FRESH, None)


def to_capsule(array: DeviceArray) -> Any:
    """A device array for another library, which must have let go of it when the array's owner dies."""
    return capsule(array.pointer, array.shape, type_code(array.dtype), (CUDA, array.device_id))


def from_capsule(taken: Any) -> DeviceArray:
    """The device array in a capsule, which is used up; its memory is kept until the array is gone.

    Raises RequestError where it is not dense, or not of a type that NumPy has, or not in CUDA memory.
    """
    if not _capsule_valid(taken, _FRESH):
        raise RequestError("a GPU tensor came in a DLPack capsule that was used already")
    address = _capsule_pointer(taken, _FRESH)
    _capsule_rename(taken, _USED)
    owner = _Taken(address)
    managed = _Managed.from_address(address)
    shape = tuple(managed.shape[axis] for axis in range(managed.ndim))
    if managed.device_type != CUDA:
        raise RequestError(f"a tensor on DLPack device type {managed.device_type}; CUDA memory is wanted")
    if managed.code not in _KINDS or managed.lanes != 1 or managed.bits % 8:
        raise RequestError(f"a GPU tensor of DLPack type {managed.code} with {managed.bits} bits")
    if managed.strides and not _is_dense(shape, [managed.strides[axis] for axis in range(managed.ndim)]):
        raise RequestError("a GPU tensor with gaps between its elements; a dense one is wanted")
    kind = _KINDS[managed.code]
    dtype = np.dtype(np.bool_) if kind == "b" else np.dtype(f"{kind}{managed.bits // 8}")
    return DeviceArray((managed.data or 0) + managed.byte_offset, shape, dtype, managed.device_id, owner)


def _is_dense(shape: tuple[int, ...], strides: list[int]) -> bool:
    dense = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return 0 in shape or all(
        stride == want or dim == 1 for dim, stride, want in zip(shape, strides, dense, strict=True)
    )


class _Taken:
    """A DLManagedTensor that is ours to give back."""

    def __init__(self, address: int):
        self._address = address

    def __del__(self) -> None:
        deleter = _Managed.from_address(self._address).deleter
        if deleter:
            ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(deleter)(self._address)
