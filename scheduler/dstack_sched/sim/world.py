"""The discrete-event loop: the very engine of the arbiter, with simulated backends, delays and faults.

A request is a number in an array of arrival times; a backend is two indices into it. The heap holds messages
and wake-ups only: the GPU's next end is kept beside it, since every start and end moves it.
"""

from __future__ import annotations

from bisect import bisect_left
from heapq import heappop, heappush
from math import ceil

import numpy as np

from dstack_sched.domain.decision import Decision, Grant, Overload, Revoke, SetTimer, Shed
from dstack_sched.domain.event import (
    BackendJoined,
    BackendLeft,
    BatchFinished,
    BatchStarted,
    Event,
    TimerFired,
    WorkQueued,
)
from dstack_sched.engine.interface import Engine
from dstack_sched.sim.backend import FOREVER, Backend
from dstack_sched.sim.chart import Interval
from dstack_sched.sim.gpu import Gpu, Job
from dstack_sched.sim.scenario import Fault, Scenario, SimInstance

ARRIVAL, TO_ENGINE, TO_BACKEND, TIMER, LAUNCH, FAULT, MEND = range(7)


class World:
    """One run of a scenario. `run()` once, then read backends, gpu, overloads."""

    def __init__(
        self,
        scenario: Scenario,
        make: object,
        seed: int,
        *,
        checked: bool = False,
        record: bool = False,
        drain_us: int | None = None,
    ) -> None:
        assert callable(make)
        self.scenario = scenario
        self.make = make
        self.engine: Engine | None = None
        seeds = np.random.SeedSequence(seed).spawn(len(scenario.instances) + 1)
        self.gpu = Gpu(scenario.speeds, np.random.default_rng(seeds[0]))
        self.backends = [
            Backend(i, spec, self._arrivals(spec, i, seeds[i + 1]))
            for i, spec in enumerate(scenario.instances)
        ]
        self.by_name = {backend.name: backend for backend in self.backends}
        self.closed_loop = scenario.arrivals.kind == "closed"
        self.checked = checked
        self.trace: list[tuple[int, Event, tuple[Decision, ...]]] | None = [] if record else None
        self.intervals: list[Interval] | None = [] if record else None
        self.overloads: list[tuple[int, Overload]] = []
        self.events = 0
        slowest = max((spec.slo_us for spec in scenario.instances), default=0)
        self.until_us = scenario.duration_us + (slowest if drain_us is None else drain_us)
        self.now_us = 0
        self._heap: list[tuple[int, int, int, int, object]] = []
        self._serial = 0
        self._epoch = 0  # of the engine: messages to a dead one are lost
        self._timer_token = 0

    def _arrivals(self, spec: SimInstance, stripe: int, seed: np.random.SeedSequence) -> list[int]:
        rng = np.random.default_rng(seed)
        times = self.scenario.arrivals.times(spec.demand.rate_per_s, self.scenario.duration_us, rng, stripe)
        return [int(t) for t in times]

    # ---- the loop -------------------------------------------------------------------------------------

    def run(self) -> World:
        self._start_engine(0)
        for fault in self.scenario.faults:
            self._push(fault.at_us, FAULT, 0, fault)
        for backend in self.backends:
            self._arm(backend)
        heap, gpu = self._heap, self.gpu
        while True:
            at = heap[0][0] if heap else FOREVER
            if gpu.next_end_us <= at:
                end = gpu.next_end_us
                if end > self.until_us:
                    break
                self.now_us = ceil(end)
                self._end(gpu.ended(), end)
                continue
            if at > self.until_us:
                break
            self.now_us = at
            _, _, kind, index, payload = heappop(heap)
            self._step(kind, index, payload, at)
            self.events += 1
        self.gpu.close(min(self.until_us, max(self.now_us, self.scenario.duration_us)))
        return self

    def _step(self, kind: int, index: int, payload: object, now: int) -> None:
        if kind == ARRIVAL:
            backend = self.backends[index]
            if payload == backend.wake_token:
                self._notice(backend, now)
        elif kind == TO_ENGINE:
            if index == self._epoch and self.engine is not None:
                self._tell(payload, now)  # type: ignore[arg-type]
        elif kind == TO_BACKEND:
            assert isinstance(payload, tuple)
            if payload[0] == self._epoch and self.engine is not None:
                self._obey(self.backends[index], payload[1], now)
        elif kind == TIMER:
            if payload == self._timer_token and self.engine is not None:
                self._tell(TimerFired(), now)
        elif kind == LAUNCH:
            if payload is self.backends[index].job:
                self.gpu.launch(payload, now)  # type: ignore[arg-type]
        elif kind == FAULT:
            self._break(payload, now)  # type: ignore[arg-type]
        else:
            self._mend(payload, now)  # type: ignore[arg-type]

    def _push(self, at: int, kind: int, index: int, payload: object) -> None:
        self._serial += 1
        heappush(self._heap, (at, self._serial, kind, index, payload))

    # ---- the engine's side ----------------------------------------------------------------------------

    def _start_engine(self, now: int) -> None:
        self.engine = self.make()
        self._epoch += 1
        self._tell(self.scenario.plan, now)
        for backend in self.backends:
            if not backend.down:
                self._join(backend, now)

    def _join(self, backend: Backend, now: int) -> None:
        """The backend's messages on a new connection; after BackendLeft of the old one, if any."""
        spec, job = backend.spec, backend.job
        joined = BackendJoined(
            spec.name, spec.demand.name, spec.gpu_percent, spec.levels, spec.max_batch_size,
            spec.batch_size, spec.slo_us, spec.demand.on_late,
            job.percent if job else 0.0, ceil(min(job.end_us, FOREVER)) if job else 0,
            spec.sm_groups,
        )  # fmt: skip
        self._send(joined, now)
        waiting = backend.waiting(now)
        self._report(backend, waiting, now)

    def _tell(self, event: Event, now: int) -> None:
        engine = self.engine
        assert engine is not None
        decisions = engine.handle(event, now)
        if self.checked:
            engine.check_invariants()
        if self.trace is not None:
            self.trace.append((now, event, tuple(decisions)))
        at = now + self.scenario.delays.to_backend_us
        for decision in decisions:
            kind = type(decision)
            if kind is SetTimer:
                self._timer_token += 1
                self._push(decision.at_us, TIMER, 0, self._timer_token)  # type: ignore[union-attr]
            elif kind is Overload:
                self.overloads.append((now, decision))  # type: ignore[arg-type]
            else:
                backend = self.by_name[decision.instance]  # type: ignore[union-attr]
                self._push(at, TO_BACKEND, backend.index, (self._epoch, decision))

    def _send(self, event: Event, now: float) -> None:
        self._push(ceil(now) + self.scenario.delays.to_engine_us, TO_ENGINE, self._epoch, event)

    # ---- the backends' side ---------------------------------------------------------------------------

    def _notice(self, backend: Backend, now: int) -> None:
        """Rows arrived: report them, or run them when nobody gates."""
        waiting = backend.waiting(now)
        if backend.down:
            return
        if self.engine is None:
            self._run_ungated(backend, now)
            self._expect_more(backend, backend.waiting(now))
        elif not self._start_standing(backend, waiting, now):
            self._report(backend, waiting, now)
        self._arm(backend)

    def _start_standing(self, backend: Backend, waiting: int, now: int) -> bool:
        """Run what waits under the standing grant, if there are both."""
        grant = backend.standing
        if grant is None or not waiting or backend.job is not None:
            return False
        backend.standing = None
        self._start(backend, grant, now)
        return True

    def _report(self, backend: Backend, waiting: int, now: float) -> None:
        deadline = backend.deadline_us() if waiting else 0
        self._send(WorkQueued(backend.name, waiting, deadline), now)
        self._expect_more(backend, waiting)

    def _expect_more(self, backend: Backend, waiting: int) -> None:
        """From now on tell when the queue reaches notify_at rows."""
        few = waiting < 2 * backend.spec.batch_size
        backend.notify_at = waiting + 1 if few else 2 * waiting

    def _arm(self, backend: Backend) -> None:
        """Wake up when the queue reaches notify_at rows."""
        backend.wake_token += 1
        if backend.down or (self.engine is None and backend.job is not None):
            return  # it looks at its queue when it is back, or when the batch ends
        at = backend.head + backend.notify_at - 1
        if at < len(backend.arrivals):
            self._push(max(backend.arrivals[at], self.now_us), ARRIVAL, backend.index, backend.wake_token)

    def _obey(self, backend: Backend, decision: Grant | Revoke | Shed, now: int) -> None:
        if backend.down:
            return
        if type(decision) is Shed:
            self._shed(backend, decision.deadline_before_us, now)
        elif type(decision) is Revoke:
            self._give_back(backend, decision.grant_id, now)
        elif type(decision) is Grant and decision.standing:
            backend.standing = decision
            self._start_standing(backend, backend.waiting(now), now)
        elif backend.job is not None or backend.hung:
            backend.chained = decision  # type: ignore[assignment]
        else:
            self._start(backend, decision, now)  # type: ignore[arg-type]

    def _give_back(self, backend: Backend, grant_id: int, now: int) -> None:
        """A standing grant is revoked; it is too late where it runs already."""
        if backend.standing is not None and backend.standing.grant_id == grant_id:
            backend.standing = None
            waiting = backend.waiting(now)
            deadline = backend.deadline_us() if waiting else 0
            self._send(BatchFinished(backend.name, grant_id, 0, 0, waiting, deadline), now)
            self._expect_more(backend, waiting)
            self._arm(backend)

    def _shed(self, backend: Backend, before_us: int, now: float) -> None:
        backend.waiting(now)
        slo = backend.spec.slo_us or FOREVER // 4
        first = bisect_left(backend.arrivals, before_us - slo, backend.head, backend.tail)
        count = first - backend.head
        backend.rejected += count
        backend.head = first
        self._answered(count, now, backend)
        if backend.job is None and backend.grant is None:
            self._report(backend, backend.tail - backend.head, now)
        self._arm(backend)

    def _start(self, backend: Backend, grant: Grant | None, now: float) -> None:
        """Take rows, most urgent first, and run them; None: ungated."""
        waiting = backend.waiting(now)
        rows = min(waiting, grant.batch_size if grant else backend.spec.batch_size)
        if rows == 0:
            if grant is not None:
                self._send(BatchFinished(backend.name, grant.grant_id, 0, 0, 0, 0), now)
                self._expect_more(backend, 0)
                self._arm(backend)
            return
        percent = grant.gpu_percent if grant else backend.spec.gpu_percent
        stretch = FOREVER if backend.hung else backend.slow
        backend.grant = grant
        backend.job = self.gpu.make(backend.index, backend.spec.demand.name, percent, rows, stretch)
        prepare_us = self.scenario.serving.prepare_us
        if prepare_us and now > backend.ended_us:
            self._push(ceil(now) + prepare_us, LAUNCH, backend.index, backend.job)
        else:  # right behind another batch: prepared while that one ran
            self.gpu.launch(backend.job, now)
        backend.batches.append((backend.head, rows, 0))
        backend.head += rows
        if grant is not None and grant.standing:
            left = waiting - rows
            deadline = backend.deadline_us() if left else 0
            self._send(BatchStarted(backend.name, grant.grant_id, rows, left, deadline), now)
            self._expect_more(backend, left)
        elif self.engine is not None and waiting > rows:
            self._report(backend, waiting - rows, now)
        else:
            self._expect_more(backend, waiting - rows)
        self._arm(backend)

    def _run_ungated(self, backend: Backend, now: float) -> None:
        if backend.job is None and not backend.down and backend.waiting(now):
            self._start(backend, None, now)

    def _end(self, job: Job, now: float) -> None:
        """A batch left the GPU: answer its rows, tell the engine, go on with the chained grant."""
        backend = self.backends[job.owner]
        self.gpu.finish(job, now)
        grant, backend.job, backend.grant = backend.grant, None, None
        first, rows, _ = backend.batches[-1]
        end = backend.ended_us = ceil(now)
        backend.batches[-1] = (first, rows, end)
        slo = backend.spec.slo_us or FOREVER // 4
        late = bisect_left(backend.arrivals, end - slo, first, first + rows) - first
        backend.share_percent_us += job.percent * (now - job.start_us)
        if self.intervals is not None:
            self.intervals.append(Interval(backend.name, job.start_us, end, job.percent, rows, late))
        self._answered(rows, now, backend)
        if self.engine is None:
            backend.chained = None
            self._run_ungated(backend, now)
            if backend.job is None:
                self._expect_more(backend, 0)
                self._arm(backend)
            return
        waiting = backend.waiting(now)
        deadline = backend.deadline_us() if waiting else 0
        grant_id = grant.grant_id if grant else 0
        run_us = max(1, round(now - job.start_us))
        self._send(BatchFinished(backend.name, grant_id, rows, run_us, waiting, deadline, late), now)
        self._expect_more(backend, waiting)
        chained, backend.chained = backend.chained, None
        if chained is not None:
            self._start(backend, chained, now)
        else:
            self._arm(backend)

    def _answered(self, rows: int, now: float, backend: Backend) -> None:
        """In a closed loop every answer brings the next request."""
        if self.closed_loop and now < self.scenario.duration_us:
            backend.arrivals.extend([ceil(now) + 1] * rows)

    # ---- faults ---------------------------------------------------------------------------------------

    def _break(self, fault: Fault, now: int) -> None:
        self._push(now + fault.duration_us, MEND, 0, fault)
        if fault.kind == "arbiter":
            self.engine = None
            for backend in self.backends:
                backend.chained = backend.standing = None
                self._run_ungated(backend, now)
                self._expect_more(backend, 0)
                self._arm(backend)
            return
        backend = self.by_name[fault.instance]
        if fault.kind == "slow":
            backend.slow = fault.factor
        elif fault.kind == "hang":
            backend.hung = True
            if backend.job is not None:
                self.gpu.hang(backend.job, now)
        else:
            self._kill(backend, now)

    def _kill(self, backend: Backend, now: int) -> None:
        """The process dies: what it executes fails, what waits stays with the server."""
        if backend.job is not None:
            self.gpu.finish(backend.job, now)
            _, rows, _ = backend.batches.pop()
            backend.failed += rows
            backend.job = backend.grant = None
            self._answered(rows, now, backend)
        backend.chained = backend.standing = None
        backend.down = True
        self._send(BackendLeft(backend.name), now)

    def _mend(self, fault: Fault, now: int) -> None:
        if fault.kind == "arbiter":
            self._start_engine(now)
            for backend in self.backends:
                self._arm(backend)
            return
        backend = self.by_name[fault.instance]
        if fault.kind == "slow":
            backend.slow = 1.0
            return
        if fault.kind == "hang":
            self._kill(backend, now)
        backend.down = backend.hung = False
        if self.engine is None:
            self._run_ungated(backend, now)
        else:
            self._join(backend, now)
        self._arm(backend)
