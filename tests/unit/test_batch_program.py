"""The batch program against exhaustive search, its limits, and what it says when nothing fits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dstack_sched.errors import InfeasibleError
from dstack_sched.policy.batch_program import solve_batch_program
from dstack_sched.policy.latency import LatencySurface, Posynomial
from dstack_sched.policy.runnable import RunnableGrid, runnable_grid
from fakes.surfaces import CPU, GPU, h100_surfaces, points, random_surface

INSTANCES = 600


def exhaustive(surface, slo_ms, rate_per_s, grid):
    """The best efficacy over the whole runnable grid, recomputed with NumPy; None when nothing is allowed."""
    p = np.asarray(grid.percents)[:, None]
    b = np.asarray(grid.batches, float)[None, :]
    f = surface.latency_ms(p, b)
    allowed = np.ones(f.shape, bool)
    if slo_ms is not None:
        with np.errstate(divide="ignore"):
            assembly = np.where(b > 1, 1000.0 * (b - 1) / rate_per_s, 0.0) if rate_per_s else (b - 1) * 1e18
        allowed = (f <= slo_ms / 2 * (1 + 1e-12)) & (assembly + f <= slo_ms * (1 + 1e-12))
    value = np.where(allowed, b / (p * f**2), -1.0)
    return None if value.max() < 0 else float(value.max())


def _instance(seed: int):
    rng = np.random.default_rng(seed)
    surface = random_surface(rng, noise=float(rng.choice([0.0, 0.0, 0.0, 0.3])))
    grid = runnable_grid(surface, GPU, step_percent=int(rng.choice([1, 5, 10])))
    fastest = float(surface.latency_ms(100, 1))
    slo_ms = fastest * float(rng.uniform(1.5, 30.0)) if rng.random() > 0.05 else None
    return surface, slo_ms, float(10 ** rng.uniform(0, 4)) * (rng.random() > 0.03), grid


def test_equals_exhaustive_search_on_random_instances():
    """600 seeds; guards the rounding above all: the walk may stop only where the bound proves it."""
    by_program, infeasible = 0, 0
    for seed in range(INSTANCES):
        surface, slo_ms, rate, grid = _instance(seed)
        best = exhaustive(surface, slo_ms, rate, grid)
        if best is None:
            with pytest.raises(InfeasibleError):
                solve_batch_program(surface, slo_ms=slo_ms, rate_per_s=rate, grid=grid)
            infeasible += 1
            continue
        found = solve_batch_program(surface, slo_ms=slo_ms, rate_per_s=rate, grid=grid)
        assert found.efficacy == pytest.approx(best, rel=1e-9), f"seed {seed}"
        assert found.gpu_percent in grid.percents and found.batch_size in grid.batches
        if found.relaxed is not None:
            by_program += 1
            assert found.relaxed.efficacy >= best * (1 - 1e-5), f"seed {seed}: the bound is no bound"
    assert by_program > INSTANCES / 2  # the geometric program is the usual way, not the exception
    assert 0 < infeasible < INSTANCES / 4


def test_the_choice_keeps_every_limit():
    for seed in range(100):
        surface, slo_ms, rate, grid = _instance(seed)
        if slo_ms is None or exhaustive(surface, slo_ms, rate, grid) is None:
            continue
        found = solve_batch_program(surface, slo_ms=slo_ms, rate_per_s=rate, grid=grid)
        assert found.latency_ms == float(surface.latency_ms(found.gpu_percent, found.batch_size))
        assert found.latency_ms <= slo_ms / 2 * (1 + 1e-9)
        assert found.assembly_ms + found.latency_ms <= slo_ms * (1 + 1e-9)
        wait = 0.0 if found.batch_size == 1 else 1000 * (found.batch_size - 1) / rate
        assert found.assembly_ms == pytest.approx(wait)


def test_a_measured_grid_is_searched_in_full_and_says_so():
    surface = random_surface(np.random.default_rng(1), noise=0.6)
    assert surface.kind == "grid"
    found = solve_batch_program(surface, slo_ms=None, rate_per_s=10, grid=runnable_grid(surface, GPU))
    assert found.method == "grid search" and found.relaxed is None


def test_too_short_an_slo_names_the_fastest_run_and_the_least_slo_that_works():
    surface = h100_surfaces()["resnet50"]
    grid = runnable_grid(surface, GPU)
    with pytest.raises(InfeasibleError) as error:
        solve_batch_program(surface, slo_ms=2.0, rate_per_s=100, grid=grid)
    assert str(error.value) == (
        "SLO 2 ms of resnet50 cannot be met: the fastest run is 1.12 ms at 100%, b=1; "
        "the SLO must be at least 2.24 ms"
    )
    assert solve_batch_program(surface, slo_ms=2.24, rate_per_s=100, grid=grid).batch_size == 1


def _surface(a=(1.0, 0.1, 40.0, 20.0), percents=(10, 50, 100), batches=(1, 8, 32)):
    return LatencySurface("m", points(Posynomial(a), percents, batches))


def test_binding_names_the_limit_that_keeps_a_better_point_out():
    surface = _surface()
    grid = RunnableGrid(tuple(float(p) for p in range(10, 101, 10)), tuple(range(1, 33)))

    def binding(slo_ms, rate, grid=grid):
        return solve_batch_program(surface, slo_ms=slo_ms, rate_per_s=rate, grid=grid).binding

    free = solve_batch_program(surface, slo_ms=None, rate_per_s=1000, grid=grid)
    assert free.binding == ()
    # A slow trickle of requests: a batch does not fill in time. A tight SLO: a run is too long.
    assert "slo" in binding(30.0, 50.0)
    assert "slo/2" in binding(3.6, 1e6)
    assert binding(None, 1000.0, RunnableGrid((10.0, 20.0, 30.0), grid.batches)) == ("percent_max",)
    small = RunnableGrid(grid.percents, tuple(range(1, free.batch_size - 1)))
    assert "batch_max" in binding(None, 1000.0, small)


def test_no_requests_means_no_batch_to_wait_for():
    surface = _surface()
    found = solve_batch_program(surface, slo_ms=50.0, rate_per_s=0.0, grid=runnable_grid(surface, GPU))
    assert found.batch_size == 1 and found.assembly_ms == 0.0


def test_cpu_hosts_run_at_whole_cores_and_levels_at_their_levels():
    surface = _surface(percents=(50, 100), batches=(1, 4, 8))
    assert runnable_grid(surface, CPU).percents == (50.0, 100.0)
    found = solve_batch_program(surface, slo_ms=40.0, rate_per_s=300, grid=runnable_grid(surface, CPU))
    assert found.efficacy == pytest.approx(exhaustive(surface, 40.0, 300, runnable_grid(surface, CPU)))
    leveled = LatencySurface("m", points(Posynomial((1, 0.1, 40, 20)), (12, 48, 100), (1, 8)), None, (12, 48))
    assert runnable_grid(leveled, GPU).percents == (12.0, 48.0)


def test_nothing_below_the_smallest_measured_share_or_above_the_largest_batch_is_runnable():
    surface = _surface(percents=(12.5, 50, 100), batches=(1, 6))
    grid = runnable_grid(surface, GPU, step_percent=5)
    assert grid.percents[0] == 13.0 and grid.percents[-1] == 100.0 and grid.batches == tuple(range(1, 7))


def test_a_solver_without_an_answer_is_not_the_end(monkeypatch):
    """A numerical failure must not stop a control loop: the grid is searched in full instead."""
    from dstack_sched.policy import batch_program

    monkeypatch.setattr(batch_program, "solve_relaxed", lambda *_: None)
    surface, slo_ms, rate, grid = _instance(2)
    found = solve_batch_program(surface, slo_ms=slo_ms, rate_per_s=rate, grid=grid)
    assert found.method == "grid search"
    assert found.efficacy == pytest.approx(exhaustive(surface, slo_ms, rate, grid))
    assert dataclasses.asdict(found)["relaxed"] is None
