"""What an engine keeps of run times, for whoever refits a profile by them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dstack_backend import wire
from dstack_sched.app.arbiter import ArbiterService
from dstack_sched.cli.live_steps import seen_of
from dstack_sched.domain.decision import Grant
from dstack_sched.domain.event import BackendJoined, BatchFinished, EngineModel, PlanChanged, WorkQueued
from dstack_sched.domain.workload import OnLate
from dstack_sched.engine.dstack import DStackEngine, Rules
from dstack_sched.engine.registry import make_engine
from dstack_sched.engine.run_times import SEEN_CELLS, SEEN_RUNS, Beside, RunTimes, Seen
from fakes.scripted_engine import PlanMemory

MODEL = EngineModel(
    "m", 50.0, 4, 100_000, 1.0, OnLate.SERVE, 50.0, (50.0, 100.0), (1, 4), ((10.0, 20.0), (6.0, 12.0))
)


def test_newest_runs_count_and_the_old_ones_are_forgotten() -> None:
    """Guards against a refit by what was true an hour ago."""
    times = RunTimes((50.0, 100.0), 8, MODEL)
    for _ in range(SEEN_RUNS):
        times.observe(0, 4, 20_000)
    for _ in range(SEEN_RUNS):
        times.observe(0, 4, 40_000)
    (seen,) = times.seen()
    assert (seen.gpu_percent, seen.rows, seen.runs) == (50.0, 4, 2 * SEEN_RUNS)
    assert (seen.p50_us, seen.p99_us) == (40_000, 40_000)


def test_cells_are_bounded_and_the_oldest_goes() -> None:
    times = RunTimes((50.0, 100.0), 64, MODEL)
    for rows in range(1, 64):
        times.observe(1, rows, 1_000 * rows)
    rows_kept = [seen.rows for seen in times.seen()]
    assert rows_kept == list(range(64 - SEEN_CELLS, 64))


def test_a_new_plan_does_not_wipe_what_was_seen_and_the_arbiter_tells() -> None:
    service = ArbiterService(make_engine, "dstack", PlanMemory())
    service.received(1, wire.Join("m", "m_0", 7, -1, 50.0, 8, 4, 100_000, False), 0)
    (welcome, *_) = service.received(1, wire.Work(4, 100_000), 10)
    assert welcome
    grant = next(m for _, m in [welcome] if isinstance(m, wire.Grant))
    service.received(1, wire.Done(grant.grant_id, 4, 0, 19_000, 0, 0), 19_010)
    for capacity in (100.0, 200.0):
        plan = {"-1": {"capacity_percent": capacity, "models": []}}
        (_, reply) = service.received(2, wire.Control({"verb": "plan", "gpus": plan}), 20_000)[-1]
        assert reply.body["ok"], reply
    (_, reply) = service.received(2, wire.Control({"verb": "run_times", "model": "m"}), 21_000)[-1]
    beside = [1.0, pytest.approx(19_000), 0.0, 0.0, 0.0, 0.0]
    assert reply.body["runs"] == [[50.0, 4, 1, pytest.approx(19_000), pytest.approx(19_000), beside]]
    assert seen_of(reply.body) == [Seen(50.0, 4, 1, 19_000.0, 19_000.0, Beside(*reply.body["runs"][0][5]))]
    (_, reply) = service.received(2, wire.Control({"verb": "run_times"}), 21_000)[-1]
    assert "a model is wanted" in reply.body["error"]


def test_the_engine_tells_who_ran_beside_whom() -> None:
    """Runs of `m` alone and beside `n`, whose share counts for the time that both are on the device."""
    engine = DStackEngine(Rules(stand=False))
    other = replace(MODEL, name="n")
    engine.handle(PlanChanged(100.0, (MODEL, other)), 0)
    for name in ("m", "n"):
        engine.handle(BackendJoined(f"{name}#1", name, 50.0, (50.0,), 8, 4, 100_000, OnLate.SERVE), 1)

    def run(name: str, at: int, end: int, run_us: int) -> None:
        (grant,) = [
            d for d in engine.handle(WorkQueued(f"{name}#1", 4, at + 90_000), at) if isinstance(d, Grant)
        ]
        ends.append((end, BatchFinished(f"{name}#1", grant.grant_id, 4, run_us, 0, 0)))

    for start in range(0, 1_200_000, 60_000):
        beside = start % 120_000 == 0
        ends: list[tuple[int, BatchFinished]] = []
        run("m", start, start + 20_000, 20_000 if beside else 16_000)
        if beside:
            run("n", start + 1, start + 10_000, 9_000)
        for end, finished in sorted(ends, key=lambda each: each[0]):
            engine.handle(finished, end)
    (seen,) = engine.run_times("m")
    assert seen.beside is not None and seen.beside.runs == 20
    # q = 50% for 9 of 20 ms in every other run: crowds of 0.225 and 0, mean 0.1125, variance its square.
    assert seen.beside.crowd == pytest.approx(0.1125) and seen.beside.spread == pytest.approx(0.1125**2)
    # 20 ms and 16 ms around 18: a ninth up and down, with the crowd.
    assert seen.beside.slope == pytest.approx(0.1125 / 9) and seen.beside.scatter == pytest.approx(1 / 81)
    assert seen.beside.run_us == pytest.approx(18_000)


def test_a_changed_plan_of_the_model_keeps_what_was_seen() -> None:
    engine = make_engine("dstack")
    engine.handle(PlanChanged(100.0, (MODEL,)), 0)
    engine.handle(BackendJoined("m#1", "m", 50.0, (50.0,), 8, 4, 100_000, OnLate.SERVE), 1)
    engine.instances["m#1"].times.observe(0, 4, 21_000)  # type: ignore[attr-defined]
    changed = EngineModel("m", 50.0, 2, 100_000, 1.0, OnLate.SERVE, 50.0, (50.0,), (1,), ((9.0,),))
    engine.handle(PlanChanged(100.0, (changed,)), 2)
    assert [seen.runs for seen in engine.run_times("m")] == [1]
