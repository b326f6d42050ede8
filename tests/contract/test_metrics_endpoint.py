"""The real endpoints, scraped over HTTP and read by Prometheus' own parser: what they serve is what the table
says, and it adds up."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dstack_backend import wire
from dstack_sched.adapters.arbiter_client import SocketArbiterClient
from dstack_sched.adapters.controller_board import FileStatusBoard
from dstack_sched.adapters.prometheus import MetricsEndpoint, PrometheusMetrics
from dstack_sched.app.telemetry import ControllerTelemetry, ModelLook
from dstack_sched.cli.endpoint import EndpointOptions, serve_arbiter_metrics
from dstack_sched.domain import metrics as table
from dstack_sched.domain.json_form import gpus_to_json
from dstack_sched.engine.registry import POLICIES
from dstack_sched.errors import InputError, MachineError
from fakes.arbiter_bench import PATIENCE_S, Arbiter, Backend, arbiter, deadline_us, model_plan, plan_of, works
from fakes.scrape import scrape
from fakes.serving import FakeClock


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Arbiter]:
    with arbiter(tmp_path / "a.sock") as started:
        yield started


@pytest.fixture
def url(running: Arbiter) -> Iterator[str]:
    endpoint = serve_arbiter_metrics(running.path, EndpointOptions(0))
    yield endpoint.url
    endpoint.close()


def test_grants_and_rows_add_up(running: Arbiter, url: str) -> None:
    works(running.path, rounds=20, model="m")
    with Backend(running.path, "m") as backend:
        backend.send(wire.Work(8, deadline_us()))
        grant = backend.granted()
        backend.send(wire.Done(grant.grant_id, 5, 2, 1500, 3, deadline_us()))
        again = backend.granted()
        seen = scrape(url)
        backend.finish(again)
    seen.check(table.ARBITER)
    assert seen.value(table.ARBITER_UP) == 1
    assert seen.value(table.ARBITER_POLICY, policy="dstack") == 1
    assert seen.value(table.GRANTS, model="m") == 22
    assert seen.value(table.GRANTED_ROWS, model="m") == 21 * 8 + again.batch_size
    assert seen.value(table.ROWS, model="m") == 20 * 8 + 5
    assert seen.value(table.LATE_ROWS, model="m") == 2
    assert seen.value(table.RUN_TIME, model="m") == pytest.approx(20 * 0.0005 + 0.0015)
    assert seen.value(table.WAITING_ROWS, model="m") == 3
    assert seen.value(table.SESSIONS, state="running") == 1
    assert seen.value(table.GPU_GRANTED, gpu="0") == pytest.approx(again.gpu_percent / 100)
    waits = seen.buckets(table.GRANT_WAIT, model="m")
    counts = [count for _, count in waits]
    assert [le for le, _ in waits] == [*table.GRANT_WAIT.bounds, float("inf")]
    assert counts[-1] == 22 and counts == sorted(counts)
    assert seen.buckets(table.DECISION_TIME)[-1][1] >= 22


def test_plans_and_shares_are_ratios_and_seconds(running: Arbiter, url: str) -> None:
    client = SocketArbiterClient(running.path, timeout_s=PATIENCE_S)
    client.request("plan", gpus=gpus_to_json(plan_of(model_plan("m"), capacity_percent=200.0)))
    client.close()
    works(running.path, model="m")
    seen = scrape(url)
    assert seen.value(table.GPU_CAPACITY, gpu="0") == 2.0
    assert seen.value(table.PLAN_SHARE, gpu="0", model="m") == 0.4
    assert seen.value(table.PLAN_BATCH, gpu="0", model="m") == 8
    assert seen.value(table.PLAN_RUN, gpu="0", model="m") == pytest.approx(0.005)
    assert seen.value(table.PLAN_SLO, gpu="0", model="m") == pytest.approx(0.1)
    used, granted = seen.value(table.SHARE_TIME, model="m"), seen.value(table.GPU_SHARE_TIME, gpu="0")
    assert 0 < used == pytest.approx(granted)
    assert seen.value(table.SCORE, gpu="0", model="m") > 0


def test_everything_of_the_table_is_served(running: Arbiter, url: str) -> None:
    """A metric that is documented and never served is a dashboard with a hole."""
    client = SocketArbiterClient(running.path, timeout_s=PATIENCE_S)
    client.request("plan", gpus=gpus_to_json(plan_of(model_plan("m"))))
    client.close()
    works(running.path, model="m")
    with Backend(running.path, "m"):
        give_up = time.monotonic() + PATIENCE_S
        while (seen := scrape(url)).names() != {metric.name for metric in table.ARBITER}:
            assert time.monotonic() < give_up, {m.name for m in table.ARBITER} - seen.names()


def test_an_arbiter_that_is_gone_is_down_and_not_an_error(tmp_path: Path) -> None:
    endpoint = serve_arbiter_metrics(tmp_path / "none.sock", EndpointOptions(0))
    try:
        seen = scrape(endpoint.url)
        assert seen.names() == {"dstack_arbiter_up"} and seen.value(table.ARBITER_UP) == 0
        with arbiter(tmp_path / "none.sock"):
            assert scrape(endpoint.url).value(table.ARBITER_UP) == 1
        assert scrape(endpoint.url).value(table.ARBITER_UP) == 0
    finally:
        endpoint.close()


def test_scrapes_at_the_same_time_do_not_mix(running: Arbiter, url: str) -> None:
    """Two Prometheus servers, one line to the arbiter."""
    seen: list[float] = []

    def often() -> None:
        seen.extend(scrape(url).value(table.ARBITER_UP) for _ in range(10))

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert seen == [1.0] * 40


def test_the_controller_s_metrics(tmp_path: Path) -> None:
    metrics = PrometheusMetrics(table.CONTROLLER + table.HEALTH)
    told = ControllerTelemetry(metrics, FileStatusBoard(tmp_path), FakeClock())
    told.looked({"m": ModelLook(measured_per_s=5.0)})
    endpoint = MetricsEndpoint(metrics.registry, 0)
    try:
        seen = scrape(endpoint.url)
    finally:
        endpoint.close()
    seen.check(table.CONTROLLER + table.HEALTH)
    assert seen.names() == {metric.name for metric in table.CONTROLLER + table.HEALTH}
    assert seen.value(table.ARRIVALS, model="m", kind="measured") == 5.0
    with pytest.raises(OSError):
        urllib.request.urlopen(endpoint.url, timeout=5)


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=f"metrics at 127.0.0.1:{port}: Address already in use; "):
            MetricsEndpoint(PrometheusMetrics(()).registry, port)
    with pytest.raises(InputError, match="--metrics-port 99999"):
        EndpointOptions(99999)


class Process:
    """`dstackctl arbiter` with an endpoint; `url` as its log says it."""

    def __init__(self, tmp_path: Path, *options: str) -> None:
        self.socket, self.log = tmp_path / "a.sock", tmp_path / "log"
        command = [sys.executable, "-m", "dstack_sched", "arbiter", "--socket", str(self.socket)]
        with self.log.open("wb") as stderr:
            self.popen = subprocess.Popen(
                [*command, "--metrics-port", "0", "--log-format", "json", *options], stderr=stderr
            )
        give_up = time.monotonic() + PATIENCE_S
        while not (found := re.search(r"metrics at (http\S+?)\"", self.log.read_text())):
            assert self.popen.poll() is None and time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.02)
        self.url = found[1]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_the_endpoint_of_the_arbiter_goes_with_it(tmp_path: Path, how: signal.Signals) -> None:
    process = Process(tmp_path)
    assert scrape(process.url).value(table.ARBITER_UP) == 1
    (exporter,) = psutil.Process(process.popen.pid).children()
    process.popen.send_signal(how)
    process.popen.wait(PATIENCE_S)
    exporter.wait(PATIENCE_S)
    lines = [json.loads(line) for line in process.log.read_text().splitlines()]
    assert all(line["part"] == "arbiter" for line in lines)


def test_the_arbiter_outlives_its_endpoint(tmp_path: Path) -> None:
    process = Process(tmp_path)
    try:
        (exporter,) = psutil.Process(process.popen.pid).children()
        os.kill(exporter.pid, signal.SIGKILL)
        works(process.socket)
    finally:
        process.popen.kill()
        process.popen.wait(PATIENCE_S)


def test_an_arbiter_whose_port_is_taken_does_not_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = subprocess.run(
            [sys.executable, "-m", "dstack_sched", "arbiter", "--socket", str(tmp_path / "a.sock"),
             "--metrics-port", port],
            capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert f"dstackctl: metrics at 127.0.0.1:{port}: Address already in use" in run.stderr
    assert not (tmp_path / "a.sock").exists()


def policy(socket_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dstack_sched", "arbiter", "policy", *arguments]
    return subprocess.run(
        [*command, "--socket", str(socket_path)], capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_the_policy_changes_live_by_command(running: Arbiter, url: str) -> None:
    with Backend(running.path, "m") as backend:
        backend.send(wire.Work(8, deadline_us()))
        grant = backend.granted()
        assert policy(running.path, "temporal").stdout == "dstack -> temporal\n"
        backend.finish(grant, waiting=8, deadline_us=deadline_us())
        backend.finish(backend.granted())
        assert scrape(url).value(table.ARBITER_POLICY, policy="temporal") == 1
    assert policy(running.path).stdout == f"temporal; choose from {', '.join(POLICIES)}\n"
    assert json.loads(policy(running.path, "dstack", "--json").stdout)["before"] == "temporal"
    refused = policy(running.path, "fastest")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "policy 'fastest' is unknown; choose one of dstack" in refused.stderr
    absent = policy(running.path.with_name("none.sock"), "dstack")
    assert absent.returncode == 2 and "no arbiter answers" in absent.stderr
