"""Runs an instance: requests wait here briefly, a batch is made at the moment of its grant, and runs.

    Triton's thread  submit(): queue -> tell the gate -> block while enough waits (backlog stays in Triton)
    gate's thread    on_grant(): the right to run one batch
    other threads    see workshop

A request that comes alone, with a permit at hand, is run and answered by Triton's own thread: no hand-over,
and no response to send from outside execute(), which costs Triton a round trip each. Knows neither Triton
nor sockets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from dstack_backend.batching import Item, Part, batch_of
from dstack_backend.errors import RejectedError, RequestError, RunError, one_line
from dstack_backend.interfaces import Gate, Permit, Request
from dstack_backend.pipeline import Job, Pipeline
from dstack_backend.stats import Stats
from dstack_backend.workshop import UNLOADING, Workshop

BEST_EFFORT_US = 3_600_000_000  # the deadline of a request without one: it never counts as late
# Requests that come while others are under way, or sooner after an answer than its client could send the
# next, are a crowd, which overlap serves best. None comes while Triton's thread runs one itself, so every so
# often it does not, and looks.
CROWD_US = 50_000
HEELS_US = 100
LOOK_EVERY = 16
SHORT_RUN_US = 300  # a run this short gains nothing from overlapping
LONG_RUN_US = 5_000  # during a run this long, Triton's thread had better take more requests in
REFUSE_S = 0.02  # without a device: how long Triton's thread rests after each refusal, for the end to come


def monotonic_us() -> int:
    """CLOCK_MONOTONIC, microseconds: the clock that all processes of a host share."""
    return time.monotonic_ns() // 1000


class Executor(Workshop):
    """One instance: what comes from Triton and from the gate, over the threads of Workshop.

    slo_us 0: best effort. prefetch: batches that may wait here; 0: submit() returns once all its requests are
    settled. batched False: every request runs alone. overlap: the device computes beside the host, so that
    gathering and answering meanwhile gain something. on_lost: called once the device is lost and all that
    was accepted is answered. slo_us, batch_size: what is in force, which the arbiter may change.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        gate: Gate,
        *,
        batched: bool,
        batch_size: int,
        slo_us: int = 0,
        reject_late: bool = False,
        prefetch: float = 2.0,
        overlap: bool = True,
        stats: Stats | None = None,
        clock_us: Callable[[], int] = monotonic_us,
        on_lost: Callable[[], None] = lambda: None,
    ):
        super().__init__(
            pipeline,
            gate,
            batch_size=batch_size,
            reject_late=reject_late,
            stats=stats or Stats(),
            clock_us=clock_us,
            on_lost=on_lost,
        )
        self._batched = batched
        self.slo_us, self.batch_size = slo_us, batch_size
        self._prefetch, self._prefetch_rows = prefetch, max(1.0, prefetch * batch_size)
        self._overlap = overlap
        self._crowd_us = -CROWD_US  # when a request last came while others were under way
        self._run_here_count = 0  # since the last look whether others come

    def start(self) -> None:
        """Start the threads, and ask for permits."""
        super().start()
        self._gate.start(self)

    # Triton's thread

    def submit(self, requests: Iterable[Request]) -> None:
        """Accept requests; each will be answered or failed. Blocks while enough rows wait."""
        kept, self._kept = self._kept, None
        if kept is not None:
            self._pipeline.close(kept)
        started_us = self._now_us()
        if self._answers.unanswered or started_us - self._answers.idle_since_us < HEELS_US:
            self._crowd_us = started_us
        items = [item for item in map(self._accept, requests) if item]
        if self._run_here(items, started_us):
            return
        refusal = self._enqueue(items)
        if refusal is not None:
            for item in items:
                item.request.fail(refusal)
            if self._lost is not None:
                self._at_rest.set()
                time.sleep(REFUSE_S)
                self._at_rest.clear()
            return
        self._gate.work()
        if not self._prefetch:
            self._answers.wait_for(items)
            return
        with self._lock:
            while self._waiting_rows() >= self._prefetch_rows and not self._closing:
                self._room.wait()

    def _accept(self, request: Request) -> Item | None:
        now = self._now_us()
        failure: RequestError
        try:
            budget_us = request.budget_us or self.slo_us or BEST_EFFORT_US
            return Item(request, request.feeds(), self._batched, now, now + budget_us)
        except RequestError as error:
            failure = error
        except Exception as error:
            failure = RunError(f"cannot read the request: {one_line(error)}")
        self._answers.unreadable()
        request.fail(failure)
        return None

    def _enqueue(self, items: Sequence[Item]) -> RequestError | None:
        """Put requests in the queue; why not, where they cannot be served any more."""
        for item in items:
            item.request.defer()
        with self._lock:
            if self._lost is not None or self._closing:
                return self._lost or RejectedError(UNLOADING)
            now_us = self._now_us()
            for item in items:
                item.queued_us = now_us
                self._queue.push(item)
            self._answers.expect(items)
            self.stats.waiting_rows = self._queue.rows
            if (self._launched and self._permits) or self._queue.rows >= self._full_rows:
                self._helpers_wake.notify()
        return None

    def _run_here(self, items: Sequence[Item], started_us: int) -> bool:
        """Run and answer a batch of these in this thread, where they are alone and a permit is at hand."""
        unfit = self._answers.unanswered or self._closing or self._lost
        if not items or unfit or not self._is_alone(items, started_us):
            return False
        permit = self._gate.take()
        if permit is None:
            return False
        rows = sum(item.rows for item in items)
        most = min(permit.batch_size, self._pipeline.rows_at_once(rows))
        if rows > most or (len(items) > 1 and not self._batched):
            self.on_grant(permit)  # batches are made from the queue
            return False
        job, now_us = Job(permit), self._now_us()
        job.here = True
        job.batch = batch_of([Part(item, 0, item.rows) for item in items])
        for item in items:
            item.taken_rows, item.queued_us = item.rows, now_us
        self._answers.expect(items)
        job.made(self._now_us())
        self._pipeline.prepare(job)
        if not self._launch(job):
            self._answers.forget(items)
            self._pipeline.close(job)
            for item in items:
                item.taken_rows = 0
            self._gate.done(permit, 0, 0, 0)
            return False
        run_us = self._pipeline.wait(job)
        self._pipeline.collect(job)
        self._answer(job, job.batch.parts)
        # After the answer is made, which is kept until this returns: what the arbiter says to it would take
        # the interpreter from this thread.
        self._ended(job, run_us)
        self._answers.answered(job)
        self._kept = job
        self.stats.returned += len(items)
        return True

    def _is_alone(self, items: Sequence[Item], started_us: int) -> bool:
        """Whether Triton's thread has nothing better to do than to run these."""
        if any(item.key != items[0].key for item in items):
            return False
        if not self._prefetch:
            return True
        run_us = self._expected_us(sum(item.rows for item in items), 0)
        if run_us <= (SHORT_RUN_US if self._overlap else LONG_RUN_US):
            return True
        if run_us > LONG_RUN_US or started_us - self._crowd_us < CROWD_US:
            return False
        self._run_here_count = (self._run_here_count + 1) % LOOK_EVERY
        return self._run_here_count > 0

    # The gate's callbacks

    def state(self) -> tuple[int, int]:
        with self._lock:
            deadline_us = self._queue.earliest_deadline_us()
            ahead = self._batch_ahead()
            if ahead is not None:
                first_us = ahead.earliest_deadline_us
                deadline_us = min(deadline_us or first_us, first_us)
            return self._waiting_rows(), deadline_us

    def on_grant(self, permit: Permit) -> None:
        with self._lock:
            self._permits.append(permit)
            self._full_rows = permit.batch_size
            # A live plan may grant more than the config says.
            self._prefetch_rows = max(1.0, self._prefetch * max(self.batch_size, permit.batch_size))
            (self._helpers_wake if self._launched else self._device_wakes).notify()

    def on_shed(self, deadline_before_us: int) -> None:
        with self._lock:
            undone = self._undo_ahead(deadline_before_us)
            items = self._queue.remove_before(deadline_before_us)
            self._room.notify_all()
        if undone is not None:
            self._pipeline.close(undone)
        self._answers.reject(items, "shed by the scheduler: it could not meet its deadline")

    def on_plan(self, batch_size: int, slo_us: int, reject_late: bool) -> None:
        with self._lock:
            self.batch_size, self.slo_us, self._reject_late = batch_size, slo_us, reject_late
            self._prefetch_rows = max(1.0, self._prefetch * batch_size)
            self._room.notify_all()
