"""Rivals that run one model at a time on the whole GPU: plain time-sharing, Clipper-like, Nexus-like."""

from __future__ import annotations

from dstack_sched.domain.event import BackendJoined, BackendLeft, BatchFinished
from dstack_sched.engine.base import RATE_WINDOW_US, EngineBase
from dstack_sched.engine.state import Instance


class TemporalEngine(EngineBase):
    """One batch at a time, round robin; as many rows as wait and run within half the objective."""

    policy = "temporal"

    def __init__(self) -> None:
        super().__init__()
        self._ring: list[str] = []
        self._turn = 0

    def _on_joined(self, event: BackendJoined, now: int) -> None:
        super()._on_joined(event, now)
        if event.instance not in self._ring:
            self._ring.append(event.instance)

    def _on_left(self, event: BackendLeft, now: int) -> None:
        super()._on_left(event, now)
        if event.instance in self._ring:
            self._ring.remove(event.instance)

    def _schedule(self, now: int) -> None:
        if self.running:
            return
        count = len(self._ring)
        for step in range(count):
            at = (self._turn + step) % count
            instance = self.instances[self._ring[at]]
            if instance.waiting and not instance.lost_grant and self._start(instance, now):
                self._turn = at + 1
                return

    def _start(self, instance: Instance, now: int) -> bool:
        """Grant a batch; False when, after all, there is nothing to run."""
        batch = self._batch_size(instance)
        self._grant(instance, len(instance.levels) - 1, batch, min(batch, instance.waiting), now)
        return True

    def _batch_size(self, instance: Instance) -> int:
        if not instance.slo_us:
            return instance.batch_size
        return max(1, instance.times.largest_batch(len(instance.levels) - 1, instance.slo_us / 2))


class ClipperEngine(TemporalEngine):
    """Clipper-like: the batch size of each model grows by one while batches meet half the objective, and
    shrinks by a tenth when one does not (AIMD); one model at a time, no look at deadlines."""

    policy = "clipper"

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[str, float] = {}

    def _on_finished(self, event: BatchFinished, now: int) -> None:
        instance = self.instances.get(event.instance)
        if instance is not None and instance.slo_us and event.rows:
            size = self._sizes.get(event.instance, 1.0)
            if event.run_us > instance.slo_us / 2:
                size *= 0.9
            elif event.rows >= int(size):
                size += 1.0
            self._sizes[event.instance] = min(max(size, 1.0), float(instance.max_batch))
        super()._on_finished(event, now)

    def _batch_size(self, instance: Instance) -> int:
        return int(self._sizes.get(instance.name, 1.0)) if instance.slo_us else instance.batch_size


class NexusEngine(TemporalEngine):
    """Nexus-like: a duty cycle D in which each model runs one batch b = rate x D, with D + f(b) <= S for all
    (squishy packing onto one GPU); early drop of what a full batch could not serve in time."""

    policy = "nexus"

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[str, int] = {}
        self._packed_us = -RATE_WINDOW_US

    def _schedule(self, now: int) -> None:
        if not self.running:
            if now - self._packed_us >= RATE_WINDOW_US:
                self._packed_us = now
                self._pack()
            super()._schedule(now)

    def _pack(self) -> None:
        """The longest duty cycle that every objective allows, by bisection, and its batch sizes. The longer
        the cycle the larger and the more efficient the batches."""
        members = [i for i in self.instances.values() if i.slo_us]
        if not members:
            return
        low, high = 0.0, float(min(i.slo_us for i in members))
        for _ in range(20):
            cycle_us = (low + high) / 2
            if all(cycle_us + self._run_us(i, self._rows(i, cycle_us)) <= i.slo_us for i in members):
                low = cycle_us
            else:
                high = cycle_us
        self._sizes = {i.name: self._rows(i, low) for i in members}

    def _rows(self, instance: Instance, cycle_us: float) -> int:
        return min(max(1, round(instance.rate_per_us * cycle_us)), instance.max_batch)

    def _run_us(self, instance: Instance, rows: int) -> float:
        return instance.times.us[-1][rows] * instance.times.scale

    def _batch_size(self, instance: Instance) -> int:
        if not instance.slo_us:
            return instance.batch_size
        # What waits beyond the plan is taken along as far as the objective allows.
        longest = instance.times.largest_batch(len(instance.levels) - 1, instance.slo_us / 2)
        return max(self._sizes.get(instance.name, 1), min(instance.waiting, longest), 1)

    def _start(self, instance: Instance, now: int) -> bool:
        if instance.slo_us and instance.reject:
            rows = min(self._batch_size(instance), instance.waiting)
            end_us = now + int(self._run_us(instance, rows))
            if end_us > instance.deadline_us:  # the window of this batch starts at the first that makes it
                width = max(now + instance.slo_us - instance.deadline_us, 1)
                alive = instance.waiting * max(now + instance.slo_us - end_us, 0) // width
                self._shed(instance, end_us, alive)
                if not alive:
                    return False
        return super()._start(instance, now)
