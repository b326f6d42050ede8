"""Any stream of messages through the arbiter: books that agree with the engine, and decisions that a fresh
engine repeats when it is fed the recorded events."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dstack_backend import wire
from dstack_sched.app.arbiter import ArbiterService
from dstack_sched.domain.decision import Decision
from dstack_sched.domain.event import EngineModel, Event, PlanChanged
from dstack_sched.domain.json_form import gpus_to_json
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.interface import Engine
from dstack_sched.engine.registry import make_engine
from fakes.scripted_engine import PlanMemory

MODELS = ("a", "b", "c")
CAPACITY_PERCENT = 150.0
PERCENTS = st.sampled_from((20.0, 40.0, 60.0, 100.0))
STEP_US = st.integers(0, 30_000)


class ArbiterMachine(RuleBasedStateMachine):
    """Backends and a controller talk to the service; time goes on between messages."""

    def __init__(self) -> None:
        super().__init__()
        self.now_us = 1_000_000
        self.engines: list[Engine] = []
        self.record: list[tuple[Engine, Event, int, list[Decision]]] = []
        self.grants: dict[int, list[wire.Grant]] = defaultdict(list)  # by connection, not yet answered
        self.connections = 0
        self.service = ArbiterService(
            self._make,
            "dstack",
            PlanMemory(),
            capacity_percent=CAPACITY_PERCENT,
            epoch=5,
            observe=self._observe,
        )

    def _make(self, policy: str) -> Engine:
        self.engines.append(make_engine(policy))
        return self.engines[-1]

    def _observe(self, gpu: int, event: Event, now_us: int, decisions: list[Decision]) -> None:
        self.record.append((self.service._gpus[gpu].engine, event, now_us, list(decisions)))

    def _tell(self, connection: int, message: wire.Message) -> None:
        assert wire.decode(wire.encode(message)) == message
        self._sort(self.service.received(connection, message, self.now_us))

    def _sort(self, out) -> None:
        for connection, message in out:
            assert wire.decode(wire.encode(message)) == message, "what the arbiter says can be sent"
            if isinstance(message, wire.Grant):
                assert connection in self.service._sessions
                assert message.lease_until_us > self.now_us and message.batch_size >= 1
                self.grants[connection].append(message)

    @initialize()
    def first_backend(self) -> None:
        self.join("a", 40.0, 0.0, False)

    @rule(
        model=st.sampled_from(MODELS),
        percent=PERCENTS,
        running=st.sampled_from((0.0, 20.0)),
        late=st.booleans(),
    )
    def join(self, model: str, percent: float, running: float, late: bool) -> None:
        if len(self.service._sessions) >= 8:
            return
        self.connections += 1
        until_us = self.now_us + 5_000 if running else 0
        join = wire.Join(model, model, 1, 0, percent, 16, 8, 50_000, late, (), running, until_us)
        self._tell(self.connections, join)
        if running:
            self.grants[self.connections].append(wire.Grant(0, 8, running, until_us))

    def _some(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.service._sessions)))

    @precondition(lambda self: self.service._sessions)
    @rule(data=st.data(), rows=st.integers(0, 40), due_us=st.integers(-20_000, 100_000))
    def work(self, data: st.DataObject, rows: int, due_us: int) -> None:
        self._tell(self._some(data), wire.Work(rows, self.now_us + due_us if rows else 0))

    @precondition(lambda self: any(self.grants.values()))
    @rule(data=st.data(), rows=st.integers(0, 16), left=st.integers(0, 20), run_us=st.integers(0, 50_000))
    def done(self, data: st.DataObject, rows: int, left: int, run_us: int) -> None:
        connection = data.draw(st.sampled_from(sorted(c for c, grants in self.grants.items() if grants)))
        grant = self.grants[connection].pop(0)
        self._tell(
            connection, wire.Done(grant.grant_id, rows, 0, run_us, left, self.now_us + 40_000 if left else 0)
        )

    @precondition(lambda self: self.service._sessions)
    @rule(data=st.data())
    def stray_done(self, data: st.DataObject) -> None:
        """Of a grant that this backend does not hold: never given, of another backend, or ended."""
        connection = self._some(data)
        held = {grant.grant_id for grant in self.grants[connection]}
        stray = data.draw(st.integers(0, 2**40).filter(lambda grant_id: grant_id not in held))
        self._tell(connection, wire.Done(stray, 1, 0, 1, 0, 0))

    @precondition(lambda self: self.service._sessions)
    @rule(data=st.data(), politely=st.booleans())
    def leave(self, data: st.DataObject, politely: bool) -> None:
        connection = self._some(data)
        self.grants.pop(connection, None)
        if politely:
            self._tell(connection, wire.Leave())
        self._sort(self.service.disconnected(connection, self.now_us))

    @rule(step_us=STEP_US)
    def time_goes_on(self, step_us: int) -> None:
        until_us = self.now_us + step_us
        while (due_us := self.service.next_timer_us()) is not None and due_us <= until_us:
            self.now_us = max(self.now_us, due_us)
            self._sort(self.service.timer(self.now_us))
        self.now_us = until_us

    @rule(percent=PERCENTS, capacity=st.sampled_from((100.0, 150.0)))
    def plan(self, percent: float, capacity: float) -> None:
        rows = tuple(
            EngineModel(
                name, percent, 8, 50_000, 1.0, OnLate.SERVE, percent,
                (20.0, 100.0), (1, 16), ((3.0, 20.0), (1.0, 6.0)), 0.002,
            )
            for name in MODELS[:2]
        )  # fmt: skip
        ((_, reply),) = [
            (connection, message)
            for connection, message in self._control(
                {"verb": "plan", "gpus": gpus_to_json({0: PlanChanged(capacity, rows)})}
            )
            if isinstance(message, wire.Reply)
        ]
        assert reply.body["ok"] is True

    @rule()
    def policy(self) -> None:
        self._control({"verb": "policy", "name": "dstack"})

    def _control(self, body: dict):
        out = self.service.received(0, wire.Control(body), self.now_us)
        self._sort(out)
        return out

    @invariant()
    def engines_are_sound(self) -> None:
        for engine in self.engines:
            engine.check_invariants()

    @invariant()
    def books_agree_with_the_clients(self) -> None:
        """What the sessions hold as outstanding is what the clients have not answered."""
        for connection, session in self.service._sessions.items():
            mine = [grant.grant_id for grant in self.grants[connection]]
            assert [grant.wire_id for grant in session.grants] == mine[-len(session.grants) or len(mine) :]

    @invariant()
    def status_and_timeline_can_always_be_sent(self) -> None:
        for verb in ("status", "timeline"):
            ((_, reply),) = self.service.received(0, wire.Control({"verb": verb}), self.now_us)
            assert wire.decode(wire.encode(reply)) == reply

    def teardown(self) -> None:
        """A fresh engine, fed what was recorded, decides the same."""
        fresh = {id(engine): make_engine("dstack") for engine in self.engines}
        for engine, event, now_us, decisions in self.record:
            assert fresh[id(engine)].handle(event, now_us) == decisions, event


ArbiterMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)
TestArbiterReplay = ArbiterMachine.TestCase
