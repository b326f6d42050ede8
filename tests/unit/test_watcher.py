"""Looks: arrivals from counters that reset, attainment, backlogs, what is missing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstack_sched.adapters.triton_metrics import PREPARING, WAITING, stages_by_model, sums_by_model
from dstack_sched.app.drift import digest
from dstack_sched.app.rates import ArrivalMeter, CounterDelta, Counts, arrivals, failures
from dstack_sched.app.watcher import Watcher
from dstack_sched.domain.profile import Correction, ProfileSet
from dstack_sched.errors import ServerError
from fakes.controller import CPU, Counters, FakeSources, profile
from fakes.serving import FakeClock


def entry(name: str, rows: int, failed: int) -> dict[str, Any]:
    return {"name": name, "inference_count": rows, "inference_stats": {"fail": {"count": failed}}}


def test_arrivals_count_rows_and_failures_of_every_version() -> None:
    statistics = {"model_stats": [entry("a", 5, 1), entry("a", 10, 0), entry("other", 99, 9)]}
    assert arrivals(statistics, "a") == 16
    assert failures(statistics, "a") == 1


@given(st.lists(st.integers(0, 50), min_size=3, max_size=40), st.data())
def test_a_reset_loses_at_most_what_came_between_two_readings(steps: list[int], data: st.DataObject) -> None:
    """Guards against a negative rate, or one spoiled for ever, after a reload sets the counters to 0."""
    reset_at = data.draw(st.integers(1, len(steps) - 1))
    counter, count, seen = CounterDelta(), 100, 0
    assert counter.step(count) is None
    for number, step in enumerate(steps):
        count = step if number == reset_at else count + step
        grown = counter.step(count)
        assert grown is not None and grown >= 0
        seen += grown
    assert sum(steps) - seen <= max(steps)
    assert seen <= sum(steps)


def test_what_waits_has_arrived_and_is_counted_once() -> None:
    """Guards against taking an overloaded server's throughput for the demand, and against counting twice."""
    meter = ArrivalMeter()
    assert meter.step(Counts(0, 0, 1.0), 0, 0) is None
    assert meter.step(Counts(10, 0, 1.0), 90, 1_000_000) == (1.0, 100.0)
    assert meter.step(Counts(20, 0, 1.0), 180, 2_000_000) == (1.0, 100.0)
    assert meter.step(Counts(200, 0, 1.0), 0, 4_000_000) == (2.0, 0.0)
    assert meter.step(Counts(260, 0, 1.0), 0, 5_000_000) == (1.0, 60.0)


def test_readings_of_different_moments_make_no_negative_rate() -> None:
    meter = ArrivalMeter()
    meter.step(Counts(0, 0, 1.0), 50, 0)
    assert meter.step(Counts(30, 0, 1.0), 0, 1_000_000) == (1.0, 0.0), "20 are not counted yet"
    assert meter.step(Counts(50, 0, 1.0), 0, 2_000_000) == (1.0, 0.0), "now they are"
    assert meter.step(Counts(60, 0, 1.0), 0, 3_000_000) == (1.0, 10.0)
    assert meter.step(Counts(70, 0, 1.0), 0, 3_000_000) is None, "no time has passed"


def test_the_step_of_a_reload_is_left_out() -> None:
    """Guards against a rate that falls for a second because a model was loaded: its counters began anew."""
    meter = ArrivalMeter()
    meter.step(Counts(1000, 0, 1.0), 0, 0)
    assert meter.step(Counts(1030, 0, 1.0), 0, 1_000_000) == (1.0, 30.0)
    assert meter.step(Counts(6, 0, 1.0), 0, 2_000_000) is None
    assert meter.step(Counts(36, 0, 1.0), 0, 3_000_000) == (1.0, 30.0)


def test_refused_requests_count_with_the_rows_of_the_others() -> None:
    """Guards against taking 100 refused requests of 4 rows for 100 rows: the demand would look met."""
    stats = {"success": {"count": 50}, "fail": {"count": 30}}
    statistics = {"model_stats": [{"name": "a", "inference_count": 200, "inference_stats": stats}]}
    counts = Counts.of(statistics, "a")
    assert counts == Counts(200, 30, 4.0)
    meter = ArrivalMeter()
    meter.step(Counts(100, 10, 4.0), 0, 0)
    assert meter.step(counts, 0, 1_000_000) == (1.0, 100.0 + 20 * 4.0)
    assert Counts.of({"model_stats": []}, "a") == Counts(0, 0, 1.0)


METRICS = """\
# HELP nv_inference_pending_request_count Instantaneous number of pending requests per-model.
# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="a",version="1"} 7
nv_inference_pending_request_count{model="a",version="2"} 1
nv_inference_pending_request_count{model="b",version="1"} 0
# TYPE dstack_waiting_rows gauge
dstack_waiting_rows{model="a",version="1",instance="a_0",pid="12"} 4
# TYPE dstack_preparing_programs gauge
dstack_preparing_programs{model="a",version="1",instance="a_0",pid="12"} 2
dstack_preparing_programs{model="a",version="1",instance="a_1",pid="13"} 3
# TYPE dstack_stage_seconds_total counter
dstack_stage_seconds_total{model="a",version="1",instance="a_0",pid="12",stage="run"} 0.5
dstack_stage_seconds_total{model="a",version="1",instance="a_1",pid="13",stage="run"} 0.25
# TYPE dstack_stage_samples_total counter
dstack_stage_samples_total{model="a",version="1",instance="a_0",pid="12",stage="run"} 100
dstack_stage_samples_total{model="a",version="1",instance="a_1",pid="13",stage="run"} 50
# TYPE nv_cpu_utilization gauge
nv_cpu_utilization 0.5
"""


def test_what_waits_is_read_from_tritons_metrics() -> None:
    assert sums_by_model(METRICS, WAITING) == {"a": 12, "b": 0}
    assert sums_by_model("", WAITING) == {}


def test_what_is_prepared_is_read_from_tritons_metrics() -> None:
    assert sums_by_model(METRICS, PREPARING) == {"a": 5}


def test_stage_times_are_read_from_tritons_metrics() -> None:
    assert stages_by_model(METRICS) == {"a": {"run": (0.75, 150)}}


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.server, self.sources = Counters(self.clock), FakeSources()
        self.watcher = Watcher(["a", "b"], self.server, self.sources, self.clock)

    def look(self, seconds: float = 1.0):
        self.clock.now += seconds
        return self.watcher.look()


def test_forecasts_come_after_three_steps_and_survive_a_gap() -> None:
    world = World()
    assert [world.look().forecasts() for _ in range(3)] == [{}, {}, {}]
    assert set(world.look().forecasts()) == {"a", "b"}
    world.server.unloaded = "a"
    look = world.look()
    assert look.views["a"].arrived_per_s is None
    assert look.forecasts()["a"].mean_per_s == pytest.approx(20.0, rel=0.1)
    world.server.unloaded = ""
    world.look(9.0)
    assert world.look().forecasts()["a"].mean_per_s == pytest.approx(20.0, rel=0.1)


def test_no_model_that_can_be_read_is_an_error() -> None:
    world = World()
    world.look()
    world.server.down = True
    with pytest.raises(ServerError):
        world.look()


def test_attainment_counts_late_and_refused_rows() -> None:
    world = World()
    world.sources.totals = {"a": {"rows": 100, "late_rows": 10, "run_ms": 50, "grants": 10}}
    world.look()
    world.sources.totals = {"a": {"rows": 180, "late_rows": 20, "run_ms": 130, "grants": 20}}
    world.server.failed = {"a": 20}
    view = world.look().views["a"]
    assert view.attainment == pytest.approx((80 - 10) / (80 + 20))
    assert view.run_ms == pytest.approx(8.0)
    assert world.look().views["b"].attainment is None


def test_corrections_are_taken_up_and_applied() -> None:
    world = World()
    profiles = ProfileSet(CPU, {"a": profile("a"), "b": profile("b")})
    stored = Correction(digest(profile("a")), 2.0)
    world.watcher.profiled(profiles, {"a": stored})
    points = world.watcher.corrected(profiles).models
    assert points["a"].points[0].latency_ms_p50 == 2 * profile("a").points[0].latency_ms_p50
    assert points["b"] == profile("b")
    assert world.watcher.corrections()["a"] == stored
