"""The executor with a gate and a device in the test's hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from dstack_backend.answers import CANCEL_CHECK_AFTER_US
from dstack_backend.errors import CancelledError, DeviceLostError, RejectedError, RunError
from dstack_backend.executor import CROWD_US, HEELS_US, LOOK_EVERY, SHORT_RUN_US, Executor
from dstack_backend.interfaces import Permit
from dstack_backend.pipeline import Pipeline
from dstack_backend.staging import Staging
from dstack_backend.stats import STAGES
from dstack_backend.tensors import DeviceArray, TensorSpec
from fakes.backend import PATIENCE_S, FakeDevice, FakeRequest, ManualGate


class Rig:
    """An executor with fakes around it, and a clock that the test advances."""

    def __init__(self) -> None:
        self.gate, self.device = ManualGate(), FakeDevice()
        self.now_us = 1_000_000
        self.executor: Executor | None = None

    def start(self, synchronous: bool = True, **options) -> Executor:
        self.device.synchronous = synchronous
        settings = {"batched": True, "batch_size": 4, "prefetch": 64, **options}
        pipeline = Pipeline(self.device, Staging(4, self.device.allocate))
        self.executor = Executor(pipeline, self.gate, clock_us=lambda: self.now_us, **settings)
        self.executor.start()
        return self.executor


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.device.hold.set()
    if rig.executor:
        rig.executor.close(0.1)
    assert rig.device.open == 0, "device memory of a batch was never given back"


def doubled(*requests: FakeRequest) -> bool:
    return all(np.array_equal(request.wait().outputs["y"], 2 * request.x) for request in requests)


def test_nothing_runs_without_a_grant(rig: Rig) -> None:
    executor = rig.start()
    executor.submit([FakeRequest(1)])
    assert executor.state()[0] == 1
    assert rig.gate.worked == 1
    assert rig.device.batches == []


def test_a_batch_is_made_when_the_grant_comes(rig: Rig) -> None:
    """What arrived between the request for a grant and the grant is in the batch."""
    executor = rig.start()
    first, second = FakeRequest(1), FakeRequest([2, 3])
    executor.submit([first])
    executor.submit([second])
    rig.gate.grant(4)
    assert doubled(first, second)
    assert [batch.ravel().tolist() for batch in rig.device.batches] == [[1, 2, 3]]
    assert rig.gate.wait_done(1) == [3]


def test_a_chained_batch_is_not_made_before_its_turn_unless_it_is_full(rig: Rig) -> None:
    executor = rig.start()
    rig.device.hold.clear()
    requests = [FakeRequest(number) for number in range(1, 5)]
    executor.submit(requests[:1])
    rig.gate.grant(1)
    rig.device.wait_running()
    executor.submit(requests[1:2])
    rig.gate.grant(4)
    executor.submit(requests[2:])
    assert executor.state()[0] == 3  # still in the queue: the batch is not full and the device not free
    rig.device.hold.set()
    assert doubled(*requests)
    assert [len(batch) for batch in rig.device.batches] == [1, 3]


def test_a_full_chained_batch_is_gathered_while_another_runs(rig: Rig) -> None:
    executor = rig.start()
    rig.device.hold.clear()
    executor.submit([FakeRequest(1)])
    rig.gate.grant(1)
    rig.device.wait_running()
    rest = [FakeRequest(number) for number in (2, 3)]
    executor.submit(rest)
    rig.gate.grant(2)
    give_up = threading.Event()
    while executor.state()[0] and not give_up.wait(0.005):
        pass
    assert len(rig.device.batches) == 1  # gathered, not run
    rig.device.hold.set()
    assert doubled(*rest)


def test_runs_are_in_the_order_of_grants(rig: Rig) -> None:
    executor = rig.start()
    requests = [FakeRequest(number) for number in range(20, 60)]
    for request in requests:
        executor.submit([request])
        rig.gate.grant(1)
    assert doubled(*requests)
    assert [int(batch[0, 0]) for batch in rig.device.batches] == list(range(20, 60))


def test_done_comes_before_the_answer(rig: Rig) -> None:
    """The device must not idle while clients are answered."""
    executor = rig.start()
    request = FakeRequest(1)
    told_first = []
    request.answer = lambda outputs: (told_first.append(len(rig.gate.finished)), request.settled.set())
    executor.submit([request])
    rig.gate.grant(1)
    request.wait()
    assert told_first == [1]


def test_submit_blocks_while_enough_waits(rig: Rig) -> None:
    """The backlog must stay in Triton's queue."""
    executor = rig.start(prefetch=1)
    returned = threading.Event()
    requests = [FakeRequest(number) for number in range(1, 6)]

    def hand_over() -> None:
        executor.submit(requests)
        returned.set()

    thread = threading.Thread(target=hand_over)
    thread.start()
    assert not returned.wait(0.1)
    rig.gate.grant(4)
    assert returned.wait(PATIENCE_S)
    thread.join()
    assert executor.state()[0] == 1


def test_earliest_deadline_first_over_arrival(rig: Rig) -> None:
    executor = rig.start(slo_us=500_000)
    slow, quick = FakeRequest(1), FakeRequest(2, budget_us=1000)
    executor.submit([slow, quick])
    assert executor.state() == (2, rig.now_us + 1000)
    rig.gate.grant(1)
    quick.wait()
    assert not slow.settled.is_set()


def test_a_failing_batch_fails_its_own_requests_only(rig: Rig) -> None:
    executor = rig.start()
    bad, good = FakeRequest(13), FakeRequest(1)
    executor.submit([bad, good])
    rig.gate.grant(1)
    rig.gate.grant(1)
    assert isinstance(bad.wait().error, RunError)
    assert doubled(good)
    assert rig.gate.wait_done(2) == [1, 1]
    assert executor.stats.failed == 1


def test_a_defect_answers_its_batch_and_the_executor_lives_on(rig: Rig) -> None:
    executor = rig.start()
    bad, good = FakeRequest(666), FakeRequest(1)
    executor.submit([bad])
    rig.gate.grant(4)
    assert "ZeroDivisionError" in str(bad.wait().error)
    executor.submit([good])
    rig.gate.grant(4)
    assert doubled(good)


def test_rows_that_do_not_follow_fail_the_batch(rig: Rig) -> None:
    executor = rig.start()
    request = FakeRequest([7, 8])
    executor.submit([request])
    rig.gate.grant(4)
    assert "max_batch_size: 0" in str(request.wait().error)


def test_a_large_request_runs_in_chunks_and_is_answered_once(rig: Rig) -> None:
    executor = rig.start()
    big = FakeRequest(np.arange(1.0, 11.0))
    executor.submit([big])
    for _ in range(3):
        rig.gate.grant(4)
    assert doubled(big)
    assert rig.gate.wait_done(3) == [4, 4, 2]
    assert big.times_settled == 1


def test_batches_are_no_larger_than_the_device_is_prepared_for(rig: Rig) -> None:
    rig.device.prepared_rows = 2
    executor = rig.start()
    requests = [FakeRequest(1), FakeRequest(2), FakeRequest([3, 4, 5])]
    executor.submit(requests)
    for _ in range(3):
        rig.gate.grant(4)
    assert doubled(*requests)
    assert [len(x) for x in rig.device.batches] == [2, 2, 1]
    rig.gate.at_hand = [permit()]
    large = FakeRequest([6, 7, 8])  # alone, and too large for Triton's thread to run at once
    executor.submit([large])
    rig.gate.grant(4)
    assert doubled(large)


def test_a_failed_chunk_drops_the_rest(rig: Rig) -> None:
    executor = rig.start()
    big = FakeRequest(np.array([13.0, 1, 1, 1, 2, 3]))
    executor.submit([big])
    rig.gate.grant(4)
    assert isinstance(big.wait().error, RunError)
    rig.gate.grant(4)
    assert rig.gate.wait_done(2) == [4, 0]
    assert executor.state()[0] == 0
    assert big.times_settled == 1


def test_cancelled_requests_are_answered_and_do_not_run(rig: Rig) -> None:
    executor = rig.start()
    gone, young, kept = FakeRequest(1, cancelled=True), FakeRequest(2, cancelled=True), FakeRequest(3)
    executor.submit([gone])
    rig.now_us += CANCEL_CHECK_AFTER_US + 1
    executor.submit([young, kept])  # too young to be worth asking
    rig.gate.grant(4)
    assert isinstance(gone.wait().error, CancelledError)
    assert doubled(young, kept)
    assert executor.stats.cancelled == 1


def test_late_requests_are_rejected_before_they_run_where_asked(rig: Rig) -> None:
    executor = rig.start(slo_us=10_000, reject_late=True)
    late = FakeRequest(1)
    executor.submit([late])
    rig.now_us += 20_000
    on_time = FakeRequest(2)
    executor.submit([on_time])
    rig.gate.grant(4)
    assert isinstance(late.wait().error, RejectedError)
    assert doubled(on_time)
    assert executor.stats.rejected == 1


def test_late_requests_are_served_and_counted_otherwise(rig: Rig) -> None:
    executor = rig.start(slo_us=10_000)
    late = FakeRequest([1, 2])
    executor.submit([late])
    rig.now_us += 20_000
    rig.gate.grant(4)
    assert doubled(late)
    assert rig.gate.finished[0][1:] == (2, 2)  # rows, and rows that were late
    assert executor.stats.late == 1


def test_shed_is_heeded(rig: Rig) -> None:
    executor = rig.start(slo_us=10_000)
    doomed, kept = FakeRequest(1), FakeRequest(2, budget_us=90_000)
    executor.submit([doomed, kept])
    executor.on_shed(rig.now_us + 50_000)
    assert isinstance(doomed.wait().error, RejectedError)
    assert executor.state()[0] == 1


def test_a_void_permit_gives_the_batch_back(rig: Rig) -> None:
    """A lease that ran out, or an ungated run after the arbiter came back."""
    executor = rig.start()
    request = FakeRequest(1)
    executor.submit([request])
    rig.gate.grant(4, void=True)
    assert rig.gate.wait_done(1) == [0]
    assert executor.state()[0] == 1
    rig.gate.grant(4)
    assert doubled(request)


def test_a_grant_with_nothing_to_run_is_answered(rig: Rig) -> None:
    rig.start()
    rig.gate.grant(4)
    assert rig.gate.wait_done(1) == [0]


def test_unreadable_requests_are_answered_and_the_others_served(rig: Rig) -> None:
    executor = rig.start()
    broken, good = FakeRequest([1, 2], others={"mask": np.ones((5, 1), np.float32)}), FakeRequest(1)
    executor.submit([broken, good])
    rig.gate.grant(4)
    assert "first (batch) dimension" in str(broken.wait().error)
    assert doubled(good)


def test_close_serves_what_was_accepted_then_refuses(rig: Rig) -> None:
    executor = rig.start()
    accepted = FakeRequest(1)
    executor.submit([accepted])
    closing = threading.Thread(target=executor.close, args=(PATIENCE_S,))
    closing.start()
    rig.gate.grant(4)
    assert doubled(accepted)
    closing.join(PATIENCE_S)
    assert rig.gate.closed
    refused = FakeRequest(2)
    executor.submit([refused])
    assert isinstance(refused.wait().error, RejectedError)


def test_close_does_not_wait_for_ever(rig: Rig) -> None:
    executor = rig.start()
    stranded = FakeRequest(1)
    executor.submit([stranded])
    executor.close(0.05)
    assert isinstance(stranded.wait().error, RejectedError)


def permit(batch_size: int = 4) -> Permit:
    return Permit(batch_size, 40.0, sm_groups=0b110)


def test_a_request_that_comes_alone_is_run_and_answered_by_tritons_thread(rig: Rig) -> None:
    executor = rig.start()
    rig.gate.at_hand = [permit()]
    request = FakeRequest([1, 2])
    executor.submit([request])
    assert request.times_settled == 1 and not request.deferred  # its answer can be returned
    assert doubled(request)
    assert rig.device.threads == {threading.get_ident()}
    assert [rows for _, rows, _ in rig.gate.finished] == [2]
    assert rig.gate.worked == 0
    assert (executor.stats.requests, executor.stats.returned, executor.stats.rows) == (1, 1, 2)


def test_outputs_of_a_kept_answer_stay_until_the_next_request(rig: Rig) -> None:
    """Triton reads them after execute() has returned."""
    executor = rig.start()
    rig.gate.at_hand = [permit(), permit()]
    executor.submit([FakeRequest(1)])
    assert rig.device.open == 1
    executor.submit([FakeRequest(2)])
    assert rig.device.open == 1


def test_several_requests_handed_over_together_are_one_batch(rig: Rig) -> None:
    executor = rig.start()
    rig.gate.at_hand = [permit()]
    requests = [FakeRequest(1), FakeRequest([2, 3])]
    executor.submit(requests)
    assert doubled(*requests)
    assert [len(batch) for batch in rig.device.batches] == [3]


@pytest.mark.parametrize("rows", [[1.0, 2.0, 3.0], [13.0]])
def test_what_does_not_fit_the_permit_or_comes_in_groups_takes_the_queue(rig: Rig, rows: list[float]) -> None:
    executor = rig.start()
    rig.gate.at_hand = [permit(2)]
    requests = [FakeRequest(rows), FakeRequest(np.ones((1, 7), np.float32))]
    executor.submit(requests)
    assert all(request.deferred for request in requests)
    for _ in range(3):
        rig.gate.grant(2)
    for request in requests:
        request.wait()


def test_a_void_permit_at_hand_puts_the_request_in_the_queue(rig: Rig) -> None:
    executor = rig.start()
    rig.gate.at_hand = [permit()]
    rig.gate.void = set(rig.gate.at_hand)
    request = FakeRequest(1)
    executor.submit([request])
    assert request.deferred and executor.state()[0] == 1 and rig.gate.worked == 1
    rig.gate.grant(4)
    assert doubled(request)
    assert (executor.stats.requests, executor.stats.rows, executor.stats.returned) == (1, 1, 0)


def test_a_crowd_is_noticed_and_served_with_overlap(rig: Rig) -> None:
    """While Triton's thread runs a request nobody else can be seen, so now and then it does not."""
    executor = rig.start()
    rig.device.on_run = lambda: time.sleep(2 * SHORT_RUN_US / 1e6)
    here = 0
    while True:
        rig.now_us += HEELS_US  # time for a client to send the next
        rig.gate.at_hand = [permit()]
        looked = FakeRequest(1)
        executor.submit([looked])
        if looked.deferred:
            break
        here += 1
    assert 1 < here <= LOOK_EVERY
    crowd = FakeRequest(2)
    executor.submit([crowd])  # the first one is still under way
    for _ in range(2):
        rig.gate.grant(4)
    assert doubled(looked, crowd)
    later = FakeRequest(3)
    executor.submit([later])
    assert later.deferred, "a crowd a moment ago"
    rig.gate.grant(4)
    assert doubled(later)
    rig.now_us += CROWD_US
    alone = FakeRequest(4)
    executor.submit([alone])
    assert not alone.deferred and doubled(alone)


def test_a_request_on_the_heels_of_an_answer_waited_in_triton(rig: Rig) -> None:
    executor = rig.start()
    rig.device.on_run = lambda: time.sleep(2 * SHORT_RUN_US / 1e6)
    rig.gate.at_hand = [permit(), permit()]
    executor.submit([FakeRequest(1)])
    rig.now_us += HEELS_US - 1
    second = FakeRequest(2)
    executor.submit([second])
    assert second.deferred
    rig.gate.grant(4)
    assert doubled(second)


@pytest.mark.parametrize(("overlap", "run_us"), [(True, 0), (False, 2 * SHORT_RUN_US)])
def test_where_overlap_gains_nothing_requests_stay_in_tritons_thread(
    rig: Rig, overlap: bool, run_us: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sending each answer of a crowd costs more than overlap saves: where runs are short, and on the CPU."""
    monkeypatch.setattr(
        "dstack_backend.executor.SHORT_RUN_US" if overlap else "dstack_backend.executor.LONG_RUN_US", 10**9
    )
    executor = rig.start(overlap=overlap)
    rig.device.on_run = lambda: time.sleep(run_us / 1e6)
    for number in range(3 * LOOK_EVERY):
        rig.gate.at_hand = [permit()]
        request = FakeRequest(number)
        executor.submit([request])
        assert not request.deferred


def test_failures_are_kept_too(rig: Rig) -> None:
    executor = rig.start()
    rig.gate.at_hand = [permit()]
    unlucky = FakeRequest(13)
    executor.submit([unlucky])
    assert isinstance(unlucky.error, RunError) and not unlucky.deferred
    assert executor.stats.failed == 1


def test_without_prefetch_submit_returns_once_all_is_settled(rig: Rig) -> None:
    """Triton's rate limiter then counts what really runs."""
    executor = rig.start(prefetch=0)
    requests = [FakeRequest(number) for number in range(1, 9)]
    returned = threading.Event()

    def hand_over() -> None:
        executor.submit(requests)
        returned.set()

    thread = threading.Thread(target=hand_over)
    thread.start()
    rig.gate.grant(4)
    rig.gate.wait_done(1)
    assert not returned.wait(0.05)
    rig.gate.grant(4)
    assert returned.wait(PATIENCE_S)
    thread.join()
    assert doubled(*requests)


def test_the_next_batch_is_launched_behind_the_one_that_runs(rig: Rig) -> None:
    """On a device that takes launches ahead: one behind the running one, not two."""
    executor = rig.start(synchronous=False)
    rig.device.hold.clear()
    requests = [FakeRequest([number, number]) for number in range(1, 5)]
    executor.submit(requests)
    for _ in requests:
        rig.gate.grant(2)
    rig.device.wait_running()
    give_up = time.monotonic() + PATIENCE_S
    while len(rig.device.batches) < 2:
        assert time.monotonic() < give_up, "the second batch was not launched"
        time.sleep(0.002)
    assert not rig.gate.finished
    rig.device.hold.set()
    assert doubled(*requests)
    assert rig.device.most_launched == 2
    assert [int(batch[0, 0]) for batch in rig.device.batches] == [1, 2, 3, 4]
    assert rig.gate.wait_done(4) == [2, 2, 2, 2]


def test_share_and_sm_groups_of_the_permit_reach_the_session(rig: Rig) -> None:
    executor = rig.start()
    rig.gate.at_hand = [permit()]
    executor.submit([FakeRequest(1)])
    assert rig.device.asked == [(40.0, 0b110)]


def test_a_plan_changes_objective_and_what_happens_to_late_ones(rig: Rig) -> None:
    executor = rig.start()
    executor.on_plan(2, 10_000, True)
    late = FakeRequest(1)
    executor.submit([late])
    assert executor.state() == (1, rig.now_us + 10_000)
    rig.now_us += 20_000
    rig.gate.grant(4)
    assert isinstance(late.wait().error, RejectedError)
    assert (executor.batch_size, executor.slo_us) == (2, 10_000)


@pytest.mark.parametrize("synchronous", [True, False])
def test_a_lost_device_fails_everything_and_ends_the_instance(rig: Rig, synchronous: bool) -> None:
    """No answer is made up, none is left out, and the process is ended only then."""
    ended = threading.Event()
    executor = rig.start(synchronous, batch_size=1, on_lost=ended.set)
    requests = [FakeRequest(99), *(FakeRequest(number) for number in range(1, 6))]
    executor.submit(requests)
    rig.gate.grant(1)
    rig.gate.grant(1)
    assert ended.wait(PATIENCE_S)
    assert isinstance(requests[0].error, DeviceLostError)
    assert all(request.settled.is_set() for request in requests)
    assert all(isinstance(request.error, DeviceLostError) for request in requests[2:])
    assert rig.gate.closed
    refused = FakeRequest(1)
    executor.submit([refused])
    assert isinstance(refused.error, DeviceLostError)


def test_every_stage_of_a_batch_is_timed(rig: Rig) -> None:
    executor = rig.start()
    requests = [FakeRequest(1), FakeRequest(2)]
    executor.submit(requests)
    rig.now_us += 700
    rig.gate.grant(4)
    assert doubled(*requests)
    executor.close()
    executor.stats.fold()
    times = executor.stats.stages
    assert {stage: times[stage].total for stage in STAGES} == dict.fromkeys(STAGES, 1)
    assert times["latency"].total == 2 and times["latency"].sum_us == 1400
    assert times["wait_grant"].sum_us == 700
    assert (times["copy_in"].sum_us, times["copy_out"].sum_us) == (5, 7)


@pytest.mark.parametrize("synchronous", [True, False])
def test_many_clients_with_grants_of_all_sizes(rig: Rig, synchronous: bool) -> None:
    """Every request is answered once, with its own rows, whoever makes and answers its batch."""
    executor = rig.start(synchronous, prefetch=2)
    rng = np.random.default_rng(1)
    sent: list[FakeRequest] = []
    stop = threading.Event()

    def grant() -> None:
        while not stop.is_set():
            if executor.state()[0]:
                rig.gate.grant(int(rng.integers(1, 6)))
            time.sleep(0.0002)

    granting = threading.Thread(target=grant)
    granting.start()
    for number in range(300):
        if number % 7 == 0:
            rig.gate.at_hand = [permit()]
        requests = [FakeRequest(100 + rng.random(rng.integers(1, 8))) for _ in range(rng.integers(1, 4))]
        sent += requests
        executor.submit(requests)
    assert doubled(*sent)
    stop.set()
    granting.join()
    assert all(request.times_settled == 1 for request in sent)
    assert executor.stats.requests == len(sent)
    assert sum(rows for _, rows, _ in rig.gate.finished) == sum(len(request.x) for request in sent)


def test_a_device_that_likes_parts_gets_them_as_they_came(rig: Rig) -> None:
    """It reads the requests' own memory: no copy on the host."""
    rig.device.takes_parts = True
    executor = rig.start()
    requests = [FakeRequest([1, 2]), FakeRequest(3), FakeRequest([4, 5, 6])]
    executor.submit(requests)
    rig.gate.grant(4)
    rig.gate.grant(4)
    assert doubled(*requests)
    assert rig.device.parts == [2]  # the other batch was one request: one array


@pytest.mark.parametrize("where", ["_finish", "_take_batch", "_respond"])
def test_a_defect_in_a_thread_ends_the_instance(
    rig: Rig, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the stub stays alive and READY, and every request hangs."""
    ended = threading.Event()
    executor = rig.start(on_lost=ended.set)
    monkeypatch.setattr("dstack_backend.answers.Answers.wait_drained", lambda *_: None)

    def broken(*_: object) -> None:
        raise AttributeError("a slip")

    monkeypatch.setattr(executor, where, broken)
    executor.submit([FakeRequest(1), FakeRequest(2)])
    rig.gate.grant(1)
    assert ended.wait(PATIENCE_S)
    refused = FakeRequest(3)
    executor.submit([refused])
    assert "a slip" in str(refused.error)
    rig.device.open = 0  # what the defect held is gone with the process


@pytest.mark.parametrize(("columns", "stays"), [(4, False), (1 << 18, True)])
def test_large_outputs_of_requests_on_the_device_stay_there(rig: Rig, columns: int, stays: bool) -> None:
    """As views of the batch's rows; small ones are cheaper by way of the host."""
    rig.device.outputs = tuple(TensorSpec(name, "tensor(float)", ("batch", columns)) for name in ("y", "z"))
    executor = rig.start()
    requests = [FakeRequest([1, 2]), FakeRequest(3)]
    for request in requests:
        request.on_device = True
        request.answer = lambda outputs, to=request: (setattr(to, "outputs", dict(outputs)), to.settled.set())
    executor.submit(requests)
    rig.gate.grant(4)
    first, second = (request.wait().outputs["y"] for request in requests)
    assert isinstance(first, DeviceArray) == stays == isinstance(second, DeviceArray)
    if stays:
        assert (first.pointer, len(first)) == (4096, 2)
        assert (second.pointer, len(second)) == (4096 + 2 * 40, 1)


def test_a_batch_with_one_request_in_host_memory_is_answered_there(rig: Rig) -> None:
    rig.device.outputs = (TensorSpec("y", "tensor(float)", ("batch", 1 << 18)),)
    executor = rig.start()
    requests = [FakeRequest(1), FakeRequest(2)]
    requests[0].on_device = True
    executor.submit(requests)
    rig.gate.grant(4)
    assert doubled(*requests)


def staged(rig: Rig, count: int) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while rig.device.staged < count:
        assert time.monotonic() < give_up, "nothing was staged ahead"
        time.sleep(0.002)


def test_a_full_batch_is_on_the_device_before_its_permit(rig: Rig) -> None:
    """So that the device does not idle between two batches; it could not have grown."""
    executor = rig.start(synchronous=False)
    requests = [FakeRequest([1, 2]), FakeRequest([3, 4]), FakeRequest(5)]
    executor.submit(requests)
    staged(rig, 1)
    assert executor.state() == (5, executor.state()[1]) and not rig.device.batches
    rig.gate.grant(4)
    assert doubled(*requests[:2])
    assert executor.state()[0] == 1 and rig.device.staged == 1
    rig.gate.grant(4)
    assert doubled(*requests)


def test_a_batch_that_is_being_made_ahead_counts_as_waiting(rig: Rig) -> None:
    """Whoever is told meanwhile that nothing waits sends no permit, and nothing else asks for one."""
    executor, stage = rig.start(), rig.device.stage
    seen: list[tuple[int, int]] = []
    rig.device.stage = lambda feeds: (seen.append(executor.state()), stage(feeds))[1]  # type: ignore[method-assign]
    requests = [FakeRequest(number) for number in range(1, 5)]
    executor.submit(requests)
    staged(rig, 1)
    assert seen == [executor.state()] and seen[0][0] == 4 and seen[0][1] > 0
    rig.gate.grant(4)
    assert doubled(*requests)


def test_a_smaller_permit_undoes_a_batch_made_ahead(rig: Rig) -> None:
    executor = rig.start()
    requests = [FakeRequest(number) for number in range(1, 5)]
    executor.submit(requests)
    staged(rig, 1)
    rig.gate.grant(3)
    assert doubled(*requests[:3])
    assert rig.gate.wait_done(1) == [3] and executor.state()[0] == 1


def test_a_more_urgent_request_undoes_a_batch_made_ahead(rig: Rig) -> None:
    executor = rig.start(slo_us=500_000)
    requests = [FakeRequest(number) for number in range(1, 5)]
    executor.submit(requests)
    staged(rig, 1)
    urgent = FakeRequest(9, budget_us=1_000)
    executor.submit([urgent])
    rig.gate.grant(4)
    assert doubled(urgent)
    assert rig.device.batches[0][0, 0] == 9


def test_shedding_and_late_ones_reach_a_batch_made_ahead(rig: Rig) -> None:
    executor = rig.start(slo_us=10_000, reject_late=True)
    shed = [FakeRequest(number) for number in range(4)]
    executor.submit(shed)
    staged(rig, 1)
    executor.on_shed(rig.now_us + 50_000)
    assert all(isinstance(request.wait().error, RejectedError) for request in shed)
    late = [FakeRequest(number) for number in range(4)]
    executor.submit(late)
    staged(rig, 2)
    rig.now_us += 20_000
    rig.gate.grant(4)
    assert all(isinstance(request.wait().error, RejectedError) for request in late)
    assert rig.gate.wait_done(1) == [0]
    assert not rig.device.batches


def test_closing_answers_a_batch_made_ahead(rig: Rig) -> None:
    executor = rig.start()
    requests = [FakeRequest(number) for number in range(4)]
    executor.submit(requests)
    staged(rig, 1)
    executor.close(0.05)
    assert all(isinstance(request.wait().error, RejectedError) for request in requests)
