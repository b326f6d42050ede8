"""The bench use case against a load generator and a server that live in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from dstack_sched.app.bench import (
    ATTEMPTS,
    MAX_STRETCHES,
    BenchOptions,
    SilentLoadError,
    again_if_silent,
    arrival_times_s,
    run_bench,
)
from dstack_sched.domain.load import LoadTrace
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.errors import InputError, MachineError
from fakes.serving import FakeClock

FAST_MS, SLOW_MS = 5.0, 80.0


class CountingServer:
    """The part of ports.ModelServer that bench uses: states, and counters that the load moves."""

    def __init__(self, *models: str) -> None:
        self.answered = dict.fromkeys(models, 0)
        self.failed = dict.fromkeys(models, 0)

    def models(self) -> Mapping[str, str]:
        return dict.fromkeys(self.answered, "READY")

    def statistics(self, model: str) -> Mapping[str, Any]:
        stats = {"success": {"count": self.answered[model]}, "fail": {"count": self.failed[model]}}
        return {"model_stats": [{"inference_stats": stats}]}


class Load:
    """Sends every request on time; `latency` gives its latency in ms; `cuts` ends stretches early."""

    def __init__(self, server: CountingServer, clock: FakeClock, latency: Callable[[int], float]) -> None:
        self.server = server
        self.clock = clock
        self.latency = latency
        self.cuts: list[int] = []  # the stretch ends with an error behind that many requests
        self.by_server = True  # by a request that failed; False: the generator itself did
        self.silent = 0  # that many stretches of model a send nothing
        self.slow = False  # answers come, but no stretch ends before it is waited for
        self.starts: dict[str, list[np.ndarray]] = {}

    def start(self, model: str, intervals_us: np.ndarray) -> Stretch:
        self.starts.setdefault(model, []).append(intervals_us)
        return Stretch(self, model, intervals_us, self.clock.wall_time_s())


class Stretch:
    def __init__(self, load: Load, model: str, intervals_us: np.ndarray, begin_s: float) -> None:
        self.load, self.model = load, model
        self.sent_s = begin_s + np.cumsum(intervals_us) / 1e6
        self.silent = model == "a" and load.silent > 0
        load.silent -= self.silent

    def ends_within(self, timeout_s: float) -> bool:
        assert timeout_s > 0
        if self.silent or self.load.slow:
            self.load.clock.now += timeout_s
            self.load.server.answered[self.model] += not self.silent
        return not self.silent and not self.load.slow

    def wait(self, timeout_s: float) -> LoadTrace:
        assert timeout_s >= 0
        if self.silent:
            return LoadTrace.cut("killed", request_failed=False)
        server = self.load.server
        if self.load.cuts:
            done = self.load.cuts.pop(0)
            server.answered[self.model] += done
            server.failed[self.model] += self.load.by_server
            self.load.clock.now = self.sent_s[done] - 1_800_000_000
            return LoadTrace.cut("boom", request_failed=self.load.by_server)
        server.answered[self.model] += self.sent_s.size
        latency = np.array([self.load.latency(i) for i in range(self.sent_s.size)])
        return LoadTrace(self.sent_s, latency)


def bench(
    latency: Callable[[int], float] = lambda i: FAST_MS,
    cuts: tuple[int, ...] = (),
    by_server: bool = True,
    **options: Any,
) -> tuple[Any, Load]:
    server, clock = CountingServer("a", "b"), FakeClock()
    load = Load(server, clock, latency)
    load.cuts, load.by_server = list(cuts), by_server
    demands = (
        (ModelDemand("a", 50.0, 100.0),)
        if cuts
        else (ModelDemand("a", 50.0, 100.0), ModelDemand("b", None, 30.0))
    )
    result = run_bench(Workload(demands), load, server, clock, BenchOptions(**options))  # type: ignore[arg-type]
    return result, load


def test_arrivals_are_a_poisson_process() -> None:
    """Guards against a fixed spacing, which would hide all queueing: mean and variance of gaps fit 1/rate."""
    times = arrival_times_s(200.0, 100.0, np.random.default_rng(5))
    gaps = np.diff(times)
    assert np.all(gaps >= 0) and times[0] >= 0 and times[-1] < 100
    assert abs(times.size - 20_000) < 5 * np.sqrt(20_000)
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 200, rel=0.05)


def test_all_in_time_is_met() -> None:
    result, _ = bench(seconds=10, warmup_s=1)
    a, b = result.models["a"], result.models["b"]
    assert result.missed == ()
    assert a.failed == a.unmeasured == 0
    assert a.slo_attainment == 1.0 and b.slo_attainment is None
    assert a.goodput_per_s == pytest.approx(a.requests / 10)
    assert abs(a.requests - 1000) < 5 * np.sqrt(1000)
    assert (a.latency_ms_p50, a.latency_ms_p99) == (FAST_MS, FAST_MS)
    assert a.send_lag_ms_p99 == pytest.approx(0, abs=0.01)


def test_late_requests_miss_the_slo() -> None:
    result, _ = bench(lambda i: SLOW_MS if i % 20 == 0 else FAST_MS, seconds=10, warmup_s=1)
    a = result.models["a"]
    assert result.missed == ("a",), "best effort b has no SLO to miss"
    assert a.slo_attainment == pytest.approx(0.95, abs=0.01)
    assert a.goodput_per_s == pytest.approx(a.requests * a.slo_attainment / 10)
    assert a.latency_ms_p99 == pytest.approx(SLOW_MS)


def test_requests_before_and_behind_the_window_do_not_count() -> None:
    """Guards against a slow first second (loading, warming up) in the figures."""
    result, load = bench(lambda i: SLOW_MS if i < 150 else FAST_MS, seconds=5, warmup_s=3)
    assert result.models["a"].slo_attainment == 1.0
    (intervals,) = load.starts["a"]
    assert intervals.sum() / 1e6 == pytest.approx(9, abs=0.5)


def test_load_goes_on_behind_an_error_and_failures_are_counted() -> None:
    """perf_analyzer ends at the first error: the bench must neither stop there nor call it a success."""
    result, load = bench(cuts=(200, 300), seconds=10, warmup_s=1)
    a = result.models["a"]
    assert len(load.starts["a"]) == 3
    assert a.failed == 2 and a.unmeasured == 500 and a.errors == ("boom",)
    known = a.requests - a.unmeasured
    assert a.slo_attainment == pytest.approx((known - 2) / known)
    total = sum(each.sum() for each in load.starts["a"][:1]) / 1e6
    assert load.starts["a"][2].size < load.starts["a"][0].size and total > 10


def test_a_generator_that_fails_by_itself_is_no_failed_request() -> None:
    """Guards against a crash of perf_analyzer in the server's figures: replaced and told, not counted."""
    result, load = bench(cuts=(0, 200), by_server=False, seconds=10, warmup_s=1)
    a = result.models["a"]
    assert len(load.starts["a"]) == 3
    assert (a.failed, a.unmeasured, a.errors, a.slo_attainment) == (0, 200, ("boom",), 1.0)


def test_a_generator_that_never_works_is_an_error_and_no_objective_met() -> None:
    with pytest.raises(MachineError, match="a: the load could not be driven: boom"):
        bench(cuts=(0,) * MAX_STRETCHES, by_server=False, seconds=10, warmup_s=1)


def silent(times: int, slow: bool = False) -> tuple[Callable[[], Any], Load]:
    server, clock = CountingServer("a", "b"), FakeClock()
    load = Load(server, clock, lambda i: FAST_MS)
    load.silent, load.slow = times, slow
    demands = Workload((ModelDemand("a", 50.0, 100.0), ModelDemand("b", None, 30.0)))
    return lambda: run_bench(demands, load, server, clock, BenchOptions(seconds=40)), load  # type: ignore[arg-type]


def test_a_generator_that_sends_nothing_is_started_anew() -> None:
    """perf_analyzer's sender misses its start now and then: the whole run again, and none of it counts."""
    run, load = silent(ATTEMPTS - 1)
    result = again_if_silent(run)
    assert (len(load.starts["a"]), len(load.starts["b"])) == (ATTEMPTS, ATTEMPTS)
    a = result.models["a"]
    assert (a.failed, a.unmeasured, a.errors, a.slo_attainment) == (0, 0, (), 1.0)
    assert a.goodput_per_s == pytest.approx(100, rel=0.1)


def test_a_model_that_never_answers_is_told_after_the_last_attempt() -> None:
    run, load = silent(99)
    with pytest.raises(SilentLoadError, match="a: no request was answered within 15 s of the first"):
        again_if_silent(run)
    assert len(load.starts["a"]) == ATTEMPTS


def test_load_that_gets_answers_is_not_cut() -> None:
    """Guards against a long run, or a slow one, taken for one that sends nothing."""
    run, load = silent(0, slow=True)
    assert again_if_silent(run).models["a"].errors == () and len(load.starts["a"]) == 1


def test_same_seed_same_load_and_models_differ() -> None:
    _, first = bench(seconds=5, seed=7)
    _, again = bench(seconds=5, seed=7)
    _, other = bench(seconds=5, seed=8)
    assert np.array_equal(first.starts["a"][0], again.starts["a"][0])
    assert not np.array_equal(first.starts["a"][0], other.starts["a"][0])
    ratio = first.starts["a"][0][:50] / np.maximum(1, first.starts["b"][0][:50])
    assert ratio.std() > 0.5, "models must not get one pattern, only scaled"


def test_scale_multiplies_rates() -> None:
    result, _ = bench(seconds=10, scale=2.0)
    assert result.models["a"].rate_per_s == 200.0
    assert abs(result.models["a"].requests - 2000) < 5 * np.sqrt(2000)


def test_an_unknown_model_is_named_with_those_that_are_served() -> None:
    server = CountingServer("a", "b")
    load = Load(server, FakeClock(), lambda i: FAST_MS)
    with pytest.raises(InputError, match="'c' is not served; ready are: a, b"):
        run_bench(Workload((ModelDemand("c", 10.0, 1.0),)), load, server, FakeClock(), BenchOptions())  # type: ignore[arg-type]
    assert not load.starts


@pytest.mark.parametrize("options", [{"seconds": 0}, {"seconds": -1}, {"warmup_s": -1}, {"scale": 0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="--seconds"):
        BenchOptions(**options)  # type: ignore[arg-type]
