"""A Triton that we did not start: behind TLS and restricted protocols, or with its repository elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import trustme

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_sched.adapters.pushed_repository import PushedRepository, PushingClient
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_connection import ConnectionOptions
from dstack_sched.adapters.triton_process import TritonProcess, find_server
from dstack_sched.domain.model_config import ConfigChange
from dstack_sched.errors import MachineError, ServerError
from fakes import feature_models as made
from fakes.verbs import dstackctl, plan_document

KEY = "triton-grpc-protocol-admin-key"
PROTOCOLS = "health,metadata,inference,model-repository,model-config,statistics"
SHARE = 'parameters { key: "gpu_percent" value { string_value: "%s" } }\n'


@dataclass
class Guarded:
    """A Triton that wants TLS with our certificate, and a key for all but nothing."""

    server: TritonProcess
    root: Path
    state: Path
    pem: Path

    def options(self, **changes: object) -> ConnectionOptions:
        given: dict[str, object] = {
            "headers": {KEY: "s3cret"}, "tls_ca": self.pem / "ca.pem",
            "tls_cert": self.pem / "ours.pem", "tls_key": self.pem / "ours.key",
        }  # fmt: skip
        return ConnectionOptions(self.server.grpc_url, **{**given, **changes})

    def dstackctl(self, *arguments: object) -> tuple[int, str, str]:
        pem = self.pem
        return dstackctl(
            *arguments, "--url", self.server.grpc_url, "--state", self.state,
            "--header", f"{KEY}=@{pem / 'secret'}", "--tls-ca", pem / "ca.pem",
            "--tls-cert", pem / "ours.pem", "--tls-key", pem / "ours.key",
        )  # fmt: skip


def build(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        made.save(made.plus(number), root / name / "1" / "model.onnx")
        (root / name / "config.pbtxt").write_text(f'# {name}\nbackend: "dstack"\nmax_batch_size: 8\n')
    return root


def plan_file(folder: Path, **shares: float) -> Path:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan_document(**shares)))
    return path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    root, pem, state = build(folder / "models", "a"), folder / "pem", folder / "state"
    pem.mkdir()
    state.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(pem / "ca.pem")
    for name, identity in (("theirs", "127.0.0.1"), ("ours", "controller@example.org")):
        issued = authority.issue_cert(identity)
        issued.private_key_pem.write_to_path(pem / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(pem / f"{name}.pem")
    trustme.CA().cert_pem.write_to_path(pem / "other-ca.pem")
    (pem / "secret").write_text("s3cret\n")
    arguments = [
        "--grpc-use-ssl=1", "--grpc-use-ssl-mutual=1", f"--grpc-server-cert={pem / 'theirs.pem'}",
        f"--grpc-server-key={pem / 'theirs.key'}", f"--grpc-root-cert={pem / 'ca.pem'}",
        f"--grpc-restricted-protocol={PROTOCOLS}:admin-key=s3cret",
    ]  # fmt: skip
    env = {SOCKET_VARIABLE: str(folder / "none.sock")}
    with TritonProcess(
        find_server(), root, log_path=folder / "triton.log", env=env, extra_args=arguments
    ) as server:
        yield Guarded(server, root, state, pem)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tls_ca": None, "tls_cert": None, "tls_key": None}, "no Triton answers at .* --tls"),
        ({"headers": {}}, r"refuses: .*restricted.*triton-grpc-protocol-admin-key.*--header KEY=VALUE"),
        ({"headers": {KEY: "wrong"}}, r"refuses: .*restricted"),
        ({"tls_ca": "other-ca.pem"}, r"no TLS with .*check --tls-ca"),
    ],
)
def test_what_bars_the_way_is_said_with_its_mend(
    guarded: Guarded, changes: dict[str, object], words: str
) -> None:
    if changes.get("tls_ca"):
        changes = {"tls_ca": guarded.pem / str(changes["tls_ca"])}
    with (
        TritonClient(guarded.options(**changes)) as client,
        pytest.raises(MachineError, match=words) as caught,
    ):
        client.require_ready()
    assert "\n" not in str(caught.value)


def test_verbs_work_through_tls_and_restricted_protocols(guarded: Guarded) -> None:
    made.save(made.plus(9), guarded.root / "b" / "1" / "model.onnx")
    config = guarded.root / "b" / "config.pbtxt"
    config.write_text('platform: "onnxruntime_onnx"\n')
    status, out, err = guarded.dstackctl("adopt", guarded.root, "--model", "b", "--json")
    assert status == 0, err
    assert json.loads(out)["models"][0]["action"] == "adopted"
    status, out, err = guarded.dstackctl("status", "--json")
    assert status == 0, err
    assert json.loads(out)["models"]["b"]["state"] == "READY"
    status, _, err = guarded.dstackctl("revert", guarded.root)
    assert status == 0, err
    assert config.read_text() == 'platform: "onnxruntime_onnx"\n'


# -- a repository that is not on a path here --------------------------------------------------------------


@dataclass
class Elsewhere:
    """A Triton whose repository we look at only to see that nobody touches it."""

    server: TritonProcess
    root: Path
    state: Path

    def share(self, model: str) -> str:
        with TritonClient(self.server.grpc_url) as client:
            return client.config(model)["parameters"].get("gpu_percent", {}).get("string_value", "")

    def answers(self, model: str, number: float) -> bool:
        x = np.ones((2, 4), np.float32)
        tensor = grpcclient.InferInput("x", [2, 4], "FP32")
        tensor.set_data_from_numpy(x)
        with grpcclient.InferenceServerClient(self.server.grpc_url) as client:
            y = client.infer(model, [tensor], client_timeout=10).as_numpy("y")
        return np.array_equal(y, x + number)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    folder = tmp_path_factory.mktemp("elsewhere")
    root, state = build(folder / "models", "p", "q"), folder / "state"
    state.mkdir()
    env = {SOCKET_VARIABLE: str(folder / "none.sock")}
    with TritonProcess(find_server(), root, log_path=folder / "triton.log", env=env) as server:
        with TritonClient(server.grpc_url) as client:
            for name in ("p", "q"):
                client.load(name)
        yield Elsewhere(server, root, state)


def test_a_plan_is_pushed_with_the_loads_and_no_file_is_touched(elsewhere: Elsewhere) -> None:
    files = {path: path.read_bytes() for path in elsewhere.root.rglob("*") if path.is_file()}
    command = ["apply", "--plan", plan_file(elsewhere.state, p=40), "--push", "--json",
               "--url", elsewhere.server.grpc_url, "--state", elsewhere.state]  # fmt: skip
    status, out, err = dstackctl(*command)
    assert status == 0, err
    assert [each["action"] for each in json.loads(out)["outcomes"]] == ["reloaded"]
    assert elsewhere.share("p") == "40"
    assert elsewhere.answers("p", 0)
    status, out, err = dstackctl(*command)
    assert status == 0, err
    assert {each["action"] for each in json.loads(out)["outcomes"]} == {"unchanged"}
    assert {path: path.read_bytes() for path in elsewhere.root.rglob("*") if path.is_file()} == files


def test_a_pushed_plan_that_does_not_load_is_taken_back(elsewhere: Elsewhere) -> None:
    before = {name: elsewhere.share(name) for name in ("p", "q")}
    status, _, err = dstackctl(
        "apply", "--plan", plan_file(elsewhere.state, p=20, q=400), "--push",
        "--url", elsewhere.server.grpc_url, "--state", elsewhere.state,
    )  # fmt: skip
    assert status == 2
    assert "q" in err
    assert {name: elsewhere.share(name) for name in ("p", "q")} == before
    assert elsewhere.answers("p", 0)


def test_a_repository_and_push_exclude_each_other(elsewhere: Elsewhere) -> None:
    status, _, err = dstackctl(
        "apply", "--plan", plan_file(elsewhere.state, p=20), "--push", "--repo", elsewhere.root,
        "--url", elsewhere.server.grpc_url, "--state", elsewhere.state,
    )  # fmt: skip
    assert status == 2
    assert "--push writes no file: leave out" in err


def test_the_facts_about_overrides_that_the_help_tells(elsewhere: Elsewhere) -> None:
    """They are Triton's behaviour: a load without the config keeps it, a newer file ends it."""
    client = PushingClient(elsewhere.server.grpc_url)
    with client, TritonClient(elsewhere.server.grpc_url) as other:
        repository = PushedRepository(client, elsewhere.state / "pushed")
        change = ConfigChange(parameters={"gpu_percent": "70"})
        repository.write_config("p", repository.edited("p", change))
        client.load("p")
        other.load("p")
        assert elsewhere.share("p") == "70", "ignored: no file is newer"
        config = elsewhere.root / "p" / "config.pbtxt"
        config.write_text(config.read_text() + SHARE % "55")
        other.load("p")
        assert elsewhere.share("p") == "55", "a newer file is"
        client.load("p")
        assert elsewhere.share("p") == "70", "our next load brings ours back"
        assert repository.config("p").parameters["gpu_percent"] == "70"
        with pytest.raises(ServerError):
            client.load("p", '{"backend": "dstack", "max_batch_size": -1}')
        assert elsewhere.share("p") == "70"


def test_run_plans_for_a_triton_whose_repository_is_elsewhere(elsewhere: Elsewhere, tmp_path: Path) -> None:
    workload, profiles = tmp_path / "workload.yaml", tmp_path / "profiles.json"
    workload.write_text("models: [{name: q, slo_ms: 500, rate_per_s: 5}]")
    points = [
        {"gpu_percent": share, "batch_size": rows, "latency_ms_p50": (1 + rows) * 100 / share,
         "latency_ms_p99": (1 + rows) * 110 / share, "samples": 100}
        for share in (25, 50, 100) for rows in (1, 4, 8)
    ]  # fmt: skip
    device = {"name": "a CPU", "sms": 2, "memory_bytes": 1 << 34, "driver": "none", "runtime": "test"}
    model = {"sha256": "", "memory_bytes": 1 << 20, "points": points}
    profiles.write_text(json.dumps({"version": 1, "gpu": device, "models": {"q": model}}))
    command = ["run", "--workload", workload, "--push", "--once", "--json",
               "--url", elsewhere.server.grpc_url, "--state", elsewhere.state]  # fmt: skip
    status, out, err = dstackctl(*command, "--profiles", profiles)
    assert status == 0, err
    assert float(elsewhere.share("q")) == json.loads(out)["plan"]["models"]["q"]["gpu_percent"]
