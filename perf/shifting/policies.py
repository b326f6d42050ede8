"""Who plans: once for the mean rates, the control loop, or a control loop that knows the rates.

All three start from the plan for the mean rates, with the same profiles, on a server started afresh.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dstack_backend.endpoint import SOCKET_VARIABLE
from dstack_sched.adapters.triton_client import TritonClient
from dstack_sched.app.control_loop import ControlLoop, Round
from dstack_sched.app.forecast import Forecast
from dstack_sched.app.planning import CONTROL_OPTIONS
from dstack_sched.app.profiling import ProfilingOptions
from dstack_sched.app.replan import ReplanSettings
from dstack_sched.app.telemetry import NoMetrics
from dstack_sched.app.watcher import Look, ModelView, Watcher
from dstack_sched.cli.deployment import Deployment
from dstack_sched.cli.host import Host
from dstack_sched.cli.run import live_loop
from dstack_sched.domain.workload import Workload
from shifting.scenario import Script

PROFILING = ProfilingOptions(target_error=0.05, time_budget_s=40.0)
READY_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0


def planning_loop(deployment: Deployment, wanted: Workload) -> ControlLoop:
    """The control loop of `dstackctl run`, for its first plan."""
    return live_loop(deployment, lambda: wanted, NoMetrics(), PROFILING, CONTROL_OPTIONS)


@contextlib.contextmanager
def static(host: Host, deployment: Deployment, script: Script) -> Iterator[threading.Event]:
    """Plan once; the event is set when load may start."""
    planning_loop(deployment, script.workload(script.mean_rates())).once()
    ready = threading.Event()
    ready.set()
    yield ready


@contextlib.contextmanager
def adaptive(host: Host, deployment: Deployment, script: Script) -> Iterator[threading.Event]:
    """`dstackctl run` as an operator starts it, with its defaults."""
    path = deployment.state / "workload.yaml"
    path.write_text(yaml.safe_dump(workload_document(script.workload(script.mean_rates()))))
    command = [
        sys.executable, "-m", "dstack_sched", "run", str(deployment.repository.root), "--workload", str(path),
        "--url", host.triton.grpc_url, "--triton-metrics", host.triton.metrics_url,
        "--socket", str(host.socket), "--state", str(deployment.state),
    ]  # fmt: skip
    with (deployment.state / "run.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, SOCKET_VARIABLE: str(host.socket)}
        )
        try:
            wait_for_plan(deployment.state / "run.log", process)
            ready = threading.Event()
            ready.set()
            yield ready
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for_plan(log: Path, process: subprocess.Popen[bytes]) -> None:
    """Until `run` says that it watches. Errors: RuntimeError with what it said where it ends."""
    until_s = time.monotonic() + READY_LIMIT_S
    while b"watching the rates" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > until_s:
            raise RuntimeError(f"dstackctl run did not get to watching: {log.read_text()[-2000:]}")
        time.sleep(0.1)


def workload_document(workload: Workload) -> dict:
    """workload.yaml."""
    models = [
        {"name": m.name, "slo_ms": m.slo_ms, "rate_per_s": round(m.rate_per_s, 3), "on_late": m.on_late.value}
        for m in workload.models
    ]
    return {"models": models}


class Oracle(Watcher):
    """Looks of a controller that knows the mean rates of each minute, and plans at the marks."""

    def __init__(self, script: Script, *parts: Any) -> None:
        super().__init__(*parts)
        self._script = script
        self._begin_s: float | None = None

    def begin(self) -> None:
        """The load starts now."""
        self._begin_s = time.monotonic()

    def look(self) -> Look:
        """The rates of the minute that runs now, as forecasts without a doubt."""
        minute = 0
        if self._begin_s is not None:
            passed_s = time.monotonic() - self._begin_s
            minute = min(int(passed_s / self._script.minute_s), self._script.minutes - 1)
        rates = self._script.minute_rates(minute)
        views = {
            name: ModelView(forecast=Forecast(rate, rate, 1.0, self._script.minute_s, 0.0))
            for name, rate in rates.items()
        }
        return Look(views)


@contextlib.contextmanager
def oracle(host: Host, deployment: Deployment, script: Script) -> Iterator[threading.Event]:
    """The same loop, its forecasts replaced by what will come: it plans at the minute marks and waits for no
    measurement. Its loads must pay over the minute, as the adaptive one's must."""
    ready, stop = threading.Event(), threading.Event()
    wanted = script.workload(script.mean_rates())
    knows: list[Oracle] = []

    def make(*parts: Any) -> Oracle:
        knows.append(Oracle(script, *parts))
        return knows[-1]

    with TritonClient(host.triton.grpc_url) as server:
        here = Deployment(deployment.repository, server, deployment.state, deployment.socket)
        at_once = ReplanSettings(cooldown_s=0.0)
        loop = live_loop(
            here,
            lambda: wanted,
            NoMetrics(),
            PROFILING,
            CONTROL_OPTIONS,
            settings=at_once,
            make_watcher=make,
        )
        first = loop.once()
        thread = threading.Thread(target=follow, args=(loop, first, knows[0], ready, stop), daemon=True)
        thread.start()
        try:
            yield ready
        finally:
            stop.set()
            thread.join(STOP_LIMIT_S)


def follow(
    loop: ControlLoop, first: Round, knows: Oracle, ready: threading.Event, stop: threading.Event
) -> None:
    """Watch, four times a second, from when the load starts."""
    ready.wait()
    knows.begin()
    loop.watch(first, 0.25, lambda: not stop.is_set())


POLICIES = {"static": static, "adaptive": adaptive, "oracle": oracle}
