"""Rivals that let models run side by side: MPS without and with fixed shares, fixed batches, Triton's rate
limiter, and the two greedy ones. None looks at deadlines."""

from __future__ import annotations

from collections.abc import Iterator

from dstack_sched.domain.event import BackendJoined, BackendLeft, PlanChanged
from dstack_sched.engine.base import ROUNDING, EngineBase
from dstack_sched.engine.books import WAKE_GO
from dstack_sched.engine.state import Instance


class SpatialEngine(EngineBase):
    """Base: whoever has work and is idle runs, in the order of `_order`, as long as its share fits."""

    def _schedule(self, now: int) -> None:
        for instance in self._order(self._idle()):
            percent = min(instance.levels[instance.plan_level], self.capacity)
            if percent <= self.capacity - self.granted + ROUNDING and self._goes(instance, now):
                batch = self._batch_size(instance)
                self._grant(instance, instance.plan_level, batch, min(batch, instance.waiting), now)

    def _idle(self) -> Iterator[Instance]:
        return (i for i in self.instances.values() if i.waiting and i.run is None and not i.lost_grant)

    def _order(self, idle: Iterator[Instance]) -> list[Instance]:
        return list(idle)

    def _goes(self, instance: Instance, now: int) -> bool:
        return True

    def _batch_size(self, instance: Instance) -> int:
        """Adaptive: as many as run within half the objective beside those that run now."""
        if not instance.slo_us:
            return instance.batch_size
        slow = instance.model.slowdown(self.promised)
        return max(1, instance.times.largest_batch(instance.plan_level, instance.slo_us / 2 / slow))


class MpsDefaultEngine(SpatialEngine):
    """MPS without limits: everyone runs whenever it has work; nobody holds anyone back."""

    policy = "mps-default"

    def _unlimit(self) -> None:
        self.capacity = 100.0 * max(1, len(self.instances))
        self._ceiling = max(self.capacity, self.granted)

    def _on_joined(self, event: BackendJoined, now: int) -> None:
        self._ceiling += 100.0
        super()._on_joined(event, now)
        self._unlimit()

    def _on_left(self, event: BackendLeft, now: int) -> None:
        super()._on_left(event, now)
        self._unlimit()

    def _on_plan(self, event: PlanChanged, now: int) -> None:
        super()._on_plan(event, now)
        self._unlimit()


class TimeSlicedEngine(MpsDefaultEngine):
    """No MPS: everyone runs whenever it has work, and the driver takes turns between them: the world's
    business, so that only the batch size differs: as many as run within half the objective in their turns."""

    policy = "time-sliced"

    def _batch_size(self, instance: Instance) -> int:
        if not instance.slo_us:
            return instance.batch_size
        turns = len(self.running) + 1
        return max(1, instance.times.largest_batch(instance.plan_level, instance.slo_us / 2 / turns))


class MpsStaticEngine(MpsDefaultEngine):
    """GSLICE-like: fixed shares, adaptive batches, everyone runs whenever it has work."""

    policy = "mps-static"


class FixedBatchEngine(MpsDefaultEngine):
    """Fixed shares and fixed batches: a batch runs when it is full, or its oldest row has waited half the
    objective."""

    policy = "fixed-batch"

    def _goes(self, instance: Instance, now: int) -> bool:
        if instance.waiting >= instance.batch_size or not instance.slo_us:
            return True
        due_us = instance.deadline_us - instance.slo_us // 2
        if due_us <= now:
            return True
        self._wake(due_us, WAKE_GO, instance, instance.deadline_us)
        return False

    def _batch_size(self, instance: Instance) -> int:
        return instance.batch_size


class RateLimiterEngine(SpatialEngine):
    """Triton's rate limiter: shares as resource counts within the capacity; among those that wait the one
    with the fewest executions over its weight (its priority) goes first."""

    policy = "triton-rate-limiter"

    def __init__(self) -> None:
        super().__init__()
        self._executions: dict[str, float] = {}

    def _order(self, idle: Iterator[Instance]) -> list[Instance]:
        return sorted(idle, key=lambda i: (self._executions.get(i.name, 0.0), i.serial))

    def _goes(self, instance: Instance, now: int) -> bool:
        self._executions[instance.name] = self._executions.get(instance.name, 0.0) + 1 / instance.model.weight
        return True


class MaxThroughputEngine(SpatialEngine):
    """Most requests a second per percent of the GPU first; heavy models starve when it is full."""

    policy = "max-throughput"

    def _order(self, idle: Iterator[Instance]) -> list[Instance]:
        def cost(i: Instance) -> float:
            rows = min(i.waiting, self._batch_size(i))
            return i.levels[i.plan_level] * i.times.us[i.plan_level][rows] / rows

        return sorted(idle, key=lambda i: (cost(i), i.serial))


class MaxMinEngine(SpatialEngine):
    """Max-min fairness of GPU%-time over weight: the least served first; it keeps the next place until it
    fits."""

    policy = "max-min"

    def _schedule(self, now: int) -> None:
        for instance in sorted(self._idle(), key=lambda i: (i.model.vtime, i.serial)):
            if min(instance.levels[instance.plan_level], self.capacity) > (
                self.capacity - self.granted + ROUNDING
            ):
                return
            batch = self._batch_size(instance)
            self._grant(instance, instance.plan_level, batch, min(batch, instance.waiting), now)

    def _queue(self, instance: Instance, waiting: int, deadline_us: int, now: int) -> None:
        if waiting and not instance.waiting and instance.run is None:
            busy = [i.model.vtime for i in self.instances.values() if i.run or i.waiting]
            instance.model.vtime = max(instance.model.vtime, min(busy, default=0.0))
        super()._queue(instance, waiting, deadline_us, now)
