"""A device that breaks under an instance: errors, never a wrong answer; no more grants; the process ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from dstack_backend.device_watch import DeviceWatch
from dstack_backend.errors import DeviceLostError, RequestError
from dstack_backend.executor import Executor
from dstack_backend.pipeline import Pipeline
from dstack_backend.staging import Staging
from fakes.backend import PATIENCE_S, FakeDevice, FakeRequest, ManualGate

BREAKS = 99  # FakeDevice loses its device at a batch that begins with this


class Rig:
    """An executor whose end sets `ended`."""

    def __init__(self, synchronous: bool) -> None:
        self.gate, self.device = ManualGate(), FakeDevice(synchronous)
        self.ends = 0
        self.ended = threading.Event()
        pipeline = Pipeline(self.device, Staging(4, self.device.allocate))
        self.executor = Executor(
            pipeline, self.gate, batched=True, batch_size=4, prefetch=64, on_lost=self._end
        )
        self.executor.start()

    def _end(self) -> None:
        self.ends += 1
        self.ended.set()

    def submit(self, *requests: FakeRequest) -> None:
        self.executor.submit(list(requests))


@pytest.fixture(params=[True, False], ids=["in launch", "in wait"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(request.param)
    yield rig
    rig.device.hold.set()
    rig.executor.close(0.1)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def assert_failed(*requests: FakeRequest) -> None:
    for request in requests:
        request.wait()
        assert isinstance(request.error, RequestError) and request.outputs is None, (
            "an error, never an answer"
        )
        assert request.times_settled == 1


def test_all_that_is_there_fails_and_the_process_ends_once(rig: Rig) -> None:
    """The batch in hand, the one behind it, what waits in the queue, and what comes later."""
    good = FakeRequest([1, 2, 3, 4])
    rig.submit(good)
    rig.gate.grant(4)
    assert np.array_equal(good.wait().outputs["y"], 2 * good.x)
    rig.device.hold.clear()
    doomed, behind, waiting = FakeRequest([BREAKS, 1, 1, 1]), FakeRequest([2, 2, 2, 2]), FakeRequest([3])
    rig.submit(doomed)
    rig.gate.grant(4)
    rig.device.wait_running()
    rig.submit(behind)
    rig.gate.grant(4)
    rig.submit(waiting)
    rig.device.hold.set()
    assert_failed(doomed, waiting)
    behind.wait()
    assert behind.error is not None or np.array_equal(behind.outputs["y"], 2 * behind.x)
    assert rig.ended.wait(PATIENCE_S)
    later = FakeRequest([5])
    rig.submit(later)
    assert_failed(later)
    assert rig.ends == 1 and rig.gate.closed


def test_nothing_is_granted_any_more_even_while_answers_are_slow(rig: Rig) -> None:
    """Guards against a dead instance that holds its share of the GPU until its last answer is out."""
    slow, release = FakeRequest([BREAKS]), threading.Event()
    closed_before_answer: list[bool] = []

    def fail(error: RequestError) -> None:
        wait_for(lambda: rig.gate.closed or release.is_set())
        closed_before_answer.append(rig.gate.closed)
        FakeRequest.fail(slow, error)

    slow.fail = fail  # type: ignore[method-assign]
    rig.submit(slow)
    rig.gate.grant(4)
    assert rig.ended.wait(PATIENCE_S)
    release.set()
    slow.wait()
    assert closed_before_answer == [True]


def test_requests_that_race_with_the_loss_are_all_settled(rig: Rig) -> None:
    requests = [FakeRequest([BREAKS if number == 40 else 1.0]) for number in range(120)]

    def submit(part: list[FakeRequest]) -> None:
        for each in part:
            rig.submit(each)
            rig.gate.grant(1)

    threads = [threading.Thread(target=submit, args=(requests[start::3],)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    for request in requests:
        request.wait()
        right = request.outputs is not None and np.array_equal(request.outputs["y"], 2 * request.x)
        assert right or isinstance(request.error, RequestError)
        assert request.times_settled == 1
    assert requests[40].error is not None
    assert rig.ended.wait(PATIENCE_S) and rig.ends == 1


def test_an_idle_instance_notices_and_ends_before_a_request_comes(rig: Rig) -> None:
    watch = DeviceWatch(rig.device, rig.executor, rig.executor.stats, every_s=0.01)  # type: ignore[arg-type]
    watch.start()
    wait_for(lambda: rig.device.checks > 2)
    assert not rig.ended.is_set()
    rig.device.lost = True
    assert rig.ended.wait(PATIENCE_S)
    late = FakeRequest([1])
    rig.submit(late)
    assert_failed(late)
    assert rig.device.batches == [], "nothing ran on it"
    watch.stop()


def test_a_watch_that_is_stopped_asks_no_more(rig: Rig) -> None:
    watch = DeviceWatch(rig.device, rig.executor, rig.executor.stats, every_s=0.01)  # type: ignore[arg-type]
    watch.start()
    watch.stop()
    rig.device.lost, asked = True, rig.device.checks
    time.sleep(0.05)
    assert rig.device.checks == asked and not rig.ended.is_set()


def test_losing_twice_is_losing_once(rig: Rig) -> None:
    for _ in range(3):
        rig.executor.lose(DeviceLostError("gone"))
    assert rig.ended.wait(PATIENCE_S)
    time.sleep(0.05)
    assert rig.ends == 1
