"""The share of a batch: the plan's, stretched to fill the capacity; more where deadlines need it."""

from __future__ import annotations

import pytest

from dstack_sched.domain.decision import Grant
from dstack_sched.domain.event import BackendJoined, EngineModel, PlanChanged, WorkQueued
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.dstack import DStackEngine

LEVELS = tuple(float(p) for p in range(10, 101, 10))
SLO_US = 20_000


def model(name: str, percent: float) -> EngineModel:
    """Runs 2 ms a row at 100%, twice that at 50%."""
    percents, batches = (10.0, 100.0), (1, 8)
    table = tuple(tuple(2.0 * b * 100.0 / p for b in batches) for p in percents)
    return EngineModel(name, percent, 4, SLO_US, 1.0, OnLate.SERVE, percent, percents, batches, table)


def engine_of(shares: dict[str, float], capacity: float) -> DStackEngine:
    engine = DStackEngine()
    engine.handle(PlanChanged(capacity, tuple(model(n, p) for n, p in shares.items())), 0)
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
