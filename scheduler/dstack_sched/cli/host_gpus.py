"""The GPUs behind a Triton of this host, wired for the verbs that plan or watch."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

import typer

from dstack_backend.cuda_devices import GPUS_VARIABLE
from dstack_sched.adapters.clock import SystemClock
from dstack_sched.adapters.gpu_exclusions import GpuExclusions
from dstack_sched.adapters.mps import find_daemon
from dstack_sched.adapters.nvml import NvmlInventory
from dstack_sched.adapters.stub_processes import LocalStubProcesses, all_triton_pids
from dstack_sched.app.gpus import GpuWatch, host_gpus
from dstack_sched.app.host_view import HostView
from dstack_sched.app.status_reading import read_telemetry
from dstack_sched.cli.common import say
from dstack_sched.domain.gpu import HostGpus
from dstack_sched.domain.mps import MpsServer
from dstack_sched.errors import MachineError
from dstack_sched.ports import ArbiterClient

ExcludeGpuOption = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude-gpu", metavar="GPU", help="Leave this GPU (index or UUID) out; may be given again."
    ),
]


def triton_gpu_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What makes Triton and its stubs number the GPUs as we do; {} on a host without a GPU, or where NVML
    fails: models on the CPU can be served there all the same."""
    inventory = NvmlInventory(environ)
    try:
        uuids = [gpu.uuid for gpu in inventory.read()]
    except MachineError as error:
        say(f"{error}; until then no GPU is planned with")
        return {}
    finally:
        inventory.close()
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", GPUS_VARIABLE: ",".join(uuids)} if uuids else {}


def gpu_watch(state: Path, excluded: Collection[str], environ: Mapping[str, str] = os.environ) -> GpuWatch:
    """The GPUs that a program of this environment sees. Errors: InputError for a name that is none."""
    named = environ.get(GPUS_VARIABLE, "")
    inventory = NvmlInventory(environ, tuple(named.split(",")) if named else ())
    return GpuWatch(inventory, SystemClock(), GpuExclusions(state, excluded))


def local_view(
    url: str, state: Path, excluded: Collection[str] = (), arbiter: ArbiterClient | None = None
) -> HostView | None:
    """The host of the Triton at `url`, through that server's own environment; None where it is another host,
    or has no GPU that NVML can tell of. arbiter: asked what our instances hold, where process ids are hidden.
    Errors: InputError."""
    stubs = LocalStubProcesses(url)
    server = stubs.server_pid()
    if server is None:
        return None
    environ = {**os.environ, **stubs.server_environment()}
    watch = gpu_watch(state, excluded, environ)
    try:
        watch.look()
    except MachineError as error:
        say(f"{error}; until then no GPU is planned with")
    if not watch.states:
        return None

    def own_pids() -> Collection[int]:
        return {server, stubs.server_pid() or server, *stubs.all_pids()}

    def servers() -> tuple[MpsServer, ...] | None:
        console = find_daemon(environ)
        return console.servers() if console else None

    return HostView(watch, SystemClock(), own_pids, servers, lambda: held_bytes(arbiter))


def held_bytes(arbiter: ArbiterClient | None) -> dict[int, int]:
    """GPU index -> device memory that our instances say they hold; {} without an arbiter."""
    held: dict[int, int] = {}
    for told in read_telemetry(arbiter).values() if arbiter else ():
        held[told["gpu"]] = held.get(told["gpu"], 0) + int(told.get("device_bytes", 0))
    return held


def gpus_here(state: Path, excluded: Collection[str] = ()) -> HostGpus:
    """The GPUs of this machine, for a plan without a running controller: what the Tritons here hold is what
    the plan is about to place, so it counts as free. Errors: InputError, MachineError."""
    watch = gpu_watch(state, excluded)
    watch.look()
    return host_gpus(watch.states, all_triton_pids())
