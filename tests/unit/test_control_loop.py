"""The loop: when it plans again, what it changes and what it leaves alone, and that it says why."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dstack_sched.adapters import decision_log
from dstack_sched.adapters.decision_log import FileDecisionLog
from dstack_sched.domain.workload import ModelDemand, Workload
from dstack_sched.engine.run_times import Seen
from dstack_sched.errors import InfeasibleError, InputError, SolverError
from fakes.controller import SETTINGS, STATED, LoopBench


@pytest.fixture
def bench(tmp_path: Path) -> LoopBench:
    return LoopBench(tmp_path)


def test_steady_rates_change_nothing(bench: LoopBench) -> None:
    first = bench.loop.once()
    loads = list(bench.steps.loads)
    bench.watch(first, 300)
    assert bench.steps.loads == loads
    assert bench.decisions().count("applied") == 1
    assert bench.steps.profiled == [["a", "b"]]
    assert bench.steps.health_checks == 300


def test_a_shift_is_planned_and_explained(bench: LoopBench) -> None:
    first = bench.loop.once()
    bench.watch(first, 60)
    bench.server.rates["b"] = 120.0
    bench.watch(first, 60)
    (reason,) = [reason for reason in bench.reasons() if "would miss without it" in reason]
    assert "b: " in reason and "/s forecast" in reason and "GPU% 20 -> " in reason
    assert bench.steps.in_force["b"].gpu_percent >= 70


def test_a_batch_size_is_a_message_not_a_load(bench: LoopBench) -> None:
    """Guards against reloads for what the arbiter can tell: the least disruptive way first."""
    first = bench.loop.once()
    bench.watch(first, 60)
    bench.steps.loads.clear()
    bench.server.rates.update(a=40.0, b=10.0)  # twice as much of both: shares stay, a's batch grows
    bench.watch(first, 60)
    assert bench.steps.loads == []
    assert bench.steps.told[-1].models["a"].batch_size == 8
    assert bench.steps.in_force["a"].batch_size == 8
    assert any("batch 4 -> 8 (message)" in reason for reason in bench.reasons())


def test_without_an_arbiter_only_what_pays_is_loaded(bench: LoopBench) -> None:
    first = bench.loop.once()
    bench.steps.arbiter = False
    bench.watch(first, 60)
    bench.steps.loads.clear()
    bench.server.rates["b"] = 150.0
    bench.watch(first, 60)
    assert "b" in bench.steps.loads, "b would miss most of its rows"


def test_levels_are_told_too(bench: LoopBench) -> None:
    bench.steps.levels = ("a", "b")
    first = bench.loop.once()
    bench.watch(first, 30)
    bench.steps.loads.clear()
    bench.server.rates["b"] = 150.0
    bench.watch(first, 60)
    assert bench.steps.loads == []
    assert any("(level)" in reason for reason in bench.reasons())


def test_a_load_that_gains_too_little_is_not_done(bench: LoopBench) -> None:
    """Guards against reloads for a percent: shares 80:20 serve 70:30 as well as long as both fit."""
    first = bench.loop.once()
    bench.watch(first, 60)
    bench.steps.loads.clear()
    bench.server.rates["b"] = 8.0
    bench.watch(first, 120)
    assert bench.steps.loads == []


def test_loads_keep_their_distance(bench: LoopBench) -> None:
    """Guards against thrashing when rates swing faster than reloads pay."""
    first = bench.loop.once()
    at_s: list[float] = []
    for turn in range(20):
        bench.server.rates.update(a=150.0 if turn % 2 else 5.0, b=5.0 if turn % 2 else 150.0)
        before = len(bench.steps.loads)
        first = bench.watch(first, 4)
        if len(bench.steps.loads) > before:
            at_s.append(bench.clock.now)
    assert all(later - earlier >= SETTINGS.cooldown_s - 4 for earlier, later in pairwise(at_s))


def test_what_the_cooldown_held_back_comes_after_it(tmp_path: Path) -> None:
    bench = LoopBench(tmp_path, settings=replace(SETTINGS, cooldown_s=60.0))
    first = bench.loop.once()
    bench.server.rates["b"] = 150.0
    current = bench.watch(first, 40)
    assert bench.steps.in_force["b"].gpu_percent == 20
    bench.watch(current, 40)
    assert bench.steps.in_force["b"].gpu_percent > 20
    assert bench.reasons()[-1].startswith("b: ") and "GPU% 20 -> " in bench.reasons()[-1]


def test_a_second_start_finds_its_plan_in_force_and_reloads_nothing(bench: LoopBench) -> None:
    bench.loop.once()
    report = bench.new_loop().once().report
    assert report is not None
    assert report.loads == 0
    assert bench.decisions() == ["applied", "kept"]


def test_dry_run_only_advises(tmp_path: Path) -> None:
    bench = LoopBench(tmp_path, dry_run=True)
    first = bench.loop.once()
    assert first.report is None
    bench.watch(first, 30)
    bench.server.rates["b"] = 150.0
    bench.sources.seen["a"] = [Seen(50.0, 4, 1000, 40_000.0, 41_000.0)]
    bench.watch(first, 60)
    steps = bench.steps
    assert (steps.applied, steps.told, steps.kept, steps.health_checks) == ([], [], {}, 0)
    assert set(bench.decisions()) == {"advised"}
    assert len(bench.decisions()) > 1


# -- what does not fit --------------------------------------------------------------------------------------


def test_what_does_not_fit_is_planned_as_far_as_it_goes_and_said(bench: LoopBench) -> None:
    """Guards against a stale plan: under overload the operator wants the best that can be had."""
    first = bench.loop.once()
    bench.server.rates.update(a=30.0, b=500.0)
    current = bench.watch(first, 60)
    assert not current.plan.feasible
    assert bench.steps.in_force["b"].gpu_percent == 90
    assert "of the rates this much fits" in current.shortfall
    assert any("of the rates this much fits: a " in reason for reason in bench.reasons())
    bench.server.rates.update(a=20.0, b=5.0)
    assert bench.watch(current, 120).shortfall == ""


def test_a_start_that_does_not_fit_is_served_as_far_as_it_goes(bench: LoopBench) -> None:
    bench.steps.workload = Workload((ModelDemand("a", 50.0, 900.0), ModelDemand("b", 80.0, 5.0)))
    first = bench.new_loop().once()
    assert first.shortfall
    assert bench.steps.in_force["a"].gpu_percent > 80


def test_nothing_at_all_that_fits_is_an_error_at_the_start(
    bench: LoopBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench.steps.plan

    def without_models(*args: object, **options: object) -> object:
        return replace(whole(*args, **options), models={}, feasible=False, binding=("a: GPU memory",))  # type: ignore[arg-type]

    monkeypatch.setattr(bench.steps, "plan", without_models)
    with pytest.raises(InfeasibleError, match="a: GPU memory"):
        bench.loop.once()
    assert bench.steps.applied == []


# -- what fails -------------------------------------------------------------------------------------------


def test_failures_of_the_server_or_the_solver_do_not_end_the_watch(bench: LoopBench) -> None:
    first = bench.loop.once()
    bench.server.down = True
    bench.watch(first, 20)
    bench.server.down = False
    bench.server.rates["b"] = 150.0
    bench.steps.fail = SolverError("numerical failure")
    bench.watch(first, 60)
    assert bench.steps.in_force["b"].gpu_percent == 20
    assert any("no new plan: numerical failure" in reason for reason in bench.reasons())
    bench.steps.fail = None
    bench.watch(first, 60)
    assert bench.steps.in_force["b"].gpu_percent > 20


def test_a_model_that_is_not_loaded_does_not_blind_the_others(bench: LoopBench) -> None:
    first = bench.loop.once()
    bench.watch(first, 20)
    bench.server.unloaded = "a"
    bench.server.rates["b"] = 150.0
    bench.watch(first, 60)
    assert bench.steps.in_force["b"].gpu_percent > 20


def test_a_refused_plan_is_taken_back_at_the_arbiter_and_not_tried_every_second(bench: LoopBench) -> None:
    """Guards against an arbiter that schedules by a plan whose configs were rolled back."""
    first = bench.loop.once()
    bench.watch(first, 20)
    bench.steps.refuse = "b"
    bench.server.rates["b"] = 150.0
    told = len(bench.steps.told)
    bench.watch(first, 20)
    assert bench.steps.told[-1].models == first.plan.models
    assert len(bench.steps.told) - told == 2, "told, taken back, and then held back"
    assert any("held back for" in reason for reason in bench.reasons())
    bench.steps.refuse = ""
    bench.watch(first, 60)
    assert bench.steps.in_force["b"].gpu_percent > 20


def test_a_wish_whose_round_fails_is_tried_again_ever_more_rarely(bench: LoopBench) -> None:
    """Guards against a full disk that makes the controller forget what it was asked, or plan every second."""
    first = bench.loop.once()
    bench.watch(first, 10)
    bench.steps.workload = Workload((replace(STATED.models[0], slo_ms=70.0), STATED.models[1]))
    bench.steps.fail = InputError("config.pbtxt: cannot be written (No space left on device)")
    current = bench.watch(first, 120)
    failed = [reason for reason in bench.reasons() if "No space left" in reason]
    assert 5 <= len(failed) <= 9, "after 2, 4, 8, 16, 30, 30 s"
    assert failed[-1].endswith("next try in 30 s")
    bench.steps.fail = None
    bench.watch(current, 31)
    assert bench.steps.in_force["a"].slo_ms == 70.0


# -- other reasons than rates -----------------------------------------------------------------------------


def test_latencies_that_drift_are_planned_with_and_survive_a_restart(bench: LoopBench) -> None:
    first = bench.loop.once()
    bench.watch(first, 30)
    before = bench.steps.in_force["a"].gpu_percent
    bench.sources.seen["a"] = [Seen(50.0, 4, 1000, 32_000.0, 35_000.0)]  # twice the profiled 16 ms
    bench.server.rates["b"] = 30.0
    current = bench.watch(first, 30)
    assert bench.steps.kept["a"].scale == pytest.approx(2.0)
    assert current.profiles.models["a"].points[0].latency_ms_p50 == pytest.approx(8.0)
    assert any("runs take 2.00 of the predicted time" in reason for reason in bench.reasons())
    assert bench.steps.told[-1] is not bench.steps.told[0]
    again = bench.new_loop().once()
    assert again.profiles.models["a"].points[0].latency_ms_p50 == pytest.approx(8.0)
    assert before


def test_all_that_calls_for_a_plan_at_once_is_named(bench: LoopBench) -> None:
    """Guards against "hot: runs take longer" as the whole reason of a plan that a new rate changed."""
    current = bench.watch(bench.loop.once(), 30)
    bench.sources.seen["a"] = [Seen(50.0, 4, 1000, 32_000.0, 35_000.0)]
    bench.server.rates["b"] = 150.0
    told: list[str] = []
    while not any("runs take" in reason for reason in told):
        assert bench.clock.now < 600, "no drift was noticed"
        # The workload file, a GPU and a rate move in whichever look notices the drift.
        bench.steps.workload = replace(
            STATED, models=(replace(STATED.models[0], slo_ms=60.0 + bench.clock.now), STATED.models[1])
        )
        bench.server.rates["b"] *= 2.0
        bench.steps.news = ["GPU 1 is out: Xid 79"]
        current = bench.watch(current, 1)
        told = bench.reasons()
    (reason,) = (reason for reason in told if "runs take" in reason)
    named = [
        reason.index(each)
        for each in ("the workload file", "GPU 1 is out", "runs take", "b: ", "/s forecast")
    ]
    assert named == sorted(named)


def test_a_changed_workload_file_is_followed_and_new_models_are_profiled(bench: LoopBench) -> None:
    first = bench.loop.once()
    bench.watch(first, 10)
    bench.steps.workload = Workload((replace(STATED.models[0], slo_ms=70.0), STATED.models[1]))
    current = bench.watch(first, 5)
    assert bench.steps.in_force["a"].slo_ms == 70.0
    assert len(bench.steps.profiled) == 1
    bench.server.rates["c"] = 1.0
    bench.server.counts["c"] = 0.0
    bench.steps.workload = Workload((*STATED.models, ModelDemand("c", 90.0, 1.0)))
    bench.watch(current, 5)
    assert bench.steps.profiled[-1] == ["a", "b", "c"]
    assert "c" in bench.steps.in_force


def test_urgent_news_do_not_wait_for_the_cooldown(tmp_path: Path) -> None:
    bench = LoopBench(tmp_path, settings=replace(SETTINGS, cooldown_s=1e6))
    first = bench.loop.once()
    bench.watch(first, 10)
    bench.server.rates["b"] = 150.0
    current = bench.watch(first, 10)
    assert bench.steps.in_force["b"].gpu_percent == 20
    bench.steps.news = ["GPU 1 is out: Xid 79"]
    bench.watch(current, 3)
    assert bench.steps.in_force["b"].gpu_percent > 20
    assert any(reason.startswith("GPU 1 is out: Xid 79") for reason in bench.reasons())


def test_a_backlog_counts_as_arrivals(bench: LoopBench) -> None:
    """Guards against taking what an overloaded server manages for what is asked of it."""
    first = bench.loop.once()
    bench.watch(first, 20)
    for second in range(40):
        bench.sources.backlog["b"] = 130 * second
        first = bench.watch(first, 1)
    assert bench.steps.in_force["b"].gpu_percent > 60


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
