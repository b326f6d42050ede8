"""D-STACK: deadlines in time, shares in space (DESIGN section 4).

Each pass looks at the instances with work, most urgent first (latest start = earliest deadline - run time):

1. each gets its share, or more of what is free where it needs it, and the largest batch that still makes its
   deadline (choice.py);
2. the first one that does not fit reserves its place at the predicted end of those that run, and nobody
   behind it may take that place;
3. what is left over goes down the list (work-conserving), best-effort models last; a batch that is not full
   may wait for more rows, unless the shares are fixed, all fit side by side and much of the GPU is idle;
4. while an instance runs, its next batch is decided shortly before the end and chained behind it;
5. under overload the order is by scoreboard: the least served for its weight first, so that who asks for
   more than its part is who misses; every such miss and every session without a run is reported;
6. while nobody waits, who runs out of work gets a standing grant, so that its next request need not ask, if
   all others that were active lately could still start beside it. It is revoked when somebody does not fit.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from dstack_sched.domain.decision import Overload
from dstack_sched.domain.event import BackendJoined, BackendLeft, BatchStarted, PlanChanged
from dstack_sched.engine.base import ROUNDING
from dstack_sched.engine.books import WAKE_CHAIN, WAKE_GO, WAKE_SESSION
from dstack_sched.engine.choice import MIN_SESSION_US, ChoosingEngine, Pick, Place, Rules
from dstack_sched.engine.run_times import RunTimes
from dstack_sched.engine.state import NEVER, Instance, Run

CROWDED = 0.5  # of the capacity is in use
AT_EASE = 0.2  # of its objective, for one row
LATELY_US = 100_000  # who was active since then may come again at any moment
Entry = tuple[int, int, Instance, bool]  # urgency, serial (ties by age), instance, whether it runs
ROWS_WORTH_WAITING = 0.5  # rows expected until it must go
MISS_RATE_GAIN = 0.02  # one grant's weight in the miss rate
OVERLOAD_ON, OVERLOAD_OFF = 0.05, 0.02


class DStackEngine(ChoosingEngine):
    """D-STACK on one GPU. See the module for its rules, EngineBase for what it remembers."""

    policy = "dstack"

    def __init__(self, rules: Rules | None = None) -> None:
        super().__init__(rules)
        self._misses = 0.0  # moving average of the part of rows that a grant could not serve in time
        self._smallest = 0.0  # the smallest share that anyone can run at
        self._vfloor = 0.0  # virtual time of the last model that started
        self._ready: list[Entry] = []  # who may be granted now, most urgent first
        self._parked: list[Entry] = []  # have work, but wait for more; in the same order
        self._chainable = 0  # how many of them run already
        self._all_fit = False  # fixed shares, of all side by side
        self._emptied: Instance | None = None  # has just run out of work

    # ---- events ---------------------------------------------------------------------------------------

    def _on_joined(self, event: BackendJoined, now: int) -> None:
        super()._on_joined(event, now)
        self._resize()
        self._place(self.instances[event.instance], now)

    def _on_started(self, event: BatchStarted, now: int) -> None:
        super()._on_started(event, now)
        instance = self.instances.get(event.instance)
        if instance is not None and instance.run is not None:
            self._vfloor = max(self._vfloor, instance.model.vtime)

    def _on_left(self, event: BackendLeft, now: int) -> None:
        super()._on_left(event, now)
        self._resize()

    def _on_plan(self, event: PlanChanged, now: int) -> None:
        super()._on_plan(event, now)
        self._resize()
        for instance in self.instances.values():
            self._place(instance, now)

    def _forget(self, name: str, now: int) -> None:
        instance = self.instances.get(name)
        if instance is not None:
            self._unplace(instance)
        super()._forget(name, now)
        if instance is not None:
            self._unplace(instance)
            self._weights -= instance.claim_weight

    def _resize(self) -> None:
        """Recompute what depends on who is there."""
        instances = self.instances.values()
        objectives = [i.slo_us for i in instances if i.slo_us > 0]
        self.session_us = max(objectives, default=MIN_SESSION_US)
        self._shortest_slo_us = min(objectives, default=NEVER)
        self._smallest = min((min(i.levels[0], self.capacity) for i in instances), default=0.0)
        self._stretch()
        fixed = [min(i.levels[0], self.capacity) for i in instances if len(i.levels) == 1]
        self._all_fit = len(fixed) == len(instances) and sum(fixed) <= self.capacity + ROUNDING

    def _on_wake(self, kind: int, instance: Instance, token: int, now: int) -> None:
        super()._on_wake(kind, instance, token, now)
        run = instance.run
        if kind == WAKE_CHAIN and run is not None:
            if run.end_us - self.rules.chain_lead_us > now:  # slowed down meanwhile: ask again later
                self._wake(run.end_us - self.rules.chain_lead_us, WAKE_CHAIN, instance, token)
                return
            # Under overload the queue is never empty: what comes until the end is worth more than the gap.
            instance.chainable = not self.overloaded or self._is_alone(instance, now)
        elif kind == WAKE_SESSION:
            instance.model.reported_us = -NEVER  # at most one of these a session anyhow: never held back
            self._report(instance, f"{instance.waiting} rows without a run for a whole session", now)
            instance.boosted = True
            self._wake(now + self.session_us, WAKE_SESSION, instance, token)
        self._place(instance, now)

    def _queue(self, instance: Instance, waiting: int, deadline_us: int, now: int) -> None:
        since = instance.work_since_us
        if waiting == 0:
            self._emptied = instance
        if instance.waiting == 0 and instance.run is None:
            if waiting == 0:
                return
            if now - instance.active_us > self.session_us:  # who was away does not save up service
                instance.model.vtime = max(instance.model.vtime, self._vfloor)
        instance.active_us = now
        super()._queue(instance, waiting, deadline_us, now)
        if instance.run is not None and not instance.chainable and waiting:
            instance.chainable = self._is_alone(instance, now)
        if instance.work_since_us not in (since, NEVER):
            self._wake(now + self.session_us, WAKE_SESSION, instance, instance.work_since_us)
        self._place(instance, now)

    def _drop(self, instance: Instance, now: int) -> None:
        super()._drop(instance, now)
        instance.active_us = now
        self._place(instance, now)

    def _begin(self, instance: Instance, run: Run, now: int) -> None:
        instance.chainable = instance.boosted = False
        super()._begin(instance, run, now)
        instance.chainable = self._is_alone(instance, now)
        if self.rules.chain and not instance.chainable:
            self._wake(
                max(run.end_us - self.rules.chain_lead_us, now + 1), WAKE_CHAIN, instance, run.grant_id
            )

    def _is_alone(self, instance: Instance, now: int) -> bool:
        """Whether nobody else has used the GPU lately: then its next batch may be decided at any time.

        Not where late requests are rejected under overload: an early decision sheds by a time still far."""
        if not self.rules.chain or (self.overloaded and instance.reject):
            return False
        if len(self.running) > (instance.run is not None) or self._parked:
            return False
        return all(
            other is instance or (not other.waiting and now - other.active_us > LATELY_US)
            for other in self.instances.values()
        )

    # ---- the order ------------------------------------------------------------------------------------

    def _place(self, instance: Instance, now: int) -> None:
        """Put an instance where it belongs among those that may be granted, or take it out."""
        self._unplace(instance)
        activity = 1.0 if instance.run is not None or instance.waiting > 0 else instance.duty
        weight = instance.model.weight * activity
        self._weights += weight - instance.claim_weight
        instance.claim_weight = weight
        if instance.waiting == 0 or instance.lost_grant or instance.chained is not None:
            return
        if instance.standing is not None:  # what waits there will run under it
            return
        if instance.run is not None and not instance.chainable:
            return
        if instance.name not in self.instances:
            return
        running = instance.run is not None
        instance.entry = (self._urgency(instance), instance.serial, instance, running)
        insort(self._ready, instance.entry)
        self._chainable += running

    def _unplace(self, instance: Instance) -> None:
        entry = instance.entry
        if entry is not None:
            held = self._parked if instance.parked else self._ready
            del held[bisect_left(held, entry)]
            self._chainable -= entry[3]
            instance.entry, instance.parked = None, False

    def _park(self, instance: Instance, until_us: int) -> None:
        """Leave an instance aside until then, or until its queue changes: a pass looks only at the others."""
        entry = instance.entry
        assert entry is not None and instance.run is None
        self._unplace(instance)
        insort(self._parked, entry)
        instance.entry, instance.parked = entry, True
        self._wake(until_us, WAKE_GO, instance, instance.deadline_us)

    def _urgency(self, instance: Instance) -> int:
        """Latest start; under overload plus the virtual time; best-effort models after all others."""
        if instance.boosted:
            return 0
        service = int(instance.model.vtime / self.capacity) if self.overloaded or not instance.slo_us else 0
        if not instance.slo_us:
            return NEVER // 2 + service
        times = instance.times
        rows = min(instance.waiting, instance.batch_size)
        run_us = times.us[instance.level][rows] * times.scale * instance.model.slowdown(self.promised)
        return instance.deadline_us - int(run_us) + service

    # ---- the pass -------------------------------------------------------------------------------------

    def _schedule(self, now: int) -> None:
        ready, parked, reserve = self._ready, self._parked, self.rules.reserve
        if parked and not self.running:  # nobody waits beside an idle GPU
            for entry in tuple(parked):
                self._place(entry[2], now)
        at = 0
        place: Place | None = None  # what the first one that did not fit has reserved
        while at < len(ready):
            free = self.capacity - self.granted
            if free + ROUNDING < self._smallest and not self._chainable:
                break
            instance = ready[at][2]
            pick = self._pick(instance, free + instance.share, now)
            if instance.parked:
                continue
            if place is None and reserve and parked and parked[0] < ready[at]:
                place = self._reserve(parked[0][2], free, now)
            if pick is not None and (place is None or place.admits(pick)):
                self._carry_out(instance, pick, now)
                if place is not None:
                    place.spare -= pick.percent
                continue
            if pick is None and place is None and reserve:
                place = self._reserve(instance, free, now)
            at += 1
        emptied, self._emptied = self._emptied, None
        if self.standing and (not all(entry[3] for entry in ready) or self._is_crowded()):
            self._revoke_standing(now)
        elif emptied is not None and not ready and not parked:
            self._offer(emptied, now)

    def _is_crowded(self) -> bool:
        """Whether one holds a standing grant of more than its planned share while others run: what was the
        best share of an idle GPU is so no more, and takes from theirs."""
        return bool(self.running) and any(
            i.standing is not None and i.standing.level > i.plan_level for i in self.instances.values()
        )

    def _offer(self, instance: Instance, now: int) -> None:
        """A standing grant for an instance without work, where it takes no place from the others."""
        idle = instance.run is None and instance.standing is None and not instance.lost_grant
        if not self.rules.stand or not idle or self.overloaded or instance.name not in self.instances:
            return
        free = self.capacity - self.granted
        for other in self.instances.values():
            if other is instance or (other.share == 0.0 and now - other.active_us > LATELY_US):
                continue
            if not (self._is_at_ease(instance) and self._is_at_ease(other)):
                return
            if other.share == 0.0:  # it may come at any moment, and is to find its place
                free -= min(other.levels[other.plan_level], self.capacity)
        instance.expected, instance.deadline_us = 1, now + instance.slo_us
        slow = max(instance.model.slowdown(self.promised), instance.slow_seen)
        pick = self._choose(instance, free, now, slow, now)
        if pick is not None:
            self._stand(instance, pick.level, max(1, pick.batch), now)

    def _is_at_ease(self, instance: Instance) -> bool:
        """Whether its planned share is enough beside all others: it will not ask for more of the GPU, which
        standing grants would keep from it."""
        if len(instance.levels) == 1 or not instance.slo_us:
            return True
        times, level = instance.times, instance.plan_level
        slow = instance.model.slowdown(max(self.capacity - instance.levels[level], 0.0))
        return times.us[level][1] * times.scale * slow <= AT_EASE * instance.slo_us

    def _carry_out(self, instance: Instance, pick: Pick, now: int) -> None:
        """Shed, grant, keep the books."""
        if pick.shed_before_us:
            self._shed(instance, pick.shed_before_us, pick.left)
            self._report(instance, "rows shed that could not make their deadline", now)
        if pick.batch:
            self._grant(instance, pick.level, pick.batch, pick.rows, now)
            if instance.work_since_us != NEVER:
                self._wake(now + self.session_us, WAKE_SESSION, instance, instance.work_since_us)
            self._vfloor = max(self._vfloor, instance.model.vtime)
        self._note_misses(pick.missed)
        self._place(instance, now)

    def _pick(self, instance: Instance, available: float, now: int) -> Pick | None:
        """The best share and batch within `available` percent, or None when it should wait for more."""
        run = instance.run
        start = now if run is None else max(run.end_us, now)
        # A chained batch takes what has come by the time it starts.
        instance.expected = instance.waiting + int(instance.rate_per_us * (start - now))
        beside = self.promised - (run.percent if run is not None else 0.0)
        slow = instance.model.slowdown(beside)
        if self.rules.foresee:
            slow = max(slow, instance.slow_seen)
        if self.rules.patience < 1 and self._may_wait(instance, start, slow, now):
            return None
        return self._choose(instance, available, start, slow, now)

    def _may_wait(self, instance: Instance, start: int, slow: float, now: int) -> bool:
        if not instance.slo_us or instance.waiting >= instance.batch_size or instance.boosted:
            return False
        if not self.running or (self._all_fit and self.promised <= CROWDED * self.capacity):
            return False  # its place would stay empty meanwhile
        times = instance.times
        run_us = times.us[instance.plan_level][instance.waiting] * times.scale * slow * self._margin(times)
        go_us = instance.deadline_us - int(run_us + self._patience(instance) * instance.slo_us)
        if go_us <= start:
            return False
        if instance.rate_per_us * (go_us - start) < ROWS_WORTH_WAITING:
            return False
        if instance.run is None:
            self._wait(instance, go_us, slow, now)
        return True

    def _patience(self, instance: Instance) -> float:
        """The part of the objective that is left when it stops waiting: more, the more it was late lately."""
        return self.rules.patience + self.rules.haste * instance.late_seen

    def _margin(self, times: RunTimes) -> float:
        """What a run may take over its prediction, where waiting is a choice: nearly the worst seen."""
        return 1.0 + self.rules.safety + self.rules.jitter * times.spread

    def _wait(self, instance: Instance, go_us: int, slow: float, now: int) -> None:
        """Park it for as long as `_may_wait` would say so whatever its co-runners do, then look at it in
        every pass until go_us."""
        times = instance.times
        worst = max(slow, instance.model.slowdown(self.capacity)) * self._margin(times)
        run_us = times.us[instance.plan_level][instance.waiting] * times.scale * worst
        surely_us = (
            run_us + self._patience(instance) * instance.slo_us + ROWS_WORTH_WAITING / instance.rate_per_us
        )
        until_us = instance.deadline_us - int(surely_us) - 2
        if until_us > now:  # a far deadline must not fill the agenda: look again after one objective
            self._park(instance, min(until_us, now + instance.slo_us))
        elif instance.go_us != go_us:
            instance.go_us = go_us
            self._wake(go_us, WAKE_GO, instance, instance.deadline_us)

    def _reserve(self, instance: Instance, free: float, now: int) -> Place:
        """When the predicted ends free enough for this one, and what is left over then."""
        level = instance.plan_level
        need = min(instance.levels[level], self.capacity)
        ends = sorted(
            (i.run.end_us, i.share) for i in self.running if i.run is not None and i.chained is None
        )
        at_us = now
        for end_us, share in ends:
            if free + ROUNDING >= need:
                break
            free += share
            at_us = end_us
        return Place(max(at_us, now), free - need)

    # ---- overload -------------------------------------------------------------------------------------

    def _note_misses(self, missed: float) -> None:
        self._misses += MISS_RATE_GAIN * (missed - self._misses)
        contended = self.rules.scoreboard and not self._all_fit
        overloaded = contended and self._misses > (OVERLOAD_OFF if self.overloaded else OVERLOAD_ON)
        if overloaded != self.overloaded:
            self.overloaded = overloaded
            for entry in (*self._ready, *self._parked):
                self._place(entry[2], self.now_us)

    def _report(self, instance: Instance, reason: str, now: int) -> None:
        """At most one overload report a session and model."""
        model = instance.model
        if now - model.reported_us < self.session_us:
            return
        model.reported_us = now
        waited = now - instance.work_since_us if instance.work_since_us != NEVER else 0
        self._out.append(Overload(model.name, reason, waited))
