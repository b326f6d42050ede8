"""NVML of a made-up host, in place of nvidia-ml-py: programs under test get it by PYTHONPATH.

The host is the JSON file that $FAKE_NVML names, read anew at each call, so that a test changes it while a
program runs: {"driver": "580.1", "gpus": [{"uuid", "name", "total", "used", "processes": [[pid, bytes]],
"xids": [79], "lost": true, "pending": true}]}. An Xid is told once. A GPU left out of "gpus" has disappeared.
Without the variable there is no driver.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

nvmlEventTypeXidCriticalError = 8  # noqa: N816 - NVML's own name


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801, N818
    pass


class NVMLError_DriverNotLoaded(NVMLError):  # noqa: N801, N818
    pass


class NVMLError_GpuIsLost(NVMLError):  # noqa: N801, N818
    pass


class NVMLError_NotFound(NVMLError):  # noqa: N801, N818
    pass


class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
    pass


class NVMLError_Timeout(NVMLError):  # noqa: N801, N818
    pass


_told: dict[str, int] = {}  # uuid -> Xids told so far


def host() -> dict[str, Any]:
    named = os.environ.get("FAKE_NVML")
    if not named:
        raise NVMLError_LibraryNotFound("NVML Shared Library Not Found")
    document: dict[str, Any] = json.loads(Path(named).read_text())
    if document.get("broken"):
        raise NVMLError(document["broken"])
    return document


def gpu_of(uuid: str) -> dict[str, Any]:
    for gpu in host()["gpus"]:
        if gpu["uuid"] == uuid:
            if gpu.get("lost"):
                raise NVMLError_GpuIsLost("GPU is lost")
            return gpu
    raise NVMLError_NotFound("Not Found")


def nvmlInit() -> None:
    host()


def nvmlShutdown() -> None:
    _told.clear()


def nvmlSystemGetDriverVersion() -> str:
    return str(host().get("driver", "580.159.04"))


def nvmlDeviceGetCount() -> int:
    return len(host()["gpus"])


def nvmlDeviceGetHandleByIndex(index: int) -> str:
    return str(gpu_of(host()["gpus"][index]["uuid"])["uuid"])


def nvmlDeviceGetHandleByUUID(uuid: str) -> str:
    return str(gpu_of(uuid)["uuid"])


def nvmlDeviceGetUUID(handle: str) -> str:
    return handle


def nvmlDeviceGetName(handle: str) -> bytes:
    return gpu_of(handle).get("name", "Fake GPU").encode()


def nvmlDeviceGetMemoryInfo(handle: str) -> SimpleNamespace:
    gpu = gpu_of(handle)
    return SimpleNamespace(total=gpu.get("total", 80 << 30), used=gpu.get("used", 0))


def nvmlDeviceGetUtilizationRates(handle: str) -> SimpleNamespace:
    gpu = gpu_of(handle)
    if "utilization" not in gpu:
        raise NVMLError_NotSupported("Not Supported")
    return SimpleNamespace(gpu=gpu["utilization"])


def _listed(handle: str, kind: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in gpu_of(handle).get(kind, ())]


def nvmlDeviceGetComputeRunningProcesses(handle: str) -> list[SimpleNamespace]:
    return _listed(handle, "processes")


def nvmlDeviceGetMPSComputeRunningProcesses(handle: str) -> list[SimpleNamespace]:
    return _listed(handle, "clients")


def nvmlDeviceGetGraphicsRunningProcesses(handle: str) -> list[SimpleNamespace]:
    raise NVMLError_NotSupported("Not Supported")


def nvmlDeviceGetMigMode(handle: str) -> list[int]:
    mig = int(gpu_of(handle).get("mig", False))
    return [mig, mig]


def nvmlDeviceGetRemappedRows(handle: str) -> tuple[int, int, int, int]:
    return (0, 0, int(gpu_of(handle).get("pending", False)), 0)


def nvmlDeviceGetRetiredPagesPendingStatus(handle: str) -> int:
    raise NVMLError_NotSupported("Not Supported")


def nvmlEventSetCreate() -> dict[str, Any]:
    return {"uuid": ""}


def nvmlDeviceRegisterEvents(handle: str, kinds: int, events: dict[str, Any]) -> None:
    events["uuid"] = handle
    _told[handle] = len(gpu_of(handle).get("xids", ()))  # what happened before is not told


def nvmlEventSetWait_v2(events: dict[str, Any], timeout_ms: int) -> SimpleNamespace:
    uuid = events["uuid"]
    xids = next((gpu.get("xids", ()) for gpu in host()["gpus"] if gpu["uuid"] == uuid), ())
    told = _told.get(uuid, 0)
    if told >= len(xids):
        raise NVMLError_Timeout("Timeout")
    _told[uuid] = told + 1
    return SimpleNamespace(eventType=nvmlEventTypeXidCriticalError, eventData=xids[told])


def nvmlEventSetFree(events: dict[str, Any]) -> None:
    pass
