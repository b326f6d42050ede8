"""Which of this process's CUDA devices is Triton's GPU N.

CUDA numbers devices when a process starts. When a GPU has gone meanwhile, those behind it have moved up in a
new stub, while the server goes on with its own numbers: GPU 2 would be taken for GPU 1. `dstackctl serve`
tells its children the UUIDs by the server's numbers ($DSTACK_GPUS), so that they can tell.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping

from dstack_backend.errors import DeviceError

GPUS_VARIABLE = "DSTACK_GPUS"


def ordinal_of(
    device_id: int,
    environ: Mapping[str, str] = os.environ,
    uuids: Callable[[], list[str]] | None = None,
) -> int:
    """This process's number of the server's GPU `device_id`; the same where nobody told the UUIDs.

    Starts CUDA (not a context): set what MPS reads from the environment before. Errors: DeviceError where the
    GPU is not there any more.
    """
    named = environ.get(GPUS_VARIABLE, "").split(",")
    if device_id >= len(named) or not named[device_id]:
        return device_id
    present = (uuids or visible_uuids)()
    if not present or present[device_id : device_id + 1] == [named[device_id]]:
        return device_id
    if named[device_id] not in present:
        raise DeviceError(
            f"GPU {device_id} ({named[device_id]}) is not there any more; place the model on another one "
            "(dstackctl run does)"
        )
    return present.index(named[device_id])


def cuda_version() -> int:
    """Of CUDA that the driver brings, as in 12050; 0 without a driver. Makes no context."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def visible_uuids() -> list[str]:
    """UUIDs of this process's devices, "GPU-..." as NVML and nvidia-smi write them; [] where CUDA fails."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for ordinal in range(count.value):
        device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
        if cuda.cuDeviceGet(ctypes.byref(device), ordinal) or cuda.cuDeviceGetUuid_v2(raw, device):
            return []
        text = bytes(raw).hex()
        parts = (text[:8], text[8:12], text[12:16], text[16:20], text[20:])
        found.append(f"GPU-{'-'.join(parts)}")
    return found
