"""Tensors between Triton's Python stub and NumPy: right under NumPy 2, and without copies of the inputs.

Stubs up to Triton 24.10 (2.51), those of the nvidia-pytriton wheel among them, embed a pybind11 older than
2.12. It reads a dtype's item size where NumPy 2 keeps the dtype's flags, and gets 0. So inputs come with
strides of 0 (every element is the first, BYTES inputs kill the stub) and outputs with a size of 0 bytes.
NumPy 1 is no way out: it has no wheels for Python 3.13, and cvxpy wants 2. Under either NumPy it copies every
input on Triton's thread, although the tensor behind it lives in shared memory as long as its request.
Three bridges, each checked by tests on a real server; newer stubs are left as they are.

- Inputs: pybind11 looks NumPy's function table up by name, once. It finds a copy of the table whose
  PyArray_NewFromDescr leaves the strides to NumPy, which knows the item size,
- and whose PyArray_NewCopy hands the array that was made over a tensor just before back as it is: a view.
- Outputs, under NumPy 2: numbers travel by DLPack. BYTES travel as a byte array of a private dtype that shows
  its item size, 1, where pybind11 looks, while the tensor is made.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dstack_backend.tensors import Array

_NEW_COPY, _NEW_FROM_DESCR = 85, 94  # indices in NumPy's function table, the same in NumPy 1 and 2
_TABLE_SIZE = 400  # longer than the table of any NumPy 2; what lies behind it is copied, never called
_FLAGS_OFFSET = 16 + 8 + 4 + 4  # PyArray_Descr of NumPy 2: head, typeobj, kind..flags, type_num, then flags
_keep_alive: list[Any] = []


def is_old(executable: Path = Path("/proc/self/exe")) -> bool:
    """True for a stub whose pybind11 does not know NumPy 2 (it has never heard of numpy._core)."""
    return b"numpy._core" not in executable.read_bytes()


def is_needed(executable: Path = Path("/proc/self/exe")) -> bool:
    """True where tensors would come out wrong without the bridges: an old stub under NumPy 2."""
    return int(np.__version__.split(".")[0]) >= 2 and is_old(executable)


def install(pb_utils: Any) -> Callable[[str, Array], Any]:
    """Make inputs readable, and return the maker of output tensors: make(name, array) -> pb_utils.Tensor.

    Call it before the first request, which is when the stub looks NumPy up.
    """
    if is_old() and not _keep_alive:
        _patch_function_table()
    if not is_needed():
        return lambda name, array: pb_utils.Tensor(name, array)
    pb_utils.serialize_byte_tensor = _serialize
    return lambda name, array: _make_tensor(pb_utils, name, array)


def _patch_function_table() -> None:
    looked_up: Any = importlib.import_module("numpy.core.multiarray")  # what the old pybind11 asks for

    capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    capsule_pointer.restype, capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule_new = ctypes.pythonapi.PyCapsule_New
    capsule_new.restype = ctypes.py_object
    capsule_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

    table_type = ctypes.c_void_p * _TABLE_SIZE
    table = table_type.from_buffer_copy(table_type.from_address(capsule_pointer(looked_up._ARRAY_API, None)))
    pointer, number = ctypes.c_void_p, ctypes.c_int
    new_type = ctypes.PYFUNCTYPE(
        pointer, pointer, pointer, number, pointer, pointer, pointer, number, pointer
    )
    copy_type = ctypes.PYFUNCTYPE(pointer, pointer, number)
    new_original = new_type(table[_NEW_FROM_DESCR] or 0)
    copy_original = copy_type(table[_NEW_COPY] or 0)
    increase = ctypes.pythonapi.Py_IncRef
    increase.restype, increase.argtypes = None, [pointer]
    over_tensor = threading.local()  # .array: the last array this thread made over memory of the stub's

    def new_from_descr(  # type: ignore[no-untyped-def]
        subtype, descr, ndim, dims, strides, data, flags, obj
    ):
        array = new_original(subtype, descr, ndim, dims, None, data, flags, obj)
        over_tensor.array = array if data and not obj else None
        return array

    def new_copy(array, order):  # type: ignore[no-untyped-def]
        if array != getattr(over_tensor, "array", None):
            return copy_original(array, order)
        over_tensor.array = None
        increase(array)
        return array

    callbacks = new_type(new_from_descr), copy_type(new_copy)
    table[_NEW_FROM_DESCR] = ctypes.cast(callbacks[0], pointer).value
    table[_NEW_COPY] = ctypes.cast(callbacks[1], pointer).value
    _keep_alive.extend([table, new_original, copy_original, callbacks])
    looked_up._ARRAY_API = capsule_new(ctypes.addressof(table), None, None)


def _make_tensor(pb_utils: Any, name: str, array: Array) -> Any:
    if array.dtype == np.object_:
        return _make_bytes_tensor(pb_utils, name, array)
    if not array.size:
        return pb_utils.Tensor(name, array)
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = array.copy()
    capsule = array.__dlpack__()
    # The stub renames a used capsule in its own way, which NumPy's destructor would complain about. The
    # array is released by the DLPack tensor's own deleter, so the capsule needs no destructor.
    ctypes.pythonapi.PyCapsule_SetDestructor(ctypes.py_object(capsule), None)
    return pb_utils.Tensor.from_dlpack(name, capsule)


def _make_bytes_tensor(pb_utils: Any, name: str, array: Array) -> Any:
    _serialized.clear()
    try:
        return pb_utils.Tensor(name, array)  # calls _serialize in this thread
    finally:
        for flags in _serialized.flags:
            flags.value = 0


class _Serialized(threading.local):
    """The flags of the byte arrays that the tensor under construction in this thread has made."""

    flags: tuple[ctypes.c_uint64, ...] = ()

    def clear(self) -> None:
        self.flags = ()


_serialized = _Serialized()


def _serialize(array: Array) -> Array:
    """Triton's wire form of BYTES: each element's length (u32, little endian) and its bytes.

    The result's dtype is private; its flags, 0 for bytes, say 1 until the tensor is made: the item size.
    """
    chunks: list[bytes] = []
    for item in array.ravel().tolist():
        data = item if isinstance(item, bytes) else str(item).encode()
        chunks.append(len(data).to_bytes(4, "little"))
        chunks.append(data)
    dtype = np.dtype(np.uint8, metadata={"private": True})
    joined = np.frombuffer(b"".join(chunks), dtype=dtype)
    flags = ctypes.c_uint64.from_address(id(dtype) + _FLAGS_OFFSET)
    assert flags.value == 0 and joined.dtype is dtype
    flags.value = 1
    _serialized.flags = (*_serialized.flags, flags)
    return joined
