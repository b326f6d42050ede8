"""GPUs that a test makes up: an inventory that reads what the test sets, and a host file for fakes/nvml."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dstack_sched.domain.gpu import GpuReading

H100 = "NVIDIA H100 80GB HBM3"
GIB = 1 << 30


class FakeInventory:
    """ports.GpuInventory; `set` changes one GPU. Xids are told once, as by NVML."""

    def __init__(self, count: int, name: str = H100) -> None:
        self.gpus = [
            GpuReading(i, f"GPU-{i}{i}{i}{i}-fake", name, 80 * GIB, driver="580.159.04") for i in range(count)
        ]

    def set(self, index: int, **fields: Any) -> None:
        self.gpus[index] = replace(self.gpus[index], **fields)

    def read(self) -> tuple[GpuReading, ...]:
        told = tuple(self.gpus)
        self.gpus = [replace(gpu, xids=()) for gpu in self.gpus]
        return told

    def close(self) -> None:
        pass


def write_host(path: Path, gpus: Sequence[dict[str, Any]], **more: Any) -> Path:
    """The file that fakes/nvml/pynvml.py reads. Each GPU: uuid, and what differs from an empty H100."""
    rows = [{"name": H100, "total": 80 * GIB, "used": GIB // 2, **gpu} for gpu in gpus]
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"gpus": rows, **more}))
    return temporary.replace(path)
