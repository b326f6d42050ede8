"""A simulated backend: one model instance with its queue, as the real one shows itself to the arbiter."""

from __future__ import annotations

from dstack_sched.domain.decision import Grant
from dstack_sched.sim.gpu import Job
from dstack_sched.sim.scenario import SimInstance

FOREVER = 1 << 62


class Backend:
    """A simulated instance: a queue in order of deadlines, at most one running batch and one chained grant.

    Rows [head, tail) of `arrivals` wait. It reports work as the real one does (dstack_backend.gate): each new
    row up to two batches, then no more but each doubling.
    """

    __slots__ = (
        "arrivals", "batches", "chained", "down", "ended_us", "failed", "grant", "head", "hung", "index",
        "job", "name", "notify_at", "rejected", "share_percent_us", "slow", "spec", "standing", "tail",
        "wake_token",
    )  # fmt: skip

    def __init__(self, index: int, spec: SimInstance, arrivals: list[int]) -> None:
        self.index = index
        self.spec = spec
        self.name = spec.name
        self.arrivals = arrivals
        self.head = self.tail = 0
        self.job: Job | None = None
        self.grant: Grant | None = None  # of the running batch; None while it runs ungated
        self.chained: Grant | None = None
        self.standing: Grant | None = None  # for the next rows that come
        self.notify_at = 1
        self.wake_token = 0
        self.ended_us = -1  # when its last batch left the GPU
        self.down = self.hung = False
        self.slow = 1.0
        self.rejected = self.failed = 0
        self.share_percent_us = 0.0
        self.batches: list[tuple[int, int, int]] = []  # first row, rows, end in us

    def waiting(self, now: float) -> int:
        """Rows that wait at `now`."""
        arrivals, tail = self.arrivals, self.tail
        end = len(arrivals)
        while tail < end and arrivals[tail] <= now:
            tail += 1
        self.tail = tail
        return tail - self.head

    def deadline_us(self) -> int:
        return self.arrivals[self.head] + (self.spec.slo_us or FOREVER // 4)
