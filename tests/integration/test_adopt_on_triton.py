"""`dstackctl adopt` and `revert` over a real Triton: adopted models answer as their graphs do, ensembles too.

The Triton of these tests has no onnxruntime backend, so what a model answered before its adoption is told by
plain onnxruntime.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import np_to_triton_dtype

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_sched.adapters.originals import FILE_NAME
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_process import TritonProcess, find_server
from fakes import feature_models as made
from fakes.adopt_corpus import CORPUS, SERVABLE, SERVED, Feeds, build, model_file, snapshot
from fakes.verbs import dstackctl, plan_document

LEFT_ALONE = ["pipeline", "caller", "accelerated"]


@dataclass
class Site:
    """A repository as a deployment has it, and a Triton in explicit mode over it."""

    root: Path
    state: Path
    server: TritonProcess
    before: dict[str, bytes]
    document: dict[str, Any]

    def dstackctl(self, *arguments: object) -> tuple[int, str, str]:
        return dstackctl(*arguments, "--url", self.server.grpc_url, "--state", self.state)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The repository adopted, all models loaded."""
    folder = tmp_path_factory.mktemp("adopt")
    root, state = build(folder / "models", [*SERVED, *LEFT_ALONE]), folder / "state"
    before = snapshot(root)
    env = {SOCKET_VARIABLE: str(folder / "none.sock"), "PYTHONDONTWRITEBYTECODE": "1"}
    with TritonProcess(find_server(), root, log_path=folder / "triton.log", env=env) as server:
        status, out, err = dstackctl("adopt", root, "--url", server.grpc_url, "--state", state, "--json")
        assert status == 0, err
        with TritonClient(server.grpc_url) as client:
            for model in ("pipeline", "caller"):
                client.load(model)
        yield Site(root, state, server, before, json.loads(out))


def test_what_was_adopted_is_loaded_and_the_rest_is_listed_with_its_reason(site: Site) -> None:
    rows = {row["model"]: row for row in site.document["models"]}
    assert {name for name, row in rows.items() if row["action"] == "adopted"} == set(SERVED)
    for name in LEFT_ALONE:
        assert rows[name]["action"] == "left alone"
        assert CORPUS[name].why in rows[name]["why"]
    assert site.document["next"] is None, "nothing is left for the operator to do"
    with TritonClient(site.server.grpc_url) as client:
        states = client.models()
        assert {name for name in SERVED if states[name] == "READY"} == set(SERVED)
        assert {client.config(name)["backend"] for name in SERVED} == {"dstack"}


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("name", SERVED)
def test_an_adopted_model_answers_as_its_graph_does(site: Site, name: str, protocol: str) -> None:
    check_answer(site.server, site.root, name, protocol)


@pytest.mark.slow
def test_all_of_the_corpus_that_can_run_here_is_adopted_answers_and_goes_back(tmp_path: Path) -> None:
    root = build(tmp_path / "models", SERVABLE)
    before = snapshot(root)
    env = {SOCKET_VARIABLE: str(tmp_path / "none.sock")}
    with TritonProcess(find_server(), root, log_path=tmp_path / "log", env=env) as server:
        options = ("--url", server.grpc_url, "--state", tmp_path / "state")
        status, _, err = dstackctl("adopt", root, *options)
        assert status == 0, err
        for name in SERVABLE:
            for protocol in ("grpc", "http"):
                if not (protocol == "http" and name == "empty"):  # HTTP's JSON cannot carry FP16
                    check_answer(server, root, name, protocol)
        status, _, err = dstackctl("revert", root, *options)
        assert status == 0, err
    assert snapshot(root) == before


def check_answer(server: TritonProcess, root: Path, name: str, protocol: str) -> None:
    """Triton's own client gets what plain onnxruntime says."""
    wanted = run_graph(model_file(root, name), seen_by_the_graph(name, CORPUS[name].requests))
    got = infer(server, protocol, name, CORPUS[name].requests)
    for output, array in wanted.items():
        expected = np.asarray(array).reshape(got[output].shape)  # numbers travel as [1], reshapes apply
        if expected.dtype == np.object_:
            assert [text.decode() for text in got[output].ravel()] == expected.ravel().tolist()
        else:
            np.testing.assert_allclose(got[output], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_an_ensemble_over_adopted_models_goes_on(site: Site, protocol: str) -> None:
    row = run_graph(model_file(site.root, "minimal"), CORPUS["minimal"].requests)["scores"]
    got = infer(site.server, protocol, "pipeline", {"pixels": CORPUS["minimal"].requests["x"]})
    np.testing.assert_allclose(got["row"], row, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["twice"], 2 * row, rtol=1e-5, atol=1e-6)


def test_a_python_model_goes_on_calling_an_adopted_one(site: Site) -> None:
    request = CORPUS["minimal"].requests
    wanted = run_graph(model_file(site.root, "minimal"), request)["scores"]
    got = infer(site.server, "grpc", "caller", request)
    np.testing.assert_allclose(got["scores"], wanted, rtol=1e-5, atol=1e-6)


def test_labels_and_versions_of_an_adopted_model_are_kept(site: Site) -> None:
    """Guards what Triton itself does with fields that we do not know: classification, version policy."""
    with grpcclient.InferenceServerClient(site.server.grpc_url) as client:
        assert client.is_model_ready("labelled", "1")
        assert not client.is_model_ready("labelled", "2"), "its version policy leaves this one out"
        wanted = grpcclient.InferRequestedOutput("y", class_count=1)
        answer = client.infer("labelled", tensors(grpcclient, CORPUS["labelled"].requests), outputs=[wanted])
        rows = answer.as_numpy("y").ravel()
    assert [row.split(b":")[2] for row in rows] == [
        [b"cat", b"dog", b"owl", b"fox"][index] for index in CORPUS["labelled"].requests["x"].argmax(axis=1)
    ]


def test_a_model_that_does_not_load_takes_all_back(site: Site, tmp_path: Path) -> None:
    """Triton refuses the second config (our look at it cannot know why); the first must be as before, too."""
    for name, extra in (("first", ""), ("second", "dynamic_batching { preferred_batch_size: [ 99 ] }\n")):
        made.save(made.plus(1), site.root / name / "1" / "model.onnx")
        (site.root / name / "config.pbtxt").write_text(f'backend: "onnxruntime"\nmax_batch_size: 8\n{extra}')
    added, kept = snapshot(site.root), (site.root / FILE_NAME).read_bytes()
    status, _, err = site.dstackctl("adopt", site.root, "--model", "first", "--model", "second")
    assert status == 2
    assert "second: its adoption could not be put in force, all is as before" in err
    assert err.count("\n") == 1
    assert snapshot(site.root) == added
    assert (site.root / FILE_NAME).read_bytes() == kept
    with TritonClient(site.server.grpc_url) as client:
        assert not client.is_model_ready("first")


def test_reverted_after_a_plan_was_applied_every_file_is_as_at_first(site: Site) -> None:
    """The last test on this site. Models that Triton did not serve before their adoption are unloaded."""
    plan = site.state / "plan.json"
    plan.write_text(json.dumps(plan_document(bare=50)))
    status, _, err = site.dstackctl("apply", "--plan", plan, "--repo", site.root)
    assert status == 0, err
    assert "gpu_percent" in (site.root / "bare" / "config.pbtxt").read_text()
    status, out, err = site.dstackctl("revert", site.root, "--json")
    assert status == 0, err
    assert {row["model"] for row in json.loads(out)["models"]} == set(SERVED)
    after = snapshot(site.root)
    assert {name: after[name] for name in site.before} == site.before
    assert FILE_NAME not in after
    assert "bare/config.pbtxt" not in after
    with TritonClient(site.server.grpc_url) as client:
        assert not any(client.is_model_ready(name) for name in SERVED)
        assert client.is_model_ready("caller"), "what was not adopted is not touched"


@pytest.mark.parametrize(
    ("mode", "advice"),
    [
        ("poll", "takes the configs by itself, within 1 s each"),
        pytest.param("none", "reads its repository at its start", marks=pytest.mark.slow),
    ],
)
def test_without_explicit_control_the_operator_is_told_what_to_do(
    tmp_path: Path, mode: str, advice: str
) -> None:
    root = build(tmp_path / "models", ["minimal"])
    args = [f"--model-control-mode={mode}", "--exit-on-error=false", "--strict-readiness=false"]
    args += ["--repository-poll-secs=1"] if mode == "poll" else []
    env = {SOCKET_VARIABLE: str(tmp_path / "none.sock")}
    install = find_server()
    with TritonProcess(install, root, log_path=tmp_path / "log", env=env, extra_args=args) as server:
        status, _, err = dstackctl("adopt", root, "--url", server.grpc_url, "--state", tmp_path / "state")
        assert status == 0, err
        assert advice in err
        if mode == "none":
            return
        wait_until_ready(server, "minimal")
        got = infer(server, "grpc", "minimal", CORPUS["minimal"].requests)
    wanted = run_graph(model_file(root, "minimal"), CORPUS["minimal"].requests)
    np.testing.assert_allclose(got["scores"], wanted["scores"], rtol=1e-5, atol=1e-6)


def wait_until_ready(server: TritonProcess, model: str) -> None:
    until_s = time.monotonic() + 60
    with TritonClient(server.grpc_url) as client:
        while not client.is_model_ready(model):
            assert time.monotonic() < until_s, "Triton did not take the adopted config by itself"
            time.sleep(0.2)


def seen_by_the_graph(name: str, feeds: Feeds) -> Feeds:
    shapes = {"reshaped": (-1, 4), "scalar": ()}
    return {"x": feeds["x"].reshape(shapes[name])} if name in shapes else feeds


def run_graph(path: Path, feeds: Feeds) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def infer(server: TritonProcess, protocol: str, model: str, feeds: Feeds) -> Mapping[str, np.ndarray]:
    """The answer of Triton's own client, with the names of all outputs that came."""
    if protocol == "http":
        with httpclient.InferenceServerClient(server.http_url) as client:
            answer = client.infer(model, tensors(httpclient, feeds))
            names = [output["name"] for output in answer.get_response()["outputs"]]
    else:
        with grpcclient.InferenceServerClient(server.grpc_url) as client:
            answer = client.infer(model, tensors(grpcclient, feeds), client_timeout=20)
            names = [output.name for output in answer.get_response().outputs]
    return {name: answer.as_numpy(name) for name in names}


def tensors(client: Any, feeds: Feeds) -> list[Any]:
    made_of = []
    for name, array in feeds.items():
        tensor = client.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        made_of.append(tensor)
    return made_of
