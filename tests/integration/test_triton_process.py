"""Our own Triton: what it leaves behind when it, its parent or a stub ends, and what bad input says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_process import TritonProcess, find_server
from dstack_sched.errors import InputError, MachineError, ServerError
from fakes.feature_models import plus, save

TIMEOUT_S = 40.0


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"timed out: {what}"
        time.sleep(0.05)


def shared_memory(prefix: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"{prefix}*"))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    save(plus(1.0), root / "sum" / "1" / "model.onnx")
    (root / "sum" / "config.pbtxt").write_text('backend: "dstack"')
    return root


def test_client_tells_what_is_served(triton: Callable[..., TritonProcess], repository: Path) -> None:
    server = triton(repository, load=["sum"])
    with TritonClient(server.grpc_url) as client:
        client.require_ready()
        assert client.models() == {"sum": "READY"}
        assert client.metadata()["version"].startswith("2.")
        config = client.config("sum")
        assert config["backend"] == "dstack" and isinstance(config["max_batch_size"], int)
        assert all(isinstance(dim, int) for dim in config["input"][0]["dims"])
        assert client.statistics("sum")["model_stats"][0]["inference_stats"]["success"]["count"] == 0
        with pytest.raises(ServerError, match="nothing: load failed"):
            client.load("nothing")
        client.unload("sum")
        wait_for(lambda: not client.is_model_ready("sum"), "unloaded")
        assert client.models()["sum"] in ("UNAVAILABLE", "UNLOADING")


def test_stop_leaves_no_process_socket_or_shared_memory(
    triton: Callable[..., TritonProcess], repository: Path
) -> None:
    server = triton(repository, load=["sum"])
    processes = psutil.Process(server.pid).children(recursive=True)
    assert processes, "a stub is running"
    assert shared_memory(server.shm_prefix)
    ports = list(server.ports.values())
    server.stop()
    assert not [each for each in processes if each.is_running()]
    assert not shared_memory(server.shm_prefix)
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_kill_9_of_the_server_leaves_nothing_either(
    triton: Callable[..., TritonProcess], repository: Path
) -> None:
    server = triton(repository, load=["sum"])
    processes = psutil.Process(server.pid).children(recursive=True)
    os.kill(server.pid, signal.SIGKILL)
    wait_for(lambda: server.failure() is not None, "the death is seen")
    assert "status 137" in (server.failure() or "")
    assert not [each for each in processes if each.is_running()]
    assert not shared_memory(server.shm_prefix)


def test_kill_9_of_a_stub_and_of_the_parent_leave_nothing(repository: Path, tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from dstack_sched.adapters.triton_process import *
from dstack_sched.adapters.triton_client import TritonClient
server = TritonProcess(find_server(), Path({str(repository)!r}), log_path=Path({str(tmp_path / "log")!r}))
server.start()
TritonClient(server.grpc_url).load("sum")
print(server.pid, server.shm_prefix, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        pid, prefix = parent.stdout.readline().split()
    server = psutil.Process(int(pid))
    stubs = server.children(recursive=True)
    assert shared_memory(prefix)
    for stub in stubs:
        stub.kill()
    parent.kill()
    parent.wait()
    wait_for(lambda: not server.is_running(), "the server is gone")
    wait_for(lambda: not shared_memory(prefix), "shared memory is gone")


def test_a_taken_port_is_one_line_and_starts_nothing(repository: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = TritonProcess(find_server(), repository, grpc_port=port)
        with pytest.raises(
            MachineError, match=rf"port {port} \(grpc\) on 127\.0\.0\.1 is taken by .*--grpc-port"
        ):
            server.start()
    assert server.process is None


def test_a_repository_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none is not a directory"):
        TritonProcess(find_server(), tmp_path / "none").start()


def test_a_server_that_refuses_its_arguments_says_why(repository: Path) -> None:
    server = TritonProcess(find_server(), repository, extra_args=["--no-such-option"])
    with pytest.raises(MachineError, match=r"ended with status \d+ before it was ready: .*no-such-option"):
        server.start()
    assert server.process is None
    assert server.failure() == "does not run", "serve must try again: a restart that failed is no health"


def test_nobody_at_the_url_is_one_line() -> None:
    with (
        TritonClient("127.0.0.1:1") as client,
        pytest.raises(MachineError, match=r"no Triton answers at 127\.0\.0\.1:1 .*--url"),
    ):
        client.require_ready()
