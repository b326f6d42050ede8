"""Where the weights of an ONNX file lie: a reader of just that part of the format, for files of any size.

ONNX is a protocol buffer (onnx.proto): ModelProto.graph = 7, GraphProto.initializer = 5, and of TensorProto
dims = 1, data_type = 2, name = 8, external_data = 13 (pairs of key = 1 and value = 2), data_location = 14.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dstack_backend.errors import ModelError

Part = TypeVar("Part")

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_EXTERNAL = 1  # TensorProto.DataLocation
# data_type -> DLPack's (code, bits), for the types that weights come in.
_TYPES = {
    1: (2, 32), 2: (1, 8), 3: (0, 8), 4: (1, 16), 5: (0, 16), 6: (0, 32), 7: (0, 64), 9: (6, 8), 10: (2, 16),
    11: (2, 64), 12: (1, 32), 13: (1, 64), 16: (4, 16),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weight:
    """An initializer whose data lies in a file beside the model. kind: DLPack's (code, bits)."""

    name: str
    shape: tuple[int, ...]
    kind: tuple[int, int]
    file: str
    offset: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.kind[1] // 8


def external_weights(path: Path) -> tuple[Weight, ...]:
    """The initializers that lie outside the file, in its order. Raises ModelError."""
    return tuple(weight for weight in _read(path, 5, _weight) if weight is not None)


def operators(path: Path) -> frozenset[str]:
    """The operators of a model's graph, without those of its subgraphs. Raises ModelError."""
    return frozenset(_read(path, 1, _operator))


def external_files(path: Path) -> tuple[Path, ...]:
    """The files beside a model that hold its weights, sorted."""
    return tuple(sorted({path.parent / weight.file for weight in external_weights(path)}))


def _read(path: Path, field: int, take: Callable[[memoryview], Part]) -> list[Part]:
    """What `take` makes of each message in a field of the model's graph."""
    try:
        with path.open("rb") as file:  # the map goes when the last view of it does
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return [take(part) for graph in _messages(whole, 7) for part in _messages(graph, field)]
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{path}: not an ONNX file that can be read ({error})") from error


def _operator(node: memoryview) -> str:
    names = [bytes(value) for field, value in _fields(node) if field == 4 and not isinstance(value, int)]
    return names[-1].decode() if names else ""


def _weight(tensor: memoryview) -> Weight | None:
    dims: list[int] = []
    kind = location = 0
    name, pairs = "", {}
    for field, value in _fields(tensor):
        if field == 1:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif field == 2 and isinstance(value, int):
            kind = value
        elif field == 14 and isinstance(value, int):
            location = value
        elif field == 8 and not isinstance(value, int):
            name = bytes(value).decode()
        elif field == 13 and not isinstance(value, int):
            pair = {key: bytes(text).decode() for key, text in _fields(value) if not isinstance(text, int)}
            pairs[pair[1]] = pair.get(2, "")
    if location != _EXTERNAL:
        return None
    return Weight(name, tuple(dims), _TYPES[kind], pairs["location"], int(pairs.get("offset", 0)))


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    for field, value in _fields(data):
        if field == wanted and not isinstance(value, int):
            yield value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: numbers as int, all else as its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > len(data):
            raise ValueError("it ends in the middle of a field")
        yield key >> 3, data[at : at + length]
        at += length


def _packed(data: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        values.append(value)
    return values


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number longer than 64 bits")
