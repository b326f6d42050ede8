"""Runs an instance: requests wait here briefly, a batch is made at the moment of its grant, and runs.

    Triton's thread  submit(): queue -> tell the gate -> block while enough waits (backlog stays in Triton)
    gate's thread    on_grant(): the right to run one batch
    device thread    make a batch where nothing runs -> wait for it -> tell the gate
    helper threads   while a batch runs: make and launch the next one behind it, answer the last one

Batches are launched one at a time, in the order of their permits, at most one behind the one that runs. A
batch is made late: when it is its turn, or earlier once it would be full. A request that comes alone, with a
permit at hand, is run and answered by Triton's own thread: no hand-over, and no response to send from
outside execute(), which costs Triton a round trip each. Knows neither Triton nor sockets.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from dstack_backend.answers import Answers
from dstack_backend.batching import Item, Part, RequestQueue, batch_of
from dstack_backend.errors import DeviceLostError, RejectedError, RequestError, RunError, one_line
from dstack_backend.interfaces import Gate, Permit, Request
from dstack_backend.pipeline import Job, Pipeline
from dstack_backend.stats import Stats

BEST_EFFORT_US = 3_600_000_000  # the deadline of a request without one: it never counts as late
HELPERS = 4  # one makes the next batch, the others answer: Triton acknowledges a response in 0.1 ms or so
MAX_LAUNCHED = 2  # one runs, one behind it
FIRST_RUN_US = 10_000  # what a run is expected to take before any was seen
# Requests that come while others are under way, or sooner after an answer than its client could send the
# next, are a crowd, which overlap serves best. None comes while Triton's thread runs one itself, so every so
# often it does not, and looks.
CROWD_US = 50_000
HEELS_US = 100
LOOK_EVERY = 16
SHORT_RUN_US = 300  # a run this short gains nothing from overlapping
LONG_RUN_US = 5_000  # during a run this long, Triton's thread had better take more requests in
DRAIN_S = 20.0
STOP_S = 5.0
REST_S, REFUSE_S = 0.5, 0.02  # without a device: the end waits so long for rest, each refusal gives so much
NEVER = 1 << 62
UNLOADING = "the model is unloading"

log = logging.getLogger("dstack")


def monotonic_us() -> int:
    """CLOCK_MONOTONIC, microseconds: the clock that all processes of a host share."""
    return time.monotonic_ns() // 1000


class Executor:
    """One instance's queue and threads.

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
        self._pipeline = pipeline
        self._gate = gate
        self._batched = batched
        self.slo_us, self._reject_late = slo_us, reject_late
        self._prefetch, self.batch_size = prefetch, batch_size
        self._prefetch_rows = max(1.0, prefetch * batch_size)
        self._overlap = overlap
        self.stats = stats or Stats()
        self._now_us = clock_us
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._device_wakes = threading.Condition(self._lock)
        self._helpers_wake = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)  # submit() waits for the queue to shrink
        self._queue = RequestQueue()
        self._answers = Answers(self.stats, clock_us, self._drop)
        self._permits: deque[Permit] = deque()
        self._making: Job | None = None  # a batch is being made for the next permit
        self._ahead: Job | None = None  # a full batch, made and on the device before its permit
        self._full_rows = batch_size  # what counts as full: as the last permit says
        self._launched: deque[Job] = deque()  # on the device, in order; the first one runs
        self._finished: deque[tuple[Job, Sequence[Part]]] = deque()  # to be answered by helpers
        self._kept: Job | None = None  # its answers were returned: Triton may still read them
        self._lost: RequestError | None = None  # the device is gone, and why
        self._at_rest = threading.Event()  # Triton's thread waits here, with nothing to answer
        self._closing = False
        self._stopped = False
        self._run_us: dict[int, int] = {}  # last run time by rows: what begin() is told to expect
        self._crowd_us = -CROWD_US  # when a request last came while others were under way
        self._run_here_count = 0  # since the last look whether others come
        loops = [("device", self._device_loop), *((f"helper-{i}", self._helper_loop) for i in range(HELPERS))]
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"dstack-{name}", daemon=True)
            for name, loop in loops
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
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
        if rows > permit.batch_size or (len(items) > 1 and not self._batched):
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
        self._wait(job)
        self._pipeline.collect(job)
        self._answer(job, job.batch.parts)
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
            if self._ahead is not None and self._ahead.batch is not None:
                first_us = self._ahead.batch.earliest_deadline_us
                deadline_us = min(deadline_us or first_us, first_us)
            return self._waiting_rows(), deadline_us

    def _waiting_rows(self) -> int:
        ahead = self._ahead.batch if self._ahead is not None else None
        return self._queue.rows + (ahead.rows if ahead is not None else 0)

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

    def _guarded(self, loop: Callable[[], None]) -> None:
        """A thread of ours that died of a defect would leave an instance READY and silent for ever."""
        try:
            loop()
        except BaseException as error:
            log.critical("a defect of the backend in %s", threading.current_thread().name, exc_info=True)
            self.lose(DeviceLostError(f"a defect of the backend: {type(error).__name__}: {one_line(error)}"))

    # The device thread

    def _device_loop(self) -> None:
        while (job := self._next_job()) is not None:
            if job.begun:
                self._finish(job)
            else:
                self._make(job)

    def _next_job(self) -> Job | None:
        """The batch that runs, to be waited for; where none does, a new job for the next permit."""
        with self._lock:
            while True:
                if self._launched:
                    if not self._launched[0].here:
                        return self._launched[0]
                elif self._permits and self._making is None:
                    return self._next_permitted()
                if self._stopped:
                    return None
                self._device_wakes.wait()

    def _next_permitted(self) -> Job:
        """The job of the next permit: with the batch that was made ahead, if there is one."""
        job, self._ahead = self._ahead, None
        permit = self._permits.popleft()
        if job is None:
            job = Job(permit)
        elif job.batch is not None:
            self._room.notify_all()
        job.permit, job.ahead = permit, False
        self._making = job
        return job

    def _finish(self, job: Job) -> None:
        """Wait for a batch; the device is free: tell the gate before any client is answered."""
        with self._pipeline.turn:
            pass  # whoever launches it has done so
        self._wait(job)
        batch = job.batch
        assert batch is not None
        with self._lock:
            idle = not self._permits and not self._launched and self._making is None
            alone = idle and self._ahead is None and not self._queue.rows
            if not alone or len(batch.parts) > 1:
                self._finished.append((job, ()))
                self._helpers_wake.notify()
                return
        self._respond(job)

    # Making batches: the device thread, or a helper while a batch runs

    def _make(self, job: Job) -> None:
        """Make a batch for a permit, gather, stage and launch it. The caller has set _making."""
        try:
            if job.batch is not None and not self._is_still_good(job):
                self._give_back(job)
            if job.batch is None:
                self._take_batch(job)
                if job.batch is not None:
                    self._pipeline.prepare(job)
            if job.batch is not None and not self._launch(job):
                self._give_back(job)
        finally:
            self._made(job)
        if job.batch is None:
            self._gate.done(job.permit, 0, 0, 0)
            with self._lock:
                self.stats.unused_grants += 1

    def _make_ahead(self, job: Job) -> None:
        """Make a full batch, gather and stage it, to be launched as soon as its permit comes. It would not
        have grown. The caller has set _making."""
        try:
            self._take_batch(job)
            if job.batch is not None:
                self._pipeline.prepare(job)
        finally:
            with self._lock:
                self._ahead = job if job.batch is not None else None
            self._made(job)
        if self._lost is not None:
            self._fail_waiting(self._lost)

    def _made(self, job: Job) -> None:
        with self._lock:
            if self._making is job:
                self._making = None
            self._device_wakes.notify()
            self._helpers_wake.notify()

    def _is_still_good(self, job: Job) -> bool:
        """Whether a batch that was made ahead is what would be made now."""
        batch = job.batch
        assert batch is not None
        now_us = self._now_us()
        job.made(now_us - job.stage_us.get("gather", 0))
        first_us = batch.earliest_deadline_us
        with self._lock:
            other_us = self._queue.earliest_deadline_us()
            late = self._reject_late and first_us < now_us
            dead = any(part.item.settled for part in batch.parts)
        urgent = 0 < other_us < min(first_us, now_us + 2 * self._expected_us(batch.rows))
        return batch.rows <= job.permit.batch_size and not (late or dead or urgent)

    def _give_back(self, job: Job) -> None:
        """The rows of a batch wait again."""
        assert job.batch is not None
        with self._lock:
            self._queue.give_back(job.batch)
        self._pipeline.close(job)
        job.batch, job.error = None, None

    def _undo_ahead(self, before_us: int = NEVER) -> Job | None:
        """Put the rows of the batch made ahead back, if one is due before then; the caller, who holds the
        lock, closes the job."""
        job = self._ahead
        if job is None or job.batch is None or job.batch.earliest_deadline_us >= before_us:
            return None
        self._ahead = None
        self._queue.give_back(job.batch)
        return job

    def _take_batch(self, job: Job) -> None:
        """Take a batch from the queue; none where nothing waits."""
        while True:
            with self._lock:
                expired = self._queue.remove_before(self._now_us()) if self._reject_late else []
                batch = self._queue.take(max(1, job.permit.batch_size))
                self.stats.waiting_rows = self._queue.rows
                self._room.notify_all()
            self._answers.reject(expired, "its deadline had passed before it could run")
            if batch is not None:
                batch = self._answers.without_dead(batch)
            if batch is None or batch.parts:
                job.batch = batch
                break
        if batch is not None:
            job.made(self._now_us())

    def _launch(self, job: Job) -> bool:
        """Launch a prepared job, once those before it are launched; False where its permit is void."""
        assert job.batch is not None
        with self._pipeline.turn:
            rows = job.batch.rows
            if self._lost is not None:
                job.error = job.error or self._lost
            job.begun = self._gate.begin(job.permit, rows, self._expected_us(rows))
            if not job.begun:
                return False
            with self._lock:
                self._launched.append(job)
                if self._making is job:
                    self._making = None
                    self._device_wakes.notify()
                    if self._permits:
                        self._helpers_wake.notify()
            self._pipeline.launch(job)
        return True

    def _wait(self, job: Job) -> None:
        """Wait for the batch on the device and tell the gate that it is free."""
        batch = job.batch
        assert batch is not None
        run_us = self._pipeline.wait(job)
        now_us = self._now_us()
        late = sum(part.stop - part.start for part in batch.parts if part.item.deadline_us < now_us)
        self._gate.done(job.permit, batch.rows, late, run_us)
        with self._lock:
            self._launched.remove(job)
            self._run_us[batch.rows] = run_us
            if job.here and (self._launched or self._permits):
                self._device_wakes.notify()

    def _expected_us(self, rows: int, unknown: int = FIRST_RUN_US) -> int:
        return self._run_us.get(rows) or max(self._run_us.values(), default=unknown)

    # Helpers

    def _helper_loop(self) -> None:
        while (help_wanted := self._next_help()) is not None:
            job, parts = help_wanted
            if job.ahead:
                self._make_ahead(job)
            elif not job.begun:
                self._make(job)
            elif parts:
                self._answer_slice(job, parts)
            else:
                self._respond(job)

    def _next_help(self) -> tuple[Job, Sequence[Part]] | None:
        """A job to make behind the one that runs, or ahead of its permit, where its batch would be full; else
        one to answer."""
        with self._lock:
            while True:
                if self._making is None and self._permits:
                    full = self._ahead is not None or self._queue.rows >= self._permits[0].batch_size
                    if full and 0 < len(self._launched) < MAX_LAUNCHED:
                        return self._next_permitted(), ()
                elif self._making is None and self._ahead is None and self._queue.rows >= self._full_rows:
                    self._making = Job(Permit(self._full_rows, 0.0))
                    self._making.ahead = True
                    return self._making, ()
                if self._finished:
                    return self._finished.popleft()
                if self._stopped:
                    return None
                self._helpers_wake.wait()

    def _respond(self, job: Job) -> None:
        """Bring the outputs of a job home and answer its parts, other helpers some of them."""
        assert job.batch is not None
        self._pipeline.collect(job)
        parts = job.batch.parts
        slices = min(HELPERS - 1, len(parts))
        job.unanswered = slices
        if slices > 1:
            with self._lock:
                self._finished.extend((job, parts[index::slices]) for index in range(1, slices))
                self._helpers_wake.notify(slices - 1)
        self._answer_slice(job, parts[::slices])

    def _answer_slice(self, job: Job, parts: Sequence[Part]) -> None:
        """Answer some parts; whoever answers the last ones gives the job's memory back."""
        self._answer(job, parts)
        with self._lock:
            job.unanswered -= 1
            if job.unanswered:
                return
        self._answers.answered(job)
        self._pipeline.close(job)

    def _answer(self, job: Job, parts: Sequence[Part]) -> None:
        if isinstance(job.error, DeviceLostError):
            self.lose(job.error)
        self._answers.answer(job, parts)

    def _drop(self, item: Item) -> None:
        with self._lock:
            self._queue.drop(item)

    # The end

    def lose(self, error: DeviceLostError) -> None:
        """The device is gone for good: fail all that waits and comes, ask for no grants any more, and let the
        process be ended. Any thread."""
        with self._lock:
            if self._lost is not None:
                return
            self._lost = error
        log.error("this process ends: %s", one_line(error))
        self._fail_waiting(error)
        threading.Thread(target=self._end_lost, name="dstack-end", daemon=True).start()

    def _fail_waiting(self, error: RequestError) -> None:
        """Fail everything that waits for a batch or a permit."""
        with self._lock:
            undone = self._undo_ahead()
            items = self._queue.clear()
            self._room.notify_all()
        if undone is not None:
            self._pipeline.close(undone)
        for item in items:
            self._answers.settle(item, error)

    def _end_lost(self) -> None:
        """Once all is answered: a stub that dies within a call of Triton's can take the server with it."""
        self._gate.close()
        self._answers.wait_drained(STOP_S)
        self._at_rest.wait(REST_S)
        self._on_lost()

    def close(self, drain_s: float = DRAIN_S) -> None:
        """Serve what was accepted, for at most drain_s; then fail the rest, stop the gate and the threads."""
        with self._lock:
            self._closing = True
            self._room.notify_all()
        self._answers.wait_drained(drain_s)
        self._fail_waiting(RejectedError(UNLOADING))
        self._gate.close()
        with self._lock:
            self._stopped = True
            self._device_wakes.notify_all()
            self._helpers_wake.notify_all()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(STOP_S)
        self._fail_waiting(RejectedError(UNLOADING))  # what was being made meanwhile
        if self._kept is not None:
            self._pipeline.close(self._kept)
