"""What a failover rests on: a change of instance groups ends the dead instance and spares the living one.

Triton tells instances apart by all of their group but name, count and gpus, and by their device. Without GPUs
a rate limiter's priority stands for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_process import TritonProcess, find_server
from fakes.load import wait_until
from fakes.onnx_models import WIDTH, SlowSum

MODEL = SlowSum("one", depth=2)
DEVICES = {"gpu0": 1, "gpu1": 2}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TritonProcess]:
    MODEL.save(tmp_path / "models" / "one" / "1" / "model.onnx")
    place(tmp_path / "models", ["gpu0", "gpu1"])
    env = {SOCKET_VARIABLE: str(tmp_path / "no-arbiter.sock")}
    quick_end = ["--exit-timeout-secs=1"]  # a dead stub holds requests that never end
    with TritonProcess(
        find_server(), tmp_path / "models", env=env, log_path=tmp_path / "log", extra_args=quick_end
    ) as running:
        yield running


def place(repository: Path, devices: Sequence[str]) -> None:
    groups = ", ".join(
        f'{{ name: "{each}" kind: KIND_CPU count: 1 rate_limiter {{ priority: {DEVICES[each]} }} }}'
        for each in devices
    )
    (repository / "one" / "config.pbtxt").write_text(
        f'backend: "dstack"\nmax_batch_size: 8\ndynamic_batching {{ }}\ninstance_group [ {groups} ]\n'
    )


def stubs(server: TritonProcess) -> dict[str, psutil.Process]:
    """Instance name -> its process; dead ones that Triton has not reaped are left out."""
    found = {}
    for each in psutil.Process(server.pid).children():
        words = each.cmdline() if each.status() != psutil.STATUS_ZOMBIE else []
        found |= {device: each for device in DEVICES if f"{device}_0" in words}
    return found


def all_answered(server: TritonProcess, asked: int = 20) -> bool:
    """Whether so many requests, one after another, get their right answers; not asked further where not."""
    x = np.ones((1, WIDTH), np.float32)
    tensor = grpcclient.InferInput("x_one", [1, WIDTH], "FP32")
    tensor.set_data_from_numpy(x)
    with grpcclient.InferenceServerClient(server.grpc_url) as client:
        for _ in range(asked):
            try:
                answer = client.infer("one", [tensor], client_timeout=3)
            except InferenceServerException:
                return False
            if not np.allclose(answer.as_numpy("y_one"), MODEL.expected(x), atol=1e-3):
                return False
    return True


def test_a_model_leaves_its_dead_instance_and_comes_back(server: TritonProcess) -> None:
    with TritonClient(server.grpc_url) as client:
        client.load("one")
        before = stubs(server)
        before["gpu1"].kill()
        wait_until("it is dead", lambda: set(stubs(server)) == {"gpu0"})
        assert not all_answered(server), "Triton goes on handing requests to the dead instance"
        place(server.repository, ["gpu0"])
        client.load("one")
        assert all_answered(server)
        assert stubs(server) == {"gpu0": before["gpu0"]}, "the living one was not touched"
        place(server.repository, ["gpu0", "gpu1"])
        client.load("one")
        assert all_answered(server)
        now = stubs(server)
        assert set(now) == {"gpu0", "gpu1"} and now["gpu0"] == before["gpu0"]
