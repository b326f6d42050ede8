"""Everything the backend must be able to serve, on a real Triton, against plain onnxruntime.

Requests that run alone must be equal bit for bit (the batch is the request); under load, when batches are
mixed, floats may differ in the last places.
"""

from __future__ import annotations

import random
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_backend.staging import aligned
from dstack_backend.stats import STAGES
from dstack_sched.adapters.triton_process import TritonProcess, find_server
from fakes import feature_models as made
from fakes.arbiter_bench import ArbiterProcess

Feeds = Mapping[str, np.ndarray]
CLIENTS = 32
WITHIN_S = 30.0


def config(*lines: str, **parameters: str) -> str:
    texts = [
        f'parameters {{ key: "{key}" value {{ string_value: "{v}" }} }}' for key, v in parameters.items()
    ]
    return "\n".join(['backend: "dstack"', *lines, *texts]) + "\n"


def build_repository(root: Path) -> Path:
    """Bare configs wherever auto-complete can know; others say what only their owner knows."""
    bare = {
        "every_type": made.every_type(),
        "dense": made.dense(),
        "dynamic": made.dynamic(),
        "without_batch": made.without_batch(),
        "scalar": made.scalar(),
        "with_default": made.with_default(),
        "with_optional": made.with_optional(),
        "text": made.text(),
        "lookup": made.lookup(),
    }
    for name, proto in bare.items():
        made.save(proto, root / name / "1" / "model.onnx")
        (root / name / "config.pbtxt").write_text(config())
    made.save(made.dense(seed=3), root / "external" / "1" / "model.onnx", external="weights.bin")
    (root / "external" / "config.pbtxt").write_text(config())
    for version in (1, 3):
        made.save(made.plus(version), root / "versions" / str(version) / "model.onnx")
    (root / "versions" / "config.pbtxt").write_text(config("version_policy { all {} }"))
    made.save(made.dense(seed=5), root / "chunks" / "1" / "named.onnx")
    (root / "chunks" / "config.pbtxt").write_text(
        config(
            "max_batch_size: 16", "instance_group [{ count: 2 kind: KIND_CPU }]",
            batch_size="4", model_file="named.onnx",
        )
    )  # fmt: skip
    for name, on_late in (("patient", "serve"), ("strict", "reject")):
        made.save(made.slow(), root / name / "1" / "model.onnx")
        options = {"batch_size": "1", "prefetch": "64", "slo_ms": "10000", "on_late": on_late}
        (root / name / "config.pbtxt").write_text(config(**options))
    return root


class Served:
    """A server with the models above, and a plain onnxruntime session of each."""

    def __init__(self, server: TritonProcess, repository: Path, socket: Path):
        self.server = server
        self.socket = socket
        self.repository = repository
        self._plain: dict[Path, ort.InferenceSession] = {}
        self._lock = threading.Lock()

    def client(self) -> grpc.InferenceServerClient:
        return grpc.InferenceServerClient(self.server.grpc_url)

    def plain(
        self, model: str, feeds: Feeds, outputs: Sequence[str] | None = None, version: str = "1"
    ) -> dict[str, np.ndarray]:
        path = next((self.repository / model / version).glob("*.onnx"))
        with self._lock:
            if path not in self._plain:
                options = ort.SessionOptions()
                options.log_severity_level = 3
                self._plain[path] = ort.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"]
                )
            session = self._plain[path]
        names = list(outputs or [output.name for output in session.get_outputs()])
        arrays = session.run(names, {name: on_aligned_memory(array) for name, array in feeds.items()})
        return {name: as_seen(array, model) for name, array in zip(names, arrays, strict=True)}

    def metric(self, name: str, model: str) -> float:
        """A custom metric of the backend, summed over the series of a model."""
        with urllib.request.urlopen(f"http://{self.server.metrics_url}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith(f"{name}{{") and f'model="{model}"' in line
        )


def on_aligned_memory(array: np.ndarray) -> np.ndarray:
    """ONNX Runtime's reductions round by where the data begins, so both sides begin alike."""
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def as_seen(array: np.ndarray, model: str) -> np.ndarray:
    """Triton has no empty dims: what is a number a row (or in all) is seen as a row of one."""
    return array[..., None] if array.ndim == (0 if model == "scalar" else 1) else array


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("features")
    repository = build_repository(root / "models")
    server = TritonProcess(
        find_server(),
        repository,
        log_path=root / "triton.log",
        env={
            SOCKET_VARIABLE: str(root / "private" / "arbiter.sock")
        },  # nobody listens until a test begins to
    )
    try:
        server.start()
        loader = grpc.InferenceServerClient(server.grpc_url)
        names = sorted(path.name for path in repository.iterdir())
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(loader.load_model, names))
        yield Served(server, repository, root / "private" / "arbiter.sock")
    finally:
        server.stop()


def ask(
    client: grpc.InferenceServerClient,
    model: str,
    feeds: Feeds,
    outputs: Sequence[str] | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Infer, and every output that came back (strings as str)."""
    inputs = []
    for name, array in feeds.items():
        tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    wanted = [grpc.InferRequestedOutput(name) for name in outputs] if outputs else None
    result = client.infer(model, inputs, outputs=wanted, client_timeout=WITHIN_S, **options)
    answer = {}
    for output in result.get_response().outputs:
        array = result.as_numpy(output.name)
        if array.dtype == np.object_:
            array = np.array([each.decode() for each in array.ravel()], np.object_).reshape(array.shape)
        answer[output.name] = array
    return answer


def assert_equal(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], exact: bool = True) -> None:
    assert set(got) == set(wanted)
    for name, array in wanted.items():
        assert got[name].shape == array.shape, name
        assert got[name].dtype == array.dtype, name
        if exact or array.dtype.kind not in "f":
            assert np.array_equal(got[name], array), name
        else:
            np.testing.assert_allclose(got[name], array, rtol=1e-3, atol=1e-4, err_msg=name)


def every_type_feeds(rng: np.random.Generator, rows: int, columns: int = 3) -> dict[str, np.ndarray]:
    feeds = {}
    for name, (_, dtype) in made.TYPES.items():
        numbers = rng.integers(0, 100, (rows, columns))
        if dtype is np.object_:
            array = np.array([f"ä{each}\n" * (each % 4) for each in numbers.ravel()], np.object_)
            feeds[f"in_{name}"] = array.reshape(rows, columns)
        else:
            feeds[f"in_{name}"] = (numbers > 50) if dtype is np.bool_ else numbers.astype(dtype)
    return feeds


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


RNG = np.random.default_rng(11)


def test_every_type_bit_for_bit(served: Served) -> None:
    feeds = every_type_feeds(RNG, 5)
    assert_equal(ask(served.client(), "every_type", feeds), served.plain("every_type", feeds))


def test_extreme_values_survive(served: Served) -> None:
    """Not-a-number, infinities, smallest and largest integers, empty strings come back as they went."""
    feeds = {}
    for name, (_, dtype) in made.TYPES.items():
        kind = np.dtype(dtype).kind
        if kind in "iu":
            edge = np.iinfo(dtype)
            values = np.array([edge.min, edge.max, 1], dtype)
        elif kind == "f":
            values = np.array([np.nan, -np.inf, np.finfo(dtype).tiny], dtype)
        else:
            values = np.array(["", "\0", "語" * 999], dtype) if kind == "O" else np.array([True, False, True])
        feeds[f"in_{name}"] = values[None]
    got = ask(served.client(), "every_type", feeds)
    for name, array in feeds.items():
        wanted = array[:, ::-1]
        assert np.array_equal(got[name.replace("in_", "out_")], wanted, equal_nan=array.dtype.kind == "f"), (
            name
        )


def test_two_outputs_and_one_of_them(served: Served) -> None:
    feeds = {"x": normal(RNG, 3, 16)}
    assert_equal(ask(served.client(), "dense", feeds), served.plain("dense", feeds))
    assert_equal(ask(served.client(), "dense", feeds, ["mean"]), served.plain("dense", feeds, ["mean"]))


@pytest.mark.parametrize("length", [0, 1, 7])
def test_dynamic_dimensions_and_zero_elements(served: Served, length: int) -> None:
    feeds = {"x": normal(RNG, 4, length)}
    assert_equal(ask(served.client(), "dynamic", feeds), served.plain("dynamic", feeds))


def test_zero_strings(served: Served) -> None:
    feeds = {"x": np.zeros((2, 0), np.object_)}
    assert_equal(ask(served.client(), "text", feeds), served.plain("text", feeds))


def test_model_without_batch_dimension(served: Served) -> None:
    client = served.client()
    assert client.get_model_config("without_batch", as_json=True)["config"].get("max_batch_size", 0) == 0
    for rows in (1, 4):
        feeds = {"x": np.round(normal(RNG, rows, 6))}
        assert_equal(ask(client, "without_batch", feeds), served.plain("without_batch", feeds))


def test_scalars(served: Served) -> None:
    assert_equal(
        ask(served.client(), "scalar", {"x": np.array([2.5], np.float32)}), {"y": np.float32([-2.5])}
    )


def test_outputs_without_elements(served: Served) -> None:
    feeds = {"x": np.zeros((2, 2), np.float32)}
    assert ask(served.client(), "without_batch", feeds)["where"].shape == (2, 0)


def test_optional_inputs(served: Served) -> None:
    client = served.client()
    x, other = normal(RNG, 2, 4), normal(RNG, 2, 4)
    assert_equal(ask(client, "with_default", {"x": x}), served.plain("with_default", {"x": x}))
    both = {"x": x, "scale": other}
    assert_equal(ask(client, "with_default", both), served.plain("with_default", both))
    assert_equal(ask(client, "with_optional", {"x": x}), {"y": x + x})
    assert_equal(ask(client, "with_optional", {"x": x, "bias": other}), {"y": x + other})


def test_weights_listed_as_inputs_are_not_offered(served: Served) -> None:
    """An old exporter's hundreds of weights must not become hundreds of optional inputs."""
    metadata = served.client().get_model_metadata("with_default", as_json=True)
    assert {each["name"] for each in metadata["inputs"]} == {"x", "scale"}


def test_strings_that_are_not_text_are_refused(served: Served) -> None:
    with pytest.raises(InferenceServerException, match="input 'x': BYTES elements must be UTF-8"):
        ask(served.client(), "text", {"x": np.array([[b"\xff\xfe"]], np.object_)})


def test_external_data(served: Served) -> None:
    feeds = {"x": normal(RNG, 3, 16)}
    assert_equal(ask(served.client(), "external", feeds), served.plain("external", feeds))


def test_versions_side_by_side(served: Served) -> None:
    x = normal(RNG, 2, 4)
    for version in ("1", "3"):
        got = ask(served.client(), "versions", {"x": x}, model_version=version)
        assert_equal(got, served.plain("versions", {"x": x}, version=version))


def test_request_larger_than_the_batch_size(served: Served) -> None:
    """16 rows where 4 run at once: in chunks, put together again; equal to the same chunks run plainly."""
    x = normal(RNG, 15, 16)
    chunks = [served.plain("chunks", {"x": x[at : at + 4]}) for at in range(0, 15, 4)]
    wanted = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    assert_equal(ask(served.client(), "chunks", {"x": x}), wanted)


def test_auto_completed_config(served: Served) -> None:
    completed = served.client().get_model_config("dense", as_json=True)["config"]
    assert completed["max_batch_size"] == 64
    assert "dynamic_batching" in completed
    assert [(each["name"], each["data_type"], each["dims"]) for each in completed["input"]] == [
        ("x", "TYPE_FP32", ["16"])
    ]
    assert {each["name"]: each.get("dims") for each in completed["output"]} == {
        "scores": ["5"],
        "mean": ["1"],
    }


def test_a_failing_batch_fails_its_own_requests_only(served: Served) -> None:
    client = served.client()
    with pytest.raises(InferenceServerException, match="out of data bounds"):
        ask(client, "lookup", {"index": np.array([[99]], np.int64)})
    feeds = {"index": np.array([[2], [7]], np.int64)}
    assert_equal(ask(client, "lookup", feeds), served.plain("lookup", feeds))


def start_slow(
    client: grpc.InferenceServerClient, model: str, count: int, done: Callable, rows: int = 1, **options: Any
):
    """Send requests that take some 6 ms a row, without waiting; returns their handles."""
    tensor = grpc.InferInput("x", [rows, 16, 512], "FP32")
    tensor.set_data_from_numpy(np.ones((rows, 16, 512), np.float32))
    return [
        client.async_infer(model, [tensor], lambda result, error: done(error), **options)
        for _ in range(count)
    ]


class Outcomes:
    """The callbacks that have come."""

    def __init__(self) -> None:
        self.errors: list[InferenceServerException | None] = []
        self.waited = 0
        self._new = threading.Semaphore(0)

    def __call__(self, error: InferenceServerException | None) -> None:
        self.errors.append(error)
        self._new.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self._new.acquire(timeout=WITHIN_S), "a request was never answered"
            self.waited += 1


class Ahead:
    """Long requests without end: the instance is never idle, and whatever is due later waits. AT_ONCE, so
    that it stays so when this process has to wait for a processor. A context manager; all are answered at its
    end."""

    LONG_ROWS = 64  # as many batches, of one row each
    AT_ONCE = 6

    def __init__(self, client: grpc.InferenceServerClient, model: str) -> None:
        self._client, self._model = client, model
        self._on = True
        self.sent = 0
        self.answered = Outcomes()
        for _ in range(self.AT_ONCE):
            self._send()

    def _send(self) -> None:
        self.sent += 1
        start_slow(self._client, self._model, 1, self._done, rows=self.LONG_ROWS)

    def _done(self, error: InferenceServerException | None) -> None:
        if self._on:
            self._send()
        self.answered(error)

    def passes(self) -> None:
        """Returns when requests that were sent from now on are answered: what this connection sent before
        has been taken in."""
        self.answered.wait(self.AT_ONCE + 2)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        self.answered.wait(self.sent - self.answered.waited)
        assert set(self.answered.errors) == {None}


def test_cancelled_requests_do_not_run(served: Served) -> None:
    """Cancelled while others run ahead of them: answered as cancelled, and counted, not run."""
    names = ("dstack_cancelled_requests_total", "dstack_requests_total", "dstack_batches_total")

    def counted() -> list[float]:
        return [served.metric(name, "patient") for name in names]

    client, cancelled = served.client(), Outcomes()
    time.sleep(1.1)  # metrics are brought up to date each second
    before = counted()
    with Ahead(client, "patient") as ahead:
        handles = start_slow(client, "patient", 20, cancelled, parameters={"deadline_ms": "60000"})
        ahead.passes()
        for handle in handles:
            handle.cancel()
        cancelled.wait(20)
        ahead.passes()
    assert all("CANCELLED" in str(error) for error in cancelled.errors)
    assert ask(client, "patient", {"x": np.ones((1, 16, 512), np.float32)})["y"].shape == (1, 16, 512)
    wanted = [20, ahead.sent + 21, ahead.sent * ahead.LONG_ROWS + 1]
    give_up = time.monotonic() + WITHIN_S
    while (found := list(np.subtract(counted(), before))) != wanted and time.monotonic() < give_up:
        time.sleep(0.2)
    assert found == wanted


def test_late_requests_are_rejected_or_served_as_the_config_says(served: Served) -> None:
    client = served.client()
    kept, shed = Outcomes(), Outcomes()
    start_slow(client, "patient", 30, kept, parameters={"deadline_ms": "1"})
    kept.wait(30)
    assert kept.errors == [None] * 30
    start_slow(client, "strict", 30, shed, parameters={"deadline_ms": "1"})
    shed.wait(30)
    errors = [error for error in shed.errors if error]
    assert errors
    assert all("deadline" in error.message() and "UNAVAILABLE" in error.status() for error in errors)


def test_triton_timeout_counts_as_deadline(served: Served) -> None:
    outcomes = Outcomes()
    start_slow(served.client(), "strict", 30, outcomes, timeout=1000)
    outcomes.wait(30)
    assert any(error and "deadline" in error.message() for error in outcomes.errors)


def test_bad_deadline_is_refused(served: Served) -> None:
    with pytest.raises(InferenceServerException, match="deadline_ms is 'soon'; a positive number is wanted"):
        ask(served.client(), "dense", {"x": normal(RNG, 1, 16)}, parameters={"deadline_ms": "soon"})


def one_of_everything(served: Served, client: grpc.InferenceServerClient, seed: int) -> None:
    """One request of a random kind, checked against plain onnxruntime."""
    rng, pick = np.random.default_rng(seed), random.Random(seed)
    rows = pick.choice((1, 1, 2, 3, 5))
    kind = pick.randrange(9)
    outputs: Sequence[str] | None = None
    options: dict[str, Any] = {}
    version = "1"
    if kind == 0:
        model, feeds = "every_type", every_type_feeds(rng, rows)
    elif kind == 1:
        model, feeds = "dense", {"x": normal(rng, rows, 16)}
        outputs = pick.choice((None, ["mean"], ["scores"]))
    elif kind == 2:
        model, feeds = "dynamic", {"x": normal(rng, rows, pick.choice((0, 1, 3, 3, 8)))}
    elif kind == 3:
        model, feeds = "without_batch", {"x": np.round(normal(rng, rows, 5))}
    elif kind == 4:
        model, feeds = "with_default", {"x": normal(rng, rows, 4)}
        if pick.random() < 0.5:
            feeds["scale"] = normal(rng, rows, 4)
    elif kind == 5:
        words = [f"wort {each}" for each in rng.integers(0, 99, rows * 2)]
        model, feeds = "text", {"x": np.array(words, np.object_).reshape(rows, 2)}
    elif kind == 6:
        model, feeds = "external", {"x": normal(rng, rows, 16)}
    elif kind == 7:
        version = pick.choice(("1", "3"))
        model, feeds = "versions", {"x": normal(rng, rows, 4)}
        options["model_version"] = version
    else:
        model, feeds = "chunks", {"x": normal(rng, pick.choice((1, 3, 9, 16)), 16)}
    got = ask(client, model, feeds, outputs, **options)
    assert_equal(got, served.plain(model, feeds, outputs, version), exact=False)


def ask_everything(served: Served) -> None:
    def client_of(number: int) -> None:
        with served.client() as client:
            for round_ in range(40):
                one_of_everything(served, client, 1000 * number + round_)

    with ThreadPoolExecutor(CLIENTS) as pool:
        for future in [pool.submit(client_of, number) for number in range(CLIENTS)]:
            future.result(timeout=90)


def test_everything_at_once_under_32_clients(served: Served) -> None:
    """Mixed kinds, shapes and sizes from 32 clients: each gets its own answer; some batches hold several."""
    ask_everything(served)
    time.sleep(1.1)  # metrics are brought up to date each second
    batched = ("every_type", "dense", "dynamic", "with_default", "text", "external", "versions")
    requests = sum(served.metric("dstack_requests_total", name) for name in batched)
    assert sum(served.metric("dstack_batches_total", name) for name in batched) < requests


def test_a_lone_client_is_answered_by_tritons_thread_and_its_stages_are_timed(served: Served) -> None:
    names = ("returned_requests", "batches", "stage_samples", "latency_samples")

    def counted() -> list[float]:
        return [served.metric(f"dstack_{name}_total", "lookup") for name in names]

    time.sleep(1.1)  # metrics are brought up to date each second
    before = counted()
    client, feeds = served.client(), {"index": np.array([[3]], np.int64)}
    for _ in range(40):
        assert np.array_equal(ask(client, "lookup", feeds)["row"], served.plain("lookup", feeds)["row"])
    time.sleep(1.1)
    returned, batches, samples, latencies = np.subtract(counted(), before)
    assert returned > 30 and batches == latencies == 40
    assert samples == len(STAGES) * batches
    assert served.metric("dstack_stage_seconds_total", "lookup") > 0


def test_everything_at_once_under_the_arbiter(served: Served, tmp_path: Path) -> None:
    """The same with all models under one arbiter's grants, from joining to its end by kill -9 under load."""
    arbiter = ArbiterProcess(served.socket, tmp_path / "arbiter.log")
    try:
        ready = served.client().get_model_repository_index(as_json=True)["models"]
        wanted = len({each["name"] for each in ready if each.get("state") == "READY"})
        give_up = time.monotonic() + WITHIN_S
        while len({each["model"] for each in arbiter.client.request("status")["backends"]}) < wanted:
            assert time.monotonic() < give_up, "not all instances joined"
            time.sleep(0.05)
        ask_everything(served)
        told = arbiter.client.request("telemetry", since=0)
        assert told["instances"] and all("stages_us" in each for each in told["instances"].values())
        feeds = {"index": np.array([[3]], np.int64)}
        time.sleep(0.2)  # from now on it is alone
        for _ in range(10):
            ask(served.client(), "lookup", feeds)
        assert arbiter.client.request("status")["models"]["lookup"]["rows"] >= 10
        killer = threading.Timer(0.3, arbiter.end, [signal.SIGKILL])
        killer.start()
        ask_everything(served)
        killer.join()
    finally:
        arbiter.popen.kill()
        arbiter.popen.wait()
    time.sleep(1.1)  # metrics are brought up to date each second
    assert served.metric("dstack_grants_total", "dense") > 0
    assert served.metric("dstack_arbiter_disconnects_total", "dense") == 1
    assert served.metric("dstack_standing_grants_total", "lookup") > 0


def test_unload_under_load_answers_every_accepted_request(served: Served) -> None:
    """Every request is answered rightly or refused by Triton because the model is not there; none hangs."""
    x = normal(RNG, 2, 16)
    wanted = served.plain("dense", {"x": x})
    answered, refused, stop = [], [], threading.Event()

    def client_of(_: int) -> None:
        with served.client() as client:
            while not stop.is_set():
                try:
                    assert_equal(ask(client, "dense", {"x": x}), wanted, exact=False)
                    answered.append(1)
                except InferenceServerException as error:
                    refused.append(error.message())
                    time.sleep(0.01)

    with ThreadPoolExecutor(8) as pool, served.client() as control:
        futures = [pool.submit(client_of, number) for number in range(8)]
        while len(answered) < 100:
            time.sleep(0.01)
        control.unload_model("dense")
        while not refused:
            time.sleep(0.01)
        control.load_model("dense")
        before = len(answered)
        while len(answered) < before + 100:
            time.sleep(0.01)
        stop.set()
        for future in futures:
            future.result(timeout=WITHIN_S)
    unexpected = [each for each in refused if "is not ready" not in each and "unknown model" not in each]
    assert not unexpected
