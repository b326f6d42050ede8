"""The threads that make, run and answer the batches of an instance.

    device thread    make a batch where nothing runs -> wait for it -> tell the gate
    helper threads   while a batch runs: make and launch the next one behind it, answer the last one

Batches are launched one at a time, in the order of their permits, at most one behind the one that runs. A
batch is made late: when it is its turn, or earlier once it is full; a full one is also brought to the device
before its permit has come, so that the device does not idle between two batches.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from dstack_backend.answers import Answers
from dstack_backend.batching import Batch, Item, Part, RequestQueue
from dstack_backend.errors import DeviceLostError, RejectedError, RequestError, one_line
from dstack_backend.interfaces import Gate, Permit
from dstack_backend.pipeline import Job, Pipeline
from dstack_backend.stats import Stats

HELPERS = 4  # one makes the next batch, the others answer: Triton acknowledges a response in 0.1 ms or so
MAX_LAUNCHED = 2  # one runs, one behind it
FIRST_RUN_US = 10_000  # what a run is expected to take before any was seen
DRAIN_S = 20.0
STOP_S = 5.0
REST_S = 0.5  # without a device: how long the end waits for a quiet moment
NEVER = 1 << 62
UNLOADING = "the model is unloading"

log = logging.getLogger("dstack")


class Workshop:
    """The queue of an instance, and the threads that work on it. Executor adds where requests and permits
    come from.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        gate: Gate,
        *,
        batch_size: int,
        reject_late: bool,
        stats: Stats,
        clock_us: Callable[[], int],
        on_lost: Callable[[], None],
    ):
        self._pipeline = pipeline
        self._gate = gate
        self._reject_late = reject_late
        self.stats = stats
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
        loops = [("device", self._device_loop), *((f"helper-{i}", self._helper_loop) for i in range(HELPERS))]
        self._threads = [
            threading.Thread(target=self._guarded, args=(loop,), name=f"dstack-{name}", daemon=True)
            for name, loop in loops
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _waiting_rows(self) -> int:
        ahead = self._batch_ahead()
        return self._queue.rows + (ahead.rows if ahead is not None else 0)

    def _batch_ahead(self) -> Batch | None:
        """The batch that waits for a permit, made or still being made: whoever asks for permits counts it,
        else none would come for it. The caller holds the lock."""
        making = self._making
        job = making if making is not None and making.ahead else self._ahead
        return job.batch if job is not None else None

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
        self._ended(job, self._pipeline.wait(job))
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
                self._next_may_be_made(job)
        if self._lost is not None:
            self._fail_waiting(self._lost)

    def _made(self, job: Job) -> None:
        with self._lock:
            self._next_may_be_made(job)

    def _next_may_be_made(self, job: Job) -> None:
        """The caller holds the lock."""
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
                most = self._pipeline.rows_at_once(min(job.permit.batch_size, self._queue.rows))
                job.batch = batch = self._queue.take(most)
                self.stats.waiting_rows = self._queue.rows
                self._room.notify_all()
            self._answers.reject(expired, "its deadline had passed before it could run")
            if batch is None:
                return
            batch = self._answers.without_dead(batch)
            job.batch = batch if batch.parts else None
            if job.batch is not None:
                job.made(self._now_us())
                return

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

    def _ended(self, job: Job, run_us: int) -> None:
        """Tell the gate that the device is free of a batch."""
        batch = job.batch
        assert batch is not None
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
