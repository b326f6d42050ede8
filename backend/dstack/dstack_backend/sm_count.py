"""How many SMs a process of this environment gets: `python -m dstack_backend.sm_count DEVICE` prints it.

Under MPS the driver tells a client with CUDA_MPS_ACTIVE_THREAD_PERCENTAGE what it was granted. A process can
ask once: MPS fixes the share when the context is made.
"""

from __future__ import annotations

import ctypes
import sys

_MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


def sm_count(device_id: int) -> int:
    """SMs of the device for this process, in a context like a model's. Errors: OSError, RuntimeError."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context, count = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
    steps = (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), device_id)),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), device)),
        ("cuDeviceGetAttribute", (ctypes.byref(count), _MULTIPROCESSOR_COUNT, device)),
    )
    for name, arguments in steps:
        status = getattr(cuda, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with CUDA error {status}")
    return count.value


if __name__ == "__main__":
    print(sm_count(int(sys.argv[1])))  # noqa: T201
