"""Shares of a GPU as sets of SM groups: green contexts of the CUDA driver (12.4 and later).

The SMs are split once into groups of 8 (the last one takes the rest); a share is a bit mask over the
groups. The numbers mean the same SMs in every process of a GPU (decision 0011). What is captured as a CUDA
graph on a stream of a share keeps to its SMs wherever the graph is launched (decision 0060)."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import threading
from functools import lru_cache
from typing import Any

from dstack_backend.cuda_driver import Driver
from dstack_backend.errors import DeviceError, DeviceLostError

GROUP_SMS = 8
MAX_GROUPS = 16
CUDA_OF_LEVELS = 12050
_RESOURCE_SM = 1
_DEFAULT_STREAM, _NON_BLOCKING = 1, 1  # CU_GREEN_CTX_DEFAULT_STREAM, CU_STREAM_NON_BLOCKING


class _Resource(ctypes.Structure):
    """CUdevResource, version 1: 144 bytes in CUDA 12 and 13."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("padding", ctypes.c_uint8 * 92),
        ("sm_count", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 44),
    )


class SmGroups:
    """The groups of one device. sms[i]: SMs of group i. Raises DeviceError where the driver has no green
    contexts.
    """

    def __init__(self, driver: Driver):
        self._driver = driver
        names = ("cuDeviceGetDevResource", "cuDevSmResourceSplitByCount", "cuDevResourceGenerateDesc",
                 "cuGreenCtxCreate", "cuGreenCtxDestroy", "cuGreenCtxStreamCreate")  # fmt: skip
        driver.use()
        self._entry: dict[str, Any] = {name: driver.entry(name, CUDA_OF_LEVELS) for name in names}
        whole, rest = _Resource(), _Resource()
        self._entry["cuDeviceGetDevResource"](driver.device, ctypes.byref(whole), ctypes.c_int(_RESOURCE_SM))
        groups, count = (_Resource * MAX_GROUPS)(), ctypes.c_uint(MAX_GROUPS)
        self._entry["cuDevSmResourceSplitByCount"](
            groups, ctypes.byref(count), ctypes.byref(whole), ctypes.byref(rest), ctypes.c_uint(0),
            ctypes.c_uint(GROUP_SMS),
        )  # fmt: skip
        self._resources = list(groups)[: count.value] + ([rest] if rest.sm_count else [])
        self.sms = tuple(resource.sm_count for resource in self._resources)
        self._lock = threading.Lock()
        atexit.register(self._end)  # the driver is not to end with them in use
        self._contexts: dict[int, ctypes.c_void_p] = {}
        if len(self.sms) < 2:
            raise DeviceError(
                f"the {whole.sm_count} SMs of this GPU cannot be split into groups: set levels to off"
            )

    def stream(self, mask: int) -> int:
        """A stream on the SMs of the groups in the mask; Driver.destroy_stream ends it.

        Green contexts stay until the process ends: destroying one does not give its memory back (4 MB each
        on an H100), so a model that is loaded again takes those that are there."""
        with self._lock:
            if mask not in self._contexts:
                self._contexts[mask] = self._context(mask)
            context = self._contexts[mask]
        self._driver.use()
        stream = ctypes.c_void_p()
        self._entry["cuGreenCtxStreamCreate"](
            ctypes.byref(stream), context, ctypes.c_uint(_NON_BLOCKING), ctypes.c_int(0)
        )
        return stream.value or 0

    def _end(self) -> None:
        contexts, self._contexts = self._contexts, {}
        for context in contexts.values():
            with contextlib.suppress(DeviceError, DeviceLostError):
                self._entry["cuGreenCtxDestroy"](context)

    def _context(self, mask: int) -> ctypes.c_void_p:
        chosen = [resource for bit, resource in enumerate(self._resources) if mask >> bit & 1]
        self._driver.use()
        description, context = ctypes.c_void_p(), ctypes.c_void_p()
        self._entry["cuDevResourceGenerateDesc"](
            ctypes.byref(description), (_Resource * len(chosen))(*chosen), ctypes.c_uint(len(chosen))
        )
        self._entry["cuGreenCtxCreate"](
            ctypes.byref(context), description, self._driver.device, ctypes.c_uint(_DEFAULT_STREAM)
        )
        return context


@lru_cache(maxsize=8)
def sm_groups(driver: Driver) -> SmGroups:
    """The groups of a device, split once a process. Raises DeviceError as SmGroups does."""
    return SmGroups(driver)
