"""`dstackctl serve` when MPS dies under it, with a real Triton and a program that speaks as NVIDIA's does.

The models run on the CPU; the stand-in daemon tells their processes as its clients, so that what serve does
for clients of a dead server happens to real processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from fakes.gpu_site import is_mps, model_of
from fakes.gpus import NVML_DIR, write_host
from fakes.load import Load, all_grow, wait_until
from fakes.mps_control import install_control, set_servers, times_asked
from fakes.onnx_models import SlowSum
from fakes.site import Served, Site

# `dstackctl` on a host with a GPU: that is all that is pretended.
PROGRAM = """
import pathlib, sys
from dstack_sched.adapters import mps
mps.GPU_DEVICE = pathlib.Path(sys.argv.pop(1))
from dstack_sched.cli import main
main()
"""
HEALED_WITHIN_S = 60.0


class Host(Site):
    """A site whose serve finds a GPU, and the stand-in for NVIDIA's control program."""

    def __init__(self, folder: Path) -> None:
        runtime = folder / "bin"
        control = install_control(runtime)
        nvml = {
            "PYTHONPATH": str(NVML_DIR),
            "FAKE_NVML": str(write_host(folder / "host.json", [{"uuid": "GPU-a"}])),
        }
        super().__init__(folder, [SlowSum("one"), SlowSum("two", seed=1)], env={**control, **nvml})
        (folder / "nvidiactl").touch()
        self.pipe_dir = runtime / "runtime" / "dstack" / "mps"

    def start(self) -> Served:
        self.serve = OnGpuHost(self, env=self.env)
        return self.serve

    def stubs(self) -> dict[int, str]:
        assert self.serve is not None
        found = {each.pid: model_of(each) for each in self.serve.descendants()}
        return {pid: model for pid, model in found.items() if model}

    def daemon(self) -> psutil.Process:
        assert self.serve is not None
        return next(each for each in self.serve.descendants() if runs_control(each))

    def tell_clients(self, server: int, clients: Mapping[int, str], status: str = "ACTIVE") -> None:
        rows = [[pid, "GPU-a", model] for pid, model in clients.items()]
        set_servers(self.pipe_dir, {server: {"status": status, "clients": rows}})


class OnGpuHost(Served):
    """`dstackctl serve` through PROGRAM."""

    def __init__(self, host: Host, env: Mapping[str, str]) -> None:
        self.errors = host.folder / "serve.err"
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        device = str(host.folder / "nvidiactl")
        command = [sys.executable, "-c", PROGRAM, device, "serve", str(host.repository), *ports,
                   "--state", str(host.state), "--socket", str(host.socket), "--json"]  # fmt: skip
        with self.errors.open("ab") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, **env}
            )
        self.printed = self.printed_json()


def runs_control(process: psutil.Process) -> bool:
    """The stand-in is a Python script: its own name is the second word."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    script = len(words) > 2 and "nvidia-cuda-mps-control" in words[1] and words[2] == "-f"
    return script or is_mps(process, "-f")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Every test leaves it with two models served and a daemon that tells of no clients in fault."""
    host = Host(tmp_path_factory.mktemp("mps"))
    try:
        host.start()
        yield host
    finally:
        host.stop()


@pytest.fixture
def server() -> Iterator[subprocess.Popen[bytes]]:
    """Stands for an nvidia-cuda-mps-server."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def reasons(host: Host, kind: str) -> list[str]:
    return [each["reason"] for each in host.decisions() if each.get("kind") == kind]


def test_a_killed_daemon_is_started_again_and_its_hanging_clients_are_replaced(
    host: Host, server: subprocess.Popen[bytes]
) -> None:
    before = host.stubs()
    assert set(before.values()) == {"one", "two"}
    environ = psutil.Process(next(iter(before))).environ()
    assert environ["CUDA_MPS_PIPE_DIRECTORY"] == str(host.pipe_dir)
    assert (environ["DSTACK_GPUS"], environ["CUDA_DEVICE_ORDER"]) == ("GPU-a", "PCI_BUS_ID")
    host.tell_clients(server.pid, before)
    first = host.daemon().pid
    with Load(host.url, host.models) as load:
        load.wait_for(20)
        # The guard shows nothing while all is well. Once it asks again it knows what it was told before.
        known = times_asked(host.pipe_dir, "ps") + 2
        wait_until(
            "the guard knows the clients",
            lambda: times_asked(host.pipe_dir, "ps") >= known,
            HEALED_WITHIN_S,
        )
        server.kill()
        server.wait()
        host.daemon().send_signal(signal.SIGKILL)
        wait_until("every client was replaced", lambda: fresh(host, before), HEALED_WITHIN_S)
        wait_until("both answer again", all_grow(load.counts), HEALED_WITHIN_S)
    assert host.daemon().pid != first and (host.pipe_dir / "control").read_text() == str(host.daemon().pid)
    assert not [why for why in load.failed() if "wrong answer" in why]
    told = reasons(host, "mps_dead")
    assert any("ended 2 backends that hung without their MPS server" in each for each in told), told
    wait_until("the time to recover is logged", lambda: recovery_told(host))


def recovery_told(host: Host) -> bool:
    return any("MPS clients" in each and "well again after" in each for each in reasons(host, "mps_dead"))


def fresh(host: Host, before: Mapping[int, str]) -> bool:
    now = host.stubs()
    return not set(now) & set(before) and set(now.values()) == {"one", "two"}


def test_a_server_in_fault_gets_rid_of_its_old_clients(host: Host, server: subprocess.Popen[bytes]) -> None:
    before = host.stubs()
    host.tell_clients(server.pid, before, status="FAULT")
    wait_until("every client was replaced", lambda: fresh(host, before), HEALED_WITHIN_S)
    host.tell_clients(server.pid, {})
    with Load(host.url, host.models) as load:
        wait_until("both answer again", all_grow(load.counts), HEALED_WITHIN_S)
    assert not [why for why in load.failed() if "wrong answer" in why]


def test_a_gpu_that_disappears_is_told_as_a_fault(host: Host) -> None:
    write_host(host.folder / "host.json", [{"uuid": "GPU-a", "lost": True}])
    wait_until("the fault is in the log", lambda: reasons(host, "gpu_lost"), 15.0)
    assert any("GPU is lost" in each for each in reasons(host, "gpu_lost"))
    write_host(host.folder / "host.json", [{"uuid": "GPU-a"}])
    wait_until("and its end", lambda: any("well again" in each for each in reasons(host, "gpu_lost")), 15.0)
