"""A CUDA program for tests on a GPU, through the driver alone: python cuda_client.py DEVICE COMMAND...

hold            make a context, print "ready", wait for stdin to close
allocate MIB    print the driver's status of an allocation of that size
crash           make a context, print "ready", wait for a line, write to GPU address 0, print the status
"""

from __future__ import annotations

import ctypes
import os
import sys

BAD = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry bad()
{
  .reg .u64 %address;
  .reg .u32 %value;
  mov.u64 %address, 0;
  mov.u32 %value, 1;
  st.global.u32 [%address], %value;
  ret;
}
\0"""


def main() -> None:
    device_id, command, *rest = sys.argv[1:]
    limit_mib = os.environ.get("LIMIT_MIB")
    if limit_mib:
        from dstack_backend.mps_limits import limit_memory

        limit_memory(int(device_id), int(limit_mib) << 20)
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    for status in (
        cuda.cuInit(0),
        cuda.cuDeviceGet(ctypes.byref(device), int(device_id)),
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        cuda.cuCtxSetCurrent(context),
    ):
        if status:
            sys.exit(f"no CUDA context: error {status}")
    if command == "allocate":
        pointer = ctypes.c_uint64()
        print(cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(int(rest[0]) << 20)), flush=True)
        return
    print("ready", flush=True)
    if command == "hold":
        sys.stdin.read()
        return
    sys.stdin.readline()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    loaded = cuda.cuModuleLoadData(ctypes.byref(module), BAD)
    if loaded or cuda.cuModuleGetFunction(ctypes.byref(function), module, b"bad"):
        sys.exit(f"the bad kernel cannot be loaded: error {loaded}")
    one, zero = ctypes.c_uint(1), ctypes.c_uint(0)
    cuda.cuLaunchKernel(function, one, one, one, one, one, one, zero, None, None, None)
    print(cuda.cuCtxSynchronize(), flush=True)


main()
