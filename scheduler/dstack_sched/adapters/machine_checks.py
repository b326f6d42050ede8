"""Is every part that D-STACK needs on this machine? One check a part; each names its mend."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dstack_backend import numpy_bridge
from dstack_backend.endpoint import socket_path
from dstack_sched.adapters.mps import GPU_DEVICE, MpsDaemon
from dstack_sched.adapters.mps_console import CONTROL
from dstack_sched.adapters.nvml import NvmlInventory
from dstack_sched.adapters.perf_analyzer import find_perf_analyzer
from dstack_sched.adapters.ports_free import choose_ports
from dstack_sched.adapters.server_install import (
    RUNNING,
    backend_parts,
    find_binary,
    find_libpython,
    find_server,
    find_stub,
    server_environment,
)
from dstack_sched.domain.gpu import GpuReading
from dstack_sched.errors import DstackError, MachineError

USUAL_PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
SHM = Path("/dev/shm")  # noqa: S108
SHM_WANTED_BYTES = 256 << 20
SOCKET_PATH_LIMIT = 107  # sizeof(sockaddr_un.sun_path) less the final zero


@dataclass(frozen=True, slots=True)
class Check:
    """One part. `found` says what is there, or what is wrong; `mend` is empty where nothing is to be done.

    needed: without it, models cannot be served or loaded on this machine.
    """

    name: str
    ok: bool
    needed: bool
    found: str
    mend: str = ""


def run_checks(tritonserver: Path | None = None) -> list[Check]:
    """All checks, in the order in which a set-up meets them."""
    return [
        attempt("python", True, python_version),
        attempt("tritonserver", True, lambda: str(find_binary(tritonserver))),
        attempt("python stub", True, lambda: str(find_stub(find_binary(tritonserver).parent.parent))),
        attempt("libpython", True, lambda: str(libpython(tritonserver))),
        attempt("stub starts", True, lambda: stub_starts(tritonserver)),
        attempt("backend dstack", True, lambda: str(backend_parts()["model.py"].parent)),
        attempt("onnxruntime", True, onnxruntime_providers),
        attempt("perf_analyzer", True, perf_analyzer_version),
        attempt("ports", False, usual_ports),
        attempt("shared memory", False, shared_memory),
        attempt("arbiter socket", True, arbiter_socket),
        *gpu_checks(),
    ]


def attempt(name: str, needed: bool, look: Callable[[], str]) -> Check:
    """Errors of ours say 'what: mend' or 'what; mend', so they split there."""
    try:
        return Check(name, True, needed, look())
    except DstackError as error:
        what, _, mend = str(error).partition("; ")
        return Check(name, False, needed, what, mend)


def python_version() -> str:
    """The running Python, if it is one of those supported."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        raise MachineError(f"Python {RUNNING}; use 3.10 to 3.13 (make PYTHON=python3.12 setup)")
    return f"{sys.version.split()[0]} ({sys.prefix})"


def libpython(tritonserver: Path | None) -> Path:
    """The shared library that the stub loads."""
    root = find_binary(tritonserver).parent.parent
    libraries = root.parent.parent / "nvidia_pytriton.libs"
    return find_libpython(find_stub(root), (libraries,) if libraries.is_dir() else ())


def stub_starts(tritonserver: Path | None) -> str:
    """Start the stub without arguments: its loader finds all libraries, or says which one is missing."""
    install = find_server(tritonserver)
    run = subprocess.run(
        [str(install.stub)], env=server_environment(install), capture_output=True, text=True, timeout=20
    )
    said = " ".join((run.stderr or run.stdout).split())
    if "error while loading shared libraries" in said:
        raise MachineError(f"{said.partition('libraries: ')[2]}; install the package that has this library")
    bridged = "numpy_bridge in use" if numpy_bridge.is_needed(install.stub) else "its own numpy support"
    return f"all libraries found; {bridged}"


def onnxruntime_providers() -> str:
    """The providers that models need on this machine: CPU, and CUDA where there is a GPU."""
    if importlib.util.find_spec("onnxruntime") is None:
        extra = "gpu" if GPU_DEVICE.exists() else "cpu"
        raise MachineError(f"not installed; {sys.executable} -m pip install 'dstack-triton[{extra}]'")
    import onnxruntime  # only where it is there, and slow to load

    providers = onnxruntime.get_available_providers()
    if GPU_DEVICE.exists() and "CUDAExecutionProvider" not in providers:
        raise MachineError(
            f"onnxruntime {onnxruntime.__version__} has no CUDA provider although there is a GPU;"
            " pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    names = ", ".join(each.removesuffix("ExecutionProvider") for each in providers)
    return f"{onnxruntime.__version__} ({names})"


def perf_analyzer_version() -> str:
    """perf_analyzer starts and tells its version."""
    program = find_perf_analyzer()
    run = subprocess.run([str(program), "--version"], capture_output=True, text=True, timeout=20)
    said = (run.stdout + run.stderr).strip().splitlines()
    if not said or "Version" not in said[-1]:
        raise MachineError(f"{program} does not start ({said[-1] if said else 'no output'}); run make setup")
    return f"{said[-1].removeprefix('Perf Analyzer Version ')} ({program})"


def usual_ports() -> str:
    """Triton's usual ports are free; others can be chosen, so this is no need."""
    choose_ports("127.0.0.1", USUAL_PORTS)
    return ", ".join(f"{port} ({use})" for use, port in USUAL_PORTS.items()) + " are free"


def shared_memory() -> str:
    """Room in /dev/shm: each model instance and each shared-memory client takes a region there."""
    usage = shutil.disk_usage(SHM)
    if usage.free < SHM_WANTED_BYTES:
        raise MachineError(
            f"{usage.free >> 20} MiB free in {SHM}; make it larger (docker run --shm-size=1g,"
            " or mount -o remount,size=1g /dev/shm)"
        )
    return f"{usage.free >> 20} MiB free in {SHM}"


def arbiter_socket() -> str:
    """The place of the arbiter's socket can be used."""
    path = socket_path().absolute()
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        raise MachineError(f"{path} is longer than a socket path can be; set XDG_RUNTIME_DIR to a short one")
    place = next(each for each in path.parents if each.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise MachineError(f"{place} is not writable; set XDG_RUNTIME_DIR to a directory of yours")
    return str(path)


def gpu_checks() -> list[Check]:
    """GPU and MPS. Without a GPU nothing is missing: the CPU provider serves."""
    if not GPU_DEVICE.exists():
        return [
            Check("GPU", False, False, "none: models run on the CPU provider"),
            Check("MPS", False, False, "none: not needed without a GPU"),
        ]
    return [attempt("GPU", True, describe_gpus), attempt("MPS", True, describe_mps)]


def describe_gpus() -> str:
    """Name, memory, what others hold of it, and driver of every GPU. Errors: MachineError."""
    gpus = NvmlInventory().read()
    if not gpus:
        raise MachineError("the driver shows no GPU; give this container one (docker run --gpus all)")
    broken = [gpu for gpu in gpus if gpu.lost or gpu.reset_pending]
    if len(broken) == len(gpus):
        raise MachineError(
            f"GPU {broken[0].index}: {_ails(broken[0])}; reset it (nvidia-smi -r) or restart the host"
        )
    said = [
        f"{gpu.index}: {gpu.name} {gpu.memory_bytes >> 30} GiB, "
        + (_ails(gpu) if gpu in broken else f"{gpu.used_bytes / 2**30:.1f} in use")
        for gpu in gpus
    ]
    return f"{'; '.join(said)}; driver {next(gpu.driver for gpu in gpus if gpu not in broken)}"


def _ails(gpu: GpuReading) -> str:
    return gpu.lost or "memory errors, needs a reset"


def describe_mps() -> str:
    """The MPS control program is there; whether a daemon runs already."""
    daemon = MpsDaemon(Path(os.devnull))
    if not daemon.available():
        raise MachineError(f"{CONTROL} is not on PATH; install the driver's utilities or serve with --no-mps")
    return "a daemon answers, it will be used" if daemon.running() else "serve starts a daemon of its own"
