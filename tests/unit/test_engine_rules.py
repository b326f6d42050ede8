"""The engine fed by hand: one rule a test, no simulator."""

from __future__ import annotations

import pytest

from dstack_sched.domain.decision import Grant, Overload, Revoke, SetTimer, Shed
from dstack_sched.domain.event import (
    BackendJoined,
    BackendLeft,
    BatchFinished,
    BatchStarted,
    PlanChanged,
    TimerFired,
    WorkQueued,
)
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.books import REVOKE_WITHIN_US
from dstack_sched.engine.dstack import DStackEngine, Rules
from dstack_sched.engine.interface import Engine
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


def rejecting_engine() -> Engine:
    """One model, whose late requests are rejected."""
    engine = make_engine("dstack")
    engine.handle(joined("m", 100.0, on_late=OnLate.REJECT), 0)
    wanted = demand("m", 1.0, 20.0, on_late=OnLate.REJECT)
    plan = engine_model(surface("m", LIGHT), wanted, 100.0, 8, Interference())
    engine.handle(PlanChanged(100.0, (plan,)), 0)
    return engine


def test_what_cannot_make_it_is_shed_before_it_runs_and_reported() -> None:
    engine = rejecting_engine()
    decisions = engine.handle(WorkQueued("m", 4, 1_000_200), 1_000_000)  # 0.2 ms left, a run takes 0.9 ms
    assert isinstance(decisions[0], Shed) and decisions[0].deadline_before_us > 1_000_200
    assert any(isinstance(d, Overload) for d in decisions)


def test_what_was_shed_and_waits_again_is_served() -> None:
    """An instance may have rows that it cannot reject: a shed order each time would keep them for ever."""
    engine = rejecting_engine()
    assert isinstance(engine.handle(WorkQueued("m", 1, 1_000_200), 1_000_000)[0], Shed)
    again = engine.handle(WorkQueued("m", 1, 1_000_200), 1_000_300)
    assert [name for name, _ in grants(again)] == ["m"] and not any(isinstance(d, Shed) for d in again)


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


# ---- standing grants ------------------------------------------------------------------------------------


def serve(engine: DStackEngine, name: str, now: int, rows: int = 1, run_us: int = 1_000) -> list:
    """A request comes, runs, and the queue is empty: the decisions after it."""
    granted = [d for d in engine.handle(WorkQueued(name, rows, now + 20_000), now) if isinstance(d, Grant)]
    (grant,) = [d for d in granted if d.instance == name and not d.standing]
    answer = engine.handle(BatchFinished(name, grant.grant_id, rows, run_us, 0, 0), now + run_us)
    engine.check_invariants()
    return answer


def standing(decisions: list) -> list[Grant]:
    return [d for d in decisions if isinstance(d, Grant) and d.standing]


def test_who_runs_out_of_work_on_an_idle_gpu_gets_a_standing_grant() -> None:
    engine = DStackEngine()
    engine.handle(joined("m", 60.0), 0)
    (grant,) = standing(serve(engine, "m", 1_000))
    assert (grant.instance, grant.gpu_percent) == ("m", 60.0)
    assert engine.snapshot()["granted_percent"] == 0 and engine.snapshot()["standing_percent"] == 60.0
    engine.handle(BatchStarted("m", grant.grant_id, 2, 0, 0), 9_000)
    engine.check_invariants()
    state = engine.snapshot()
    assert state["granted_percent"] == 60.0 and state["instances"]["m"]["grant_id"] == grant.grant_id
    again = engine.handle(BatchFinished("m", grant.grant_id, 2, 900, 0, 0), 10_000)
    assert len(standing(again)) == 1


def test_a_short_run_that_told_its_end_alone_counts_as_run() -> None:
    engine = DStackEngine()
    engine.handle(joined("m", 60.0), 0)
    (grant,) = standing(serve(engine, "m", 1_000))
    before = engine.snapshot()["models"]["m"]["served_percent_us"]
    again = engine.handle(BatchFinished("m", grant.grant_id, 1, 400, 0, 0), 5_000)
    engine.check_invariants()
    assert engine.snapshot()["models"]["m"]["served_percent_us"] - before == 60 * 400
    assert len(standing(again)) == 1


def test_a_standing_grant_takes_no_place_from_those_active_lately() -> None:
    """Two models that take turns on a GPU that holds one at a time: a standing grant of one would cost the
    other a revocation each time."""
    engine = DStackEngine()
    for name in ("a", "b"):
        engine.handle(joined(name, 60.0), 0)
    assert standing(serve(engine, "a", 1_000))  # b has never shown
    revoked = engine.handle(WorkQueued("b", 1, 25_000), 5_000)
    assert [type(d) for d in revoked if not isinstance(d, SetTimer)] == [Revoke]
    grant_id = revoked[0].grant_id
    granted = engine.handle(BatchFinished("a", grant_id, 0, 0, 0, 0), 5_100)
    assert grants(granted) == [("b", granted[0].batch_size)]
    assert not standing(engine.handle(BatchFinished("b", granted[0].grant_id, 1, 1_000, 0, 0), 6_000))
    assert standing(serve(engine, "b", 200_000)), "a has been away for long"


def test_side_by_side_all_may_hold_one() -> None:
    engine = DStackEngine()
    engine.handle(PlanChanged(200.0, ()), 0)
    for name in ("a", "b"):
        engine.handle(joined(name, 60.0), 0)
    assert len(standing(serve(engine, "a", 1_000))) == 1
    assert len(standing(serve(engine, "b", 3_000))) == 1
    assert engine.snapshot()["standing_percent"] == 120.0


def test_a_revoked_grant_that_has_begun_runs_on() -> None:
    engine = DStackEngine()
    for name in ("a", "b"):
        engine.handle(joined(name, 60.0), 0)
    (grant,) = standing(serve(engine, "a", 1_000))
    engine.handle(WorkQueued("b", 1, 25_000), 5_000)
    assert grants(engine.handle(BatchStarted("a", grant.grant_id, 1, 0, 0), 5_050)) == []
    engine.check_invariants()
    assert [n for n, _ in grants(engine.handle(BatchFinished("a", grant.grant_id, 1, 900, 0, 0), 6_000))] == [
        "b"
    ]


def test_who_does_not_give_a_revoked_grant_back_is_passed_over() -> None:
    """A stopped process must not hold the GPU."""
    engine = DStackEngine()
    for name in ("a", "b"):
        engine.handle(joined(name, 60.0), 0)
    (grant,) = standing(serve(engine, "a", 1_000))
    engine.handle(WorkQueued("b", 1, 125_000), 5_000)
    due_us = 5_000 + REVOKE_WITHIN_US
    after = engine.handle(TimerFired(), due_us)
    assert [name for name, _ in grants(after)] == ["b"]
    assert any(isinstance(d, Overload) and d.model == "a" for d in after)
    engine.check_invariants()
    engine.handle(BatchFinished("a", grant.grant_id, 0, 0, 1, 130_000), due_us + 10)  # it lives after all
    engine.check_invariants()


def test_work_that_crossed_a_standing_grant_is_served() -> None:
    engine = DStackEngine()
    engine.handle(joined("m", 60.0), 0)
    (grant,) = standing(serve(engine, "m", 1_000))
    (revoke, *_) = engine.handle(WorkQueued("m", 1, 25_000), 5_000)
    assert revoke == Revoke("m", grant.grant_id)
    (again, *_) = engine.handle(BatchFinished("m", grant.grant_id, 0, 0, 1, 25_000), 5_100)
    assert isinstance(again, Grant) and not again.standing


# ---- SM groups ------------------------------------------------------------------------------------------


def grouped(name: str, percent: float = 50.0) -> BackendJoined:
    return BackendJoined(name, name, percent, (), 16, 8, 20_000, OnLate.SERVE, 0.0, 0, 16)


def test_co_runners_get_sm_groups_of_their_own_and_keep_them() -> None:
    engine = DStackEngine(Rules(stand=False))
    for name in ("a", "b"):
        engine.handle(grouped(name), 0)
    masks: dict[str, set[int]] = {"a": set(), "b": set()}
    for turn in range(4):
        now = turn * 10_000
        given = [d for n in ("a", "b") for d in engine.handle(WorkQueued(n, 8, now + 20_000), now)]
        for grant in given:
            if isinstance(grant, Grant):
                masks[grant.instance].add(grant.sm_groups)
                engine.handle(BatchFinished(grant.instance, grant.grant_id, 8, 1_000, 0, 0), now + 1_000)
    assert masks == {"a": {0x00FF}, "b": {0xFF00}}


def test_an_oversubscribed_gpu_shares_its_groups_evenly() -> None:
    engine = DStackEngine(Rules(stand=False))
    engine.handle(PlanChanged(200.0, ()), 0)
    names = [f"m{i}" for i in range(4)]
    for name in names:
        engine.handle(grouped(name), 0)
    given = [d for n in names for d in engine.handle(WorkQueued(n, 8, 20_000), 10) if isinstance(d, Grant)]
    assert len(given) == 4
    assert all(sum(grant.sm_groups >> group & 1 for grant in given) == 2 for group in range(16))
    engine.check_invariants()


def test_an_instance_that_is_alone_has_its_next_grant_from_the_start_of_the_run() -> None:
    """A chained grant that comes late leaves the device idle while the next batch is launched."""
    engine = DStackEngine()
    for name in ("m", "other"):
        engine.handle(joined(name, 60.0, slo_us=100_000), 0)
    first = engine.handle(WorkQueued("m", 24, 200_000), 150_000)
    assert [name for name, _ in grants(first)] == ["m", "m"]
    engine.check_invariants()
    done = engine.handle(BatchFinished("m", first[0].grant_id, 8, 4_000, 16, 210_000), 154_000)
    assert len(grants(done)) == 1, "and so on"


def test_next_to_others_a_chained_grant_is_decided_late() -> None:
    engine = DStackEngine()
    for name in ("m", "other"):
        engine.handle(joined(name, 50.0, slo_us=100_000), 0)
    engine.handle(WorkQueued("other", 1, 200_000), 150_000)
    first = engine.handle(WorkQueued("m", 24, 200_000), 150_010)
    assert [name for name, _ in grants(first)] == ["m"]


@pytest.mark.parametrize(("capacity", "overloaded"), [(100.0, False), (60.0, True)])
def test_where_all_shares_fit_side_by_side_nobody_is_put_back_for_the_others_sake(
    capacity: float, overloaded: bool
) -> None:
    """Two models that miss their objectives all the time: who goes first is a question only where not both
    can run."""
    engine = DStackEngine(Rules(stand=False))
    model = surface("x", LIGHT)
    plans = [engine_model(model, demand(n, 1.0, 20.0), 50.0, 8, Interference()) for n in "ab"]
    for name in "ab":
        engine.handle(joined(name, 50.0), 0)
    engine.handle(PlanChanged(capacity, tuple(plans)), 0)
    now = 0
    for _ in range(60):
        now += 30_000
        granted = [
            d
            for name in "ab"
            for d in engine.handle(WorkQueued(name, 8, now - 15_000), now)
            if isinstance(d, Grant)
        ]
        while granted:
            grant = granted.pop()
            now += 1_000
            done = engine.handle(BatchFinished(grant.instance, grant.grant_id, 8, 1_000, 0, 0), now)
            granted += [d for d in done if isinstance(d, Grant) and not d.standing]
    assert engine.overloaded is overloaded
