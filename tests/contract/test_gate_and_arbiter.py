"""The backend's executor and gate against a real arbiter process that is killed, stopped and restarted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dstack_backend import wire
from dstack_backend.errors import RejectedError, RequestError
from dstack_backend.executor import Executor
from dstack_backend.gate import ArbiterGate
from dstack_backend.pipeline import Pipeline
from dstack_backend.staging import Staging
from dstack_backend.stats import Stats
from dstack_sched.domain.event import PlanChanged
from dstack_sched.domain.json_form import gpus_to_json
from dstack_sched.domain.workload import OnLate
from fakes.arbiter_bench import PATIENCE_S, ArbiterProcess, model_plan
from fakes.backend import FakeDevice, FakeRequest

BATCH = 4
RUN_S = 0.002
GPU_PERCENT = 60.0  # two of them do not fit into 100


class Request(FakeRequest):
    """One row; `answers` counts how often it was answered or failed: once, whatever happens."""

    def __init__(self, settled: threading.Semaphore) -> None:
        super().__init__()
        self.release = settled
        self.answers: list[str] = []

    def answer(self, outputs: Mapping[str, np.ndarray]) -> None:
        self.answers.append("answered")
        self.release.release()

    def fail(self, error: RequestError) -> None:
        self.answers.append(str(error))
        self.release.release()


class Device:
    """Counts how many batches run at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = self.most = 0

    def run(self) -> None:
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(RUN_S)
        with self.lock:
            self.running -= 1


def slow(stage: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """So that batches end while the next one is being made."""

    def staged(feeds: Any) -> Any:
        time.sleep(RUN_S)
        return stage(feeds)

    return staged


class Instance:
    """A model instance in this process, with a client that keeps a few requests waiting. bursts: one that
    sends some at once and nothing more until all are answered."""

    def __init__(self, model: str, path: Path, device: Device, *, bursts: bool = False) -> None:
        self.stats = Stats()
        join = wire.Join(model, f"{model}_0", 1, 0, GPU_PERCENT, BATCH, BATCH, 100_000, False)
        gate = ArbiterGate(path, join, stats=self.stats)
        fake = FakeDevice(on_run=device.run)
        if bursts:
            fake.stage = slow(fake.stage)  # type: ignore[method-assign]
        self.executor = Executor(
            Pipeline(fake, Staging(BATCH)),
            gate,
            batched=True,
            batch_size=BATCH,
            slo_us=100_000,
            stats=self.stats,
        )
        self.requests: list[Request] = []
        self._stop = threading.Event()
        submit = self._submit_bursts if bursts else self._submit
        self._client = threading.Thread(target=submit, name=f"client-{model}")
        self.executor.start()
        self._client.start()

    def _submit(self) -> None:
        settled = threading.Semaphore(2 * BATCH)
        while not self._stop.is_set():
            assert settled.acquire(timeout=PATIENCE_S), "a request was never answered"
            request = Request(settled)
            self.requests.append(request)
            self.executor.submit([request])

    def _submit_bursts(self) -> None:
        rng, settled = np.random.default_rng(1), threading.Semaphore(0)
        while not self._stop.is_set():
            burst = [Request(settled) for _ in range(rng.integers(1, 4 * BATCH))]
            self.requests += burst
            for request in burst:
                self.executor.submit([request])
            for _ in burst:
                assert settled.acquire(timeout=PATIENCE_S), "a request was never answered"

    def close(self) -> None:
        self._stop.set()
        self._client.join(PATIENCE_S)
        self.executor.close()
        assert all(request.answers == ["answered"] for request in self.requests)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "private" / "arbiter.sock"


@pytest.fixture
def start(path: Path, tmp_path: Path) -> Iterator[Callable[[], ArbiterProcess]]:
    started: list[ArbiterProcess] = []

    def one() -> ArbiterProcess:
        started.append(ArbiterProcess(path, tmp_path / "log"))
        return started[-1]

    yield one
    for process in started:
        process.end(signal.SIGKILL)


@pytest.fixture(params=[False])
def instances(
    path: Path, start: Callable[[], ArbiterProcess], request: pytest.FixtureRequest
) -> Iterator[tuple[ArbiterProcess, list[Instance], Device]]:
    """Two instances that cannot run side by side, gated by a planned arbiter. Parameter: bursts."""
    arbiter, device = start(), Device()
    plan = PlanChanged(
        100.0, tuple(model_plan(m, gpu_percent=GPU_PERCENT, latency_ms=2.0) for m in ("a", "b"))
    )
    arbiter.client.request("plan", gpus=gpus_to_json({0: plan}))
    both = [Instance(model, path, device, bursts=request.param) for model in ("a", "b")]
    yield arbiter, both, device
    for instance in both:
        instance.close()


def wait_until(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def progress(instances: list[Instance], what: str, by: int = 20) -> None:
    """Wait until each instance's counter has grown."""
    before = [getattr(instance.stats, what) for instance in instances]
    wait_until(lambda: all(getattr(i.stats, what) >= n + by for i, n in zip(instances, before, strict=True)))


def most_at_once(arbiter: ArbiterProcess, both: list[Instance], device: Device, grants: int) -> int:
    """The most batches at once over a stretch in which both were gated and no lease ran out. On a machine
    with no time for 0.1 s, a living arbiter is rightly done without and a living batch given up."""

    def disturbances() -> list[int]:
        models = arbiter.client.request("status")["models"]
        ungated = [each.stats.ungated_batches for each in both]
        return ungated + [counters["leases_ended"] for counters in models.values()]

    for _ in range(20):
        before = disturbances()
        with device.lock:
            device.most = 0
        progress(both, "grants", by=grants)
        if before == disturbances():
            return device.most
    raise AssertionError("never undisturbed for long enough")


def test_gated_instances_that_do_not_fit_never_run_side_by_side(instances) -> None:
    arbiter, both, device = instances
    progress(both, "grants", by=2)
    assert most_at_once(arbiter, both, device, grants=100) == 1


@pytest.mark.parametrize("instances", [True], indirect=True)
def test_the_last_requests_of_a_burst_are_answered(instances) -> None:
    """Nothing comes behind them that would tell the arbiter once more of what waits."""
    _, both, _ = instances
    progress(both, "requests", by=1000)


def test_a_request_that_gets_late_between_two_batches_is_answered(start, path: Path) -> None:
    """Of two rows, one a batch: the first is in time, the second cannot be. Nothing comes behind it."""
    arbiter, run_ms = start(), 60.0
    late = replace(model_plan("a", latency_ms=run_ms), batch_size=1, on_late=OnLate.REJECT)
    arbiter.client.request("plan", gpus=gpus_to_json({0: PlanChanged(100.0, (late,))}))
    stats, fake = Stats(), FakeDevice(on_run=lambda: time.sleep(run_ms / 1e3))
    gate = ArbiterGate(path, wire.Join("a", "a_0", 1, 0, 40.0, 1, 1, 100_000, True), stats=stats)
    executor = Executor(
        Pipeline(fake, Staging(1)), gate, batched=True, batch_size=1, slo_us=100_000, reject_late=True,
        stats=stats,
    )  # fmt: skip
    executor.start()
    try:
        wait_until(lambda: stats.gated == 1)
        for _ in range(3):
            request = FakeRequest([1.0, 2.0])
            executor.submit([request])
            request.wait()
            # Served, where the arbiter had no time to say otherwise.
            assert request.times_settled == 1 and isinstance(request.error, RejectedError | None)
        assert all(len(batch) == 1 for batch in fake.batches), "first rows, where the order came behind them"
    finally:
        executor.close()
    orders = arbiter.client.request("status")["models"]["a"]["shed_orders"]
    assert 1 <= orders <= 3 * 2, "told once a request, or twice where something came between"


def test_killed_arbiter_is_done_without_and_used_again(instances, start) -> None:
    arbiter, both, device = instances
    progress(both, "grants")
    arbiter.end(signal.SIGKILL)
    progress(both, "ungated_batches")
    second = start()
    progress(both, "grants")
    assert most_at_once(second, both, device, grants=50) == 1, "shares are kept again"
    status = second.client.request("status")
    assert sorted(backend["model"] for backend in status["backends"]) == ["a", "b"]
    assert status["gpus"]["0"]["planned_models"] == ["a", "b"]


def test_stopped_arbiter_stalls_nobody_and_is_used_again(instances) -> None:
    arbiter, both, device = instances
    progress(both, "grants")
    arbiter.popen.send_signal(signal.SIGSTOP)
    progress(both, "ungated_batches", by=100)
    arbiter.popen.send_signal(signal.SIGCONT)
    progress(both, "grants")
    assert most_at_once(arbiter, both, device, grants=50) == 1, "shares are kept again"
    assert len(arbiter.client.request("status")["backends"]) == 2


def test_arbiter_restarted_again_and_again(instances, start) -> None:
    arbiter, both, _ = instances
    for how in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        progress(both, "grants")
        arbiter.end(how)
        arbiter = start()
    progress(both, "grants")
    assert len(arbiter.client.request("status")["backends"]) == 2
