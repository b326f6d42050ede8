"""The arbiter's service core: messages to events, decisions to messages, and its books. No socket."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dstack_backend import wire
from dstack_sched.app.arbiter import ArbiterService, ProtocolError
from dstack_sched.domain import decision
from dstack_sched.domain.event import (
    BackendJoined,
    BackendLeft,
    BatchFinished,
    BatchStarted,
    EngineModel,
    PlanChanged,
    TimerFired,
    WorkQueued,
)
from dstack_sched.domain.json_form import gpus_to_json
from dstack_sched.domain.workload import OnLate
from dstack_sched.errors import InputError
from fakes.scripted_engine import PlanMemory, ScriptedEngine

EPOCH = 7
JOIN = wire.Join("resnet", "resnet_0", 42, 0, 40.0, 16, 8, 50_000, True, (20.0, 40.0))
PLAN = PlanChanged(150.0, (EngineModel("resnet", 40.0, 8, 50_000, 1.0, OnLate.REJECT, 30.0),))


class Bench:
    """A service over scripted engines, one a make_engine call, newest last."""

    def __init__(self, plans: PlanMemory | None = None) -> None:
        self.engines: list[ScriptedEngine] = []
        self.plans = plans or PlanMemory()
        self.service = ArbiterService(self._make, "scripted", self.plans, epoch=EPOCH, now_us=0)

    def _make(self, policy: str) -> ScriptedEngine:
        if policy not in ("scripted", "other"):
            raise InputError(f"unknown policy {policy}")
        self.engines.append(ScriptedEngine())
        return self.engines[-1]

    def join(self, connection: int = 1, join: wire.Join = JOIN, now_us: int = 100) -> ScriptedEngine:
        self.service.received(connection, join, now_us)
        return self.engines[-1]

    def control(self, now_us: int = 0, **body: object) -> dict:
        ((connection, reply),) = self.service.received(99, wire.Control(dict(body)), now_us)
        assert connection == 99 and isinstance(reply, wire.Reply)
        return reply.body


def wire_id(engine_id: int, epoch: int = EPOCH) -> int:
    return epoch << 32 | engine_id


def grant(
    engine_id: int, batch: int = 8, instance: str = "resnet_0#1", lease: int = 10_000
) -> decision.Grant:
    return decision.Grant(instance, engine_id, 40.0, batch, lease)


def test_join_opens_the_gpu_and_welcomes() -> None:
    bench = Bench()
    out = bench.service.received(1, JOIN, 100)
    assert out == [(1, wire.Welcome(1, 100.0))]
    events = [event for _, event in bench.engines[-1].events]
    assert events == [
        PlanChanged(100.0, ()),
        BackendJoined("resnet_0#1", "resnet", 40.0, (20.0, 40.0), 16, 8, 50_000, OnLate.REJECT),
    ]


def test_absurd_batch_size_is_bounded() -> None:
    """Guards against a join that makes the engine build tables of a million rows."""
    bench = Bench()
    engine = bench.join(1, wire.Join("m", "m", 1, 0, 40.0, 1 << 20, 1 << 20, 0, False))
    joined = engine.events[-1][1]
    assert isinstance(joined, BackendJoined)
    assert joined.max_batch_size == joined.batch_size == 4_096


def test_two_instances_of_one_name_are_told_apart() -> None:
    """During a reload the old and the new instance have the same name for a while."""
    bench = Bench()
    engine = bench.join(1)
    bench.join(2)
    joined = [event.instance for _, event in engine.events if isinstance(event, BackendJoined)]
    assert joined == ["resnet_0#1", "resnet_0#2"]


def test_work_grant_done() -> None:
    bench = Bench()
    engine = bench.join()
    engine.answers.append([grant(5), decision.SetTimer(9_000)])
    out = bench.service.received(1, wire.Work(3, 60_000), 200)
    assert out == [(1, wire.Grant(wire_id(5), 8, 40.0, 10_000))]
    assert bench.service.next_timer_us() == 9_000
    bench.service.received(1, wire.Done(wire_id(5), 3, 1, 900, 2, 70_000), 1_200)
    assert engine.events[-2:] == [
        (200, WorkQueued("resnet_0#1", 3, 60_000)),
        (1_200, BatchFinished("resnet_0#1", 5, 3, 900, 2, 70_000, 1)),
    ]
    counters = bench.control(verb="status", now_us=1_300)["models"]["resnet"]
    assert (counters["grants"], counters["rows"], counters["late_rows"]) == (1, 3, 1)
    assert counters["wait_us"]["count"] == 1 and counters["wait_us"]["sum"] == 0
    assert counters["gpu_percent_ms"] == pytest.approx(40.0 * 0.9)


def standing(engine_id: int, mask: int = 0) -> decision.Grant:
    return decision.Grant("resnet_0#1", engine_id, 40.0, 8, 60_000_000, mask, True)


def test_a_standing_grant_runs_once_it_is_started() -> None:
    bench = Bench()
    engine = bench.join()
    engine.answers.append([standing(5, 0b11)])
    out = bench.service.received(1, wire.Work(0, 0), 200)
    assert out == [(1, wire.Grant(wire_id(5), 8, 40.0, 60_000_000, 0b11, True))]
    status = bench.control(verb="status", now_us=50_000)
    assert status["backends"][0]["state"] == "idle" and status["gpus"]["0"]["gpu_percent_ms"] == 0
    bench.service.received(1, wire.Start(wire_id(5), 3, 1, 90_000), 60_000)
    assert engine.events[-1] == (60_000, BatchStarted("resnet_0#1", 5, 3, 1, 90_000))
    assert bench.control(verb="status", now_us=60_500)["backends"][0]["state"] == "running"
    bench.service.received(1, wire.Done(wire_id(5), 3, 0, 900, 0, 0), 61_000)
    assert engine.events[-1] == (61_000, BatchFinished("resnet_0#1", 5, 3, 900, 0, 0))
    counters = bench.control(verb="status", now_us=62_000)["models"]["resnet"]
    assert (counters["grants"], counters["rows"]) == (1, 3)
    assert counters["gpu_percent_ms"] == pytest.approx(40.0 * 0.9)


def test_a_standing_grant_that_told_its_end_alone_is_booked() -> None:
    bench = Bench()
    engine = bench.join()
    engine.answers.append([standing(5)])
    bench.service.received(1, wire.Work(0, 0), 200)
    bench.service.received(1, wire.Done(wire_id(5), 2, 0, 400, 0, 0), 61_000)
    assert engine.events[-1] == (61_000, BatchFinished("resnet_0#1", 5, 2, 400, 0, 0))
    counters = bench.control(verb="status", now_us=62_000)["models"]["resnet"]
    assert (counters["rows"], counters["gpu_percent_ms"]) == (2, pytest.approx(16.0))


def test_a_standing_grant_is_revoked_and_given_back() -> None:
    bench = Bench()
    engine = bench.join()
    engine.answers.append([standing(5)])
    bench.service.received(1, wire.Work(0, 0), 200)
    engine.answers.append([decision.Revoke("resnet_0#1", 5)])
    assert bench.service.received(1, wire.Work(0, 0), 300) == [(1, wire.Revoke(wire_id(5)))]
    bench.service.received(1, wire.Done(wire_id(5), 0, 0, 0, 0, 0), 400)
    assert engine.events[-1] == (400, BatchFinished("resnet_0#1", 5, 0, 0, 0, 0))
    assert bench.control(verb="timeline", now_us=500)["rows"] == [], "nothing ran"


def test_another_policy_takes_standing_grants_back_and_counts_them_until_then() -> None:
    bench = Bench()
    engine = bench.join()
    engine.answers.append([standing(5)])
    bench.service.received(1, wire.Work(0, 0), 200)
    out = bench.service.received(99, wire.Control({"verb": "policy", "name": "other"}), 1_000)
    assert (1, wire.Revoke(wire_id(5))) in out
    (joined,) = [event for _, event in bench.engines[-1].events if isinstance(event, BackendJoined)]
    assert (joined.running_percent, joined.running_until_us) == (40.0, 51_000)
    bench.service.received(1, wire.Done(wire_id(5), 0, 0, 0, 0, 0), 1_200)
    assert bench.engines[-1].events[-1] == (1_200, BatchFinished("resnet_0#1", 0, 0, 0, 0, 0))


def test_an_instance_is_told_what_a_plan_says_otherwise() -> None:
    """Objective, batch size and what happens to late requests change without a reload."""
    bench = Bench()
    bench.join()
    same = PlanChanged(100.0, (EngineModel("resnet", 40.0, 8, 50_000, 1.0, OnLate.REJECT, 30.0),))
    assert (
        len(bench.service.received(9, wire.Control({"verb": "plan", "gpus": gpus_to_json({0: same})}), 1))
        == 1
    )
    other = PlanChanged(100.0, (EngineModel("resnet", 40.0, 64, 20_000, 1.0, OnLate.SERVE, 30.0),))
    body = wire.Control({"verb": "plan", "gpus": gpus_to_json({0: other})})
    told = [message for connection, message in bench.service.received(9, body, 2) if connection == 1]
    assert told == [wire.Plan(16, 20_000, False)], "no more rows than it can take"
    assert [m for c, m in bench.service.received(9, body, 3) if c == 1] == [], "told once"
    late = bench.service.received(2, JOIN, 4)
    assert (2, wire.Plan(16, 20_000, False)) in late, "one that joins later learns it too"


def test_deadline_of_an_empty_queue_is_zero() -> None:
    bench = Bench()
    engine = bench.join()
    bench.service.received(1, wire.Work(0, 12_345), 200)
    assert engine.events[-1] == (200, WorkQueued("resnet_0#1", 0, 0))


def test_wait_for_a_grant_is_measured_from_the_first_report() -> None:
    bench = Bench()
    engine = bench.join()
    bench.service.received(1, wire.Work(1, 60_000), 1_000)
    engine.answers.append([grant(1)])
    bench.service.received(1, wire.Work(2, 60_000), 4_000)
    wait = bench.control(verb="status", now_us=5_000)["models"]["resnet"]["wait_us"]
    assert (wait["count"], wait["sum"]) == (1, 3_000)


def test_overloads_are_logged_together_and_seldom(caplog: pytest.LogCaptureFixture) -> None:
    """Under overload the arbiter has the least time for a log."""
    bench = Bench()
    engine = bench.join()
    with caplog.at_level("WARNING", logger="dstack.arbiter"):
        for second in range(25):
            for _ in range(3):
                engine.answers.append([decision.Overload("resnet", "late", 5)])
                bench.service.received(1, wire.Work(1, 60_000), 1_000_000 * second)
            bench.service.housekeep(1_000_000 * second)
    assert [record.getMessage().rsplit(": ")[1] for record in caplog.records] == [
        "resnet (3 times)", "resnet (30 times)", "resnet (30 times)",
    ]  # fmt: skip
    assert caplog.records[1].fields == {"what": "overloaded", "models": {"resnet": 30}}


def test_telemetry_is_kept_by_session_and_paged() -> None:
    bench = Bench()
    for number in range(30):
        bench.join(number, replace(JOIN, instance=f"resnet_{number}"))
        for at_us in (1_000, 2_000):
            told = wire.Telemetry({"waiting_rows": number, "at": at_us})
            assert bench.service.received(number, told, at_us) == []
    first = bench.control(verb="telemetry", now_us=2_500_000)
    second = bench.control(verb="telemetry", since=first["next_since"], now_us=2_500_000)
    assert (len(first["instances"]), first["more"]) == (24, True)
    assert (len(second["instances"]), second["more"]) == (6, False)
    assert second["instances"]["resnet_29#30"] == {
        "waiting_rows": 29, "at": 2_000, "model": "resnet", "gpu": 0, "session": 30, "age_s": 2.498,
    }  # fmt: skip
    bench.service.received(29, wire.Leave(), 3_000)
    assert bench.control(verb="telemetry", since=29)["instances"] == {}


def test_telemetry_without_end_is_not_kept() -> None:
    """One instance that tells a book must not make everybody's page too large for a packet."""
    bench = Bench()
    bench.join()
    bench.service.received(1, wire.Telemetry({"ok": 1}), 200)
    bench.service.received(1, wire.Telemetry({"text": "x" * 10_000}), 300)
    (told,) = bench.control(verb="telemetry")["instances"].values()
    assert told["ok"] == 1 and "text" not in told


def test_done_of_another_engine_s_grant_only_reports_the_queue() -> None:
    """After a restart an instance may end a grant of the arbiter before: this engine knows nothing of it."""
    bench = Bench()
    engine = bench.join()
    bench.service.received(1, wire.Done(wire_id(5, epoch=6), 3, 0, 900, 2, 70_000), 1_200)
    assert engine.events[-1] == (1_200, WorkQueued("resnet_0#1", 2, 70_000))


def test_batch_running_while_joining_counts_and_ends() -> None:
    bench = Bench()
    running = wire.Join("resnet", "resnet_0", 42, 0, 40.0, 16, 8, 50_000, False, (), 40.0, 5_000)
    engine = bench.join(1, running)
    joined = engine.events[-1][1]
    assert isinstance(joined, BackendJoined)
    assert (joined.running_percent, joined.running_until_us) == (40.0, 5_000)
    assert bench.control(verb="status", now_us=150)["backend_states"]["running"] == 1
    bench.service.received(1, wire.Done(0, 4, 0, 900, 0, 0), 3_000)
    assert engine.events[-1] == (3_000, BatchFinished("resnet_0#1", 0, 4, 900, 0, 0))
    assert bench.control(verb="status", now_us=3_100)["backend_states"]["idle"] == 1


def test_leave_and_disconnect_free_the_instance_once() -> None:
    bench = Bench()
    engine = bench.join()
    bench.service.received(1, wire.Leave(), 300)
    assert engine.events[-1] == (300, BackendLeft("resnet_0#1"))
    told = len(engine.events)
    assert bench.service.disconnected(1, 400) == []
    assert len(engine.events) == told


def test_disconnect_may_grant_to_others() -> None:
    bench = Bench()
    engine = bench.join(1)
    bench.join(2)
    engine.answers.append([grant(3, instance="resnet_0#2")])
    assert bench.service.disconnected(1, 400) == [(2, wire.Grant(wire_id(3), 8, 40.0, 10_000))]


def test_timer_fires_once_and_only_when_due() -> None:
    bench = Bench()
    engine = bench.join()
    engine.answers.append([decision.SetTimer(9_000)])
    bench.service.received(1, wire.Work(1, 60_000), 200)
    bench.service.timer(8_999)
    assert not any(isinstance(event, TimerFired) for _, event in engine.events)
    bench.service.timer(9_000)
    assert engine.events[-1] == (9_000, TimerFired())
    assert bench.service.next_timer_us() is None


def test_shed_and_overload() -> None:
    bench = Bench()
    engine = bench.join()
    engine.answers.append([decision.Shed("resnet_0#1", 777), decision.Overload("resnet", "too late", 12)])
    assert bench.service.received(1, wire.Work(9, 800), 790) == [(1, wire.Shed(777))]
    status = bench.control(verb="status", now_us=800)
    assert status["models"]["resnet"]["shed_orders"] == 1
    assert status["models"]["resnet"]["overloads"] == 1
    assert status["overload_reports"][-1]["reason"] == "too late"


@pytest.mark.parametrize(
    "messages",
    [
        [wire.Work(1, 1)],
        [wire.Done(1, 1, 0, 1, 0, 0)],
        [wire.Leave()],
        [wire.Grant(1, 1, 10.0, 1)],
        [wire.Welcome(1, 100.0)],
        [wire.Reply({})],
        [JOIN, JOIN],
        [JOIN, wire.Control({"verb": "status"})],
        [wire.Join("m", "i", 1, 64, 40.0, 1, 1, 0, False)],
        [wire.Join("m", "i", 1, -2, 40.0, 1, 1, 0, False)],
    ],
)
def test_messages_out_of_order_are_refused(messages: list[wire.Message]) -> None:
    bench = Bench()
    for message in messages[:-1]:
        bench.service.received(1, message, 100)
    with pytest.raises(ProtocolError):
        bench.service.received(1, messages[-1], 100)


def test_ping_is_answered_joined_or_not() -> None:
    bench = Bench()
    assert bench.service.received(5, wire.Ping(77), 1) == [(5, wire.Pong(77))]
    bench.join()
    assert bench.service.received(1, wire.Ping(78), 1) == [(1, wire.Pong(78))]


def test_plan_reaches_the_engine_is_kept_and_comes_back() -> None:
    bench = Bench()
    engine = bench.join()
    assert bench.control(verb="plan", gpus=gpus_to_json({0: PLAN})) == {"ok": True, "gpus": [0], "kept": True}
    assert engine.events[-1][1] == PLAN
    again = Bench(bench.plans)  # the arbiter restarts with what was kept
    assert again.engines[-1].events == [(0, PLAN)]
    assert again.service.received(1, JOIN, 100) == [(1, wire.Welcome(1, 150.0))]


def test_plan_that_cannot_be_kept_is_in_force_and_says_so() -> None:
    bench = Bench(PlanMemory(writable=False))
    engine = bench.join()
    assert bench.control(verb="plan", gpus=gpus_to_json({0: PLAN}))["kept"] is False
    assert engine.events[-1][1] == PLAN


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "unknown verb"),
        ({"verb": ["x"]}, "unknown verb"),
        ({"verb": "plan"}, "gpus"),
        ({"verb": "plan", "gpus": {"0": {}}}, "missing"),
        ({"verb": "timeline", "since_seq": -1}, "since_seq"),
        ({"verb": "timeline", "limit": "x"}, "limit"),
        ({"verb": "policy"}, "a name is wanted"),
        ({"verb": "policy", "name": "nonsense"}, "unknown policy"),
    ],
)
def test_control_errors_are_one_line(body: dict, says: str) -> None:
    reply = Bench().control(**body)
    assert reply["ok"] is False and says in reply["error"] and "\n" not in reply["error"]


def test_policy_changes_live_and_what_runs_is_carried_over() -> None:
    """Running batches count in the new engine before it grants anything; their ends arrive there."""
    bench = Bench()
    old = bench.join(1)
    bench.join(2)
    old.answers.append([grant(1), grant(2)])
    bench.service.received(1, wire.Work(20, 60_000), 200)
    bench.service.received(2, wire.Work(4, 70_000), 200)
    assert bench.control(verb="policy", name="other", now_us=300)["policy"] == "other"
    new = bench.engines[-1]
    kinds = [type(event) for _, event in new.events]
    assert kinds == [PlanChanged, BackendJoined, BackendJoined, WorkQueued, WorkQueued]
    carried = new.events[1][1]
    assert isinstance(carried, BackendJoined)
    assert (carried.running_percent, carried.running_until_us) == (40.0, 10_000)
    told = len(old.events)
    bench.service.received(1, wire.Done(wire_id(1), 8, 0, 900, 12, 60_000), 1_200)
    assert isinstance(new.events[-1][1], WorkQueued)  # the chained one still runs
    bench.service.received(1, wire.Done(wire_id(2), 8, 0, 900, 4, 60_000), 2_200)
    assert new.events[-1][1] == BatchFinished("resnet_0#1", 0, 8, 900, 4, 60_000)
    assert len(old.events) == told
    new.answers.append([grant(1)])
    ((_, message),) = bench.service.received(1, wire.Work(4, 60_000), 2_300)
    assert message == wire.Grant(wire_id(1, EPOCH + 1), 8, 40.0, 10_000)


def test_timeline_pages_and_what_runs() -> None:
    bench = Bench()
    engine = bench.join()
    for i in range(5):
        engine.answers.append([grant(i + 1, lease=10**9)])
        bench.service.received(1, wire.Work(8, 10**9), 10_000 * i)
        bench.service.received(1, wire.Done(wire_id(i + 1), 8, 0, 4_000, 0, 0), 10_000 * i + 5_000)
    engine.answers.append([grant(9, lease=10**9)])
    bench.service.received(1, wire.Work(8, 10**9), 90_000)
    page = bench.control(verb="timeline", limit=3, now_us=91_000)
    assert (len(page["rows"]), page["more"], page["next_since"]) == (3, True, 3)
    first = dict(zip(page["fields"], page["rows"][0], strict=True))
    assert (first["start_us"], first["end_us"], first["rows"], first["outcome"]) == (1_000, 5_000, 8, "done")
    rest = bench.control(verb="timeline", since_seq=page["next_since"], now_us=91_000)
    assert (len(rest["rows"]), rest["more"]) == (2, False)
    assert rest["running"][0]["start_us"] == 90_000
    late = bench.control(verb="timeline", since_us=35_000, now_us=91_000)
    assert [row[0] for row in late["rows"]] == [4, 5]
    assert bench.control(verb="timeline", since_us=91_000, now_us=91_000)["rows"] == []
    empty = bench.control(verb="timeline", since_seq=rest["next_since"], now_us=91_000)
    assert (empty["rows"], empty["next_since"], empty["more"]) == ([], rest["next_since"], False)


def test_chained_batch_starts_where_the_first_ended() -> None:
    """Intervals of one instance never overlap, or the chart would show more GPU% than was granted."""
    bench = Bench()
    engine = bench.join()
    engine.answers.append([grant(1), grant(2)])
    bench.service.received(1, wire.Work(16, 60_000), 1_000)
    bench.service.received(1, wire.Done(wire_id(1), 8, 0, 90_000, 8, 60_000), 4_000)
    bench.service.received(1, wire.Done(wire_id(2), 8, 0, 90_000, 0, 0), 7_000)
    rows = bench.control(verb="timeline", now_us=8_000)["rows"]
    assert [row[5:7] for row in rows] == [[1_000, 4_000], [4_000, 7_000]]


def test_lease_that_ran_out_is_told_and_its_share_ends_there() -> None:
    bench = Bench()
    engine = bench.join()
    engine.answers.append([grant(1, lease=5_000)])
    bench.service.received(1, wire.Work(8, 60_000), 1_000)
    assert bench.control(verb="status", now_us=6_000)["backend_states"]["hung"] == 1
    bench.service.received(1, wire.Done(wire_id(1), 8, 8, 90_000, 0, 0), 90_000)
    row = bench.control(verb="timeline", now_us=91_000)["rows"][0]
    assert row[5:7] == [1_000, 5_000] and row[-1] == "lease"
    assert bench.control(verb="status", now_us=91_000)["models"]["resnet"]["leases_ended"] == 1


def test_names_without_end_cost_bounded_memory() -> None:
    bench = Bench()
    for i in range(3_000):
        join = wire.Join(f"model_{i}", "x", 1, 0, 40.0, 1, 1, 0, False)
        engine = bench.join(1, join)
        engine.answers.append([grant(i + 1, instance=f"x#{i + 1}")])
        bench.service.received(1, wire.Work(1, 1), 1_000)
        bench.service.received(1, wire.Leave(), 1_000)
    models = bench.service.record.models
    assert len(models) <= 129 and sum(each.grants for each in models.values()) == 3_000


def test_an_instance_that_never_answers_costs_bounded_memory() -> None:
    bench = Bench()
    engine = bench.join()
    for i in range(100):
        engine.answers.append([grant(i + 1, lease=i)])
        bench.service.received(1, wire.Work(8, 60_000), 1_000 * i)
    assert bench.control(verb="status", now_us=10**6)["backends"][0]["outstanding"] <= 16
