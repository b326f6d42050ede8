"""`dstackctl apply` on a real Triton under load: what it promises when all goes well and when not."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as grpcclient
from onnx import TensorProto, helper

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_sched.adapters.stub_processes import LocalStubProcesses
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_process import TritonProcess, find_server
from fakes.load import Load
from fakes.onnx_models import WIDTH, SlowSum

MODELS = {name: SlowSum(name, inner=64, depth=2, seed=seed) for seed, name in enumerate(("alpha", "beta"))}
CONFIG = '# {name}, kept as it is\nbackend: "dstack"\nmax_batch_size: 8\n'
PATIENCE_S = 120


class Site:
    """A Triton with its repository, and `dstackctl apply` on it."""

    def __init__(self, root: Path, state: Path, server: TritonProcess) -> None:
        self.root, self.state, self.server = root, state, server
        self.client = TritonClient(server.grpc_url)

    def start_apply(self, plan: dict[str, Any], *more: str) -> subprocess.Popen[str]:
        path = self.state / "plan.json"
        path.write_text(json.dumps(plan))
        return subprocess.Popen(
            [sys.executable, "-m", "dstack_sched", "apply", "--plan", str(path), "--repo", str(self.root),
             "--url", self.server.grpc_url, "--state", str(self.state), "--json", *more],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, SOCKET_VARIABLE: str(self.state / "none.sock")},
        )  # fmt: skip

    def apply(self, plan: dict[str, Any], *more: str) -> tuple[int, str, str]:
        process = self.start_apply(plan, *more)
        out, err = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out, err

    def tree(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.root.rglob("*"))
            if path.is_file()
        }

    def in_force(self, model: str) -> dict[str, str]:
        config = self.client.config(model)
        return {key: value["string_value"] for key, value in config["parameters"].items()}

    def answers(self, name: str) -> bool:
        x = np.ones((1, WIDTH), np.float32)
        tensor = grpcclient.InferInput(f"x_{name}", [1, WIDTH], "FP32")
        tensor.set_data_from_numpy(x)
        with grpcclient.InferenceServerClient(self.server.grpc_url) as client:
            y = client.infer(name, [tensor], client_timeout=10).as_numpy(f"y_{name}")
        return np.allclose(y, MODELS[name].expected(x), atol=1e-3)


def plan(**models: tuple[float, int]) -> dict[str, Any]:
    rows = {
        name: {
            "gpu": -1, "gpu_percent": percent, "batch_size": batch, "max_queue_delay_us": 500,
            "latency_ms": 1.0, "throughput_per_s": 100.0, "efficacy": 1.0, "knee_percent": 50.0,
            "utilization": 0.1, "slo_ms": 100.0,
        }
        for name, (percent, batch) in models.items()
    }  # fmt: skip
    return {
        "version": 1, "capacity_percent": 100.0, "gpus": ["test"], "models": rows, "feasible": True,
        "binding": [], "headroom": 2.0,
    }  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("apply")
    root, state = folder / "models", folder / "state"
    state.mkdir()
    for name, model in MODELS.items():
        model.save(root / name / "1" / "model.onnx")
        (root / name / "config.pbtxt").write_text(CONFIG.format(name=name))
    env = {SOCKET_VARIABLE: str(folder / "none.sock")}
    with TritonProcess(find_server(), root, log_path=folder / "triton.log", env=env) as server:
        with TritonClient(server.grpc_url) as client:
            for name in MODELS:
                client.load(name)
        yield Site(root, state, server)


@pytest.fixture(autouse=True)
def as_at_first(site: Site) -> Iterator[None]:
    """Each test leaves models and configs as the next one wants them."""
    tree = site.tree()
    yield
    if site.tree() == tree:
        return
    for name, model in MODELS.items():
        model.save(site.root / name / "1" / "model.onnx")
        (site.root / name / "config.pbtxt").write_text(CONFIG.format(name=name))
        site.client.load(name)


def test_a_plan_applied_under_load_loses_no_request(site: Site) -> None:
    """Guards the promise of make-before-break, with the old stubs really gone at the end."""
    stubs = LocalStubProcesses(site.server.grpc_url)
    old = {name: stubs.pids(name) for name in MODELS}
    with Load(site.server.grpc_url, MODELS, clients=2) as load:
        load.wait_for(200)
        status, out, err = site.apply(plan(alpha=(50, 4), beta=(50, 2)))
        answered_at_the_end = load.total()
        load.wait_for(max(2_100, answered_at_the_end + 300))
    assert status == 0, err
    assert load.failed() == []
    assert load.total() >= 2_000
    report = json.loads(out)
    assert report["reloads"] == 2
    assert [each["old_stubs_gone"] for each in report["outcomes"]] == [True, True]
    for name, pids in old.items():
        assert pids and not stubs.alive(pids)
        assert site.in_force(name)["gpu_percent"] == "50"
        assert (site.root / name / "config.pbtxt").read_text().startswith(CONFIG.format(name=name))
    before = {path: path.stat().st_mtime_ns for path in site.root.rglob("*")}
    status, out, _ = site.apply(plan(alpha=(50, 4), beta=(50, 2)))
    assert (status, json.loads(out)["reloads"]) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in site.root.rglob("*")} == before


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def custom_operator(path: Path) -> None:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", WIDTH]) for n in ("x_beta", "y_beta")]
    node = helper.make_node("Frobnicate", ["x_beta"], ["y_beta"], domain="com.example")
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (truncate, "beta/1/model.onnx: is not an ONNX model"),
        (
            custom_operator,
            "dstackctl: beta: the plan could not be put in force, all is as before: ",
        ),
    ],
)
def test_a_load_that_fails_changes_nothing(site: Site, damage: Any, what: str) -> None:
    """The second model cannot load any more: the first goes back too, both old versions serve on."""
    damage(site.root / "beta" / "1" / "model.onnx")
    tree, parameters = site.tree(), {name: site.in_force(name) for name in MODELS}
    with Load(site.server.grpc_url, MODELS, clients=2) as load:
        load.wait_for(50)
        status, out, err = site.apply(plan(alpha=(50, 4), beta=(50, 2)))
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert what in err
    assert load.failed() == []
    assert site.tree() == tree
    assert {name: site.in_force(name) for name in MODELS} == parameters
    assert all(site.answers(name) for name in MODELS)


def test_a_controller_killed_in_the_middle_is_cleaned_up_after(site: Site) -> None:
    """kill -9 once the first config is written; the next start finishes the plan or undoes it, as a whole."""
    process = site.start_apply(plan(alpha=(50, 4), beta=(60, 2)))
    before = site.tree()
    until_s = time.monotonic() + PATIENCE_S
    while site.tree() == before:
        assert time.monotonic() < until_s, "nothing was written"
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    written = [name for name, text in site.tree().items() if before.get(name) != text]
    assert len(written) == 1, "the test came too late: both were written"
    status, out, err = site.apply(plan(alpha=(50, 4)))
    assert status == 0, err
    assert "an interrupted apply was finished" in err
    for name, (percent, batch) in {"alpha": ("50", "4"), "beta": ("60", "2")}.items():
        assert site.in_force(name)["gpu_percent"] == percent
        assert site.in_force(name)["batch_size"] == batch
        assert (
            f'"gpu_percent" value {{ string_value: "{percent}" }}'
            in (site.root / name / "config.pbtxt").read_text()
        )
        assert site.answers(name)
    assert json.loads(out)["reloads"] == 0
    assert list(site.state.glob("edits/*/edits.json")) == []


def changed(site: Site, before: dict[str, str]) -> int:
    """How many files differ; temporary files of a write under way are none."""
    now = site.tree()
    return sum(now.get(name) != text for name, text in before.items())


def journal_is_there(site: Site, before: dict[str, str]) -> bool:
    return bool(list(site.state.glob("edits/*/edits.json")))


def both_are_written(site: Site, before: dict[str, str]) -> bool:
    return changed(site, before) == 2


class OnTheWayBack:
    """Both were written, and one is as before again."""

    def __init__(self) -> None:
        self.most = 0

    def __call__(self, site: Site, before: dict[str, str]) -> bool:
        self.most = max(self.most, now := changed(site, before))
        return self.most == 2 and now < 2 and journal_is_there(site, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "damage"),
    [(journal_is_there, None), (both_are_written, None), (OnTheWayBack(), custom_operator)],
    ids=["journal written", "second config written", "on the way back"],
)
def test_kill_9_at_other_moments_loses_nothing_either(site: Site, moment: Any, damage: Any) -> None:
    if damage is not None:
        damage(site.root / "beta" / "1" / "model.onnx")
    before = site.tree()
    with Load(site.server.grpc_url, MODELS, clients=2) as load:
        load.wait_for(50)
        process = site.start_apply(plan(alpha=(40, 4), beta=(60, 2)))
        until_s = time.monotonic() + PATIENCE_S
        while not moment(site, before):
            assert time.monotonic() < until_s and process.poll() is None, "the moment did not come"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
        status, _, err = site.apply(plan(alpha=(70, 4)))
        assert status == 0, err
        load.wait_for(load.total() + 100)
    assert load.failed() == []
    finished = damage is None
    assert f"beta: an interrupted apply was {'finished' if finished else 'undone'}" in err
    stated = (site.root / "beta" / "config.pbtxt").read_text()
    assert ('"gpu_percent" value { string_value: "60" }' in stated) == finished
    assert (site.in_force("beta").get("gpu_percent") == "60") == finished
    assert site.in_force("alpha")["gpu_percent"] == "70"
    assert not journal_is_there(site, before) and not list(site.root.glob(".dstack-*"))


def bad_inputs() -> list[Any]:
    def config(text: str) -> Any:
        return lambda site: (site.root / "beta" / "config.pbtxt").write_text(text)

    def nothing(site: Site) -> None:
        pass

    both = plan(alpha=(50, 4), beta=(50, 2))
    return [
        pytest.param(
            config('backend: "dstack\n'), both, "beta/config.pbtxt:1: a string is not closed", id="parse"
        ),
        pytest.param(
            config('backend: "identity"\n'), both, 'belongs to backend "identity"', id="other backend"
        ),
        pytest.param(nothing, plan(alpha=(50, 4), ghost=(50, 1)), "the plan names ghost", id="no such model"),
        pytest.param(nothing, plan(alpha=(50, 16)), "max_batch_size is 8", id="batch above the cap"),
        pytest.param(nothing, {"version": 7}, "version is 7", id="version"),
    ]


@pytest.mark.parametrize(("prepare", "wanted", "message"), bad_inputs())
def test_bad_input_is_one_line_and_changes_nothing(
    site: Site, prepare: Any, wanted: dict[str, Any], message: str
) -> None:
    prepare(site)
    tree, stubs = site.tree(), LocalStubProcesses(site.server.grpc_url)
    pids = {name: stubs.pids(name) for name in MODELS}
    status, out, err = site.apply(wanted)
    assert (status, out) == (2, ""), err
    assert len(err.splitlines()) == 1, err
    assert message in err
    assert site.tree() == tree
    now = {name: stubs.pids(name) for name in MODELS}
    assert all(now[name] and now[name] <= pids[name] for name in MODELS), "a model was reloaded"


def test_profiles_of_another_device_or_model_are_refused(site: Site) -> None:
    point = {"gpu_percent": 50, "batch_size": 1, "latency_ms_p50": 1.0, "latency_ms_p99": 1.0, "samples": 9}
    model = {"sha256": "0" * 64, "memory_bytes": 1, "points": [point, point | {"gpu_percent": 100}]}
    device = {"name": "other", "sms": 2, "memory_bytes": 1, "driver": "cpu", "runtime": "onnxruntime"}
    path, tree = site.state / "profiles.json", site.tree()
    for name, message in (
        ("other", "measured on other, the plan is for test"),
        ("test", "another model file"),
    ):
        document = {"version": 1, "gpu": device | {"name": name}, "models": {"alpha": model}}
        path.write_text(json.dumps(document))
        status, _, err = site.apply(plan(alpha=(50, 4)), "--profiles", str(path))
        assert status == 2
        assert len(err.splitlines()) == 1, err
        assert message in err
        assert site.tree() == tree


def test_no_triton_there_is_said_with_the_mend(site: Site) -> None:
    status, _, err = site.apply(plan(alpha=(50, 4)), "--url", "127.0.0.1:1")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert "no Triton answers at 127.0.0.1:1 (gRPC); start one (dstackctl serve) or give --url" in err
