"""A Site (fakes/site.py) whose models run on GPU instances, for tests/gpu; where they leave figures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from dstack_sched.adapters.mps_console import PIPE_VARIABLE
from dstack_sched.adapters.nvml import NvmlInventory
from fakes.onnx_models import SlowSum
from fakes.site import Site


def note(name: str, **figures: object) -> None:
    """Keep figures of a run beside the test's verdict: $OUT/NAME.json, where $OUT is set."""
    if out := os.environ.get("OUT"):
        path = Path(out) / f"{name}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **figures}, indent=1, default=str))


@contextmanager
def private_runtime() -> Iterator[dict[str, str]]:
    """Variables under which no other MPS daemon and no other arbiter is found; short paths, for sockets."""
    with TemporaryDirectory(prefix="dstack-gpu-", dir="/tmp") as runtime:
        yield {"XDG_RUNTIME_DIR": runtime, PIPE_VARIABLE: f"{runtime}/nobody"}


class GpuSite(Site):
    """The same with GPU instances, one on every GPU until a plan says where. FP32 without TF32: answers are
    compared with NumPy's."""

    def __init__(
        self,
        folder: Path,
        models: Iterable[str],
        env: Mapping[str, str],
        *,
        slo_ms: float = 100.0,
        rates: Mapping[str, float] | None = None,
        gpus: str = "",
    ) -> None:
        made = [SlowSum(name, depth=12, seed=number) for number, name in enumerate(models)]
        super().__init__(folder, made, slo_ms=slo_ms, rates=rates, env=env)
        for model in self.models:
            config = self.repository / model / "config.pbtxt"
            text = config.read_text().replace("kind: KIND_CPU", f"kind: KIND_GPU {gpus}")
            config.write_text(text + 'parameters { key: "tf32" value { string_value: "false" } }\n')

    def daemon(self) -> psutil.Process:
        """The MPS control daemon that serve started."""
        assert self.serve is not None
        return next(each for each in self.serve.descendants() if is_mps(each, "-f"))

    def gpus_of(self, model: str) -> tuple[int, ...]:
        """The GPUs on which processes of a model have memory, as NVML tells."""
        assert self.serve is not None
        pids = {each.pid for each in self.serve.descendants() if model_of(each) == model}
        inventory = NvmlInventory()
        try:
            readings = inventory.read()
        finally:
            inventory.close()
        return tuple(gpu.index for gpu in readings if pids & {each.pid for each in gpu.processes})

    def stubs(self) -> dict[int, str]:
        """Process id -> model."""
        assert self.serve is not None
        found = {each.pid: model_of(each) for each in self.serve.descendants()}
        return {pid: model for pid, model in found.items() if model}


def model_of(process: psutil.Process) -> str:
    """The model of a stub process; "" of any other."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    if len(words) > 1 and words[0].endswith("triton_python_backend_stub"):
        return Path(words[1]).parts[-3]
    return ""


def is_mps(process: psutil.Process, option: str) -> bool:
    """Whether it is NVIDIA's control program with this option."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return bool(words) and "nvidia-cuda-mps-control" in words[0] and option in words[1:]


def mps_processes() -> dict[int, str]:
    """Process id -> command line of everything of MPS on this host."""
    found = {}
    for each in psutil.process_iter(["name", "cmdline"]):
        if "nvidia-cuda-mps" in (each.info["name"] or ""):
            found[each.pid] = " ".join(each.info["cmdline"] or [each.info["name"]])
    return found
