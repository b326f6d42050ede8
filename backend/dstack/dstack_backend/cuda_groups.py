"""Shares of a GPU as sets of SM groups: green contexts of the CUDA driver (12.4 and later).

The SMs are split once into groups of 8 (the last one takes the rest); a share is a bit mask over the
groups. The numbers mean the same SMs in every process of a GPU (decision 0011). What is captured as a CUDA
graph on a stream of a share keeps to its SMs wherever the graph is launched (decision 0060)."""

from __future__ import annotations

import ctypes
from typing import Any

from dstack_backend.cuda_driver import Driver
from dstack_backend.errors import DeviceError

GROUP_SMS = 8
MAX_GROUPS = 16
_CUDA_12_5 = 12050
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
        self._entry: dict[str, Any] = {name: driver.entry(name, _CUDA_12_5) for name in names}
        whole, rest = _Resource(), _Resource()
        self._entry["cuDeviceGetDevResource"](driver.device, ctypes.byref(whole), ctypes.c_int(_RESOURCE_SM))
        groups, count = (_Resource * MAX_GROUPS)(), ctypes.c_uint(MAX_GROUPS)
        self._entry["cuDevSmResourceSplitByCount"](
            groups, ctypes.byref(count), ctypes.byref(whole), ctypes.byref(rest), ctypes.c_uint(0),
            ctypes.c_uint(GROUP_SMS),
        )  # fmt: skip
        self._resources = list(groups)[: count.value] + ([rest] if rest.sm_count else [])
        self.sms = tuple(resource.sm_count for resource in self._resources)
        if len(self.sms) < 2:
            raise DeviceError(f"the {whole.sm_count} SMs of this GPU cannot be split into groups")

    def share(self, mask: int) -> Share:
        """A share of the groups in the mask, to be closed."""
        chosen = [resource for bit, resource in enumerate(self._resources) if mask >> bit & 1]
        return Share(self._driver, self._entry, chosen)


class Share:
    """A green context and its streams."""

    def __init__(self, driver: Driver, entry: dict[str, Any], resources: list[_Resource]):
        self._driver, self._entry = driver, entry
        driver.use()
        description, context = ctypes.c_void_p(), ctypes.c_void_p()
        chosen = (_Resource * len(resources))(*resources)
        entry["cuDevResourceGenerateDesc"](ctypes.byref(description), chosen, ctypes.c_uint(len(resources)))
        entry["cuGreenCtxCreate"](
            ctypes.byref(context), description, driver.device, ctypes.c_uint(_DEFAULT_STREAM)
        )
        self._context = context

    def stream(self) -> int:
        """A stream on these SMs; Driver.destroy_stream ends it."""
        self._driver.use()
        stream = ctypes.c_void_p()
        self._entry["cuGreenCtxStreamCreate"](
            ctypes.byref(stream), self._context, ctypes.c_uint(_NON_BLOCKING), ctypes.c_int(0)
        )
        return stream.value or 0

    def close(self) -> None:
        """After its streams and what was captured on them are gone."""
        self._driver.use()
        self._entry["cuGreenCtxDestroy"](self._context)
