"""Models on GPU instances of a real Triton: shared memory of both kinds, instances, load after load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc

from dstack_backend.device import gpu_memory_used
from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_backend.runtime import load_session
from dstack_sched.adapters.mps import PIPE_VARIABLE, MpsDaemon
from dstack_sched.adapters.stub_processes import LocalStubProcesses
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_process import TritonProcess, find_server
from fakes import feature_models as made

SHM_CLIENT = Path(__file__).parents[2] / "perf" / "dataplane" / "shm_client.py"
TOLERANCE = 2e-2  # TF32 against float32
CYCLES = 3
INSTANCES = 4
MEMORY_SLACK_BYTES = 32 << 20  # of the driver's own, for a process that has come and gone
GONE_LIMIT_S = 30.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonProcess]:
    """A Triton under an MPS daemon of its own; its repository is empty to begin with."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "models").mkdir()
    with tempfile.TemporaryDirectory(prefix="dstack-gpu-", dir="/tmp") as runtime:  # sockets need short paths
        private = {**os.environ, "XDG_RUNTIME_DIR": runtime, PIPE_VARIABLE: f"{runtime}/nobody"}
        daemon = MpsDaemon(folder / "mps.log", private)
        environment = {**daemon.start(), SOCKET_VARIABLE: str(folder / "no-arbiter.sock")}
        log = folder / "triton.log"
        try:
            with TritonProcess(find_server(), folder / "models", env=environment, log_path=log) as running:
                yield running
        finally:
            daemon.stop()


def place(server: TritonProcess, name: str, *, count: int = 1) -> Path:
    """The model `dense` under this name; its file."""
    path = server.repository / name / "1" / "model.onnx"
    made.save(made.dense(), path)
    (server.repository / name / "config.pbtxt").write_text(
        f'backend: "dstack"\nmax_batch_size: 16\ninstance_group [{{ kind: KIND_GPU count: {count} }}]\n'
    )
    return path


def ask(server: TritonProcess, name: str, rows: int) -> None:
    """One answer, right by the CPU provider."""
    x = np.random.default_rng(rows).standard_normal((rows, 16)).astype(np.float32)
    tensor = grpc.InferInput("x", [rows, 16], "FP32")
    tensor.set_data_from_numpy(x)
    with grpc.InferenceServerClient(server.grpc_url) as client:
        answer = client.infer(name, [tensor], client_timeout=20)
    cpu = load_session(server.repository / name / "1" / "model.onnx", provider="cpu", gpu_percent=100)
    for spec, want in zip(cpu.outputs, cpu.run({"x": x}), strict=True):
        got = answer.as_numpy(spec.name).reshape(want.shape)  # one number a row is seen as [1]
        np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("memory", ["system", "cuda"])
def test_clients_with_tensors_in_shared_memory_get_right_answers(server: TritonProcess, memory: str) -> None:
    path = place(server, "shared")
    with TritonClient(server.grpc_url) as client:
        client.load("shared")
    environ = Path(f"/proc/{server.pid}/environ").read_bytes().decode(errors="replace").split("\0")
    theirs = dict(pair.partition("=")[::2] for pair in environ if pair.startswith("CUDA_MPS"))
    run = subprocess.run(
        [
            sys.executable, str(SHM_CLIENT), server.grpc_url, "shared", str(path), "--memory", memory,
            "--rows", "8", "--concurrency", "4", "--seconds", "1",
        ],
        capture_output=True, text=True, timeout=60, env={**os.environ, **theirs},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["rows_per_s"] > 0 and found["relative_error"] < TOLERANCE, found


def test_every_instance_of_a_model_serves_and_unloading_ends_them_all(server: TritonProcess) -> None:
    place(server, "many", count=INSTANCES)
    stubs = LocalStubProcesses(server.grpc_url)
    with TritonClient(server.grpc_url) as client:
        client.load("many")
        pids = stubs.pids("many")
        assert pids is not None and len(pids) == INSTANCES
        for rows in range(1, 4 * INSTANCES):
            ask(server, "many", 1 + rows % 16)
        client.unload("many")
    wait_gone(stubs, pids)


def test_device_memory_returns_after_loads_and_unloads(server: TritonProcess) -> None:
    """The first cycle is not counted: MPS and Triton keep what they need for later ones."""
    place(server, "cycled")
    stubs = LocalStubProcesses(server.grpc_url)
    used = []
    with TritonClient(server.grpc_url) as client:
        for _ in range(1 + CYCLES):
            client.load("cycled")
            pids = stubs.pids("cycled") or frozenset()
            ask(server, "cycled", 3)
            client.unload("cycled")
            wait_gone(stubs, pids)
            time.sleep(0.5)
            used.append(gpu_memory_used(0))
    assert used[-1] <= used[0] + MEMORY_SLACK_BYTES, used


def wait_gone(stubs: LocalStubProcesses, pids: frozenset[int]) -> None:
    until = time.monotonic() + GONE_LIMIT_S
    while stubs.alive(pids):
        assert time.monotonic() < until, f"stubs outlive their model: {sorted(stubs.alive(pids))}"
        time.sleep(0.05)
