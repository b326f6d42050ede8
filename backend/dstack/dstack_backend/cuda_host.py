"""Host memory that the device reads by itself: what was allocated for that, and shared memory registered
when seen.

Requests come as views of shared memory that Triton maps into the stub. Such a mapping is registered with
CUDA once it has been seen for a while (it grows at first, and each size is a mapping of its own); from then
on a request's rows go to the device without a copy on the host. Triton's stub keeps its mappings until the
process ends (SharedMemoryManager::old_shm_maps_), so an address that was registered stays what it was."""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dstack_backend.errors import DeviceError, DeviceLostError, one_line
from dstack_backend.tensors import Array

log = logging.getLogger("dstack")

SHARED = "/dev/shm/"  # noqa: S108
SIGHTINGS = 4  # of a mapping before it is registered,
SETTLED_S = (
    0.3  # and how long it has been there: while the memory grows, each size is soon followed by another
)
MAX_MAPPINGS = 16
MAX_UNKNOWN = 256  # blocks of addresses that are known to be no shared memory
_BLOCK_BITS = 21
MAPS = Path("/proc/self/maps")


@dataclass(slots=True)
class Mapping:
    """Shared memory that was seen and is not registered yet, or cannot be."""

    start: int
    end: int
    first_seen_s: float
    sightings: int = 0
    refused: bool = False


class HostMemory:
    """Ranges of host addresses by what the device can do with them. Any thread. Errors: those of the
    driver.
    """

    def __init__(self, cuda: Any, now_s: Callable[[], float] = time.monotonic):
        self._cuda, self._now = cuda, now_s
        self._lock = threading.Lock()
        self._starts: list[int] = []  # of the ranges below, rising
        self._ends: list[int] = []
        self._arrays: list[Array] = []  # allocated
        self._registered: list[int] = []
        self._mappings: deque[Mapping] = deque(maxlen=MAX_MAPPINGS)  # not registered, the last found first
        self._unknown: set[int] = set()

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Page-locked memory, good until close()."""
        array: Array = self._cuda.allocate_pinned(shape, dtype)
        with self._lock:
            self._arrays.append(array)
            self._add(array.ctypes.data, array.ctypes.data + array.nbytes)
        return array

    def reads(self, address: int, size_bytes: int) -> bool:
        """Whether the device can read this memory by itself."""
        with self._lock:
            if self._is_inside(address, size_bytes):
                return True
            if address >> _BLOCK_BITS in self._unknown:
                return False
            mapping = self._mapping(address)
            if mapping is None:
                if len(self._unknown) >= MAX_UNKNOWN:
                    self._unknown.clear()
                self._unknown.add(address >> _BLOCK_BITS)
                return False
            return (
                self._is_settled(mapping) and self._register(mapping) and self._is_inside(address, size_bytes)
            )

    def _is_inside(self, address: int, size_bytes: int) -> bool:
        index = bisect.bisect_right(self._starts, address) - 1
        return index >= 0 and address + size_bytes <= self._ends[index]

    def _mapping(self, address: int) -> Mapping | None:
        """The shared mapping that holds an address and is not registered."""
        for mapping in self._mappings:
            if mapping.start <= address < mapping.end:
                return mapping
        bounds = shared_mapping(address)
        if bounds is None:
            return None
        self._mappings.appendleft(Mapping(*bounds, self._now()))
        return self._mappings[0]

    def _is_settled(self, mapping: Mapping) -> bool:
        mapping.sightings += 1
        return mapping.sightings >= SIGHTINGS and self._now() - mapping.first_seen_s >= SETTLED_S

    def _register(self, mapping: Mapping) -> bool:
        if mapping.refused:
            return False
        size_bytes = mapping.end - mapping.start
        try:
            self._cuda.register(mapping.start, size_bytes)
        except DeviceLostError:
            raise
        except DeviceError as error:  # rows of this mapping are copied on the host, as before
            log.info("%d MiB of shared memory are not registered: %s", size_bytes >> 20, one_line(error))
            mapping.refused = True
            return False
        self._registered.append(mapping.start)
        self._add(mapping.start, mapping.end)
        return True

    def _add(self, start: int, end: int) -> None:
        index = bisect.bisect_left(self._starts, start)
        self._starts.insert(index, start)
        self._ends.insert(index, end)

    def close(self) -> None:
        """Once no copy is under way."""
        with self._lock:
            for array in self._arrays:
                self._cuda.free_pinned(array)
            for start in self._registered:
                self._cuda.unregister(start)
            for each in (self._arrays, self._registered, self._starts, self._ends):
                each.clear()


def shared_mapping(address: int) -> tuple[int, int] | None:
    """Start and end of the mapping of a file in shared memory that holds an address."""
    with MAPS.open(encoding="utf-8", errors="replace") as maps:
        for line in maps:
            bounds, _, rest = line.partition(" ")
            start, end = (int(each, 16) for each in bounds.split("-"))
            if start <= address < end:
                return (start, end) if SHARED in rest else None
    return None
