"""The share of a batch: the plan's, stretched to fill the capacity; more where deadlines need it."""

from __future__ import annotations

import pytest

from dstack_sched.domain.decision import Grant
from dstack_sched.domain.event import BackendJoined, BatchFinished, EngineModel, PlanChanged, WorkQueued
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.dstack import DStackEngine, Rules

LEVELS = tuple(float(p) for p in range(10, 101, 10))
SLO_US = 20_000


def model(name: str, percent: float, row_ms: float = 2.0) -> EngineModel:
    """Runs 2 ms a row at 100%, twice that at 50%."""
    percents, batches = (10.0, 100.0), (1, 8)
    table = tuple(tuple(row_ms * b * 100.0 / p for b in batches) for p in percents)
    return EngineModel(name, percent, 4, SLO_US, 1.0, OnLate.SERVE, percent, percents, batches, table)


def engine_of(shares: dict[str, float], capacity: float, row_ms: float = 2.0) -> DStackEngine:
    engine = DStackEngine()
    engine.handle(PlanChanged(capacity, tuple(model(n, p, row_ms) for n, p in shares.items())), 0)
    for name, percent in shares.items():
        engine.handle(BackendJoined(name, name, percent, LEVELS, 8, 4, SLO_US, OnLate.SERVE), 0)
    return engine


def granted(engine: DStackEngine, name: str, waiting: int, deadline_us: int) -> float:
    out = engine.handle(WorkQueued(name, waiting, deadline_us), 1)
    found = [d for d in out if isinstance(d, Grant)]
    assert [d.instance for d in found] == [name]
    engine.check_invariants()
    return found[0].gpu_percent


@pytest.mark.parametrize(
    ("shares", "capacity", "wanted"),
    [
        ({"a": 10.0, "b": 20.0}, 60.0, {"a": 20.0, "b": 40.0}),  # in proportion, until the capacity is full
        # to two thirds for one, up to a level
        ({"a": 20.0, "b": 60.0, "c": 10.0}, 190.0, {"a": 30.0, "b": 70.0, "c": 20.0}),
        ({"a": 20.0, "b": 60.0}, 300.0, {"a": 40.0, "b": 100.0}),  # to an equal part where that is more
        ({"a": 60.0, "b": 90.0}, 100.0, {"a": 60.0, "b": 90.0}),  # never shrunk
        ({"a": 25.0, "b": 25.0}, 50.0, {"a": 30.0, "b": 20.0}),  # rounding never exceeds the capacity
        ({"a": 15.0, "b": 25.0}, 40.0, {"a": 20.0, "b": 20.0}),  # what rounding leaves goes to one of them
    ],
)
def test_planned_shares_are_stretched(
    shares: dict[str, float], capacity: float, wanted: dict[str, float]
) -> None:
    for name, percent in wanted.items():
        engine = engine_of(shares, capacity)
        assert granted(engine, name, 1, 10 * SLO_US) == percent


def test_who_would_be_late_gets_more_of_what_is_free() -> None:
    """A row takes 10 ms at 20%: with 8 ms left, of which 2 are kept in hand, it needs 40%."""
    shares = {"a": 20.0, "b": 70.0, "c": 20.0}
    assert granted(engine_of(shares, 180.0), "a", 1, 10 * SLO_US) == 20.0
    assert granted(engine_of(shares, 180.0), "a", 1, 8_000) == 40.0


def fixed_engine(percents: dict[str, float], capacity: float) -> DStackEngine:
    """Backends whose share is fixed, without standing grants."""
    engine = DStackEngine(Rules(stand=False))
    engine.handle(PlanChanged(capacity, tuple(model(n, p) for n, p in percents.items())), 0)
    for name, percent in percents.items():
        engine.handle(BackendJoined(name, name, percent, (), 8, 4, 10 * SLO_US, OnLate.SERVE), 0)
    return engine


@pytest.mark.parametrize(
    ("shares", "capacity", "waits"),
    [
        ({"a": 40.0, "b": 40.0, "c": 40.0}, 120.0, False),  # all fit, and less than half of it is in use
        ({"a": 40.0, "b": 40.0, "c": 40.0}, 100.0, True),  # they do not: fuller batches leave the others more
        ({"a": 40.0, "b": 70.0, "c": 10.0}, 120.0, True),  # they do, but the GPU is crowded
    ],
)
def test_a_batch_waits_for_more_rows_only_where_that_may_spare_others_something(
    shares: dict[str, float], capacity: float, waits: bool
) -> None:
    engine = fixed_engine(shares, capacity)
    for now in range(0, 400_000, 1_000):  # a's rate becomes known
        found = [d for d in engine.handle(WorkQueued("a", 1, now + SLO_US), now) if isinstance(d, Grant)]
        for grant in found:
            engine.handle(BatchFinished("a", grant.grant_id, 1, 400, 0, 0), now + 400)
    now = 400_000
    engine.handle(WorkQueued("b", 1, now + SLO_US), now)
    out = engine.handle(WorkQueued("a", 1, now + SLO_US), now + 1)
    assert any(isinstance(d, Grant) and d.instance == "a" for d in out) is not waits


@pytest.mark.parametrize(("row_ms", "stands"), [(0.4, True), (2.0, False)])
def test_beside_others_who_needs_no_more_than_its_planned_share_may_hold_it(
    row_ms: float, stands: bool
) -> None:
    """At 30%: a row of 1.3 ms is at ease in 20 ms, one of 6.7 ms may ask for more of what is free."""
    engine = engine_of({"a": 20.0, "b": 20.0}, 60.0, row_ms)
    held = []
    for name, now in (("b", 0), ("a", 10_000)):
        (grant,) = [d for d in engine.handle(WorkQueued(name, 1, now + SLO_US), now) if isinstance(d, Grant)]
        out = engine.handle(BatchFinished(name, grant.grant_id, 1, 1_000, 0, 0), now + 1_000)
        held = [d for d in out if isinstance(d, Grant) and d.standing]
        engine.check_invariants()
    assert [(d.instance, d.gpu_percent) for d in held] == ([("a", 30.0)] if stands else [])
