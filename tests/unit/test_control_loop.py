"""The loop: when it plans again, when it leaves things alone, and that it says why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_sched.adapters import decision_log
from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.app.control_loop import ControlLoop
from dstack_sched.app.rates import RateMeter, arrivals
from dstack_sched.app.replan import ReplanSettings, Watch, demand_now, look, outside, worth_applying
from dstack_sched.domain.change import ApplyReport, ModelOutcome
from dstack_sched.domain.plan import ModelPlan, Plan
from dstack_sched.domain.profile import Device, ProfileSet
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.errors import InfeasibleError, ServerError, SolverError
from fakes.serving import FakeClock

SETTINGS = ReplanSettings(window_s=10, hold_s=5, cooldown_s=30)
STATED = Workload((ModelDemand("a", 50.0, 20.0), ModelDemand("b", 80.0, 5.0)))


def row(percent: float, batch: int = 4) -> ModelPlan:
    return ModelPlan(0, percent, batch, 500, 10.0, 100.0, 1.0, 40.0, 0.5, slo_ms=50.0)


def plan(**models: ModelPlan) -> Plan:
    return Plan(100.0, ("cpu",), dict(models), True, (), 1.5)


# -- rates ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=8, max_size=40), st.data())
def test_a_reset_loses_at_most_what_came_between_two_readings(steps: list[int], data: st.DataObject) -> None:
    """Guards against a negative rate, or one spoiled for ever, after a reload sets the counters to 0."""
    reset_at = data.draw(st.integers(1, len(steps) - 1))
    meter, count, clock = RateMeter(100.0), 0, 0
    meter.add(0, 0)
    for number, step in enumerate(steps):
        clock += 10_000_000
        count = step if number == reset_at else count + step
        meter.add(count, clock)
    seconds = min(clock / 1e6, 100.0)
    true = sum(steps[-int(seconds / 10) :]) / seconds
    rate = meter.rate_per_s()
    assert rate is not None
    assert 0 <= rate <= true + 1e-9
    assert rate >= true - 50 / seconds


def test_a_rate_is_not_given_before_half_the_window() -> None:
    meter = RateMeter(10.0)
    for second in range(5):
        meter.add(second * 7, second * 1_000_000)
        assert meter.rate_per_s() is None
    meter.add(35, 5_000_000)
    assert meter.rate_per_s() == pytest.approx(7.0)


def test_arrivals_count_rows_and_failures_of_every_version() -> None:
    def entry(name: str, rows: int, failed: int) -> dict[str, Any]:
        return {"name": name, "inference_count": rows, "inference_stats": {"fail": {"count": failed}}}

    statistics = {"model_stats": [entry("a", 5, 1), entry("a", 10, 0), entry("other", 99, 9)]}
    assert arrivals(statistics, "a") == 16


# -- when to plan again -----------------------------------------------------------------------------------


def test_noise_is_not_a_reason() -> None:
    """Guards against planning on chance: 5/s over 10 s is 50 +- 7 arrivals."""
    assert not outside(5.0, 7.5, SETTINGS)
    assert outside(5.0, 12.0, SETTINGS)
    assert not outside(5.0, 2.0, SETTINGS)
    assert outside(50.0, 10.0, SETTINGS)


def test_a_burst_shorter_than_the_hold_is_sat_out_and_a_longer_one_is_not() -> None:
    watch, planned = Watch(planned_at_us=-60_000_000), {"a": 20.0}
    for second, rate in enumerate([60.0, 60.0, 60.0, 20.0, 60.0, 60.0, 60.0, 60.0, 60.0]):
        watch, reason = look(watch, planned, {"a": rate}, second * 1_000_000, SETTINGS)
        assert reason is None, f"second {second}"
    watch, reason = look(watch, planned, {"a": 60.0}, 9_000_000, SETTINGS)
    assert reason == "a: 60/s measured, 20/s planned for"


def test_nothing_is_planned_within_the_cooldown() -> None:
    watch = Watch(planned_at_us=0)
    for second in range(30):
        watch, reason = look(watch, {"a": 20.0}, {"a": 90.0}, second * 1_000_000, SETTINGS)
        assert reason is None
    assert look(watch, {"a": 20.0}, {"a": 90.0}, 30_000_000, SETTINGS)[1]


def test_demand_follows_the_measurement_with_margin_and_floor() -> None:
    now = demand_now(STATED, {"a": 40.0}, SETTINGS)
    assert [m.rate_per_s for m in now.models] == pytest.approx([46.0, 5.0])
    idle = demand_now(STATED, {"a": 0.0, "b": 0.0}, SETTINGS)
    assert [m.rate_per_s for m in idle.models] == pytest.approx([2.0, 0.5])


@pytest.mark.parametrize(
    ("stated", "new", "why"),
    [
        (plan(), plan(a=row(40)), "a: no plan yet"),
        (plan(a=row(40)), plan(a=row(44)), None),
        (plan(a=row(40)), plan(a=row(45)), "a: GPU% 40 -> 45"),
        (plan(a=row(40)), plan(a=row(40, 8)), "a: batch 4 -> 8"),
        (plan(a=row(40)), plan(a=replace(row(40), slo_ms=20.0)), "a: SLO 50.0 -> 20.0 ms"),
        (plan(a=row(40), b=row(10)), plan(a=row(40)), None),
    ],
)
def test_a_plan_must_be_worth_its_reloads(stated: Plan, new: Plan, why: str | None) -> None:
    assert worth_applying(stated, new, SETTINGS) == why


# -- the loop ---------------------------------------------------------------------------------------------


class Counters:
    """A server whose counters follow rates that a test sets; only statistics are asked of it."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.rates = {"a": 20.0, "b": 5.0}
        self.counts = {"a": 0.0, "b": 0.0}
        self.down = False
        self.unloaded = ""
        self._last_s = 0.0

    def statistics(self, model: str) -> dict[str, Any]:
        if self.down or model == self.unloaded:
            raise ServerError("Triton is away")
        passed_s, self._last_s = self.clock.now - self._last_s, self.clock.now
        for name, rate in self.rates.items():
            self.counts[name] += rate * passed_s
        return {"model_stats": [{"name": model, "inference_count": int(self.counts[model])}]}


class FakeSteps:
    """Plans GPU% in proportion to the rates, remembers what it was asked, states what it applied last."""

    def __init__(self) -> None:
        self.in_force: dict[str, ModelPlan] = {}
        self.profiled: list[list[str]] = []
        self.planned: list[Workload] = []
        self.applied: list[Plan] = []
        self.fail: Exception | None = None

    def profile(self, models: Iterable[str]) -> ProfileSet:
        self.profiled.append(list(models))
        return ProfileSet(Device("cpu", 2, 1, "cpu", "onnxruntime"), {})

    def plan(self, profiles: ProfileSet, workload: Workload) -> Plan:
        self.planned.append(workload)
        if self.fail:
            raise self.fail
        total = sum(model.rate_per_s for model in workload.models)
        rows = {m.name: row(round(100 * m.rate_per_s / total)) for m in workload.models}
        return Plan(100.0, ("cpu",), rows, total < 200, ("a: too much",), 200 / total)

    def apply(self, plan: Plan, profiles: ProfileSet, workload: Workload) -> ApplyReport:
        changed = [m for m, r in plan.models.items() if self.in_force.get(m) != r]
        self.in_force.update(plan.models)
        self.applied.append(plan)
        return ApplyReport(tuple(ModelOutcome(m, "reloaded", 1, 1) for m in changed))

    def stated(self, plan: Plan) -> Plan:
        return replace(plan, models={m: r for m, r in self.in_force.items() if m in plan.models})


class Bench:
    def __init__(self, tmp_path: Path, **options: Any) -> None:
        self.clock, self.steps = FakeClock(), FakeSteps()
        self.server = Counters(self.clock)
        self.log = FileDecisionLog(tmp_path)
        self.loop = ControlLoop(
            self.steps, self.server, self.clock, self.log, STATED, settings=SETTINGS, **options
        )  # fmt: skip

    def watch(self, first: Any, seconds: float) -> Any:
        end_s = self.clock.now + seconds
        return self.loop.watch(first, 1.0, lambda: self.clock.now < end_s)

    def decisions(self) -> list[str]:
        return [entry["what"] for entry in self.log.last(100)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_steady_rates_change_nothing(bench: Bench) -> None:
    first = bench.loop.once()
    assert bench.watch(first, 300) is first
    assert bench.decisions() == ["applied"]
    assert bench.steps.profiled == [["a", "b"]]


def test_a_shift_is_planned_once_and_explained(bench: Bench) -> None:
    first = bench.loop.once()
    bench.watch(first, 60)
    bench.server.rates["b"] = 60.0
    bench.watch(first, 120)
    reasons = [entry["reason"] for entry in bench.log.last(10)]
    assert any("b:" in reason and "5/s planned for" in reason for reason in reasons)
    assert bench.steps.in_force["b"].gpu_percent > 60
    assert bench.decisions().count("applied") == 2


def test_a_second_start_finds_its_plan_in_force_and_reloads_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.loop.once()
    report = bench.loop.once().report
    assert report is not None
    assert report.loads == 0
    assert bench.decisions() == ["applied", "kept"]


def test_dry_run_only_advises(tmp_path: Path) -> None:
    bench = Bench(tmp_path, dry_run=True)
    assert bench.loop.once().report is None
    assert bench.steps.applied == []
    assert bench.decisions() == ["advised"]


def test_an_infeasible_start_is_an_error_and_a_later_one_keeps_the_plan(bench: Bench) -> None:
    first = bench.loop.once()
    bench.server.rates["a"] = 900.0
    current = bench.watch(first, 120)
    assert current is first
    assert len(bench.steps.applied) == 1
    assert "no new plan: a: too much" in bench.log.last(1)[0]["reason"]
    stated = Workload((ModelDemand("a", 50.0, 900.0),))
    loop = ControlLoop(bench.steps, bench.server, bench.clock, bench.log, stated)
    with pytest.raises(InfeasibleError):
        loop.once()


def test_failures_of_the_server_or_the_solver_do_not_end_the_watch(bench: Bench) -> None:
    first = bench.loop.once()
    bench.server.down = True
    bench.watch(first, 20)
    bench.server.down = False
    bench.server.rates["a"] = 80.0
    bench.steps.fail = SolverError("numerical failure")
    assert bench.watch(first, 120) is first
    bench.steps.fail = None
    assert bench.watch(first, 120) is not first


def test_a_model_that_is_not_loaded_does_not_blind_the_others(bench: Bench) -> None:
    first = bench.loop.once()
    bench.server.unloaded = "b"
    bench.server.rates["a"] = 80.0
    assert bench.watch(first, 120) is not first


def test_the_decision_log_is_bounded_and_survives_a_torn_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "MAX_BYTES", 200)
    log = FileDecisionLog(tmp_path)
    for number in range(50):
        log.append({"what": "kept", "number": number})
    with log.path.open("a") as file:
        file.write('{"what": "ke')
    assert [entry["number"] for entry in log.last(3)][-1] == 49
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 500
