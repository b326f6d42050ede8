"""What every policy shares: events, queues, and the books on grants. A policy only says who runs next.

The world is told by events; `_schedule`, the policy's part, is called after each.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop
from typing import Any, ClassVar

from dstack_sched.domain.decision import Decision, Overload
from dstack_sched.domain.event import (
    BackendJoined,
    BackendLeft,
    BatchFinished,
    BatchStarted,
    EngineModel,
    Event,
    PlanChanged,
    TimerFired,
    WorkQueued,
)
from dstack_sched.engine.books import LEASE_MARGIN_US, WAKE_LEASE, WAKE_STANDING, Books
from dstack_sched.engine.run_times import Seen
from dstack_sched.engine.state import NEVER, Instance, ModelState, Run, Story

LOST_RETRY_US = 1_000_000  # work reported this long after a lease ran out: the instance is tried again
RATE_WINDOW_US = 100_000
LATE_GAIN = 0.02  # one batch's weight in the part of rows that are late
ROUNDING = 1e-6  # GPU%: sums of floats


class EngineBase(Books):
    """Bookkeeping of one GPU. Subclasses implement `_schedule(now_us)` and set `policy`."""

    policy: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__()
        self.now_us = 0
        self.models: dict[str, ModelState] = {}
        self._join_serial = 0
        self._story = Story()
        self._doors: dict[type, Callable[[Any, int], None]] = {
            WorkQueued: self._on_work,
            BatchFinished: self._on_finished,
            BatchStarted: self._on_started,
            TimerFired: self._on_timer,
            BackendJoined: self._on_joined,
            BackendLeft: self._on_left,
            PlanChanged: self._on_plan,
        }

    # ---- the door -------------------------------------------------------------------------------------

    def handle(self, event: Event, now_us: int) -> list[Decision]:
        """See Engine.handle. Decisions come in the order in which they must be carried out."""
        now = self.now_us = now_us if now_us > self.now_us else self.now_us
        out: list[Decision] = []
        self._out = out
        self._story.append((now, event))
        self._doors[type(event)](event, now)
        agenda = self._agenda
        while agenda and agenda[0][0] <= now:
            _, _, kind, instance, token = heappop(agenda)
            if self._is_due(kind, instance, token):
                self._on_wake(kind, instance, token, now)
        self._schedule(now)
        self._set_timer(now)
        return out

    def _schedule(self, now: int) -> None:
        raise NotImplementedError

    # ---- events ---------------------------------------------------------------------------------------

    def _on_work(self, event: WorkQueued, now: int) -> None:
        instance = self.instances.get(event.instance)
        if instance is None:
            return
        if instance.lost_grant and now - instance.lost_us > LOST_RETRY_US:
            instance.lost_grant = 0
        if instance.standing is not None and event.waiting:  # its report and the grant have crossed
            self._revoke(instance, now)
        self._queue(instance, event.waiting, event.earliest_deadline_us, now)

    def _on_finished(self, event: BatchFinished, now: int) -> None:
        instance = self.instances.get(event.instance)
        if instance is None:
            return
        run = instance.run
        if event.grant_id == instance.lost_grant:
            instance.lost_grant = 0
        standing = instance.standing
        if standing is not None and event.grant_id == standing.grant_id:
            self._unstand(instance)
            if event.rows > 0 and run is None:  # so short that its start was not told
                self._start_standing(instance, standing, event.rows, now)
                standing.start_us = standing.touched_us = now - event.run_us
                self._retire(instance, standing, event.rows, event.run_us, now)
        elif run is not None and event.grant_id == run.grant_id:
            self._retire(instance, run, event.rows, event.run_us, now)
        elif instance.chained is not None and event.grant_id == instance.chained.grant_id:
            self._drop(instance, now)  # both are over: the first one's end got lost
            if instance.run is not None:
                self._retire(instance, instance.run, event.rows, event.run_us, now)
        instance.model.late_rows += event.late
        if event.rows:
            instance.late_seen += LATE_GAIN * (event.late / event.rows - instance.late_seen)
        self._count_rate(instance, event, now)
        self._queue(instance, event.waiting, event.earliest_deadline_us, now)

    def _on_started(self, event: BatchStarted, now: int) -> None:
        instance = self.instances.get(event.instance)
        if instance is None:
            return
        run = instance.standing
        if run is not None and run.grant_id == event.grant_id and instance.run is None:
            self._unstand(instance)
            self._start_standing(instance, run, event.rows, now)
        self._queue(instance, event.waiting, event.earliest_deadline_us, now)

    def _on_timer(self, event: TimerFired, now: int) -> None:
        self._timer_us = NEVER

    def _on_joined(self, event: BackendJoined, now: int) -> None:
        if event.instance in self.instances:
            self._forget(event.instance, now)
        model = self.models.get(event.model)
        if model is None:
            model = self.models[event.model] = ModelState(_unplanned(event))
        self._join_serial += 1
        instance = Instance(event, model, self._join_serial)
        instance.rate_since_us = now
        self.instances[event.instance] = instance
        if event.sm_groups > self.sm.groups:
            self._resize_sm(event.sm_groups)
        if event.running_percent > 0:
            run = Run(0, instance.level, event.running_percent, 1, 1)
            run.alone_us = run.left_us = max(float(event.running_until_us - now), 1.0)
            run.lease_us = max(event.running_until_us, now) + LEASE_MARGIN_US
            self._ceiling = max(self._ceiling, self.granted + run.percent)
            self._begin(instance, run, now)

    def _on_left(self, event: BackendLeft, now: int) -> None:
        self._forget(event.instance, now)

    def _on_plan(self, event: PlanChanged, now: int) -> None:
        self.capacity = event.capacity_percent
        self._ceiling = max(self.capacity, self.granted)
        for plan in event.models:
            model = self.models.get(plan.name)
            if model is None:
                self.models[plan.name] = ModelState(plan)
            elif model.plan != plan:
                model.adopt(plan)
                for instance in self.instances.values():
                    if instance.model is model:
                        instance.adopt()
        named = {plan.name for plan in event.models}
        used = {instance.model.name for instance in self.instances.values()}
        for name in [name for name in self.models if name not in named and name not in used]:
            del self.models[name]

    def _on_wake(self, kind: int, instance: Instance, token: int, now: int) -> None:
        """An agenda entry is due. Subclasses add their kinds."""
        if kind == WAKE_LEASE:
            instance.lost_grant = token
            instance.lost_us = now
            waited = now - (instance.run.start_us if instance.run else now)
            self._out.append(Overload(instance.model.name, f"lease of {instance.name} ran out", waited))
            self._drop(instance, now)
        elif kind == WAKE_STANDING:
            if instance.revoked:  # it does not answer: tried again once it reports work
                instance.lost_grant = token
                instance.lost_us = now
                self._out.append(Overload(instance.model.name, f"{instance.name} keeps a revoked grant", 0))
            self._unstand(instance)

    # ---- queues ---------------------------------------------------------------------------------------

    def _queue(self, instance: Instance, waiting: int, deadline_us: int, now: int) -> None:
        if waiting > 0:
            if instance.waiting == 0:
                instance.work_since_us = now
            instance.deadline_us = deadline_us
        else:
            instance.work_since_us = NEVER
        instance.waiting = waiting

    def _count_rate(self, instance: Instance, event: BatchFinished, now: int) -> None:
        """Rows served and queue growth per microsecond, averaged over RATE_WINDOW_US windows."""
        instance.rate_rows += event.rows
        elapsed = now - instance.rate_since_us
        if elapsed >= RATE_WINDOW_US:
            rate = instance.rate_rows / elapsed
            instance.rate_per_us += 0.5 * (rate - instance.rate_per_us) if instance.rate_per_us else rate
            instance.duty += 0.5 * (min(instance.busy_us / elapsed, 1.0) - instance.duty)
            instance.busy_us = 0
            instance.rate_rows = 0
            instance.rate_since_us = now

    # ---- for people and tests -------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """See Engine.check_invariants."""
        shares = sum(i.share for i in self.instances.values())
        problems = []
        held = [sum(i.held >> g & 1 for i in self.instances.values()) for g in range(self.sm.groups)]
        if held != [self.sm.holders(g) for g in range(self.sm.groups)]:
            problems.append(f"SM groups are held by {held}")
        if self.standing != sum(i.standing is not None for i in self.instances.values()):
            problems.append(f"{self.standing} standing grants counted")
        if abs(shares - self.granted) > ROUNDING:
            problems.append(f"granted {self.granted} but shares sum to {shares}")
        if self.granted > self._ceiling + ROUNDING:
            problems.append(f"granted {self.granted}% exceeds {self._ceiling}%")
        if {i.name for i in self.running} != {i.name for i in self.instances.values() if i.run}:
            problems.append("the running list is not what runs")
        for instance in self.instances.values():
            if instance.chained is not None and instance.run is None:
                problems.append(f"{instance.name}: chained behind nothing")
            holds = instance.run is not None or instance.standing is not None
            if instance.run is not None and instance.standing is not None:
                problems.append(f"{instance.name}: runs beside its standing grant")
            if instance.waiting < 0 or (instance.share > 0) != holds:
                problems.append(f"{instance.name}: waiting {instance.waiting}, share {instance.share}")
        assert not problems, f"{self.policy}: {'; '.join(problems)}; last events:\n{self._story}"

    def run_times(self, model: str) -> tuple[Seen, ...]:
        """See Engine.run_times."""
        mine = (instance for instance in self.instances.values() if instance.model.name == model)
        return tuple(seen for instance in mine for seen in instance.times.seen())

    def snapshot(self) -> dict[str, Any]:
        """See Engine.snapshot."""
        standing = sum(i.standing.percent for i in self.instances.values() if i.standing)
        return {
            "policy": self.policy,
            "now_us": self.now_us,
            "capacity_percent": self.capacity,
            "granted_percent": self.granted - standing if self.running else 0.0,
            "standing_percent": standing,
            "models": {
                name: {
                    "slo_us": model.slo_us,
                    "weight": model.weight,
                    "served_percent_us": round(model.served_percent_us),
                    "late_rows": model.late_rows,
                    "shed_count": model.shed_count,
                }
                for name, model in self.models.items()
            },
            "instances": {name: _instance_view(i) for name, i in self.instances.items()},
        }


def _instance_view(instance: Instance) -> dict[str, Any]:
    run = instance.run
    return {
        "model": instance.model.name,
        "waiting": instance.waiting,
        "earliest_deadline_us": instance.deadline_us if instance.waiting else 0,
        "gpu_percent": instance.share,
        "grant_id": run.grant_id if run else 0,
        "chained_grant_id": instance.chained.grant_id if instance.chained else 0,
        "standing_grant_id": instance.standing.grant_id if instance.standing else 0,
        "sm_groups": instance.held,
        "predicted_end_us": run.end_us if run else 0,
        "levels": list(instance.levels),
        "rate_per_s": round(instance.rate_per_us * 1e6, 1),
        "run_time_scale": round(instance.times.scale, 3),
        "lost": bool(instance.lost_grant),
    }


def _unplanned(joined: BackendJoined) -> EngineModel:
    """The plan of a model that joined before any plan: what its instance says of itself."""
    return EngineModel(
        joined.model,
        joined.gpu_percent,
        joined.batch_size,
        joined.slo_us,
        1.0,
        joined.on_late,
        joined.gpu_percent,
    )
