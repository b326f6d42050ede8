"""GPUs that a test makes up: an inventory that reads what the test sets, and a host file for fakes/nvml."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstack_sched.domain.gpu import GpuReading

H100 = "NVIDIA H100 80GB HBM3"
GIB = 1 << 30
NVML_DIR = Path(__file__).parent / "nvml"  # first on PYTHONPATH, for programs under test


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


def use_fake_nvml(monkeypatch: pytest.MonkeyPatch, host: Path) -> None:
    """fakes/nvml in place of nvidia-ml-py, in this process; `host` is a file of write_host."""
    spec = importlib.util.spec_from_file_location("pynvml", NVML_DIR / "pynvml.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setenv("FAKE_NVML", str(host))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def write_host(path: Path, gpus: Sequence[dict[str, Any]], **more: Any) -> Path:
    """The file that fakes/nvml/pynvml.py reads. Each GPU: uuid, and what differs from an empty H100."""
    rows = [{"name": H100, "total": 80 * GIB, "used": GIB // 2, **gpu} for gpu in gpus]
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"gpus": rows, **more}))
    return temporary.replace(path)
