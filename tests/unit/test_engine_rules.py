"""The engine fed by hand: one rule a test, no simulator."""

from __future__ import annotations

from dstack_sched.domain.decision import Grant, Overload, Shed
from dstack_sched.domain.event import BackendJoined, BackendLeft, BatchFinished, PlanChanged, WorkQueued
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.dstack import DStackEngine, Rules
from dstack_sched.engine.registry import make_engine
from dstack_sched.policy.interference import Interference
from fakes.worlds import LIGHT, demand, engine_model, surface


def joined(name: str, percent: float, slo_us: int = 20_000, on_late: OnLate = OnLate.SERVE) -> BackendJoined:
    return BackendJoined(name, name, percent, (), 16, 8, slo_us, on_late)


def grants(decisions: list) -> list[tuple[str, int]]:
    return [(d.instance, d.batch_size) for d in decisions if isinstance(d, Grant)]


def test_the_more_urgent_goes_first_when_only_one_fits() -> None:
    engine = make_engine("dstack")
    for name in ("busy", "relaxed", "urgent"):
        engine.handle(joined(name, 60.0), 0)
    first = engine.handle(WorkQueued("busy", 8, 20_000), 0)
    assert [name for name, _ in grants(first)] == ["busy"]
    assert grants(engine.handle(WorkQueued("relaxed", 8, 30_000), 10)) == []
    assert grants(engine.handle(WorkQueued("urgent", 8, 15_000), 20)) == []
    done = engine.handle(BatchFinished("busy", 1, 8, 4_000, 0, 0), 4_000)
    assert [name for name, _ in grants(done)] == ["urgent"]


def test_nobody_overtakes_into_a_reserved_place() -> None:
    """`large` waits for both shares; `small` would fit now, but would still run when `large` could start."""
    engine = make_engine("dstack")
    model = surface("x", LIGHT)
    plans = []
    for name, percent in (("runs", 50.0), ("large", 100.0), ("small", 50.0)):
        wanted = demand(name, 1.0, 20.0, on_late=OnLate.SERVE)
        plans.append(engine_model(model, wanted, percent, 8, Interference()))
        engine.handle(joined(name, percent), 0)
    engine.handle(PlanChanged(100.0, tuple(plans)), 0)
    assert grants(engine.handle(WorkQueued("runs", 1, 20_000), 0))
    assert not grants(engine.handle(WorkQueued("large", 8, 6_000), 10))
    assert not grants(engine.handle(WorkQueued("small", 8, 20_000), 20))
    ended = engine.handle(BatchFinished("runs", 1, 1, 1_000, 0, 0), 1_000)
    assert [name for name, _ in grants(ended)] == ["large"]


def test_what_cannot_make_it_is_shed_before_it_runs_and_reported() -> None:
    engine = make_engine("dstack")
    engine.handle(joined("m", 100.0, on_late=OnLate.REJECT), 0)
    wanted = demand("m", 1.0, 20.0, on_late=OnLate.REJECT)
    plan = engine_model(surface("m", LIGHT), wanted, 100.0, 8, Interference())
    engine.handle(PlanChanged(100.0, (plan,)), 0)
    decisions = engine.handle(WorkQueued("m", 4, 1_000_200), 1_000_000)  # 0.2 ms left, a run takes 0.9 ms
    assert isinstance(decisions[0], Shed) and decisions[0].deadline_before_us > 1_000_200
    assert any(isinstance(d, Overload) for d in decisions)


def test_a_departure_frees_the_share_at_once_and_a_new_plan_holds_from_the_next_grant() -> None:
    engine = make_engine("dstack")
    for name in ("a", "b"):
        engine.handle(joined(name, 80.0), 0)
    assert grants(engine.handle(WorkQueued("a", 8, 20_000), 0))
    assert not grants(engine.handle(WorkQueued("b", 8, 20_000), 5))
    assert grants(engine.handle(PlanChanged(200.0, ()), 10)) == [("b", 16)]
    engine.handle(BackendLeft("a"), 20)
    engine.check_invariants()
    assert engine.snapshot()["granted_percent"] == 80.0


def test_messages_of_the_unknown_and_the_past_are_ignored() -> None:
    """A message may cross a departure or a restart on its way: that is no error."""
    engine = make_engine("dstack")
    assert engine.handle(WorkQueued("nobody", 3, 10), 5) == []
    assert engine.handle(BatchFinished("nobody", 7, 1, 10, 0, 0), 6) == []
    engine.handle(joined("m", 50.0), 10)
    engine.handle(BatchFinished("m", 99, 1, 10, 0, 0), 11)
    engine.check_invariants()


def test_run_times_are_learned_without_a_profile() -> None:
    """After a few batches of 5 ms the predicted end is near 5 ms, not the first guess."""
    engine = DStackEngine(Rules(stand=False))
    engine.handle(joined("m", 50.0, slo_us=100_000), 0)
    now, grant_id = 0, 0
    for _ in range(30):
        for decision in engine.handle(WorkQueued("m", 8, now + 100_000), now):
            if isinstance(decision, Grant):
                grant_id = decision.grant_id
        now += 5_000
        engine.handle(BatchFinished("m", grant_id, 8, 5_000, 0, 0), now)
    engine.handle(WorkQueued("m", 8, now + 100_000), now)
    predicted = engine.snapshot()["instances"]["m"]["predicted_end_us"] - now
    assert 4_500 <= predicted <= 5_500
