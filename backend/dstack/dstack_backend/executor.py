"""Runs an instance: requests wait here briefly, a batch is made at the moment of its grant, and runs.

    Triton's thread  submit(): queue -> tell the gate -> block while enough waits (backlog stays in Triton)
    gate's thread    on_grant(): the right to run one batch
    device thread    take a permit -> make and gather a batch -> run -> tell the gate -> answer
    helper threads   while a batch runs: gather the next one, answer the last one

All runs happen in the device thread, in the order of their permits: CUDA graphs belong to the thread that
captured them. A batch is made late: when it is its turn, or earlier once it would be full. The device thread
does its own gathering and answering where nothing else waits, which saves a lone client two hand-overs.
Knows neither Triton nor sockets.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from dstack_backend.batching import (
    Batch,
    Item,
    Job,
    Part,
    RequestQueue,
    assemble,
    batch_of,
    check_rows,
    outputs_of,
)
from dstack_backend.errors import CancelledError, RejectedError, RequestError, RunError, one_line
from dstack_backend.interfaces import Gate, Permit, Request, Run
from dstack_backend.staging import Staging
from dstack_backend.stats import Stats

BEST_EFFORT_US = 3_600_000_000  # the deadline of a request without one: it never counts as late
CANCEL_CHECK_AFTER_US = 5_000  # asking Triton costs a round trip; a request this young is rarely cancelled
HELPERS = 3  # one gathers, two answer
FIRST_RUN_US = 10_000  # what a run is expected to take before any was seen
DRAIN_S = 20.0
STOP_S = 5.0

log = logging.getLogger("dstack")


def monotonic_us() -> int:
    """CLOCK_MONOTONIC, microseconds: the clock that all processes of a host share."""
    return time.monotonic_ns() // 1000


def late_rows(batch: Batch, now_us: int) -> int:
    """Rows of a batch that are past their deadline."""
    return sum(part.stop - part.start for part in batch.parts if part.item.deadline_us < now_us)


class Executor:
    """One instance's queue and threads.

    run(feeds, output names) -> arrays; raises RunError. output_names: in graph order. slo_us 0: best effort.
    prefetch: batches that may wait here. batched False: every request runs alone. on_device_thread: called
    once in the device thread before anything runs (warm-up); start() raises what it raises.
    """

    def __init__(
        self,
        run: Run,
        gate: Gate,
        *,
        output_names: Sequence[str],
        batched: bool,
        batch_size: int,
        slo_us: int = 0,
        reject_late: bool = False,
        prefetch: float = 2.0,
        staging: Staging | None = None,
        stats: Stats | None = None,
        clock_us: Callable[[], int] = monotonic_us,
        on_device_thread: Callable[[], None] = lambda: None,
    ):
        self._run = run
        self._gate = gate
        self._output_names = tuple(output_names)
        self._batched = batched
        self._slo_us = slo_us
        self._reject_late = reject_late
        self._prefetch, self._batch_size = prefetch, batch_size
        self._prefetch_rows = prefetch * batch_size
        self._staging = staging or Staging(batch_size)
        self.stats = stats or Stats()
        self._now_us = clock_us
        self._on_device_thread = on_device_thread
        self._lock = threading.Lock()
        self._device_wakes = threading.Condition(self._lock)
        self._helpers_wake = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)  # submit() waits for the queue to shrink
        self._drained = threading.Condition(self._lock)  # close() waits for the last answer
        self._queue = RequestQueue()
        self._permits: deque[Permit] = deque()
        self._ahead: Job | None = None  # being gathered by a helper, runs next
        self._finished: deque[tuple[Job, list[Part]]] = deque()  # to be answered by helpers
        self._running = False
        self._in_flight = 0  # requests accepted and not yet settled
        self._closing = False
        self._stopped = False
        self._run_us: dict[int, int] = {}  # last run time by rows: what begin() is told to expect
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._threads = [threading.Thread(target=self._device_loop, name="dstack-device", daemon=True)]
        self._threads += [
            threading.Thread(target=self._helper_loop, name=f"dstack-helper-{index}", daemon=True)
            for index in range(HELPERS)
        ]

    def start(self) -> None:
        """Start the threads; returns once the device thread is warm. Raises what warming up raised."""
        for thread in self._threads:
            thread.start()
        self._started.wait()
        if self._start_error is not None:
            self.close(0)
            raise self._start_error
        self._gate.start(self)

    # Triton's thread

    def submit(self, requests: Iterable[Request]) -> None:
        """Accept requests; each will be answered or failed. Blocks while enough rows wait."""
        started_ns = time.perf_counter_ns()
        items = [item for item in map(self._accept, requests) if item]
        with self._lock:
            refused = items if self._closing else []
            if not refused:
                for item in items:
                    self._queue.push(item)
                    self.stats.rows += item.rows
                self._in_flight += len(items)
                self.stats.waiting_rows = self._queue.rows
                self.stats.requests += len(items)
                self.stats.stage_ns["accept"] += time.perf_counter_ns() - started_ns
                if self._running and self._permits:
                    self._helpers_wake.notify()
        for item in refused:
            item.request.fail(RejectedError("the model is unloading"))
        self._gate.work()
        with self._lock:
            while self._queue.rows >= self._prefetch_rows and not self._closing:
                self._room.wait()

    def _accept(self, request: Request) -> Item | None:
        now = self._now_us()
        failure: RequestError
        try:
            budget_us = request.budget_us or self._slo_us or BEST_EFFORT_US
            return Item(request, request.feeds(), self._batched, now, now + budget_us)
        except RequestError as error:
            failure = error
        except Exception as error:
            failure = RunError(f"cannot read the request: {one_line(error)}")
        with self._lock:
            self.stats.failed += 1
        request.fail(failure)
        return None

    # The gate's callbacks

    def state(self) -> tuple[int, int]:
        with self._lock:
            return self._queue.rows, self._queue.earliest_deadline_us()

    def on_grant(self, permit: Permit) -> None:
        with self._lock:
            self._permits.append(permit)
            # A live plan may grant more than the config says.
            self._prefetch_rows = self._prefetch * max(self._batch_size, permit.batch_size)
            if self._running:
                self._helpers_wake.notify()
            else:
                self._device_wakes.notify()

    def on_shed(self, deadline_before_us: int) -> None:
        with self._lock:
            items = self._queue.remove_before(deadline_before_us)
            self._room.notify_all()
        self._reject(items, "shed by the scheduler: it could not meet its deadline")

    # The device thread

    def _device_loop(self) -> None:
        try:
            self._on_device_thread()
        except BaseException as error:
            self._start_error = error
            return
        finally:
            self._started.set()
        while (job := self._next_job()) is not None:
            try:
                if not job.ready:
                    self._make_batch(job)
                    self._gather(job)
                self._execute(job)
            except Exception as error:  # a defect: answer for it, and keep serving
                job.error = RunError(f"{type(error).__name__}: {one_line(error)}")
            self._finish(job)

    def _next_job(self) -> Job | None:
        """The next permit; where a helper makes its batch already, once that is gathered."""
        with self._lock:
            self._running = False
            while True:
                if self._ahead is not None:
                    if self._ahead.ready:
                        break
                elif self._permits:
                    self._ahead = Job(self._permits.popleft())
                    break
                elif self._stopped:
                    return None
                self._device_wakes.wait()
            job, self._ahead = self._ahead, None
            self._running = True
            if self._permits:
                self._helpers_wake.notify()
            return job

    def _execute(self, job: Job) -> None:
        """Run the batch; give it back to the queue where its permit is void."""
        batch = job.batch
        if batch is None:
            return
        if not self._gate.begin(job.permit, self._expected_us(batch.rows)):
            with self._lock:
                self._queue.give_back(batch)
                self._staging.release(batch, job.buffers)
            job.batch = None
            return
        if job.error is not None:
            return
        names = batch.outputs_wanted(self._output_names)
        started_ns = time.perf_counter_ns()
        try:
            arrays = self._run(job.feeds, names)
            job.outputs = dict(zip(names, arrays, strict=True))
            check_rows(batch, job.outputs)
        except RequestError as error:
            job.error = error
        job.stage_ns["run"] = time.perf_counter_ns() - started_ns

    def _expected_us(self, rows: int) -> int:
        return self._run_us.get(rows) or max(self._run_us.values(), default=FIRST_RUN_US)

    def _finish(self, job: Job) -> None:
        """The device is free: tell the gate before any client is answered, then see to the answers."""
        batch, now_us = job.batch, self._now_us()
        run_us = job.stage_ns.get("run", 0) // 1000
        late = late_rows(batch, now_us) if batch else 0
        self._gate.done(job.permit, batch.rows if batch else 0, late, run_us)
        with self._lock:
            if batch is None:
                self.stats.unused_grants += 1
                return
            self._run_us[batch.rows] = run_us
            self.stats.batches += 1
            self.stats.sizes[1 << (batch.rows - 1).bit_length()] += 1
            self.stats.stage_ns.update(job.stage_ns)
            alone = not self._permits and self._ahead is None and not self._queue.rows
            if not alone or len(batch.parts) > 1:
                slices = min(HELPERS, len(batch.parts))
                job.unanswered = slices
                self._finished.extend((job, batch.parts[index::slices]) for index in range(slices))
                self._helpers_wake.notify(slices)
                return
        job.unanswered = 1
        self._respond(job, batch.parts)

    # Making batches: the device thread, or a helper while a batch runs

    def _make_batch(self, job: Job) -> None:
        """Take a batch from the queue; none where nothing waits."""
        while True:
            with self._lock:
                expired = self._queue.remove_before(self._now_us()) if self._reject_late else []
                batch = self._queue.take(max(1, job.permit.batch_size))
                self.stats.waiting_rows = self._queue.rows
                self._room.notify_all()
            self._reject(expired, "its deadline had passed before it could run")
            if batch is not None:
                batch = self._without_dead(batch)
            if batch is None or batch.parts:
                job.batch = batch
                return

    def _without_dead(self, batch: Batch) -> Batch:
        """The batch without parts whose clients gave up or whose earlier chunk failed."""
        old_us = self._now_us() - CANCEL_CHECK_AFTER_US
        for part in batch.parts:
            item = part.item
            if not item.settled and item.arrival_us <= old_us and item.request.is_cancelled():
                self._settle(item, CancelledError("cancelled by the client"))
        kept = [part for part in batch.parts if not part.item.settled]
        return batch if len(kept) == len(batch.parts) else batch_of(kept)

    def _gather(self, job: Job) -> None:
        batch = job.batch
        if batch is None:
            return
        started_ns, now_us = time.perf_counter_ns(), self._now_us()
        with self._lock:
            job.buffers = self._staging.lease(batch)
        job.feeds = self._staging.fill(batch, job.buffers)
        waited_us = sum(now_us - part.item.arrival_us for part in batch.parts) // len(batch.parts)
        job.stage_ns = {"wait": waited_us * 1000, "gather": time.perf_counter_ns() - started_ns}

    # Helpers

    def _helper_loop(self) -> None:
        while (help_wanted := self._next_help()) is not None:
            job, parts = help_wanted
            if parts:
                self._respond(job, parts)
                continue
            try:
                self._make_batch(job)
                self._gather(job)
            except Exception as error:  # a defect: the device thread answers for it
                job.error = RunError(f"{type(error).__name__}: {one_line(error)}")
            with self._lock:
                job.ready = True
                self._device_wakes.notify()

    def _next_help(self) -> tuple[Job, list[Part]] | None:
        """A job to gather (no parts) where one runs and the next batch is full and permitted; else parts of a
        job to answer."""
        with self._lock:
            while True:
                may_gather = self._running and self._ahead is None and self._permits
                if may_gather and self._queue.rows >= self._permits[0].batch_size:
                    self._ahead = Job(self._permits.popleft())
                    return self._ahead, []
                if self._finished:
                    return self._finished.popleft()
                if self._stopped:
                    return None
                self._helpers_wake.wait()

    def _respond(self, job: Job, parts: Sequence[Part]) -> None:
        """Answer some of a job's parts; whoever answers the last ones gives its buffers back."""
        started_ns = time.perf_counter_ns()
        assert job.batch is not None
        for part in parts:
            if job.error is not None:
                self._settle(part.item, job.error)
                continue
            part.item.parts[part.start] = outputs_of(job.batch, part, job.outputs)
            if self._is_whole(part):
                self._settle(part.item, None)
        with self._lock:
            job.unanswered -= 1
            if not job.unanswered:
                self._staging.release(job.batch, job.buffers)
            self.stats.stage_ns["respond"] += time.perf_counter_ns() - started_ns

    def _is_whole(self, part: Part) -> bool:
        """True for the chunk that completes its request."""
        item = part.item
        if part.stop - part.start == item.rows:
            return True
        with self._lock:
            item.done_rows += part.stop - part.start
            return item.done_rows == item.rows

    def _settle(self, item: Item, error: RequestError | None) -> None:
        """Answer a request, once. Its later chunks, if any wait, are dropped."""
        with self._lock:
            if item.settled:
                return
            item.settled = True
            if item.taken_rows < item.rows:
                self._queue.drop(item)
            self.stats.late += item.deadline_us < self._now_us()
            self.stats.failed += isinstance(error, RunError)
            self.stats.rejected += isinstance(error, RejectedError)
            self.stats.cancelled += isinstance(error, CancelledError)
        try:
            if error is None:
                item.request.answer(assemble(item))
            else:
                item.request.fail(error)
        except Exception as failure:
            log.error("cannot answer a request: %s", one_line(failure))
        with self._lock:
            self._in_flight -= 1
            if not self._in_flight:
                self._drained.notify_all()

    def _reject(self, items: Sequence[Item], why: str) -> None:
        for item in items:
            self._settle(item, RejectedError(why))

    # Unloading

    def close(self, drain_s: float = DRAIN_S) -> None:
        """Serve what was accepted, for at most drain_s; then fail the rest, stop the gate and the threads."""
        with self._lock:
            self._closing = True
            self._room.notify_all()
            self._drained.wait_for(lambda: not self._in_flight, drain_s)
            left = self._queue.clear()
        for item in left:
            self._settle(item, RejectedError("the model is unloading"))
        self._gate.close()
        with self._lock:
            self._stopped = True
            self._device_wakes.notify_all()
            self._helpers_wake.notify_all()
        for thread in self._threads:
            thread.join(STOP_S)
