"""The GPUs of a host: what NVML shows of each, and what is ours to plan with."""

from __future__ import annotations

from dataclasses import dataclass, field

MPS_CLIENTS = 48
MPS_CLIENTS_FROM_590 = 60  # CUDA 13.1


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process with memory on a GPU. memory_bytes None: the driver does not tell."""

    pid: int
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU at one moment.

    index: as CUDA counts under CUDA_DEVICE_ORDER=PCI_BUS_ID, the same for the life of an inventory.
    used_bytes: by everybody. utilization_percent: of the last sample, None where the driver does not tell.
    xids: driver errors since the last reading. lost: why it cannot be used at all, "" where it can.
    reset_pending: its memory has errors that only a reset repairs.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: int = 0
    used_bytes: int = 0
    utilization_percent: float | None = None
    processes: tuple[GpuProcess, ...] = ()
    xids: tuple[int, ...] = ()
    lost: str = ""
    reset_pending: bool = False
    driver: str = ""


@dataclass(frozen=True, slots=True)
class PlanGpu:
    """A GPU to plan with. memory_bytes: what others leave free; clients: MPS clients that others hold."""

    index: int
    name: str
    memory_bytes: int
    clients: int = 0


@dataclass(frozen=True, slots=True)
class HostGpus:
    """names: of every GPU by index, also of those that are out; usable: those to plan with, by index."""

    names: tuple[str, ...] = ()
    usable: tuple[PlanGpu, ...] = field(default=())


def mps_client_limit(driver: str) -> int:
    """Client contexts that one MPS server takes on one GPU (Volta and later), by driver version.

    NVIDIA's MPS document: 60 from CUDA 13.1 (driver 590) on, 48 before. An unknown version counts as old.
    """
    major = driver.partition(".")[0]
    return MPS_CLIENTS_FROM_590 if major.isdigit() and int(major) >= 590 else MPS_CLIENTS
