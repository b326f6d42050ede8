"""The best plan where not all fits: cut by weight, SLOs that cannot be kept stretched, nothing hidden."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dstack_sched.app.overload import best_plan
from dstack_sched.app.planning import PlanOptions, make_plan
from dstack_sched.domain.plan import Plan
from dstack_sched.domain.profile import Device, ModelProfile, ProfilePoint, ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload

GPU = Device("H100", 132, 80 << 30, "580", "onnxruntime")


def profiles(*names: str, memory_bytes: int = 1 << 30) -> ProfileSet:
    points = tuple(
        ProfilePoint(p, b, 1.0 + 80.0 * b / p, 1.2 + 90.0 * b / p, 100)
        for p in (10.0, 25.0, 50.0, 100.0)
        for b in (1, 2, 4, 8, 16)
    )
    return ProfileSet(GPU, {name: ModelProfile(name, "0" * 64, memory_bytes, points) for name in names})


def workload(slo_ms: float = 60.0, **models: tuple[float, float]) -> Workload:
    """Models as name=(rate, weight)."""
    return Workload(tuple(ModelDemand(name, slo_ms, rate, weight) for name, (rate, weight) in models.items()))


def planner(found: ProfileSet):
    calls: list[Workload] = []

    def make(asked: Workload) -> Plan:
        calls.append(asked)
        return make_plan(found, asked, PlanOptions(lenient=True))

    return make, calls


def test_what_fits_is_planned_once_and_as_asked() -> None:
    make, calls = planner(profiles("a", "b"))
    best = best_plan(make, workload(a=(100.0, 1.0), b=(100.0, 1.0)))
    assert best.plan.feasible
    assert best.shortfall == ""
    assert len(calls) == 1


def test_equal_weights_are_cut_alike_and_the_plan_fits_what_is_left() -> None:
    make, _ = planner(profiles("a", "b"))
    asked = workload(a=(2000.0, 1.0), b=(600.0, 1.0))
    best = best_plan(make, asked)
    assert not best.plan.feasible
    assert best.kept["a"] == best.kept["b"] < 1
    assert best.plan.models["a"].rate_per_s == pytest.approx(2000 * best.kept["a"], rel=0.02)
    assert "a " in best.shortfall and "b " in best.shortfall
    assert "does not fit" in best.plan.binding[0]
    less = [
        replace(m, rate_per_s=0.97 * row.rate_per_s)
        for m, row in zip(asked.models, best.plan.models.values(), strict=True)
    ]
    fits = make(replace(asked, models=tuple(less)))
    assert fits.feasible


def test_the_lighter_model_is_cut_first_and_as_little_as_must_be() -> None:
    """Guards against shedding all alike when the operator said who matters."""
    make, _ = planner(profiles("gold", "rest"))
    best = best_plan(make, workload(gold=(500.0, 4.0), rest=(1500.0, 1.0)))
    assert best.kept["gold"] == 1.0
    assert best.kept["rest"] < 1.0
    more = make(workload(gold=(500.0, 4.0), rest=(1500.0 * min(1.0, 1.1 * best.kept["rest"]), 1.0)))
    assert not more.feasible, "more of the lighter model would have fitted"
    assert best.plan.headroom < 1


def test_an_slo_that_cannot_be_kept_does_not_leave_the_others_without_a_plan() -> None:
    make, _ = planner(profiles("slow", "fine"))
    asked = Workload((ModelDemand("slow", 2.0, 20.0), ModelDemand("fine", 80.0, 100.0)))
    best = best_plan(make, asked)
    assert set(best.plan.models) == {"slow", "fine"}
    assert best.plan.models["slow"].slo_ms == 2.0, "its stated SLO stays in force"
    assert best.slo_ms["slow"] > 2.0
    assert "fine" not in best.slo_ms
    assert "slow: its SLO cannot be kept" in best.shortfall
    assert not best.plan.feasible


def test_what_fits_at_no_rate_gives_no_models_and_the_reason() -> None:
    make, _ = planner(profiles("a", "b", memory_bytes=60 << 30))
    best = best_plan(make, workload(a=(10.0, 1.0), b=(10.0, 1.0)))
    assert best.plan.models == {}
    assert "memory" in best.plan.binding[0]
