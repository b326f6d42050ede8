"""The real MPS daemon, and `dstackctl serve` with it, on a GPU host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton

from dstack_sched.adapters.machine_checks import run_checks
from dstack_sched.adapters.mps import PIPE_VARIABLE, MpsDaemon
from fakes.feature_models import plus, save


@pytest.fixture
def environ() -> Iterator[dict[str, str]]:
    """An environment in which no other daemon is found, with a runtime directory short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="dstack-gpu-", dir="/tmp") as runtime:
        yield {**os.environ, "XDG_RUNTIME_DIR": runtime, PIPE_VARIABLE: f"{runtime}/nobody"}


def mps_processes() -> set[int]:
    return {
        each.pid for each in psutil.process_iter(["name"]) if "nvidia-cuda-mps" in (each.info["name"] or "")
    }


def test_own_daemon_starts_answers_and_leaves_nothing(environ: dict[str, str], tmp_path: Path) -> None:
    before = mps_processes()
    daemon = MpsDaemon(tmp_path / "mps.log", environ)
    environment = daemon.start()
    try:
        assert daemon.owned and daemon.running()
        assert MpsDaemon(tmp_path / "mps.log", environ).start()[PIPE_VARIABLE] == environment[PIPE_VARIABLE]
        assert mps_processes() > before
    finally:
        daemon.stop()
    assert mps_processes() == before
    assert not Path(environment[PIPE_VARIABLE]).exists()


def test_serve_brings_mps_and_takes_it_away(environ: dict[str, str], tmp_path: Path) -> None:
    before = mps_processes()
    save(plus(1.0), tmp_path / "repository" / "one" / "1" / "model.onnx")
    (tmp_path / "repository" / "one" / "config.pbtxt").write_text('backend: "dstack"\n')
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "dstack_sched", "serve"]
    serve = subprocess.Popen(
        [*command, str(tmp_path / "repository"), *ports, "--json", "--state", str(tmp_path / "state")],
        stdout=subprocess.PIPE, text=True, env=environ,
    )  # fmt: skip
    try:
        assert serve.stdout is not None
        with serve.stdout:
            lines = []
            while not lines or lines[-1] != "}\n":
                lines.append(serve.stdout.readline())
                assert lines[-1], "serve ended"
        assert mps_processes() > before
        x = triton.InferInput("x", [1, 4], "FP32")
        x.set_data_from_numpy(np.zeros((1, 4), np.float32))
        with triton.InferenceServerClient(json.loads("".join(lines))["urls"]["grpc"]) as client:
            assert list(client.infer("one", [x], client_timeout=30).as_numpy("y")[0]) == [1.0] * 4
        serve.send_signal(signal.SIGINT)
        assert serve.wait(60) == 0
    finally:
        serve.kill()
        serve.wait()
    assert mps_processes() == before


def test_doctor_sees_the_gpu_mps_and_the_cuda_provider() -> None:
    checks = {each.name: each for each in run_checks()}
    for name in ("GPU", "MPS", "onnxruntime"):
        assert checks[name].ok, checks[name]
    assert "CUDA" in checks["onnxruntime"].found
