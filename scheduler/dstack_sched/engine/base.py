"""What every policy shares: queues, grants, shares, leases, the timer. A policy only says who runs next.

The world is told by events; `_schedule`, the policy's part, is called after each. Predicted ends follow the
interference model f' = f (1 + 100 k (q/100)^g), q the co-runners' GPU%, as co-runners come and go.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, ClassVar

from dstack_sched.domain.decision import Decision, Grant, Overload, SetTimer, Shed
from dstack_sched.domain.event import (
    BackendJoined,
    BackendLeft,
    BatchFinished,
    EngineModel,
    Event,
    PlanChanged,
    TimerFired,
    WorkQueued,
)
from dstack_sched.engine.run_times import Seen
from dstack_sched.engine.state import NEVER, Instance, ModelState, Run, Story

LEASE_FACTOR = 4  # a lease lasts this many predicted run times ...
LEASE_MARGIN_US = 100_000  # ... and this much more: scheduling noise of a busy host is no death
LEASE_UNKNOWN_US = 2_000_000  # first batches of a model without a profile: warm-up can be slow
LOST_RETRY_US = 1_000_000  # work reported this long after a lease ran out: the instance is tried again
RATE_WINDOW_US = 100_000
ROUNDING = 1e-6  # GPU%: sums of floats

WAKE_LEASE, WAKE_CHAIN, WAKE_GO, WAKE_SESSION = range(4)


class EngineBase:
    """Bookkeeping of one GPU. Subclasses implement `_schedule(now_us)` and set `policy`."""

    policy: ClassVar[str] = ""

    def __init__(self) -> None:
        self.now_us = 0
        self.capacity = 100.0
        self.granted = 0.0
        self.promised = 0.0  # GPU% of the running batches
        self.models: dict[str, ModelState] = {}
        self.instances: dict[str, Instance] = {}
        self.running: list[Instance] = []
        self._ceiling = 100.0  # capacity, or what was granted when it shrank
        self._out: list[Decision] = []
        self._agenda: list[tuple[int, int, int, Instance, int]] = []
        self._agenda_serial = 0
        self._timer_us = NEVER
        self._grant_serial = 0
        self._join_serial = 0
        self._story = Story()
        self._doors: dict[type, Callable[[Any, int], None]] = {
            WorkQueued: self._on_work,
            BatchFinished: self._on_finished,
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
        self._queue(instance, event.waiting, event.earliest_deadline_us, now)

    def _on_finished(self, event: BatchFinished, now: int) -> None:
        instance = self.instances.get(event.instance)
        if instance is None:
            return
        run = instance.run
        if event.grant_id == instance.lost_grant:
            instance.lost_grant = 0
        if run is not None and event.grant_id == run.grant_id:
            self._retire(instance, run, event.rows, event.run_us, now)
        elif instance.chained is not None and event.grant_id == instance.chained.grant_id:
            self._drop(instance, now)  # both are over: the first one's end got lost
            if instance.run is not None:
                self._retire(instance, instance.run, event.rows, event.run_us, now)
        instance.model.late_rows += event.late
        self._count_rate(instance, event, now)
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

    # ---- grants ---------------------------------------------------------------------------------------

    def _grant(self, instance: Instance, level: int, batch: int, rows: int, now: int) -> Run:
        """Grant a batch, now or chained behind the running one. `rows`: how many it will likely hold."""
        self._grant_serial += 1
        percent = min(instance.levels[level], self.capacity)
        run = Run(self._grant_serial, level, percent, batch, rows)
        times = instance.times
        run.alone_us = run.left_us = max(times.us[level][min(rows, times.max_batch)] * times.scale, 1.0)
        whole_us = times.us[level][min(batch, times.max_batch)] * times.scale
        if instance.run is None:
            slow = instance.model.slowdown(self.promised)
            run.lease_us = now + self._lease(instance, whole_us * slow)
            self._begin(instance, run, now)
        else:
            run.slow = instance.model.slowdown(self.promised - instance.run.percent)
            run.lease_us = instance.run.lease_us + self._lease(instance, whole_us * run.slow)
            instance.chained = run
            self._reshare(instance)
        instance.level = level
        self._out.append(Grant(instance.name, run.grant_id, percent, batch, run.lease_us))
        instance.waiting = max(0, instance.waiting - rows)
        instance.work_since_us = now if instance.waiting else NEVER
        return run

    def _lease(self, instance: Instance, predicted_us: float) -> int:
        if not instance.times.known:
            return max(LEASE_UNKNOWN_US, int(LEASE_FACTOR * predicted_us))
        return int(LEASE_FACTOR * predicted_us) + LEASE_MARGIN_US

    def _begin(self, instance: Instance, run: Run, now: int) -> None:
        """`run` is on the device from now on: its share counts, its co-runners slow down."""
        run.start_us = run.touched_us = now
        run.slow = instance.model.slowdown(self.promised)
        run.end_us = now + int(run.left_us * run.slow)
        run.charged = run.percent * run.left_us * run.slow
        instance.model.vtime += run.charged / instance.model.weight
        self._promise(self.promised + run.percent, now)
        instance.run = run
        self.running.append(instance)
        self._reshare(instance)
        self._wake(run.lease_us, WAKE_LEASE, instance, run.grant_id)

    def _retire(self, instance: Instance, run: Run, rows: int, run_us: int, now: int) -> None:
        """The running batch ended: learn from it, free its share or pass it on to the chained one."""
        if run.grant_id and rows > 0:
            self._learn(instance, run, rows, run_us, now)
        self._score(instance, run, run_us if rows > 0 else 0, now)
        self._drop(instance, now)

    def _drop(self, instance: Instance, now: int) -> None:
        """End the running batch; a chained one starts."""
        run = instance.run
        if run is None:
            return
        instance.run = None
        self.running.remove(instance)
        self._promise(self.promised - run.percent if self.running else 0.0, now)
        chained, instance.chained = instance.chained, None
        if chained is not None:
            self._begin(instance, chained, now)
        else:
            self._reshare(instance)

    def _forget(self, name: str, now: int) -> None:
        instance = self.instances.pop(name, None)
        if instance is None:
            return
        instance.chained = None
        self._drop(instance, now)
        instance.waiting = 0
        instance.work_since_us = NEVER

    def _reshare(self, instance: Instance) -> None:
        """Count the instance once, at the larger of its grants."""
        share = instance.run.percent if instance.run else 0.0
        if instance.chained is not None and instance.chained.percent > share:
            share = instance.chained.percent
        self.granted += share - instance.share
        instance.share = share
        if not self.running:
            self.granted = 0.0  # rounding does not pile up
        if self._ceiling > self.capacity:
            self._ceiling = max(self.capacity, self.granted)

    def _promise(self, promised: float, now: int) -> None:
        """A co-runner came or went: the others' predicted ends move."""
        self.promised = promised
        for other in self.running:
            run = other.run
            if run is None:
                continue
            run.left_us = max(run.left_us - (now - run.touched_us) / run.slow, 0.0)
            run.touched_us = now
            run.slow = other.model.slowdown(promised - run.percent)
            run.end_us = now + int(run.left_us * run.slow)

    def _learn(self, instance: Instance, run: Run, rows: int, run_us: int, now: int) -> None:
        """Compare the run time with the prediction, the slowdown by co-runners taken out."""
        elapsed = now - run.start_us
        if elapsed <= 0 or run_us <= 0:
            return
        alone_progress_us = run.alone_us - run.left_us + (now - run.touched_us) / run.slow
        mean_slow = elapsed / alone_progress_us if alone_progress_us > 0 else run.slow
        instance.slow_seen += 0.1 * (mean_slow - instance.slow_seen)
        instance.busy_us += run_us
        instance.times.observe(run.level, rows, run_us / max(mean_slow, 1.0))

    def _score(self, instance: Instance, run: Run, run_us: int, now: int) -> None:
        """Put the GPU%-time on the scoreboard."""
        used = run.percent * run_us
        instance.model.served_percent_us += used
        instance.model.vtime += (used - run.charged) / instance.model.weight
        run.charged = used

    def _shed(self, instance: Instance, before_us: int, left: int) -> None:
        """Reject what is due before before_us; about `left` rows stay."""
        self._out.append(Shed(instance.name, before_us))
        instance.model.shed_count += 1
        instance.waiting = left
        instance.deadline_us = max(instance.deadline_us, before_us)

    # ---- the timer ------------------------------------------------------------------------------------

    def _wake(self, at_us: int, kind: int, instance: Instance, token: int) -> None:
        self._agenda_serial += 1
        heappush(self._agenda, (at_us, self._agenda_serial, kind, instance, token))

    def _is_due(self, kind: int, instance: Instance, token: int) -> bool:
        """Whether an agenda entry still means something; stale ones are dropped unseen."""
        run = instance.run
        if kind == WAKE_LEASE:
            return run is not None and run.grant_id == token
        if kind == WAKE_CHAIN:
            return run is not None and run.grant_id == token and instance.chained is None
        if kind == WAKE_GO:
            return run is None and instance.waiting > 0 and instance.deadline_us == token
        return instance.work_since_us == token

    def _set_timer(self, now: int) -> None:
        agenda = self._agenda
        while agenda and not self._is_due(agenda[0][2], agenda[0][3], agenda[0][4]):
            heappop(agenda)
        if agenda and agenda[0][0] < self._timer_us:
            self._timer_us = max(agenda[0][0], now + 1)
            self._out.append(SetTimer(self._timer_us))

    # ---- for people and tests -------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """See Engine.check_invariants."""
        shares = sum(i.share for i in self.instances.values())
        problems = []
        if abs(shares - self.granted) > ROUNDING:
            problems.append(f"granted {self.granted} but shares sum to {shares}")
        if self.granted > self._ceiling + ROUNDING:
            problems.append(f"granted {self.granted}% exceeds {self._ceiling}%")
        if {i.name for i in self.running} != {i.name for i in self.instances.values() if i.run}:
            problems.append("the running list is not what runs")
        for instance in self.instances.values():
            if instance.chained is not None and instance.run is None:
                problems.append(f"{instance.name}: chained behind nothing")
            if instance.waiting < 0 or (instance.share > 0) != (instance.run is not None):
                problems.append(f"{instance.name}: waiting {instance.waiting}, share {instance.share}")
        assert not problems, f"{self.policy}: {'; '.join(problems)}; last events:\n{self._story}"

    def run_times(self, model: str) -> tuple[Seen, ...]:
        """See Engine.run_times."""
        mine = (instance for instance in self.instances.values() if instance.model.name == model)
        return tuple(seen for instance in mine for seen in instance.times.seen())

    def snapshot(self) -> dict[str, Any]:
        """See Engine.snapshot."""
        return {
            "policy": self.policy,
            "now_us": self.now_us,
            "capacity_percent": self.capacity,
            "granted_percent": self.granted,
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
