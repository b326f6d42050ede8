"""The arbiter without its sockets: wire messages in, wire messages out, one engine a GPU in between.

A connection is a number that the socket loop chose; time is an argument. The service translates and keeps
the books (sessions, outstanding grants, counters, plans); who runs when is the engine's decision alone.

Grant ids on the wire are epoch << 32 | the engine's id. The epoch changes with every arbiter and every live
change of policy, so an end of a grant that another engine gave is told from one of this engine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import perf_counter_ns
from typing import Any, Protocol, TypeAlias

from dstack_backend import wire
from dstack_sched.app import arbiter_view
from dstack_sched.app.arbiter_record import Record
from dstack_sched.app.arbiter_session import EPOCH_SHIFT, ID_MASK, Gpu, Outstanding, Session
from dstack_sched.domain import decision as decisions
from dstack_sched.domain.event import (
    BackendJoined,
    BackendLeft,
    BatchFinished,
    BatchStarted,
    Event,
    PlanChanged,
    TimerFired,
    WorkQueued,
)
from dstack_sched.domain.json_form import MAX_GPUS, gpus_from_json
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.interface import Engine
from dstack_sched.engine.run_times import Seen
from dstack_sched.errors import DstackError, InputError

log = logging.getLogger("dstack.arbiter")

Outgoing: TypeAlias = list[tuple[int, wire.Message]]
Observer: TypeAlias = Callable[[int, Event, int, list[decisions.Decision]], None]

MAX_GRANT_ROWS = 4_096  # engines keep a run time for each batch size: a join must not cost seconds
SEEN_ROWS = 512  # cells of run times in one answer: it must fit into a packet
REVOKED_US = 50_000  # a revoked standing grant is back by then, unless it has begun
MAX_RUNNING_US = 60_000_000  # how long a batch may claim to run on when its instance joins
OVERLOADS_US = 10_000_000  # between two lines of the log about overloads
VERBS = "ping, plan, status, telemetry, timeline, run_times, policy"


class ProtocolError(wire.WireError):
    """A client broke the order of messages: it is refused and dropped. The text says why."""


class PlanStore(Protocol):
    """Where the last plan outlives the arbiter. `save` reports whether it was kept, and never raises."""

    def load(self) -> Mapping[int, PlanChanged]: ...
    def save(self, plans: Mapping[int, PlanChanged]) -> bool: ...


class ArbiterService:
    """Sessions, engines and books. Every method takes `now_us` and answers with messages to send.

    make_engine: policy name -> a fresh engine; raises InputError for an unknown name.
    capacity_percent: what the grants of a GPU may sum to while no plan says otherwise.
    observe: called with (gpu, event, now_us, decisions) after each engine step, for recording and tests.
    """

    def __init__(
        self,
        make_engine: Callable[[str], Engine],
        policy: str,
        plans: PlanStore,
        *,
        capacity_percent: float = 100.0,
        epoch: int = 1,
        now_us: int = 0,
        observe: Observer | None = None,
    ) -> None:
        make_engine(policy)  # an unknown name must fail now, not at the first join
        self._make_engine = make_engine
        self.policy = policy
        self._store = plans
        self._capacity_percent = capacity_percent
        self._epoch = epoch & ID_MASK
        self._observe = observe
        self._started_us = now_us
        self._also_report: Callable[[], dict[str, Any]] = dict
        self._sessions: dict[int, Session] = {}
        self._by_instance: dict[str, Session] = {}
        self._gpus: dict[int, Gpu] = {}
        self._joins = 0
        self._log_overloads_us = 0
        self.record = Record()
        for gpu, plan in plans.load().items():
            self._open_gpu(gpu, plan, now_us, [])

    def also_report(self, more: Callable[[], dict[str, Any]]) -> None:
        """Further fields for `status`: what the loop around this service counts."""
        self._also_report = more

    # -- what the socket loop calls ----------------------------------------------------------------------

    def received(self, connection: int, message: wire.Message, now_us: int) -> Outgoing:
        """Take one message in. Raises ProtocolError: the loop refuses and drops the client."""
        out: Outgoing = []
        session = self._sessions.get(connection)
        match message:
            case wire.Done() if session:
                self._done(session, message, now_us, out)
            case wire.Work(waiting, deadline) if session:
                self._work(session, waiting, deadline, now_us, out)
            case wire.Start() if session:
                self._start(session, message, now_us, out)
            case wire.Ping(nonce):
                out.append((connection, wire.Pong(nonce)))
            case wire.Join() if session is None:
                self._join(connection, message, now_us, out)
            case wire.Telemetry(body) if session:
                session.note_telemetry(body, now_us)
            case wire.Leave() if session:
                self._leave(session, now_us, out)
            case wire.Control(body) if session is None:
                out.append((connection, wire.Reply(self._control(body, now_us, out))))
            case _:
                raise ProtocolError(f"{type(message).__name__} is not expected here")
        return out

    def disconnected(self, connection: int, now_us: int) -> Outgoing:
        """The connection is gone: an instance behind it has left, its shares are free."""
        out: Outgoing = []
        session = self._sessions.get(connection)
        if session:
            self._leave(session, now_us, out)
        return out

    def timer(self, now_us: int) -> Outgoing:
        """Fire the timers that are due."""
        out: Outgoing = []
        for index, gpu in self._gpus.items():
            if 0 < gpu.timer_us <= now_us:
                gpu.timer_us = 0
                self._step(index, gpu, TimerFired(), now_us, out)
        return out

    def next_timer_us(self) -> int | None:
        """When `timer` wants to be called next."""
        due = [gpu.timer_us for gpu in self._gpus.values() if gpu.timer_us]
        return min(due) if due else None

    def housekeep(self, now_us: int) -> None:
        """What nobody waits for, about once a second: the log says who was overloaded, a line in OVERLOADS_US
        at most. A line each would cost the most when there is the least time."""
        if now_us >= self._log_overloads_us and (rose := self.record.overloads_since_asked()):
            self._log_overloads_us = now_us + OVERLOADS_US
            told = ", ".join(f"{model} ({count} times)" for model, count in rose.items())
            about = {"what": "overloaded", "models": rose}
            log.warning("overloaded, work waited a whole session: %s", told, extra={"fields": about})

    # -- backends ----------------------------------------------------------------------------------------

    def _join(self, connection: int, join: wire.Join, now_us: int, out: Outgoing) -> None:
        if not -1 <= join.gpu < MAX_GPUS:
            raise ProtocolError(f"GPU index {join.gpu} is not in -1..{MAX_GPUS - 1}")
        gpu = self._gpus.get(join.gpu) or self._open_gpu(
            join.gpu, PlanChanged(self._capacity_percent, ()), now_us, out
        )
        self._joins += 1
        instance = f"{join.instance}#{self._joins}"  # a reload has two instances of one name for a while
        joined = _joined(join, instance, now_us)
        session = Session(connection, self._joins, join.gpu, joined, join.pid, free_since_us=now_us)
        if joined.running_percent > 0:
            until_us = max(now_us, joined.running_until_us)
            session.grants.append(Outstanding(0, joined.running_percent, 0, now_us, until_us))
        self._sessions[connection] = session
        self._by_instance[instance] = session
        out.append((connection, wire.Welcome(self._joins, gpu.plan.capacity_percent)))
        session.told = wire.Plan(join.batch_size, join.slo_us, join.reject_late)
        _tell_plan(session, gpu.plan, out)
        about = {"what": "joined", "model": join.model, "instance": instance, "gpu": join.gpu}
        log.info(
            "joined: %s pid %d on GPU %d, %g%%", instance, join.pid, join.gpu, join.gpu_percent,
            extra={"fields": {**about, "pid": join.pid, "gpu_percent": join.gpu_percent}},
        )  # fmt: skip
        self._step(join.gpu, gpu, joined, now_us, out)

    def _leave(self, session: Session, now_us: int, out: Outgoing) -> None:
        del self._sessions[session.connection]
        del self._by_instance[session.joined.instance]
        while session.grants:
            session.close(session.grants.pop(0), now_us, self.record, "left")
        instance, model = session.joined.instance, session.joined.model
        about = {"what": "left", "model": model, "instance": instance, "gpu": session.gpu, "pid": session.pid}
        log.info("left: %s pid %d", instance, session.pid, extra={"fields": about})
        gpu = self._gpus[session.gpu]
        self._step(session.gpu, gpu, BackendLeft(session.joined.instance), now_us, out)

    def _work(self, session: Session, waiting: int, deadline_us: int, now_us: int, out: Outgoing) -> None:
        deadline_us = deadline_us if waiting else 0
        session.note_queue(waiting, deadline_us, now_us)
        event = WorkQueued(session.joined.instance, waiting, deadline_us)
        self._step(session.gpu, self._gpus[session.gpu], event, now_us, out)

    def _start(self, session: Session, start: wire.Start, now_us: int, out: Outgoing) -> None:
        """A standing grant is in use. One of an engine before this one counts as running already."""
        grant = session.note_start(start.grant_id, start.rows, now_us, self.record)
        deadline_us = start.earliest_deadline_us if start.waiting else 0
        session.note_queue(start.waiting, deadline_us, now_us)
        instance = session.joined.instance
        event: Event
        if grant is None or grant.epoch != self._epoch:
            event = WorkQueued(instance, start.waiting, deadline_us)
        else:
            engine_id = grant.wire_id & ID_MASK
            event = BatchStarted(instance, engine_id, start.rows, start.waiting, deadline_us)
        self._step(session.gpu, self._gpus[session.gpu], event, now_us, out)

    def _done(self, session: Session, done: wire.Done, now_us: int, out: Outgoing) -> None:
        deadline_us = done.earliest_deadline_us if done.waiting else 0
        engine_id = self._take_grant(session, done, now_us)
        session.note_queue(done.waiting, deadline_us, now_us)
        instance = session.joined.instance
        event: Event
        if engine_id is None:
            event = WorkQueued(instance, done.waiting, deadline_us)
        else:
            event = BatchFinished(
                instance, engine_id, done.rows, done.run_us, done.waiting, deadline_us, done.late
            )
        self._step(session.gpu, self._gpus[session.gpu], event, now_us, out)

    def _take_grant(self, session: Session, done: wire.Done, now_us: int) -> int | None:
        """Book the grant that ended. The engine's id of it; None where the engine has nothing to end."""
        if done.rows:  # a short run under a standing grant is told by its end alone
            session.note_start(done.grant_id, done.rows, now_us - done.run_us, self.record)
        grant = session.take(done.grant_id)
        if grant is None:
            return None
        session.close(grant, now_us, self.record, "done" if done.rows else "unused", done)
        if grant.epoch == self._epoch:
            return grant.wire_id & ID_MASK
        return None if session.carries_other_than(self._epoch) else 0

    # -- engines -----------------------------------------------------------------------------------------

    def _open_gpu(self, index: int, plan: PlanChanged, now_us: int, out: Outgoing) -> Gpu:
        gpu = self._gpus[index] = Gpu(self._make_engine(self.policy), plan)
        self._step(index, gpu, plan, now_us, out)
        return gpu

    def _step(self, index: int, gpu: Gpu, event: Event, now_us: int, out: Outgoing) -> None:
        """One event through the engine of a GPU, its decisions carried out."""
        began_ns = perf_counter_ns()
        answer = gpu.engine.handle(event, now_us)
        self.record.decided(perf_counter_ns() - began_ns)
        if self._observe is not None:
            self._observe(index, event, now_us, answer)
        for item in answer:
            match item:
                case decisions.Grant():
                    self._grant(item, now_us, out)
                case decisions.SetTimer(at_us):
                    gpu.timer_us = max(1, at_us)
                case decisions.Shed(instance, before_us):
                    session = self._by_instance[instance]
                    self.record.model(session.joined.model).shed_orders += 1
                    out.append((session.connection, wire.Shed(before_us)))
                case decisions.Revoke(instance, grant_id):
                    connection = self._by_instance[instance].connection
                    out.append((connection, wire.Revoke(self._wire_id(grant_id))))
                case decisions.Overload(model, reason, waited_us):
                    self.record.overloaded(index, model, reason, waited_us, now_us)

    def _grant(self, grant: decisions.Grant, now_us: int, out: Outgoing) -> None:
        session = self._by_instance[grant.instance]
        wire_id = self._wire_id(grant.grant_id)
        percent, batch_size, lease_us = grant.gpu_percent, grant.batch_size, grant.lease_until_us
        outstanding = Outstanding(wire_id, percent, batch_size, now_us, lease_us, grant.standing)
        session.note_grant(outstanding, now_us, self.record)
        message = wire.Grant(wire_id, batch_size, percent, lease_us, grant.sm_groups, grant.standing)
        out.append((session.connection, message))

    def _wire_id(self, grant_id: int) -> int:
        return self._epoch << EPOCH_SHIFT | (grant_id & ID_MASK)

    # -- control -----------------------------------------------------------------------------------------

    def _control(self, body: Mapping[str, Any], now_us: int, out: Outgoing) -> dict[str, Any]:
        """Answer one verb; an error is one clear line in the reply, never an exception."""
        verb = body.get("verb")
        try:
            match verb:
                case "ping":
                    return {"ok": True} | self._about(now_us)
                case "plan":
                    return {"ok": True} | self._set_plans(gpus_from_json(body.get("gpus")), now_us, out)
                case "status":
                    return {"ok": True} | self.status(now_us)
                case "timeline":
                    return {"ok": True} | self._timeline(body, now_us)
                case "telemetry":
                    return {"ok": True} | arbiter_view.telemetry(self._sessions.values(), body, now_us)
                case "run_times":
                    return {"ok": True} | self._run_times(body.get("model"))
                case "policy":
                    return {"ok": True} | self._set_policy(body.get("name"), now_us, out)
        except DstackError as error:
            return {"ok": False, "error": str(error)}
        return {"ok": False, "error": f"unknown verb {str(verb)[:40]!r}; the verbs are {VERBS}"}

    def _set_plans(self, plans: Mapping[int, PlanChanged], now_us: int, out: Outgoing) -> dict[str, Any]:
        """Plans take effect at the next grant; GPUs that are not named keep theirs."""
        for index, plan in plans.items():
            gpu = self._gpus.get(index)
            if gpu is None:
                self._open_gpu(index, plan, now_us, out)
            else:
                gpu.plan = plan
                self._step(index, gpu, plan, now_us, out)
            for session in self._sessions.values():
                if session.gpu == index:
                    _tell_plan(session, plan, out)
        kept = self._store.save({index: gpu.plan for index, gpu in self._gpus.items()})
        log.info("plan changed: GPUs %s", ", ".join(map(str, sorted(plans))))
        return {"gpus": sorted(plans), "kept": kept}

    def _set_policy(self, name: object, now_us: int, out: Outgoing) -> dict[str, Any]:
        """Replace every engine by one of another policy; what runs now is carried over as running."""
        if not isinstance(name, str):
            raise InputError("policy: a name is wanted, as in {'verb': 'policy', 'name': 'dstack'}")
        self._make_engine(name)  # an unknown name must change nothing
        before, engines = self.policy, {index: self._make_engine(name) for index in self._gpus}
        self.policy = name
        self._epoch = (self._epoch % ID_MASK) + 1  # never 0, that of ungranted batches
        for index, engine in engines.items():
            plan = self._gpus[index].plan
            gpu = self._gpus[index] = Gpu(engine, plan)
            self._step(index, gpu, plan, now_us, out)
            here = [session for session in self._sessions.values() if session.gpu == index]
            for session in here:
                for grant in session.grants:  # an engine knows of its own standing grants only
                    if grant.standing:
                        out.append((session.connection, wire.Revoke(grant.wire_id)))
            for session in here:  # all that runs is counted before anything is granted
                self._step(index, gpu, _as_running(session, now_us), now_us, out)
            for session in here:
                queue = session.joined.instance, session.waiting, session.earliest_deadline_us
                self._step(index, gpu, WorkQueued(*queue), now_us, out)
        about = {"what": "policy", "policy": name, "before": before}
        log.info("policy changed: %s -> %s", before, name, extra={"fields": about})
        return {"policy": name, "before": before}

    def status(self, now_us: int) -> dict[str, Any]:
        """See arbiter_view.status; and who answers."""
        about = {"version": 1, **self._about(now_us), **self._also_report()}
        return about | arbiter_view.status(self._gpus, self._sessions.values(), self.record, now_us)

    def _about(self, now_us: int) -> dict[str, Any]:
        uptime_s = round((now_us - self._started_us) / 1e6, 3)
        return {"pid": os.getpid(), "policy": self.policy, "uptime_s": uptime_s}

    def _run_times(self, model: object) -> dict[str, Any]:
        """Runs of one model as [GPU%, rows, runs, p50 us, p99 us, [...]]: run_times.Seen, with Beside."""
        if not isinstance(model, str):
            raise InputError("run_times: a model is wanted, as in {'verb': 'run_times', 'model': 'resnet50'}")
        seen = [row for gpu in self._gpus.values() for row in gpu.engine.run_times(model)]
        return {"runs": [_short(row) for row in seen[:SEEN_ROWS]]}

    def _timeline(self, body: Mapping[str, Any], now_us: int) -> dict[str, Any]:
        return arbiter_view.timeline(self._gpus, self._sessions.values(), self.record, body, now_us)


def _short(seen: Seen) -> list[Any]:
    """Its figures, to seven digits."""
    beside = [float(f"{x:.7g}") for x in seen.beside] if seen.beside else None
    return [*seen[:3], round(seen.p50_us, 1), round(seen.p99_us, 1), beside]


def _joined(join: wire.Join, instance: str, now_us: int) -> BackendJoined:
    """The event of a Join, within bounds that the engine can bear."""
    return BackendJoined(
        instance=instance,
        model=join.model,
        gpu_percent=join.gpu_percent,
        levels=join.levels or (join.gpu_percent,),
        max_batch_size=min(join.max_batch_size, MAX_GRANT_ROWS),
        batch_size=min(join.batch_size, MAX_GRANT_ROWS),
        slo_us=join.slo_us,
        on_late=OnLate.REJECT if join.reject_late else OnLate.SERVE,
        running_percent=join.running_percent,
        running_until_us=min(join.running_until_us, now_us + MAX_RUNNING_US),
        sm_groups=join.sm_groups,
    )


def _tell_plan(session: Session, plan: PlanChanged, out: Outgoing) -> None:
    """Tell an instance what a plan wants of its model, where that is news to it."""
    for model in plan.models:
        if model.name == session.joined.model:
            batch_size = min(model.batch_size, session.joined.max_batch_size)
            wanted = wire.Plan(batch_size, model.slo_us, model.on_late is OnLate.REJECT)
            if wanted != session.told:
                session.told = wanted
                out.append((session.connection, wanted))


def _as_running(session: Session, now_us: int) -> BackendJoined:
    """The instance as it would join an engine that does not know of its outstanding grants."""
    running = [grant for grant in session.grants if grant.lease_until_us > now_us]
    ends = [now_us + REVOKED_US if grant.standing else grant.lease_until_us for grant in running]
    return replace(
        session.joined,
        running_percent=max((grant.gpu_percent for grant in running), default=0.0),
        running_until_us=max(ends, default=0),
    )
