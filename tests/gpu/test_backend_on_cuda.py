"""The backend on a GPU instance: the same answers as the CPU provider, within float tolerance."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import np_to_triton_dtype

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_backend.executor import Executor
from dstack_backend.gate import ArbiterGate
from dstack_backend.instance import join_message, warm_up
from dstack_backend.pipeline import Pipeline
from dstack_backend.runtime import load_session
from dstack_backend.session import Session
from dstack_backend.settings import Settings
from dstack_backend.staging import Staging
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_process import TritonProcess, find_server
from fakes import feature_models as made
from fakes.backend import FakeRequest

TOLERANCE = {"rtol": 2e-2, "atol": 2e-2}  # TF32 and other algorithms
BATCH = 8
CLIENTS = 32


def on(provider: str, path: Path, **options) -> Session:
    return load_session(path, provider=provider, gpu_percent=100, **options)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    made.save(made.dense(), tmp_path / "dense.onnx")
    return tmp_path / "dense.onnx"


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("pinned", [True, False])
def test_every_batch_size_answers_as_the_cpu_does(dense: Path, cuda_graphs: bool, pinned: bool) -> None:
    """Rows of earlier, larger batches lie behind in the padded buffers: they must not show."""
    cpu, cuda = on("cpu", dense), on("cuda", dense, cuda_graphs=cuda_graphs)
    rng = np.random.default_rng(3)
    cuda.warm_up(range(1, BATCH + 1))
    memory = cuda.allocate((BATCH, 16), np.float32) if pinned else np.empty((BATCH, 16), np.float32)
    for rows in (8, 1, 5, 3, 8, 2, 7):
        memory[:rows] = rng.standard_normal((rows, 16))
        for names in (["scores", "mean"], ["mean"]):
            wanted = cpu.run({"x": memory[:rows]}, names)
            for got, want in zip(cuda.run({"x": memory[:rows]}, names), wanted, strict=True):
                assert got.shape == want.shape
                np.testing.assert_allclose(got, want, **TOLERANCE)
    cuda.close()


@pytest.mark.parametrize(
    ("name", "proto", "feeds"),
    [
        ("dynamic", made.dynamic, {"x": np.ones((3, 7), np.float32)}),
        ("zero", made.dynamic, {"x": np.ones((3, 0), np.float32)}),
        ("default", made.with_default, {"x": np.ones((3, 4), np.float32)}),
        ("text", made.text, {"x": np.array([["a", "b"]], np.object_)}),
        ("no_batch", made.without_batch, {"x": np.eye(4, dtype=np.float32)}),
    ],
)
def test_models_that_cannot_be_bound_take_the_plain_path(
    tmp_path: Path, name: str, proto: Callable, feeds: Mapping[str, np.ndarray]
) -> None:
    path = tmp_path / f"{name}.onnx"
    made.save(proto(), path)
    cpu, cuda = on("cpu", path), on("cuda", path)
    cuda.warm_up([1, 2, 4])
    for got, want in zip(cuda.run(feeds), cpu.run(feeds), strict=True):
        assert np.array_equal(got, want)
    cuda.close()


def test_the_executor_serves_from_cuda_graphs(dense: Path, tmp_path: Path) -> None:
    """Graphs are captured in one thread and launched from others, batches are gathered in pinned memory."""
    session = on("cuda", dense)
    settings = Settings("m", "1", "m_0", dense, "cuda", 0, BATCH, BATCH)
    warm_up(session, settings)
    assert session.graphs == 4
    executor = Executor(
        Pipeline(session, Staging(BATCH, session.allocate)),
        ArbiterGate(tmp_path / "nobody.sock", join_message(settings, session)),
        batched=True,
        batch_size=BATCH,
    )
    executor.start()
    cpu, rng = on("cpu", dense), np.random.default_rng(5)
    requests = [
        FakeRequest(rng.standard_normal((1 + n % 3, 16)).astype(np.float32), wanted=["scores"])
        for n in range(200)
    ]
    feeder = threading.Thread(target=lambda: [executor.submit([request]) for request in requests])
    feeder.start()
    for request in requests:
        np.testing.assert_allclose(
            request.wait().outputs["scores"], cpu.run({"x": request.x}, ["scores"])[0], **TOLERANCE
        )
    feeder.join()
    executor.close()
    session.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """dense and every_type on GPU instances; the URL of the server."""
    for name, proto in (("dense", made.dense()), ("every_type", made.every_type())):
        made.save(proto, tmp_path / "models" / name / "1" / "model.onnx")
        (tmp_path / "models" / name / "config.pbtxt").write_text(
            'backend: "dstack"\nmax_batch_size: 16\ninstance_group [{ kind: KIND_GPU }]\n'
        )
    nobody = str(tmp_path / "no-arbiter.sock")
    env, log = {SOCKET_VARIABLE: nobody}, tmp_path / "triton.log"
    with TritonProcess(find_server(), tmp_path / "models", env=env, log_path=log) as server:
        with TritonClient(server.grpc_url) as client:
            for name in ("dense", "every_type"):
                client.load(name)
        yield server.grpc_url


def tensor_of(name: str, array: np.ndarray) -> grpc.InferInput:
    tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def test_served_on_a_gpu_instance_under_32_clients(served: str, tmp_path: Path) -> None:
    models = tmp_path / "models"
    cpu = {path.name: on("cpu", path / "1" / "model.onnx") for path in models.iterdir()}
    lock = threading.Lock()

    def client_of(number: int) -> None:
        rng = np.random.default_rng(number)
        with grpc.InferenceServerClient(served) as client:
            for _ in range(20):
                rows = int(rng.integers(1, 5))
                name, feeds = "dense", {"x": rng.standard_normal((rows, 16)).astype(np.float32)}
                if number % 2:
                    numbers = rng.integers(0, 100, (rows, 3))
                    name = "every_type"
                    feeds = {f"in_{key}": numbers.astype(kind) for key, (_, kind) in made.TYPES.items()}
                    feeds["in_text"] = numbers.astype(str).astype(np.object_)
                result = client.infer(name, [tensor_of(key, x) for key, x in feeds.items()])
                with lock:
                    wanted = cpu[name].run(feeds)
                for spec, want in zip(cpu[name].outputs, wanted, strict=True):
                    got = result.as_numpy(spec.name).reshape(want.shape)
                    if want.dtype == np.object_:
                        assert [each.decode() for each in got.ravel()] == want.ravel().tolist()
                    else:
                        np.testing.assert_allclose(got, want, **TOLERANCE)

    with ThreadPoolExecutor(CLIENTS) as pool:
        for future in [pool.submit(client_of, number) for number in range(CLIENTS)]:
            future.result(timeout=120)


def test_a_provider_that_does_not_fit_the_instance_is_an_error(served: str, tmp_path: Path) -> None:
    config = tmp_path / "models" / "dense" / "config.pbtxt"
    config.write_text(
        'backend: "dstack"\nmax_batch_size: 16\ninstance_group [{ kind: KIND_CPU }]\n'
        'parameters { key: "execution_provider" value { string_value: "cuda" } }\n'
    )
    with TritonClient(served) as client, pytest.raises(Exception, match="set kind: KIND_GPU"):
        client.load("dense")
    with grpc.InferenceServerClient(served) as client:
        assert client.is_model_ready("dense"), "the old version serves on"
