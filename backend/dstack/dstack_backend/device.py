"""Which device this process runs on, and how much of its memory the process holds.

On a GPU ask a process without an MPS limit: under CUDA_MPS_ACTIVE_THREAD_PERCENTAGE the driver reports the
granted SMs as if there were no others.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_MULTIPROCESSOR_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


def identity(provider: str, device_id: int) -> dict[str, Any]:
    """name, sms, memory_bytes, driver and runtime, as profiles.json holds them.

    Errors: OSError or RuntimeError when the driver does not answer.
    """
    return _gpu_identity(device_id) if provider == "cuda" else _cpu_identity()


def gpu_memory_of_process(device_id: int, pid: int) -> int | None:
    """Device memory of one process in bytes, None where the driver does not tell (containers, some MPS)."""
    with _nvml_device(device_id) as (nvml, handle):
        try:
            processes = [*nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
        except nvml.NVMLError:
            return None
        used = [process.usedGpuMemory for process in processes if process.pid == pid]
    return int(used[0]) if used and used[0] else None


def gpu_memory_used(device_id: int) -> int:
    """Device memory in use by everybody, in bytes."""
    with _nvml_device(device_id) as (nvml, handle):
        return int(nvml.nvmlDeviceGetMemoryInfo(handle).used)


def _cpu_identity() -> dict[str, Any]:
    import onnxruntime

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return {
        "name": name,
        "sms": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "driver": "cpu",
        "runtime": f"onnxruntime {onnxruntime.__version__}",
    }


def _gpu_identity(device_id: int) -> dict[str, Any]:
    import onnxruntime

    cuda = _cuda()
    sms = ctypes.c_int()
    _check(
        cuda.cuDeviceGetAttribute(ctypes.byref(sms), _MULTIPROCESSOR_COUNT, device_id), "cuDeviceGetAttribute"
    )
    with _nvml_device(device_id) as (nvml, handle):
        return {
            "name": _text(nvml.nvmlDeviceGetName(handle)),
            "sms": sms.value,
            "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "runtime": f"onnxruntime-gpu {onnxruntime.__version__}",
        }


@contextmanager
def _nvml_device(device_id: int) -> Iterator[tuple[Any, Any]]:
    """NVML and the handle of CUDA's device `device_id` (the two count differently: match by PCI address)."""
    import pynvml

    address = ctypes.create_string_buffer(32)
    _check(_cuda().cuDeviceGetPCIBusId(address, 32, device_id), "cuDeviceGetPCIBusId")
    pynvml.nvmlInit()
    try:
        yield pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(address.value)
    finally:
        pynvml.nvmlShutdown()


def _cuda() -> Any:
    cuda = ctypes.CDLL("libcuda.so.1")
    _check(cuda.cuInit(0), "cuInit")
    return cuda


def _check(status: int, call: str) -> None:
    if status:
        raise RuntimeError(f"{call} failed with CUDA error {status}; is the GPU there (nvidia-smi)?")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
