"""The simulator against arithmetic: what a queue, a GPU and a clock must do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dstack_sched.engine.dstack import DStackEngine, Rules
from dstack_sched.engine.interface import Engine
from dstack_sched.engine.registry import POLICIES, make_engine, policy
from dstack_sched.errors import InputError
from dstack_sched.policy.interference import Interference
from dstack_sched.sim.arrivals import Arrivals, parse_arrivals, parse_trace
from dstack_sched.sim.chart import Interval, stack, timeline_html
from dstack_sched.sim.result import document, jain, summarize
from dstack_sched.sim.scenario import Scenario
from dstack_sched.sim.world import World
from fakes.worlds import HEAVY, LIGHT, demand, scenario


def run(
    case: Scenario, name: str = "dstack", seed: int = 1, make: Callable[[], Engine] | None = None
) -> World:
    make = make or (lambda: make_engine(name))
    return World(case, make, seed, checked=True, record=True, drain_us=10_000_000).run()


def test_a_lone_request_takes_the_round_trip_and_its_run_time() -> None:
    """50 us to the engine, 50 us back, f(100, 1) without jitter: nothing else is added or lost."""
    case = scenario([(demand("m", 20.0), 100.0, LIGHT)], arrivals=Arrivals("periodic"), jitter=False)
    alone_ms = LIGHT[0] + LIGHT[1] + (LIGHT[2] + LIGHT[3]) / 100
    asked = summarize(run(case, make=lambda: DStackEngine(Rules(stand=False))), "dstack", 1).models["m"]
    assert asked.latency_ms_p50 == pytest.approx(alone_ms + 0.1, abs=0.003)
    result = summarize(run(case), "dstack", 1).models["m"]
    assert result.latency_ms_p50 == pytest.approx(alone_ms, abs=0.003), "a standing grant saves the trip"
    assert (result.offered, result.served, result.mean_batch_size) == (20, 20, 1.0)


def test_two_side_by_side_slow_each_other_as_the_model_says() -> None:
    """Closed loop, both always running: throughput is b / (f (1 + k q^g)) within the hand-over times."""
    interference = Interference({}, 0.6, 1.3)
    models = [(demand(name, 1.0, 100.0), 50.0, HEAVY) for name in ("a", "b")]
    case = scenario(
        models, arrivals=Arrivals("closed", clients=16), interference=interference, jitter=False,
        duration_s=2.0, batch_size=8,
    )  # fmt: skip
    result = summarize(run(case, "mps-static"), "mps-static", 1)
    for model in result.models.values():
        alone_ms = HEAVY[0] + HEAVY[1] * 16 + (HEAVY[2] + HEAVY[3] * 16) / 50
        expected = 16_000 / (alone_ms * float(interference.slowdown("a", 50.0)))
        assert model.goodput_per_s == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    "arrivals",
    [Arrivals(), Arrivals("gamma", cv=2.0), Arrivals("periodic"), Arrivals("onoff", on_s=0.1, off_s=0.2)],
)
def test_arrivals_keep_their_mean_rate_and_spread(arrivals: Arrivals) -> None:
    times = arrivals.times(2000.0, 60_000_000, np.random.default_rng(5))
    assert times.size == pytest.approx(120_000, rel=0.06)
    assert (np.diff(times) >= 0).all() and times[0] >= 0 and times[-1] < 60_000_000
    gaps = np.diff(times)
    spread = {"poisson": 1.0, "gamma": 2.0, "periodic": 0.0}.get(arrivals.kind)
    if spread is not None:
        assert gaps.std() / gaps.mean() == pytest.approx(spread, abs=0.05)


def test_a_trace_is_scaled_to_the_rate_and_striped_over_models() -> None:
    trace = Arrivals("trace", trace_us=parse_trace("TIMESTAMP,x\n0.0,1\n0.5,1\n0.6,2\n2.0,3\n", "trace.csv"))
    first, second = (trace.times(100.0, 4_000_000, np.random.default_rng(0), stripe=s) for s in (0, 1))
    assert first.size == pytest.approx(400, rel=0.02)
    assert not np.array_equal(first, second), "two models replay the trace in step"


@pytest.mark.parametrize("text", ["gamma", "gamma:0", "onoff:1", "closed:0", "trace", "poisson:3", "often"])
def test_bad_arrivals_are_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match="wanted poisson"):
        parse_arrivals(text)


def test_a_bad_trace_names_the_line() -> None:
    with pytest.raises(InputError, match="line 3"):
        parse_trace("TIMESTAMP\n2023-11-16 18:15:46.68\nyesterday\n", "t.csv")


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_serves_a_light_load_in_time(name: str) -> None:
    """A rival that loses because of a defect in it would make D-STACK look good."""
    deployed = policy(name)
    percent = 100.0 if deployed.shares == "whole" else 50.0
    models = [(demand(f"m{i}", 40.0, 30.0), percent, LIGHT) for i in range(3)]
    case = scenario(models, capacity_percent=150.0, duration_s=3.0, interference=Interference({}, 0.3, 1.3))
    result = summarize(run(case, name), name, 1)
    assert result.worst_attainment >= 0.99, result


def test_rejecting_keeps_goodput_under_overload() -> None:
    """1.5 times what the GPU can do: D-STACK's goodput stays near its peak; without shedding it would fall
    to nothing, for every request served would already be late."""

    def goodput(rate_per_s: float) -> float:
        case = scenario([(demand("m", rate_per_s, 15.0), 100.0, LIGHT)], duration_s=3.0)
        return summarize(run(case), "dstack", 1).total_goodput_per_s

    full = goodput(5000.0)
    assert goodput(9000.0) >= 0.95 * full


def test_the_result_is_the_json_of_the_contract() -> None:
    case = scenario([(demand("m", 100.0), 50.0, LIGHT)])
    text = document(summarize(run(case), "dstack", 1), 200.0, 400.0)
    assert set(text) == {
        "version", "policy", "seed", "duration_s", "models", "total_goodput_per_s", "gpu_utilization",
        "ideal_corun_goodput_per_s", "ideal_isolated_goodput_per_s", "fraction_of_ideal", "jain_fairness",
        "max_granted_percent",
    }  # fmt: skip
    assert set(text["models"]["m"]) == {
        "offered", "served", "rejected", "late", "goodput_per_s", "slo_attainment", "latency_ms_p50",
        "latency_ms_p99", "mean_batch_size", "gpu_share_ms",
    }  # fmt: skip


def test_jain_is_one_for_equal_and_one_nth_for_one_taker() -> None:
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_bars_of_the_chart_never_overlap() -> None:
    rng = np.random.default_rng(9)
    columns = rng.integers(0, 5000, 200), rng.integers(1, 400, 200), rng.choice([10, 25, 50], 200)
    intervals = [
        Interval(f"m{i % 4}", int(start), int(start + length), float(percent))
        for i, (start, length, percent) in enumerate(zip(*columns, strict=True))
    ]
    placed = stack(intervals)
    for n, (a, low) in enumerate(placed):
        for b, base in placed[:n]:
            together = a.start_us < b.end_us and b.start_us < a.end_us
            over = low < base + b.gpu_percent - 1e-6 and base < low + a.gpu_percent - 1e-6
            assert not (together and over), (a, low, b, base)


def test_a_model_name_cannot_break_out_of_the_page() -> None:
    page = timeline_html([Interval("</script><b>", 0, 10, 50.0)], title="<i>")
    assert "</script><b>" not in page and "<i>" not in page
