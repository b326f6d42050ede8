"""What a new plan changes, sorted by how much it disturbs."""

from __future__ import annotations

from dataclasses import replace

from dstack_sched.app.changes import Reach, Way, changes, counts, loaded
from dstack_sched.domain.plan import Plan, Replica
from dstack_sched.domain.workload import OnLate
from fakes.controller import row

ARBITER = Reach(arbiter=True)


def plan(**models):
    return Plan(100.0, ("H100",), models, True, (), 1.5)


def ways(old, new, reach: Reach = ARBITER) -> list[tuple[str, str]]:
    return [(str(change.way), change.what) for change in changes(plan(m=old), plan(m=new), reach)]


def test_nothing_new_is_no_change() -> None:
    assert changes(plan(m=row(40)), plan(m=row(40)), ARBITER) == ()
    assert changes(plan(m=row(40), n=row(10)), plan(m=row(40)), ARBITER) == (), "n is not in the new plan"


def test_what_can_be_told_is_a_message() -> None:
    old = row(40)
    assert ways(old, replace(old, batch_size=8)) == [("message", "batch 4 -> 8")]
    assert ways(old, replace(old, slo_ms=80.0)) == [("message", "SLO 50 ms -> 80 ms")]
    assert ways(old, replace(old, weight=2.0)) == [("message", "weight 1 -> 2")]
    assert ways(old, replace(old, on_late=OnLate.REJECT)) == [("message", "late requests: serve -> reject")]
    assert ways(replace(old, slo_ms=None), old) == [("message", "SLO none -> 50 ms")]


def test_a_share_is_a_load_but_for_models_with_levels() -> None:
    old, new = row(40), row(70)
    assert ways(old, new) == [("reload", "GPU% 40 -> 70")]
    assert ways(old, new, Reach(arbiter=True, levels=("m",))) == [("level", "GPU% 40 -> 70")]


def test_without_an_arbiter_nothing_can_be_told() -> None:
    old, new = row(40), row(70, 8)
    nobody = Reach(arbiter=False, levels=("m",))
    assert {way for way, _ in ways(old, new, nobody)} == {"reload"}


def test_places_and_numbers_of_instances_are_instance_groups() -> None:
    def on(*gpus: int):
        return row(40, replicas=tuple(Replica(gpu, 40.0, 1.0) for gpu in gpus))

    assert ways(on(0), on(1)) == [("instance_group", "GPUs [0] -> [1]")]
    assert ways(on(-1), on(-1, -1)) == [("instance_group", "instances 1 -> 2")]
    assert ways(row(40), on(0)) == []


def test_the_least_disruptive_come_first_and_loads_are_counted_once_a_model() -> None:
    old = plan(a=row(40), b=row(40))
    new = plan(a=row(70, 8), b=row(40, 8), c=row(10))
    found = changes(old, new, ARBITER)
    assert [change.way for change in found] == [Way.MESSAGE, Way.MESSAGE, Way.RELOAD, Way.RELOAD]
    assert loaded(found) == ("a", "c")
    assert counts(found) == {Way.MESSAGE: 2, Way.RELOAD: 2}
    assert str(found[0]) == "a: batch 4 -> 8 (message)"
    assert "first plan, 10% x batch 4" in str(found[-1])
