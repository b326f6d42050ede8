"""Answers requests, each once, and counts them. Several threads answer parts of one batch side by side."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from dstack_backend.batching import Batch, Item, Part, assemble, batch_of, outputs_of
from dstack_backend.errors import CancelledError, RejectedError, RequestError, RunError, one_line
from dstack_backend.pipeline import Job
from dstack_backend.stats import Stats

CANCEL_CHECK_AFTER_US = 5_000  # asking Triton costs a round trip; a request this young is rarely cancelled

log = logging.getLogger("dstack")


class Answers:
    """What was accepted and is not yet answered. drop: takes a request out of the queue, if it is there."""

    def __init__(self, stats: Stats, clock_us: Callable[[], int], drop: Callable[[Item], None]):
        self.stats = stats
        self._now_us = clock_us
        self._drop = drop
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self.unanswered = 0  # accepted, and no answer is on its way yet
        self.idle_since_us = 0  # when the last one was about to be answered
        self._in_flight = 0  # accepted, and the answer has not left

    def expect(self, items: Sequence[Item]) -> None:
        """These were accepted."""
        with self._lock:
            self.unanswered += len(items)
            self._in_flight += len(items)
            self.stats.requests += len(items)
            self.stats.rows += sum(item.rows for item in items)

    def forget(self, items: Sequence[Item]) -> None:
        """Undo expect()."""
        with self._lock:
            self.unanswered -= len(items)
            self._in_flight -= len(items)
            self.stats.requests -= len(items)
            self.stats.rows -= sum(item.rows for item in items)

    def unreadable(self) -> None:
        """A request was answered before it was accepted."""
        with self._lock:
            self.stats.failed += 1

    def answer(self, job: Job, parts: Iterable[Part]) -> None:
        """Answer some of a job's parts, from its outputs or with its error."""
        assert job.batch is not None
        for part in parts:
            if job.error is not None:
                self.settle(part.item, job.error)
                continue
            part.item.parts[part.start] = outputs_of(job.batch, part, job.outputs)
            if self._is_whole(part):
                self.settle(part.item, None)

    def without_dead(self, batch: Batch) -> Batch:
        """The batch without parts whose clients gave up or whose earlier chunk failed."""
        old_us = self._now_us() - CANCEL_CHECK_AFTER_US
        for part in batch.parts:
            item = part.item
            if not item.settled and item.arrival_us <= old_us and item.request.is_cancelled():
                self.settle(item, CancelledError("cancelled by the client"))
        kept = [part for part in batch.parts if not part.item.settled]
        return batch if len(kept) == len(batch.parts) else batch_of(kept)

    def _is_whole(self, part: Part) -> bool:
        """True for the chunk that completes its request."""
        item = part.item
        if part.stop - part.start == item.rows:
            return True
        with self._lock:
            item.done_rows += part.stop - part.start
            return item.done_rows == item.rows

    def settle(self, item: Item, error: RequestError | None) -> None:
        """Answer a request, once. Its later chunks, if any wait, are dropped."""
        with self._lock:
            if item.settled:
                return
            item.settled = True
            # Before it leaves: its client may send the next before this thread is back.
            self.unanswered -= 1
            self.idle_since_us = now_us = self._now_us()
            self.stats.late += item.deadline_us < now_us
            self.stats.failed += isinstance(error, RunError)
            self.stats.rejected += isinstance(error, RejectedError)
            self.stats.cancelled += isinstance(error, CancelledError)
        if item.taken_rows < item.rows:
            self._drop(item)
        try:
            if error is None:
                item.request.answer(assemble(item))
            else:
                item.request.fail(error)
        except Exception as failure:
            log.error("cannot answer a request: %s", one_line(failure))
        with self._lock:
            self._in_flight -= 1
            self._settled.notify_all()
        self.stats.request_done(max(0, self._now_us() - item.arrival_us))

    def reject(self, items: Sequence[Item], why: str) -> None:
        for item in items:
            self.settle(item, RejectedError(why))

    def answered(self, job: Job) -> None:
        """All parts of a job are answered: its times count."""
        assert job.batch is not None
        job.stage_us["respond"] = (time.perf_counter_ns() - job.ended_ns) // 1000
        with self._lock:
            self.stats.batch_done(job.batch.rows, job.stage_us)

    def wait_for(self, items: Sequence[Item]) -> None:
        """Until these are answered."""
        with self._lock:
            self._settled.wait_for(lambda: all(item.settled for item in items) or not self._in_flight)

    def wait_drained(self, within_s: float) -> None:
        """Until all that was accepted is answered, for at most that long."""
        with self._lock:
            self._settled.wait_for(lambda: not self._in_flight, within_s)
