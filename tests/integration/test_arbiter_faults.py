"""Real Triton, three models under load: an arbiter or a stub that dies or hangs costs the others nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.adapters.triton_process import TritonProcess
from dstack_sched.cli.timeline import save_timelines
from dstack_sched.domain.event import EngineModel, PlanChanged
from dstack_sched.domain.json_form import CPU_INDEX, gpus_to_json
from dstack_sched.domain.workload import OnLate
from fakes.arbiter_bench import ArbiterProcess
from fakes.load import Load, all_grow, wait_until
from fakes.onnx_models import SlowSum, add_model

MODELS = ("alpha", "beta", "gamma")
CLIENTS_A_MODEL = 3
SLO_MS = 250.0


@pytest.fixture
def start_arbiter(tmp_path: Path) -> Iterator[Callable[[], ArbiterProcess]]:
    started: list[ArbiterProcess] = []

    def start() -> ArbiterProcess:
        started.append(ArbiterProcess(tmp_path / "private" / "arbiter.sock", tmp_path / "arbiter.log"))
        return started[-1]

    yield start
    for process in started:
        process.end(signal.SIGKILL)


@pytest.fixture
def served(
    triton, start_arbiter, tmp_path: Path
) -> Iterator[tuple[TritonProcess, ArbiterProcess, Path, Load]]:
    """Three models on Triton, planned for, gated by an arbiter, and under load."""
    socket = tmp_path / "private" / "arbiter.sock"
    arbiter = start_arbiter()
    models = {name: SlowSum(name, seed=i) for i, name in enumerate(MODELS)}
    for model in models.values():
        add_model(tmp_path / "repository", model, gpu_percent=50, slo_ms=SLO_MS)
    rows = tuple(
        EngineModel(
            name, 50.0, 8, int(SLO_MS * 1000), 1.0, OnLate.SERVE, 50.0, (50.0,), (1, 8), ((4.0, 12.0),)
        )
        for name in MODELS
    )
    arbiter.client.request("plan", gpus=gpus_to_json({CPU_INDEX: PlanChanged(100.0, rows)}))
    arbiter.client.close()
    quick_end = ["--exit-timeout-secs=4"]  # a dead stub holds requests that never end
    server = triton(
        tmp_path / "repository", load=MODELS, env={SOCKET_VARIABLE: str(socket)}, extra_args=quick_end
    )
    load = Load(server.grpc_url, models, clients=CLIENTS_A_MODEL)
    try:
        yield server, arbiter, socket, load
    finally:
        load.stop()


def grants(socket: Path) -> dict[str, int]:
    """Grants ended with rows by model, as the arbiter counts them; zeros where it does not answer."""
    client = SocketArbiterClient(socket)
    try:
        models = client.request("status")["models"]
    finally:
        client.close()
    return {name: models.get(name, {}).get("rows", 0) for name in MODELS}


def test_arbiter_that_dies_or_hangs_loses_no_request_and_is_used_again(
    served, start_arbiter, tmp_path: Path
) -> None:
    _, arbiter, socket, load = served
    wait_until("all models run by grants", all_grow(lambda: grants(socket)))

    arbiter.end(signal.SIGKILL)
    wait_until("all models answer without an arbiter", all_grow(load.counts))
    arbiter = start_arbiter()
    wait_until("the arbiter that came back is used", all_grow(lambda: grants(socket)))

    arbiter.popen.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until("all models answer beside a stopped arbiter", all_grow(load.counts), within_s=3.0)
    wait_until("three seconds of it", lambda: time.monotonic() - stopped > 3.0)
    arbiter.popen.send_signal(signal.SIGCONT)
    wait_until("the arbiter that went on is used", all_grow(lambda: grants(socket)))

    assert arbiter.end(signal.SIGTERM) == 0
    arbiter = start_arbiter()
    wait_until("the restarted arbiter is used", all_grow(lambda: grants(socket)))
    ((chart, said),) = save_timelines(arbiter.client, tmp_path / "last.html", last_s=5.0)
    assert said.startswith("CPU: ") and all(name in chart.read_text() for name in MODELS)

    load.stop()
    assert load.failed() == []
    status = arbiter.client.request("status")
    assert len(status["backends"]) == len(MODELS), "every instance is joined once"
    assert status["gpus"]["-1"]["planned_models"] == list(MODELS), "the plan survived two restarts"
    wait_until("no share is held", lambda: idle(arbiter.client))
    arbiter.end(signal.SIGTERM)


def states(client: SocketArbiterClient) -> dict[str, int]:
    """Backends by state: idle, waiting, running, hung."""
    return client.request("status")["backend_states"]


def suspend_busy(stub: psutil.Process, model: str, client: SocketArbiterClient) -> bool:
    """Stop the stub; let it go again and say False where it held no grant at that moment."""
    stub.suspend()
    time.sleep(0.1)  # what it had sent before is with the arbiter then
    if any(each["model"] == model and each["outstanding"] for each in client.request("status")["backends"]):
        return True
    stub.resume()
    return False


def idle(client: SocketArbiterClient) -> bool:
    return client.request("status")["gpus"]["-1"]["granted_percent"] == 0


def stub_of(server: TritonProcess, model: str) -> psutil.Process:
    """The model instance's own process."""
    found = [
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if "stub" in process.name()
        and any(
            f"/{model}/" in part or part.endswith(f"/{model}") or part.startswith(model)
            for part in process.cmdline()
        )
    ]
    assert len(found) == 1, [p.cmdline() for p in psutil.Process(server.pid).children(recursive=True)]
    return found[0]


def test_stub_that_hangs_or_dies_takes_only_what_it_ran(served, tmp_path: Path) -> None:
    server, arbiter, socket, load = served
    others = [name for name in MODELS if name != "beta"]
    wait_until("all models run by grants", all_grow(lambda: grants(socket)))

    hung = stub_of(server, "gamma")
    wait_until("gamma stops in the middle of a grant", lambda: suspend_busy(hung, "gamma", arbiter.client))
    wait_until("its lease ends", lambda: states(arbiter.client)["hung"] == 1)
    wait_until("the others run by grants", all_grow(lambda: grants(socket), by=20, names=MODELS[:2]))
    assert states(arbiter.client)["hung"] == 1
    hung.resume()
    wait_until("the hung one is used again", all_grow(lambda: grants(socket)))
    assert load.failed() == []

    os.kill(stub_of(server, "beta").pid, signal.SIGKILL)
    wait_until(
        "the arbiter forgets the dead instance",
        lambda: {b["model"] for b in arbiter.client.request("status")["backends"]} == set(others),
    )
    wait_until("the others go on by grants", all_grow(lambda: grants(socket), by=20, names=others))
    assert load.failed(*others) == []

    # Triton loads again where a file of the version is newer; a newer config of equal content is not enough.
    (tmp_path / "repository" / "beta" / "1" / "model.onnx").touch()
    with TritonClient(server.grpc_url) as client:
        client.load("beta")
    failed_before = len(load.failed("beta"))
    wait_until("beta answers again", all_grow(load.counts, names=["beta"]))
    wait_until("beta runs by grants again", all_grow(lambda: grants(socket), names=["beta"]))
    load.stop()
    assert load.failed(*others) == []
    inside = len(load.failed("beta")) - failed_before  # those that the dead stub held, one a client at most
    assert inside <= CLIENTS_A_MODEL, load.failed("beta")
    arbiter.end(signal.SIGTERM)
