"""D-STACK: deadlines in time, shares in space (DESIGN section 4).

Each pass looks at the instances with work, most urgent first (latest start = earliest deadline - run time):

1. each gets the share and batch that add most to the GPU's total speed and still meet its deadline;
2. the first one that does not fit reserves its place at the predicted end of those that run, and nobody
   behind it may take that place;
3. what is left over goes down the list (work-conserving), best-effort models last;
4. while an instance runs, its next batch is decided shortly before the end and chained behind it;
5. under overload the order is by scoreboard: the least served for its weight first, so that who asks for
   more than its part is who misses; every such miss and every session without a run is reported;
6. while nobody waits, who runs out of work gets a standing grant, so that its next request need not ask, if
   all others that were active lately could still start beside it. It is revoked when somebody does not fit.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

from dstack_sched.domain.decision import Overload
from dstack_sched.domain.event import BackendJoined, BackendLeft, BatchStarted, PlanChanged
from dstack_sched.engine.base import ROUNDING, EngineBase
from dstack_sched.engine.books import WAKE_CHAIN, WAKE_GO, WAKE_SESSION
from dstack_sched.engine.state import NEVER, Instance, Run


@dataclass(frozen=True, slots=True)
class Rules:
    """The engine's rules and their settings; every one can be switched off to measure what it brings.

    chain: decide the next batch chain_lead_us before the running one ends (not under overload). levels:
    choose the share of each batch. reserve: nobody overtakes the first one that does not fit. scoreboard:
    order by service under overload. shed: reject what cannot make it (where the model allows). run_fraction:
    no run longer than this part of the objective. safety: part of a run time kept in hand when a deadline is
    checked. patience: a batch that is not full may wait until this part of the objective is left beyond its
    run time (1: never).
    foresee: predict with the slowdown by co-runners seen lately where it is more than now's. stand: give
    standing grants.
    """

    chain: bool = True
    chain_lead_us: int = 400
    levels: bool = True
    reserve: bool = True
    scoreboard: bool = True
    shed: bool = True
    run_fraction: float = 0.7
    safety: float = 0.02
    patience: float = 0.3
    foresee: bool = True
    stand: bool = True


LATELY_US = 100_000  # who was active since then may come again at any moment
MIN_SESSION_US = 100_000  # where no model has an objective
Entry = tuple[int, int, Instance, bool]  # urgency, serial (ties by age), instance, whether it runs
ROWS_WORTH_WAITING = 0.5  # rows expected until it must go
MISS_RATE_GAIN = 0.02  # one grant's weight in the miss rate
OVERLOAD_ON, OVERLOAD_OFF = 0.05, 0.02


class Pick:
    """A candidate grant. gain: speed it adds to the GPU, in worth per microsecond. batch 0: shed only."""

    __slots__ = ("batch", "end_us", "gain", "left", "level", "missed", "percent", "rows", "shed_before_us")

    def __init__(
        self, level: int, percent: float, batch: int, rows: int, end_us: int, gain: float,
        shed_before_us: int = 0, left: int = 0, missed: float = 0.0,
    ) -> None:  # fmt: skip
        self.level = level
        self.percent = percent
        self.batch = batch
        self.rows = rows
        self.end_us = end_us
        self.gain = gain
        self.shed_before_us = shed_before_us
        self.left = left  # rows that stay after the shedding
        self.missed = missed  # part of the waiting rows that is lost or late


class Place:
    """A reservation: nobody behind may run beyond at_us with more than `spare` percent."""

    __slots__ = ("at_us", "spare")

    def __init__(self, at_us: int, spare: float) -> None:
        self.at_us = at_us
        self.spare = spare

    def admits(self, pick: Pick) -> bool:
        return pick.end_us <= self.at_us or pick.percent <= self.spare + ROUNDING


class DStackEngine(EngineBase):
    """D-STACK on one GPU. See the module for its rules, EngineBase for what it remembers."""

    policy = "dstack"

    def __init__(self, rules: Rules | None = None) -> None:
        super().__init__()
        self.rules = rules or Rules()
        self.session_us = MIN_SESSION_US
        self.overloaded = False
        self._misses = 0.0  # moving average of the part of rows that a grant could not serve in time
        self._smallest = 0.0  # the smallest share that anyone can run at
        self._shortest_slo_us = NEVER
        self._vfloor = 0.0  # virtual time of the last model that started
        self._ready: list[Entry] = []  # who may be granted now, most urgent first
        self._parked: list[Entry] = []  # have work, but wait for more; in the same order
        self._weights = 0.0  # weights of those that have work, or mostly have
        self._chainable = 0  # how many of them run already
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
            instance.run.worth = instance.run.rows * instance.worth_per_row
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
        """Whether one with a choice of shares holds a standing grant while others run: what was the best
        share of an idle GPU is so no more, and takes from theirs."""
        return bool(self.running) and any(
            i.standing is not None and len(i.levels) > 1 for i in self.instances.values()
        )

    def _offer(self, instance: Instance, now: int) -> None:
        """A standing grant for an instance without work, where it takes no place from the others."""
        idle = instance.run is None and instance.standing is None and not instance.lost_grant
        if not self.rules.stand or not idle or self.overloaded or instance.name not in self.instances:
            return
        level = instance.level
        free = self.capacity - self.granted - min(instance.levels[level], self.capacity)
        for other in self.instances.values():
            if other.run is not None or other.standing is not None or other is instance:
                continue
            if now - other.active_us > LATELY_US:
                continue
            if len(instance.levels) > 1:  # the other's coming changes the share that is best for this one
                return
            free -= min(other.levels[other.plan_level], self.capacity)
        if free < -ROUNDING or (len(instance.levels) > 1 and self.running):
            return
        instance.expected, instance.deadline_us = 1, now + instance.slo_us
        pick = self._batch(instance, level, now, instance.model.slowdown(self.promised), now)
        self._stand(instance, level, max(1, pick.batch), now)

    def _carry_out(self, instance: Instance, pick: Pick, now: int) -> None:
        """Shed, grant, keep the books."""
        if pick.shed_before_us:
            self._shed(instance, pick.shed_before_us, pick.left)
            self._report(instance, "rows shed that could not make their deadline", now)
        if pick.batch:
            run = self._grant(instance, pick.level, pick.batch, pick.rows, now)
            run.worth = pick.rows * instance.worth_per_row
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
        levels = instance.levels
        if not self.rules.levels or len(levels) == 1:
            level = instance.plan_level
            if min(levels[level], self.capacity) > available + ROUNDING:
                return None
            return self._batch(instance, level, start, slow, now)
        best: Pick | None = None
        loss = self._loss(instance)
        ceiling = min(available, self._fair_part(instance)) + ROUNDING
        for level, percent in enumerate(levels):
            if percent > ceiling and best is not None:
                break
            if percent > available + ROUNDING:
                break
            pick = self._batch(instance, level, start, slow, now)
            pick.gain -= loss * percent
            if best is None or pick.gain > best.gain:
                best = pick
        return best

    def _may_wait(self, instance: Instance, start: int, slow: float, now: int) -> bool:
        if not instance.slo_us or instance.waiting >= instance.batch_size or instance.boosted:
            return False
        if not self.running:
            return False
        times = instance.times
        run_us = (
            times.us[instance.plan_level][instance.waiting] * times.scale * slow * (1 + self.rules.safety)
        )
        go_us = instance.deadline_us - int(run_us + self.rules.patience * instance.slo_us)
        if go_us <= start:
            return False
        if instance.rate_per_us * (go_us - start) < ROWS_WORTH_WAITING:
            return False
        if instance.run is None:
            self._wait(instance, go_us, slow, now)
        return True

    def _wait(self, instance: Instance, go_us: int, slow: float, now: int) -> None:
        """Park it for as long as `_may_wait` would say so whatever its co-runners do, then look at it in
        every pass until go_us."""
        times, rules = instance.times, self.rules
        worst = max(slow, instance.model.slowdown(self.capacity)) * (1 + rules.safety)
        run_us = times.us[instance.plan_level][instance.waiting] * times.scale * worst
        surely_us = run_us + rules.patience * instance.slo_us + ROWS_WORTH_WAITING / instance.rate_per_us
        until_us = instance.deadline_us - int(surely_us) - 2
        if until_us > now:  # a far deadline must not fill the agenda: look again after one objective
            self._park(instance, min(until_us, now + instance.slo_us))
        elif instance.go_us != go_us:
            instance.go_us = go_us
            self._wake(go_us, WAKE_GO, instance, instance.deadline_us)

    def _loss(self, instance: Instance) -> float:
        """Speed that the others lose per percent granted to this one."""
        loss = 0.0
        for other in self.running:
            run = other.run
            if run is not None and other is not instance:
                slope = other.model.slope(self.promised - run.percent)
                loss += run.worth * slope / (run.alone_us * run.slow * run.slow)
        return loss

    def _fair_part(self, instance: Instance) -> float:
        """The most one may take while others have work: an equal part of the capacity."""
        active = len(self.running) + len(self._ready) - self._chainable
        return self.capacity / max(active, 1)

    def _batch(self, instance: Instance, level: int, start: int, slow: float, now: int) -> Pick:
        """The best batch at this level, starting at `start` with this slowdown by co-runners."""
        times, waiting, slo_us = instance.times, instance.expected, instance.slo_us
        percent = min(instance.levels[level], self.capacity)
        factor = slow * (1.0 + self.rules.safety)
        if not slo_us:
            batch = max(1, times.largest_batch(level, self._shortest_slo_us / 2 / factor))
            return self._filled(instance, level, percent, batch, start, factor)
        longest_us = self.rules.run_fraction * slo_us
        if self.overloaded:  # nobody runs longer than its part of a session
            part = instance.model.weight / max(self._weights, instance.model.weight)
            longest_us = min(longest_us, part * self.session_us * self.capacity / percent)
        batch = max(1, times.largest_batch(level, longest_us / factor))
        slack = instance.deadline_us - start
        fit = times.largest_batch(level, slack / factor) if slack > 0 else 0
        want = min(waiting, batch)
        if fit >= want:
            return self._filled(instance, level, percent, min(batch, fit), start, factor)
        return self._rescue(instance, level, percent, batch, fit, start, factor, now)

    def _filled(
        self, instance: Instance, level: int, percent: float, batch: int, start: int, factor: float
    ) -> Pick:
        """All rows of the batch make it."""
        rows = min(instance.expected, batch)
        run_us = instance.times.us[level][rows] * instance.times.scale * factor
        return Pick(level, percent, batch, rows, start + int(run_us), rows * instance.worth_per_row / run_us)

    def _rescue(
        self,
        instance: Instance,
        level: int,
        percent: float,
        batch: int,
        fit: int,
        start: int,
        factor: float,
        now: int,
    ) -> Pick:
        """Not all make it: serve the `fit` most urgent in time, or give them up for a larger batch of
        younger ones, whichever brings more rows in time per microsecond."""
        times, waiting, worth = instance.times, instance.expected, instance.worth_per_row
        row_us = times.us[level]
        want = min(waiting, batch)
        whole_us = row_us[want] * times.scale * factor
        end = start + int(whole_us)
        latest = now + instance.slo_us  # deadlines of those that wait lie between the earliest and this
        width = max(latest - instance.deadline_us, 1)
        alive = int(waiting * min(max((latest - end) / width, 0.0), 1.0))
        young = min(alive, want)
        young_us = row_us[young] * times.scale * factor if young else whole_us
        shed = instance.reject and self.rules.shed
        if fit:
            fit_us = row_us[fit] * times.scale * factor
            if not shed or fit / fit_us >= young / young_us:
                return Pick(level, percent, fit, fit, start + int(fit_us), fit * worth / fit_us)
        missed = (waiting - alive) / waiting
        if shed:
            if not young:
                end = start + int(row_us[1] * times.scale * factor)
                return Pick(level, percent, 0, 0, start, 0.0, end, 0, missed)
            end = start + int(young_us)
            return Pick(
                level, percent, max(young, 1), young, end, young * worth / young_us, end, alive, missed
            )
        return Pick(level, percent, want, want, end, 0.1 * want * worth / whole_us, 0, 0, missed)

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
        overloaded = self.rules.scoreboard and self._misses > (
            OVERLOAD_OFF if self.overloaded else OVERLOAD_ON
        )
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
