"""A Triton client in closed loop whose tensors stay in shared memory, system or CUDA: a process of its own.

    python perf/dataplane/shm_client.py URL MODEL MODEL.onnx --memory cuda --rows 16 --concurrency 4

Each of the `concurrency` slots has regions of its own; its answers are compared with the CPU provider's at
the end. Prints one JSON line. CUDA memory through libcuda and ctypes: no package beside the driver.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import json
import queue
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
import tritonclient.utils.shared_memory as system_memory
from tritonclient.utils import np_to_triton_dtype

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataplane.references import reference, relative_error

GRANULARITY = 2 << 20  # the driver maps whole 2 MiB blocks into other processes: no region shares one
WARM_UP_S = 0.5


class SystemRegion:
    """A region in /dev/shm that holds one tensor."""

    def __init__(self, client: Any, name: str, size_bytes: int) -> None:
        self.name, self.size_bytes = name, size_bytes
        self._handle = system_memory.create_shared_memory_region(name, f"/{name}", size_bytes)
        client.register_system_shared_memory(name, f"/{name}", size_bytes)

    def write(self, array: np.ndarray) -> None:
        system_memory.set_shared_memory_region(self._handle, [array])

    def read(self, like: np.ndarray) -> np.ndarray:
        return np.array(system_memory.get_contents_as_numpy(self._handle, like.dtype, like.shape))

    def close(self, client: Any) -> None:
        client.unregister_system_shared_memory(self.name)
        system_memory.destroy_shared_memory_region(self._handle)


class CudaRegion:
    """A region of device memory that holds one tensor, shared by its IPC handle."""

    _cuda: Any = None

    def __init__(self, client: Any, name: str, size_bytes: int) -> None:
        self.name, self.size_bytes = name, size_bytes
        self._open()
        self._pointer = ctypes.c_uint64()
        whole = -(-size_bytes // GRANULARITY) * GRANULARITY
        self._call("cuMemAlloc_v2", ctypes.byref(self._pointer), ctypes.c_size_t(whole))
        handle = (ctypes.c_ubyte * 64)()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), self._pointer)
        client.register_cuda_shared_memory(name, base64.b64encode(bytes(handle)), 0, size_bytes)

    @classmethod
    def _open(cls) -> None:
        if cls._cuda is None:
            cls._cuda = ctypes.CDLL("libcuda.so.1")
            context = ctypes.c_void_p()
            cls._call("cuInit", 0)
            cls._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
            cls._call("cuCtxSetCurrent", context)

    @classmethod
    def _call(cls, name: str, *arguments: Any) -> None:
        status = getattr(cls._cuda, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with CUDA error {status}")

    def write(self, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self._call(
            "cuMemcpyHtoD_v2",
            self._pointer,
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
        )
        self._call("cuCtxSynchronize")

    def read(self, like: np.ndarray) -> np.ndarray:
        array = np.empty_like(like)
        self._call(
            "cuMemcpyDtoH_v2",
            ctypes.c_void_p(array.ctypes.data),
            self._pointer,
            ctypes.c_size_t(array.nbytes),
        )
        return array

    def close(self, client: Any) -> None:
        client.unregister_cuda_shared_memory(self.name)
        self._call("cuMemFree_v2", self._pointer)


class Slot:
    """One request that is always under way: its regions and its tensors."""

    def __init__(self, client: Any, region: Any, tag: str, feeds: dict, outputs: dict) -> None:
        self.started_s = 0.0
        self.inputs, self.wanted, self.regions, self.answers = [], [], [], {}
        for name, array in feeds.items():
            memory = region(client, f"{tag}_{name}", array.nbytes)
            memory.write(array)
            tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_shared_memory(memory.name, array.nbytes)
            self.inputs.append(tensor)
            self.regions.append(memory)
        for name, array in outputs.items():
            memory = region(client, f"{tag}_{name}", array.nbytes)
            memory.write(np.full_like(array, np.nan))  # an output that nobody writes must not look right
            wanted = grpc.InferRequestedOutput(name)
            wanted.set_shared_memory(memory.name, array.nbytes)
            self.wanted.append(wanted)
            self.regions.append(memory)
            self.answers[name] = memory


def drive(client: Any, model: str, slots: list[Slot], seconds: float) -> tuple[list[float], float]:
    """Keep all slots under way; latencies in ms after the warm-up, and the time that they took in s."""
    done: queue.SimpleQueue = queue.SimpleQueue()

    def send(slot: Slot) -> None:
        slot.started_s = time.perf_counter()
        client.async_infer(
            model, slot.inputs, lambda result, error: done.put((slot, error)), outputs=slot.wanted
        )

    for slot in slots:
        send(slot)
    began_s = time.perf_counter() + WARM_UP_S
    latencies_ms: list[float] = []
    under_way = len(slots)
    while under_way:
        slot, error = done.get(timeout=20)
        if error is not None:
            raise RuntimeError(str(error))
        now_s = time.perf_counter()
        if began_s <= now_s < began_s + seconds:
            latencies_ms.append((now_s - slot.started_s) * 1e3)
        if now_s < began_s + seconds:
            send(slot)
        else:
            under_way -= 1
    return latencies_ms, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("path", type=Path)
    parser.add_argument("--memory", choices=["system", "cuda"], required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    feeds, wanted = reference(options.path, options.rows)
    region = SystemRegion if options.memory == "system" else CudaRegion
    with grpc.InferenceServerClient(options.url) as client:
        tag = f"dp{time.time_ns() % 10**9}"
        slots = [Slot(client, region, f"{tag}_{n}", feeds, wanted) for n in range(options.concurrency)]
        try:
            latencies_ms, took_s = drive(client, options.model, slots, options.seconds)
            errors = [
                relative_error({name: slot.answers[name].read(wanted[name]) for name in wanted}, wanted)
                for slot in slots
            ]
        finally:
            for slot in slots:
                for memory in slot.regions:
                    memory.close(client)
    print(
        json.dumps(
            {
                "rows_per_s": options.rows * len(latencies_ms) / took_s,
                "latency_ms_p50": float(np.percentile(latencies_ms, 50)),
                "latency_ms_p99": float(np.percentile(latencies_ms, 99)),
                "relative_error": max(errors),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
