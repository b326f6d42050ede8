"""ports.GpuInventory through NVML (nvidia-ml-py). It reads; whether a GPU is used app/gpus.py decides."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from dstack_sched.domain.gpu import GpuProcess, GpuReading
from dstack_sched.errors import MachineError

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
MOST_EVENTS = 64  # of one reading; more wait for the next


class NvmlInventory:
    """The GPUs that a CUDA program of this environment sees, in its order (CUDA_DEVICE_ORDER=PCI_BUS_ID).

    Which GPUs there are is fixed by `uuids`, else by the first reading: one that disappears later stays in
    the list, as lost, and the others keep their numbers, as they do in a running server. Driver errors (Xid)
    count from the first reading on. Not for several threads.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ, uuids: Sequence[str] = ()) -> None:
        self._visible = environ.get(VISIBLE_VARIABLE)
        self._uuids = tuple(uuids)
        self._known: dict[str, GpuReading] = {}  # the last good reading of each
        self._events: dict[str, Any] = {}
        self._nvml: ModuleType | None = None

    def read(self) -> tuple[GpuReading, ...]:
        """Every GPU now; () on a host without one. Errors: MachineError where GPUs are but NVML fails."""
        nvml = self._open()
        if nvml is None:
            return ()
        if not self._uuids:
            self._uuids = self._find(nvml)
        return tuple(self._read_one(nvml, index, uuid) for index, uuid in enumerate(self._uuids))

    def close(self) -> None:
        """Let go of NVML. The next reading starts it again."""
        if self._nvml is None:
            return
        for events in self._events.values():
            _maybe(self._nvml, self._nvml.nvmlEventSetFree, events)
        self._events.clear()
        _maybe(self._nvml, self._nvml.nvmlShutdown)
        self._nvml = None

    def _open(self) -> ModuleType | None:
        if self._nvml is None:
            import pynvml  # only here: hosts without a GPU do without

            try:
                pynvml.nvmlInit()
            except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
                return None
            except pynvml.NVMLError as error:
                raise MachineError(f"NVML: {error}; check the NVIDIA driver with nvidia-smi") from error
            self._nvml = pynvml
        return self._nvml

    def _find(self, nvml: ModuleType) -> tuple[str, ...]:
        """UUIDs in CUDA's order: all in PCI order, or those that CUDA_VISIBLE_DEVICES names."""
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = _maybe(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
            uuid = None if handle is None else _maybe(nvml, nvml.nvmlDeviceGetUUID, handle)
            found.append(f"unknown GPU {index}" if uuid is None else _text(uuid))
        if self._visible is None:
            return tuple(found)
        chosen: list[str] = []
        for word in filter(None, (each.strip() for each in self._visible.split(","))):
            if word.isdigit():
                match = next(iter(found[int(word) :]), None)
            else:
                match = next((uuid for uuid in found if uuid.startswith(word)), None)
            if match is None or match in chosen:
                break  # CUDA ignores an invalid entry and all behind it
            chosen.append(match)
        return tuple(chosen)

    def _read_one(self, nvml: ModuleType, index: int, uuid: str) -> GpuReading:
        before = self._known.get(uuid, GpuReading(index, uuid, "GPU"))
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            name = _text(nvml.nvmlDeviceGetName(handle))
            driver = _text(nvml.nvmlSystemGetDriverVersion())
        except nvml.NVMLError as error:
            reading = replace(
                before, used_bytes=0, utilization_percent=None, processes=(), xids=self._xids(nvml, uuid),
                lost=f"NVML: {error}",
            )  # fmt: skip
            self._forget_events(nvml, uuid)  # one that returns from a reset must be listened to anew
            return reading
        self._listen(nvml, uuid, handle)
        utilization = _maybe(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
        reading = GpuReading(
            index=index,
            uuid=uuid,
            name=name,
            memory_bytes=int(memory.total),
            used_bytes=int(memory.used),
            utilization_percent=None if utilization is None else float(utilization.gpu),
            processes=_processes(nvml, handle),
            xids=self._xids(nvml, uuid),
            lost="MIG mode is on; turn it off with nvidia-smi -mig 0" if _mig(nvml, handle) else "",
            reset_pending=_reset_pending(nvml, handle),
            driver=driver,
        )
        self._known[uuid] = reading
        return reading

    # A set of events for each GPU: one that is lost cannot be asked any more whose event it was.

    def _listen(self, nvml: ModuleType, uuid: str, handle: Any) -> None:
        if uuid in self._events:
            return
        events = _maybe(nvml, nvml.nvmlEventSetCreate)
        if events is not None:
            self._events[uuid] = events
            _maybe(nvml, nvml.nvmlDeviceRegisterEvents, handle, nvml.nvmlEventTypeXidCriticalError, events)

    def _xids(self, nvml: ModuleType, uuid: str) -> tuple[int, ...]:
        """Xids since the last call."""
        events = self._events.get(uuid)
        found: list[int] = []
        while events is not None and len(found) < MOST_EVENTS:
            event = _maybe(nvml, nvml.nvmlEventSetWait_v2, events, 0)
            if event is None:  # none waits, or this driver has no events
                break
            if event.eventType == nvml.nvmlEventTypeXidCriticalError:
                found.append(int(event.eventData))
        return tuple(found)

    def _forget_events(self, nvml: ModuleType, uuid: str) -> None:
        events = self._events.pop(uuid, None)
        if events is not None:
            _maybe(nvml, nvml.nvmlEventSetFree, events)


def _processes(nvml: ModuleType, handle: Any) -> tuple[GpuProcess, ...]:
    """Every process with a context there, clients of MPS too."""
    found: dict[int, int | None] = {}
    for list_them in (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetMPSComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        for each in _maybe(nvml, list_them, handle) or ():
            known = found.get(int(each.pid))
            found[int(each.pid)] = max(int(each.usedGpuMemory or 0), known or 0) or None
    return tuple(GpuProcess(pid, size) for pid, size in sorted(found.items()))


def _mig(nvml: ModuleType, handle: Any) -> bool:
    mode = _maybe(nvml, nvml.nvmlDeviceGetMigMode, handle)
    return bool(mode and mode[0])


def _reset_pending(nvml: ModuleType, handle: Any) -> bool:
    """Rows that wait for a reset to be remapped, or could not be (before Ampere: pages to be retired)."""
    rows = _maybe(nvml, nvml.nvmlDeviceGetRemappedRows, handle)
    if rows is not None:
        return bool(rows[2] or rows[3])
    return bool(_maybe(nvml, nvml.nvmlDeviceGetRetiredPagesPendingStatus, handle))


def _maybe(nvml: ModuleType, ask: Callable[..., Any], *arguments: Any) -> Any:
    """The answer; None where this driver, or a GPU that is lost, has none."""
    try:
        return ask(*arguments)
    except nvml.NVMLError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
